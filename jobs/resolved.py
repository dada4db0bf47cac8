"""The settings as run: every default filled in, from the model and the machine.

As asked, None means "the right default", which `resolve` fills in at one place. As
resolved, nothing that the run depends on is open, and the copy is saved beside the
results.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.devices import Devices, choose_devices, find_devices
from jobs.errors import ConfigError
from jobs.sections import (
    JobConfig,
    ModelSection,
    OutputSection,
    RefinerSection,
    RuntimeSection,
    SamplingSection,
)

ASCEND_BATCH_TIMEOUT = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A job's settings as run: sizes, devices and precision are known."""

    model: ModelSection
    refiner: RefinerSection | None
    kind: str
    precision: str
    sampling: SamplingSection
    guider: str
    width: int
    height: int
    device_target: str
    devices: tuple[int, ...]
    batch_size: int
    jit_level: str
    flash_attention: bool | None
    shard_batches: int | None
    writer_threads: int
    max_attempts: int
    batch_timeout: float | None
    output: OutputSection
    compile_cache: Path | None = None
    init_folder: Path = Path()

    @property
    def scores_aesthetics(self) -> bool:
        """Tell whether a refiner is at work: only it knows the aesthetic score."""
        return self.kind == "refiner" or self.refiner is not None

    def pixels_depend_on(self) -> dict[str, Any]:
        """List what pixels depend on, beside the checkpoint."""
        sampling = dataclasses.asdict(self.sampling)
        sampling.update(width=self.width, height=self.height, guider=self.guider)
        fields = {f"sampling.{key}": value for key, value in sampling.items()}
        fields["model.precision"] = self.precision
        for name in ("scaling", "quantize_sigma", "vae_tile"):
            fields[f"model.{name}"] = getattr(self.model, name)
        if self.refiner:
            for name in ("stage2strength", "finish_denoising"):
                fields[f"refiner.{name}"] = getattr(self.refiner, name)
        fields["output.format"] = self.output.format
        if self.output.format != "png":
            fields["output.quality"] = self.output.quality
        return fields


def resolve(config: JobConfig, *, native_size: int, kind: str = "base") -> Resolved:
    """Fill in every default that depends on the model or on the machine.

    `kind` is `base`, `refiner` or `lcm`. A latent consistency model takes its guidance
    scale as an input, so it runs without classifier-free guidance unless asked to.
    """
    target, devices = _devices(config.runtime)
    precision = config.model.precision
    if precision == "auto":
        precision = "fp16" if target == "Ascend" else "fp32"
    sampling = config.sampling
    return Resolved(
        model=config.model,
        refiner=config.refiner if config.refiner.checkpoint else None,
        kind=kind,
        precision=precision,
        sampling=sampling,
        guider=sampling.guider or ("IdentityGuider" if kind == "lcm" else "VanillaCFG"),
        width=sampling.width or native_size,
        height=sampling.height or native_size,
        device_target=target,
        devices=devices,
        batch_size=config.runtime.batch_size,
        jit_level=config.runtime.jit_level,
        flash_attention=config.runtime.flash_attention,
        shard_batches=config.runtime.shard_batches,
        writer_threads=config.runtime.writer_threads,
        max_attempts=config.runtime.max_attempts,
        batch_timeout=_batch_timeout(config.runtime, target),
        output=config.output,
        compile_cache=_compile_cache(config.runtime.compile_cache),
    )


def _batch_timeout(runtime: RuntimeSection, target: str) -> float | None:
    """Seconds after which a call counts as hung; a CPU may take hours over one."""
    if runtime.batch_timeout is None and target == "Ascend":
        return ASCEND_BATCH_TIMEOUT
    return runtime.batch_timeout


def _compile_cache(asked: str) -> Path | None:
    """Choose where compiled graphs are kept; None where they are not."""
    from sdxl.cache_key import default_root

    if asked == "off":
        return None
    if asked != "auto":
        return Path(asked).absolute()
    try:
        return default_root()
    except RuntimeError:  # a user without a home
        return None


def _devices(runtime: RuntimeSection) -> tuple[str, tuple[int, ...]]:
    """Choose the kind of device, and the ids of those that the job runs on."""
    target = runtime.device_target
    if target == "auto" and runtime.workers is not None:
        target = "CPU"
    devices = Devices(ids=(), present=0) if target == "CPU" else find_devices()
    if target == "auto":
        target = "Ascend" if devices.ids else "CPU"
    if target == "CPU":
        if runtime.devices != "auto":
            raise ConfigError(
                f"runtime.devices is `{runtime.devices}`, but this runs on the CPU",
                hint="use `--workers N` on the CPU, or `runtime.device_target=Ascend`",
            )
        return target, tuple(range(runtime.workers or 1))
    if runtime.workers is not None:
        raise ConfigError(
            "runtime.workers is for the CPU; Ascend runs one worker per device",
            hint="use `--devices 0-7`",
        )
    return target, choose_devices(runtime.devices, devices)
