"""One picture without a manifest: the same task, model and file as in a job."""

from __future__ import annotations

import os
import time
from pathlib import Path

from jobs import images, plan, settings
from jobs.config import JobConfig
from jobs.devices import cores
from jobs.errors import ConfigError, OutputError
from jobs.model import open_model
from jobs.records import Request, hash64, picture_settings, task_row
from jobs.resolved import resolve
from jobs.stages import load_pipeline, make, pipeline_name, pipeline_options
from jobs.store import publish

KINDS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


def make_sample(prompt: str, config: JobConfig, out: Path, seed: int | None) -> float:
    """Make one picture, write it to `out`, return the seconds it took once loaded."""
    kind = KINDS.get(out.suffix.lower())
    if kind is None:
        raise ConfigError(f"--out {out}: use .png, .jpg or .webp")
    if not out.parent.is_dir():
        raise OutputError(f"--out {out}: no such folder", hint="make it first")
    try:
        prompt = settings.text(prompt)
        seed = config.sampling.seed if seed is None else settings.parse("seed", seed)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    model = open_model(config.model)
    resolved = resolve(config, native_size=model.native_size, kind=model.kind)
    task = plan.task_of(
        Request(
            source_row=0,
            location="--prompt",
            prompt_id="sample",
            content=hash64(prompt),
            prompt=prompt,
            seed=seed,
        ),
        resolved,
        0,
    )

    os.environ.setdefault("GLOG_v", "3")
    options = pipeline_options(resolved, cores())
    pipeline = load_pipeline(pipeline_name(resolved), options)
    started = time.perf_counter()
    made = make(pipeline, [task], 1, Path())
    encoded = images.encode(
        made.pixels[0],
        kind,
        picture_settings(task_row(task, ())),
        quality=config.output.quality,
    )
    try:
        publish(out, encoded.data)
    except OSError as error:
        raise OutputError(f"can't write {out}: {error.strerror}") from None
    return time.perf_counter() - started
