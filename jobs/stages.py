"""One batch through a model: the same for a job, for one sample and for a replay.

    tasks ──> encode texts, sizes, initial images ──> denoise ──> decode ──> pixels

The runner knows the model by this protocol alone, and loads it by name, so that nothing
heavy is imported until a process really runs a network.
"""

from __future__ import annotations

import importlib
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jobs import images
from jobs.records import Task
from jobs.resolved import Resolved

ONE_STAGE = "sdxl.pipeline:Pipeline.load"
TWO_STAGES = "sdxl.two_stage:TwoStage.load"
Row = dict[str, Any]


class PipelineLike(Protocol):
    """What the runner needs of a model; the tests have a fake one.

    A pipeline may also have `encode_images(pixels, pictures, batch_size)`, whose
    result goes to `sample` as `init`; `base_pixels(batch_size)`: what its first stage
    made; `loads`: of `compiles`, how often from the compile cache; `peak_memory()`: see
    `memory_of`. One with `whole_leases` true wants several batches in one call, of
    `sample_all([(cond, pictures, init)], batch_size)`.
    """

    compiles: dict[str, int]
    compile_ms: dict[str, float]

    def encode(self, pictures: Sequence[Task], batch_size: int) -> Any: ...

    def sample(
        self, cond: Any, pictures: Sequence[Task], batch_size: int, **init: Any
    ) -> np.ndarray: ...

    def decode(self, latents: np.ndarray, batch_size: int) -> np.ndarray: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What the device gave for one batch, in the order of its tasks.

    `pixels` is (n, H, W, 3) uint8, `finite` (n,) bool, `base_pixels` like `pixels`
    where the base's picture is kept. `measured` holds milliseconds per image.
    """

    tasks: list[Task]
    pixels: np.ndarray
    finite: np.ndarray
    base_pixels: np.ndarray | None
    measured: Row


def make(
    pipeline: PipelineLike, tasks: list[Task], batch_size: int, init_folder: Path
) -> Made:
    """Make the pictures of one batch.

    Raises:
        OSError: an initial image can't be read.
    """
    clock = _StageClock(pipeline, len(tasks))
    cond = clock.time("text_encode_ms", pipeline.encode, tasks, batch_size)
    latents_of_images = _init(pipeline, clock, tasks, batch_size, init_folder)
    init = {} if latents_of_images is None else {"init": latents_of_images}
    latents = clock.time("denoise_ms", pipeline.sample, cond, tasks, batch_size, **init)
    pixels = clock.time("decode_ms", pipeline.decode, latents, batch_size)
    base_pixels: Any = getattr(pipeline, "base_pixels", lambda size: None)
    return Made(
        tasks=tasks,
        pixels=pixels,
        finite=_finite(latents),
        base_pixels=clock.time("decode_ms", base_pixels, batch_size),
        measured=clock.measured() | memory_of(pipeline),
    )


def make_all(
    pipeline: PipelineLike,
    batches: Sequence[list[Task]],
    batch_size: int,
    init_folder: Path,
) -> list[Made]:
    """Make the pictures of several batches, each stage for all before the next.

    Times are shared among all of the pictures. Raises as `make` does.
    """
    clock = _StageClock(pipeline, sum(map(len, batches)))
    parts: list[Any] = []
    for tasks in batches:
        cond = clock.time("text_encode_ms", pipeline.encode, tasks, batch_size)
        init = _init(pipeline, clock, tasks, batch_size, init_folder)
        parts.append((cond, tasks, init))
    sample_all: Any = getattr(pipeline, "sample_all", None)
    sampled = clock.time("denoise_ms", sample_all, parts, batch_size)
    pixels = [
        clock.time("decode_ms", pipeline.decode, latents, batch_size)
        for latents in sampled
    ]
    measured = clock.measured() | memory_of(pipeline)
    return [
        Made(
            tasks=tasks,
            pixels=drawn,
            finite=_finite(latents),
            base_pixels=None,
            measured=measured,
        )
        for tasks, drawn, latents in zip(batches, pixels, sampled, strict=True)
    ]


def _finite(latents: np.ndarray) -> np.ndarray:
    return np.isfinite(latents).reshape(len(latents), -1).all(axis=1)


def memory_of(pipeline: PipelineLike) -> Row:
    """Say how much memory was needed so far, in MB: of the host, of the device."""
    peak: Any = getattr(pipeline, "peak_memory", lambda: (host_memory(), None))
    host, device = peak()
    return {"peak_memory_mb": host, "peak_device_memory_mb": device}


def host_memory() -> float:
    """Give the most memory that this process had so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 if sys.platform == "linux" else peak / 1024**2


