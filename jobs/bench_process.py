"""The process of one trial: load, generate once, generate N times more, report."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs import images, plan
from jobs.devices import binding, cores
from jobs.progress import duration
from jobs.records import Request, Task, hash64
from jobs.resolved import Resolved
from jobs.stages import load_pipeline, make, pipeline_name, pipeline_options
from jobs.store import publish
from jobs.worker import message_of

if TYPE_CHECKING:
    from sdxl.config import ModelConfig

PROMPT = "a lighthouse on a cliff above a stormy sea, number {}, oil on canvas"
IMAGE = "init.png"
# Of the speed of this machine's matrix products, what a whole network reaches.
SHARE = 0.5
# How often a step asks the network, where that is not once.
EVALUATIONS = {"HeunEDMSampler": 2, "DPMPP2SAncestralSampler": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One row of the table to be, picklable; `pipeline` stands in for the model."""

    name: str
    resolved: Resolved
    geometry: ModelConfig
    runs: int
    from_image: bool = False
    warm: bool = False
    pipeline: str | None = None

    def describe(self) -> str:
        job = self.resolved
        sampler = job.sampling.sampler.removesuffix("Sampler")
        return f"{self.name} {job.width}x{job.height} {sampler} {job.sampling.steps}"


def main(trial: Trial, pipe: Connection, what: str = "pictures") -> None:
    """Run a trial and send what it measured. The process starts here.

    With `what` "kernels", time single kernels instead.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    resolved = trial.resolved
    if resolved.device_target == "Ascend":
        os.environ.update(binding(resolved.devices[0]))
    os.environ.setdefault("GLOG_v", "3")
    try:
        with tempfile.TemporaryDirectory() as folder:
            if what == "kernels":
                found = _kernels(resolved)
            else:
                found = _measure(trial, pipe, Path(folder))
        pipe.send(("done", found))
    except Exception as error:
        pipe.send(("failed", f"{trial.name}: {message_of(error)}"))


def _kernels(resolved: Resolved) -> dict[str, Any]:
    from sdxl.graphs import set_up
    from sdxl.microbench import kernels

    set_up(resolved.device_target, 0, cores())
    return kernels(resolved.precision, resolved.jit_level)


def _measure(trial: Trial, pipe: Connection, folder: Path) -> dict[str, Any]:
    if trial.from_image:
        _write_image(folder / IMAGE, trial.resolved)
    if trial.resolved.device_target == "CPU" and trial.pipeline is None:
        about = duration(estimate(trial))
        pipe.send(("say", f"{trial.describe()}: {about} or so of arithmetic"))
    before = time.perf_counter()
    name = trial.pipeline or pipeline_name(trial.resolved)
    pipeline = load_pipeline(name, options_of(trial))
    load_s = time.perf_counter() - before
    watched = Watched(pipeline, pipe, trial.runs + 1)
    seconds, stages = [], []
    for number in range(trial.runs + 1):
        watched.begin(number)
        tasks = tasks_of(trial, number)
        before = time.perf_counter()
        made = make(watched, tasks, trial.resolved.batch_size, folder)
        seconds.append(time.perf_counter() - before)
        stages.append(made.measured)
        if not made.finite.all():
            pipe.send(("say", f"warning: {trial.name} made values that are no numbers"))
    names = ("text_encode_ms", "denoise_ms", "decode_ms")
    return {
        "load_s": load_s,
        "first_s": seconds[0],
        "seconds": seconds[1:],
        "steps_made": watched.each or trial.resolved.sampling.steps,
        "compile_ms": dict(pipeline.compile_ms),
        "stages_ms": {n: float(np.median([s[n] for s in stages[1:]])) for n in names},
        "flash_attention": _flash(trial.resolved),
        "peak_memory_mb": stages[-1]["peak_memory_mb"],
        "loads": dict(getattr(pipeline, "loads", {})),
    }


class Watched:
    """A pipeline that tells of each step; all else is the pipeline's own."""

    def __init__(self, pipeline: Any, pipe: Connection, generations: int) -> None:
        self._pipeline, self._pipe = pipeline, pipe
        self._generations, self._number = generations, 0
        self._done = self.each = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    def begin(self, number: int) -> None:
        """Begin generation `number`; the first one tells how many steps each has."""
        if number == 1:
            self.each = self._done
        self._number, self._done = number, 0

    def sample(self, *args: Any, **named: Any) -> np.ndarray:
        return self._pipeline.sample(*args, **named, observe=self._step)

    def _step(self, step: int, steps: int) -> None:
        self._done += 1
        each = max(self.each, steps)
        self._pipe.send(
            ("step", (self._number * each + self._done, self._generations * each))
        )


def options_of(trial: Trial) -> dict[str, Any]:
    """Give the pipeline's arguments; where no checkpoint is named, weights are random.

    Graphs are compiled anew unless the trial is `warm`.
    """
    resolved = trial.resolved
    options = pipeline_options(resolved, cores())
    if resolved.model.checkpoint is None:
        options["checkpoint"] = None
    if not trial.warm:
        options["compile_cache"] = None
    if resolved.refiner and resolved.refiner.checkpoint is None:
        options["refiner_checkpoint"] = None
    return options


def tasks_of(trial: Trial, number: int) -> list[Task]:
    """Make a batch of tasks that no other run has."""
    resolved = trial.resolved
    tasks = []
    for slot in range(resolved.batch_size):
        prompt = PROMPT.format(number * resolved.batch_size + slot)
        request = Request(
            source_row=0,
            location="bench",
            prompt_id=prompt,
            content=hash64(prompt),
            prompt=prompt,
            seed=number,
            width=resolved.width,
            height=resolved.height,
            init_image=IMAGE if trial.from_image else None,
        )
        tasks.append(plan.task_of(request, resolved, slot))
    return tasks


def estimate(trial: Trial) -> float:
    """Guess the seconds of a trial from its arithmetic, before anything is loaded.

    Reading or drawing weights and compiling come on top; of two stages it is the base's
    network that is counted.
    """
    from sdxl.flops import picture
    from sdxl.graphs import set_up
    from sdxl.microbench import peak

    resolved, sampling = trial.resolved, trial.resolved.sampling
    set_up("CPU", 0, cores())
    steps = sampling.steps * EVALUATIONS.get(sampling.sampler, 1)
    if trial.from_image:
        steps = round(steps * sampling.strength)
    count = picture(
        trial.geometry,
        resolved.height,
        resolved.width,
        steps=steps,
        guided=resolved.guider == "VanillaCFG",
    )
    work = count * resolved.batch_size * (trial.runs + 1)
    return work / (SHARE * peak(resolved.precision))


def _write_image(path: Path, resolved: Resolved) -> None:
    """Write the picture that an image-to-image trial starts from."""
    shape = (resolved.height, resolved.width, 3)
    pixels = np.random.RandomState(0).randint(0, 256, shape, np.uint8)
    publish(path, images.encode(pixels, "png", {}).data)


def _flash(resolved: Resolved) -> bool:
    from sdxl import ops

    return ops.form().flash_attention and resolved.precision == "fp16"
