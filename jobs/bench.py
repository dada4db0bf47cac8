"""How long a picture takes on this machine, by the pipeline that workers run.

    settings ──> trials ──> a process each ──> first generation, then N timed ──> table

A trial is one row of the reference's table. Its process is its own, so that the first
generation compiles as a worker's does and memory is given back; texts differ from run
to run, so that none is found encoded. What the first generation takes beyond the median
of the others is the table's "graph compile".
"""

from __future__ import annotations

import multiprocessing
import platform
import signal
import statistics
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jobs import bench_process
from jobs.bench_process import EVALUATIONS, Trial
from jobs.errors import ConfigError, WorkerError, nearest
from jobs.machine import Places, look
from jobs.model import model_errors
from jobs.progress import StepBar
from jobs.resolved import resolve
from jobs.sections import JobConfig, ModelSection, RefinerSection
from jobs.slot import death

if TYPE_CHECKING:
    from sdxl.config import ModelConfig

REFINERS = {"base": "refiner", "tiny": "tiny-refiner"}
EDM = {"sampler": "EulerEDMSampler", "discretization": "LegacyDDPMDiscretization"}
KARRAS = {
    "sampler": "DPMPP2MSampler",
    "discretization": "EDMDiscretization",
    "sigma_min": 0.0291672,
    "sigma_max": 14.6146412,
    "rho": 7.0,
}
Stage = Literal["base", "refiner", "both"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the user asks for. Without a checkpoint, `preset` has random weights."""

    config: JobConfig
    preset: str | None = None
    size: tuple[int, int] | None = None
    steps: int | None = None
    runs: int = 3
    reference: bool = False
    kernels: bool = False
    warm: bool = False


def bench(wanted: Wanted) -> dict[str, Any]:
    """Run each trial in turn; report its row, and of kernels if they are asked for.

    Raises:
        JobError: the settings can't be used, or the process of a trial failed.
    """
    listed = trials(wanted)
    report: dict[str, Any] = {"versions": versions()}
    if wanted.kernels:
        report["ops"] = run(listed[0], "kernels")
    report["rows"] = [row_of(trial, run(trial)) for trial in listed]
    return report


def trials(wanted: Wanted) -> list[Trial]:
    """List what to run: the job as it is set, or the reference's four rows."""
    if not wanted.reference:
        stage: Stage = "both" if wanted.config.refiner.checkpoint else "base"
        return [trial(wanted, stage, {})]
    return [
        trial(wanted, "base", EDM | {"steps": 40}),
        trial(wanted, "base", KARRAS | {"steps": 20}),
        trial(wanted, "refiner", EDM | {"steps": 40, "strength": 0.75}),
        trial(wanted, "both", EDM | {"steps": 20}),
    ]


def trial(wanted: Wanted, stage: Stage, sampling: dict[str, Any]) -> Trial:
    """Resolve one row: which model, with which sampling, from an image or not."""
    config = _chosen(wanted, stage, sampling)
    geometry, kind = geometry_of(config.model)
    resolved = resolve(config, native_size=geometry.native_size, kind=kind)
    if stage == "both":
        geometry_of(config.refiner)  # refused here, not after the base is loaded
        resolved = replace(resolved, refiner=config.refiner)
    return Trial(
        name=_name(geometry, kind, stage),
        resolved=resolved,
        geometry=geometry,
        runs=wanted.runs,
        from_image=kind == "refiner",
        warm=wanted.warm,
    )


def _chosen(wanted: Wanted, stage: Stage, sampling: dict[str, Any]) -> JobConfig:
    """Apply what a row and the flags ask for; a preset takes the checkpoints' place."""
    config = wanted.config
    width, height = wanted.size or (None, None)
    asked = {"width": width, "height": height, "steps": wanted.steps}
    sampling = sampling | {name: n for name, n in asked.items() if n is not None}
    model, refiner = config.model, config.refiner
    if wanted.preset:
        model = replace(model, checkpoint=None, preset=wanted.preset, loras=())
        refiner = replace(refiner, checkpoint=None, preset=None)
    if model.checkpoint is None:
        model = replace(model, preset=model.preset or "base")
    if refiner.checkpoint is None:
        preset = REFINERS.get(model.preset or "base", "refiner")
        refiner = replace(refiner, preset=preset)
    if stage == "refiner":
        second = refiner.checkpoint, refiner.preset
        model = replace(model, checkpoint=second[0], preset=second[1], loras=())
    return replace(
        config,
        sampling=replace(config.sampling, **sampling),
        model=model,
        refiner=refiner if stage == "both" else RefinerSection(),
    )


def geometry_of(section: ModelSection | RefinerSection) -> tuple[ModelConfig, str]:
    """Read geometry and kind: of the checkpoint's headers, or of random weights."""
    from sdxl.config import PRESETS
    from sdxl.weights import open_checkpoint

    if section.checkpoint is None:
        name = section.preset or "base"
        if name not in PRESETS:
            raise ConfigError(f"unknown preset `{name}`", hint=nearest(name, PRESETS))
        return PRESETS[name], PRESETS[name].kind
    path = Path(section.checkpoint)
    with model_errors(path):
        found = open_checkpoint(path, preset=section.preset)
        found.check()
    return found.config, "lcm" if found.is_lcm else found.config.kind


def _name(geometry: ModelConfig, kind: str, stage: Stage) -> str:
    """Call a model by its kind, and by its width where that is not SDXL's."""
    from sdxl.config import BASE, REFINER

    name = "SDXL-" + {"base": "Base", "refiner": "Refiner", "lcm": "LCM"}[kind]
    width = geometry.unet.model_channels
    if width not in (BASE.unet.model_channels, REFINER.unet.model_channels):
        name = f"{name} of width {width}"
    return name + (" + Refiner" if stage == "both" else "")


def run(trial: Trial, what: str = "pictures") -> dict[str, Any]:
    """Run a trial in a process of its own, with a bar; return what it measured."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=bench_process.main, args=(trial, theirs, what), daemon=True
    )
    process.start()
    theirs.close()
    try:
        with StepBar(trial.describe() if what == "pictures" else what) as bar:
            return _listen(ours, bar)
    except EOFError:
        process.join()
        raise WorkerError(
            f"{trial.name}: {death(process.exitcode)}",
            hint="killed by signal 9 is most often too little memory; try --size"
            if process.exitcode == -signal.SIGKILL
            else "`sdxl-jobs doctor` may know why",
        ) from None
    finally:
        process.kill()
        process.join()


def _listen(pipe: Connection, bar: StepBar) -> dict[str, Any]:
    """Show what a process says until it gives its result."""
    while True:
        kind, content = pipe.recv()
        if kind == "step":
            bar(*content)
        elif kind == "say":
            bar.say(content)
        elif kind == "failed":
            raise WorkerError(content, hint="`sdxl-jobs doctor` may know why")
        else:
            return content


def row_of(trial: Trial, found: dict[str, Any]) -> dict[str, Any]:
    """Put a trial and its times into one row."""
    resolved, batch = trial.resolved, trial.resolved.batch_size
    seconds = [run / batch for run in found["seconds"]]
    middle = statistics.median(seconds)
    return {
        "model": trial.name,
        "weights": str(resolved.model.checkpoint or "random"),
        "width": resolved.width,
        "height": resolved.height,
        "flash_attention": found["flash_attention"],
        "sampler": resolved.sampling.sampler,
        "discretization": resolved.sampling.discretization,
        "steps": resolved.sampling.steps,
        "steps_made": found["steps_made"],
        "jit_level": resolved.jit_level,
        "precision": resolved.precision,
        "batch_size": batch,
        "load_s": found["load_s"],
        "first_s": found["first_s"],
        "compile_s": max(0.0, found["first_s"] - middle * batch),
        "compile_ms": found["compile_ms"],
        "loads": found["loads"],
        "seconds_per_image": middle,
        "least": min(seconds),
        "most": max(seconds),
        "runs": len(seconds),
        "stages_ms": found["stages_ms"],
        "arithmetic": _arithmetic(trial, found),
        "peak_memory_mb": found["peak_memory_mb"],
    }


def _arithmetic(trial: Trial, found: dict[str, Any]) -> dict[str, Any]:
    """Count what network and decoder computed for a picture, beside their times."""
    from sdxl import flops
    from sdxl.config import VAE_FACTOR

    resolved, spent = trial.resolved, found["stages_ms"]
    if resolved.refiner is not None or resolved.sampling.sampler in EVALUATIONS:
        return {}
    h, w = resolved.height // VAE_FACTOR, resolved.width // VAE_FACTOR
    halves = 2 if resolved.guider == "VanillaCFG" else 1
    step = halves * flops.unet(trial.geometry.unet, h, w)
    decode = flops.decoder(trial.geometry.vae, h, w)
    step_ms = spent["denoise_ms"] / found["steps_made"]
    return {
        "step": {"flops": step, "ms": step_ms},
        "decode": {"flops": decode, "ms": spent["decode_ms"]},
    }


def versions() -> dict[str, Any]:
    """Say what the figures were measured with."""
    machine = look(Places(), Path())
    return {
        "mindspore": machine.packages["mindspore"],
        "numpy": machine.packages["numpy"],
        "cann": machine.cann,
        "driver": machine.driver or (machine.smi.driver if machine.smi else None),
        "device": _device(machine.smi.chips[0].name if machine.smi else None),
        "cores": machine.cores,
        "python": ".".join(map(str, machine.python)),
    }


def _device(card: str | None) -> str:
    """Name the card, or else the processor."""
    if card:
        return card
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line for line in text.splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.machine()