def pipeline_name(resolved: Resolved) -> str:
    """Name what loads the model of a job, as `module:callable`."""
    return TWO_STAGES if resolved.refiner else ONE_STAGE


def pipeline_options(resolved: Resolved, threads: int) -> dict[str, Any]:
    """Give the arguments of what `pipeline_name` names."""
    model, refiner = resolved.model, resolved.refiner
    options: dict[str, Any] = {
        "checkpoint": Path(str(model.checkpoint)),
        "preset": model.preset,
        "precision": resolved.precision,
        "jit_level": resolved.jit_level,
        "device_target": resolved.device_target,
        "flash_attention": resolved.flash_attention,
        "noise": resolved.sampling.noise,
        "threads": threads,
        "loras": [(Path(lora.path), lora.scale) for lora in model.loras],
        "scaling": model.scaling,
        "quantize_sigma": model.quantize_sigma,
        "compile_cache": resolved.compile_cache,
        "vae_tile": model.vae_tile,
    }
    if refiner:
        options |= {
            "refiner_checkpoint": Path(str(refiner.checkpoint)),
            "refiner_preset": refiner.preset,
            "stage2strength": refiner.stage2strength,
            "finish_denoising": refiner.finish_denoising,
            "keep_base": refiner.keep_base,
            "resident": refiner.resident,
        }
    return options


def load_pipeline(name: str, options: dict[str, Any]) -> PipelineLike:
    """Load what `module:callable` names."""
    module, _, path = name.partition(":")
    factory: Any = importlib.import_module(module)
    for part in path.split("."):
        factory = getattr(factory, part)
    return factory(**options)


def _init(
    pipeline: PipelineLike,
    clock: _StageClock,
    tasks: list[Task],
    batch_size: int,
    folder: Path,
) -> np.ndarray | None:
    """Turn the initial images of a batch into latents, where it has some."""
    if tasks[0].init_image is None:
        return None
    pixels = _init_pixels(tasks, folder)
    encode_images: Any = getattr(pipeline, "encode_images", None)
    return clock.time("text_encode_ms", encode_images, pixels, tasks, batch_size)


def _init_pixels(tasks: Sequence[Task], folder: Path) -> np.ndarray:
    pictures = [
        images.read_init(folder / str(task.init_image), task.width, task.height)
        for task in tasks
    ]
    return np.stack(pictures)


class _StageClock:
    """Time each stage of a call, leaving out what went into compiling graphs."""

    def __init__(self, pipeline: PipelineLike, valid: int) -> None:
        self._pipeline = pipeline
        self._valid = valid
        self._spent: Row = {}
        self._compile_ms = 0.0

    def time(self, stage: str, call: Any, *args: Any, **named: Any) -> Any:
        compiled = sum(self._pipeline.compile_ms.values())
        before = time.perf_counter()
        result = call(*args, **named)
        elapsed = (time.perf_counter() - before) * 1e3
        compiled = sum(self._pipeline.compile_ms.values()) - compiled
        self._compile_ms += compiled
        spent = max(0.0, elapsed - compiled) / self._valid
        self._spent[stage] = self._spent.get(stage, 0.0) + spent
        return result

    def measured(self) -> Row:
        return self._spent | {
            "compile_ms": self._compile_ms / self._valid,
            "includes_compile": self._compile_ms > 0,
        }
