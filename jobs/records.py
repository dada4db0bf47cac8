"""Request, Task, Batch, Shard and the result row: the nouns that cross every boundary.

All are plain frozen data, picklable and free of third-party types, so that planning
needs no library and a lease travels to a worker as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

SCHEMA_VERSION = 1
PART = "\x1f"
ERROR_CLASSES = ("oom", "nan", "io", "device", "timeout", "worker_lost", "bug")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A manifest row, as asked; None means that the job's setting applies.

    `content` hashes the whole row, to tell a changed row from an appended one.
    """

    source_row: int
    location: str
    prompt_id: str
    content: int
    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    num_images: int | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    sampler: str | None = None
    discretization: str | None = None
    guider: str | None = None
    guidance_scale: float | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float | None = None
    eta: float | None = None
    s_churn: float | None = None
    s_tmin: float | None = None
    s_tmax: float | None = None
    s_noise: float | None = None
    original_width: int | None = None
    original_height: int | None = None
    crop_top: int | None = None
    crop_left: int | None = None
    target_width: int | None = None
    target_height: int | None = None
    ratio: tuple[int, int] | None = None
    init_image: str | None = None
    strength: float | None = None
    aesthetic_score: float | None = None
    negative_aesthetic_score: float | None = None
    thresholding_ratio: float | None = None
    thresholding_maximum: float | None = None
    extras: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A manifest row that can't be made: one `invalid` result, and why."""

    source_row: int
    location: str
    reason: str
    prompt_id: str
    content: int
    prompt: str | None
    extras: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One image to make, as resolved. Sizes in pixels; None where it does not apply."""

    image_id: str
    prompt_id: str
    image_index: int
    source_row: int
    prompt: str
    negative_prompt: str | None
    seed: int
    seed_source: str
    sampler: str
    discretization: str
    guider: str
    steps: int
    guidance_scale: float
    sigma_min: float | None
    sigma_max: float | None
    rho: float | None
    eta: float | None
    s_churn: float | None
    s_tmin: float | None
    s_tmax: float | None
    s_noise: float | None
    width: int
    height: int
    original_width: int
    original_height: int
    crop_top: int
    crop_left: int
    target_width: int
    target_height: int
    init_image: str | None = None
    strength: float | None = None
    aesthetic_score: float | None = None
    negative_aesthetic_score: float | None = None
    thresholding_ratio: float | None = None
    thresholding_maximum: float | None = None
    attempts: int = 0
    earlier: int = 0
    extras: tuple[Any, ...] = ()

    @property
    def tries(self) -> int:
        """How often it was tried in this run; `attempts` counts over all runs."""
        return self.attempts - self.earlier

    @property
    def schedule(self) -> tuple[Any, ...]:
        """What the pictures of one batch must share."""
        return (
            *self.graph,
            self.sampler,
            self.discretization,
            self.steps,
            self.sigma_min,
            self.sigma_max,
            self.rho,
            self.eta,
            self.s_churn,
            self.s_tmin,
            self.s_tmax,
            self.s_noise,
            self.strength,
            self.thresholding_ratio,
            self.thresholding_maximum,
        )

    @property
    def graph(self) -> tuple[int, int, str]:
        """What decides the compiled graph, beside what the whole job shares."""
        return (self.width, self.height, self.guider)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Tasks that share one graph call; at most the job's batch size of them."""

    tasks: tuple[Task, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A few batches of one graph key, leased to one worker."""

    number: int
    batches: tuple[Batch, ...] = field(repr=False)

    @property
    def tasks(self) -> list[Task]:
        return [task for batch in self.batches for task in batch.tasks]


def hash64(text: str) -> int:
    """Hash text to 64 bits, the same on every machine and in every version."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def image_number(prompt_id: str, image_index: int) -> int:
    """Give one image its number: 64 bits of (prompt id, image index)."""
    return hash64(f"{prompt_id}{PART}{image_index}")


def image_id(prompt_id: str, image_index: int) -> str:
    """Name one image: its number in 16 hex digits."""
    return f"{image_number(prompt_id, image_index):016x}"


def derived_seed(job_seed: int, prompt_id: str, image_index: int) -> int:
    """Give a task without a seed one of 32 bits that no resharding can change."""
    return hash64(f"{job_seed}{PART}{prompt_id}{PART}{image_index}") >> 32


def image_path(image_id: str, extension: str, mark: str = "") -> str:
    """Say where an image lies, relative to the output folder. No user text in it."""
    return f"images/{image_id[:2]}/{image_id}{mark}.{extension}"


_SETTINGS = (
    "image_id",
    "prompt_id",
    "image_index",
    "prompt",
    "negative_prompt",
    "seed",
    "sampler",
    "discretization",
    "guider",
    "steps",
    "guidance_scale",
    "sigma_min",
    "sigma_max",
    "rho",
    "eta",
    "s_churn",
    "s_tmin",
    "s_tmax",
    "s_noise",
    "width",
    "height",
    "original_width",
    "original_height",
    "crop_top",
    "crop_left",
    "target_width",
    "target_height",
    "init_image",
    "strength",
    "aesthetic_score",
    "negative_aesthetic_score",
    "thresholding_ratio",
    "thresholding_maximum",
)
_OF_A_TASK = (*_SETTINGS, "source_row", "seed_source", "attempts")
MAX_MESSAGE = 2_048


def picture_settings(row: dict[str, Any]) -> dict[str, Any]:
    """Choose what an image file says of itself: settings, nothing of time or place."""
    return {key: row[key] for key in _SETTINGS if row.get(key) is not None}


def task_row(task: Task, extras: Sequence[str]) -> dict[str, Any]:
    """Begin a task's result row: every column, None where it is not yet known."""
    row: dict[str, Any] = dict.fromkeys(RESULT_COLUMNS)
    row.update((key, getattr(task, key)) for key in _OF_A_TASK)
    row.update(zip(extras, task.extras, strict=True))
    return row


def failure_row(
    task: Task, extras: Sequence[str], kind: str, message: str
) -> dict[str, Any]:
    """Make the result row of a task that could not be made."""
    row = task_row(task, extras)
    row.update(status="failed", error_class=kind, error_message=_cut(message))
    row.update(finished_at=datetime.now(timezone.utc))
    return row


def invalid_row(rejected: Rejected, extras: Sequence[str]) -> dict[str, Any]:
    """Make the result row of a manifest row that can't be used."""
    row: dict[str, Any] = dict.fromkeys(RESULT_COLUMNS)
    place = f"row {rejected.source_row} {rejected.prompt_id}"
    row.update(
        image_id=image_id(place, 0),
        prompt_id=rejected.prompt_id,
        image_index=0,
        source_row=rejected.source_row,
        prompt=rejected.prompt,
        attempts=0,
        status="invalid",
        error_class="invalid_row",
        error_message=_cut(f"{rejected.location}: {rejected.reason}"),
        finished_at=datetime.now(timezone.utc),
    )
    row.update(zip(extras, rejected.extras, strict=True))
    return row


def _cut(text: str) -> str:
    return text.encode("utf-8", "replace")[:MAX_MESSAGE].decode("utf-8", "ignore")


# The columns of results.parquet: name -> arrow type, as the store spells it.
RESULT_COLUMNS: dict[str, str] = {
    "image_id": "string",
    "prompt_id": "string",
    "image_index": "int32",
    "source_row": "int64",
    "prompt": "string",
    "negative_prompt": "string",
    "prompt_tokens": "int32",
    "prompt_truncated": "bool",
    "seed": "int64",
    "seed_source": "string",
    "sampler": "string",
    "discretization": "string",
    "guider": "string",
    "steps": "int32",
    "guidance_scale": "float32",
    "sigma_min": "float32",
    "sigma_max": "float32",
    "rho": "float32",
    "eta": "float32",
    "s_churn": "float32",
    "s_tmin": "float32",
    "s_tmax": "float32",
    "s_noise": "float32",
    "strength": "float32",
    "width": "int32",
    "height": "int32",
    "original_width": "int32",
    "original_height": "int32",
    "crop_top": "int32",
    "crop_left": "int32",
    "target_width": "int32",
    "target_height": "int32",
    "aesthetic_score": "float32",
    "negative_aesthetic_score": "float32",
    "thresholding_ratio": "float32",
    "thresholding_maximum": "float32",
    "init_image": "string",
    "status": "string",
    "error_class": "string",
    "error_message": "string",
    "attempts": "int32",
    "image_path": "string",
    "base_image_path": "string",
    "image_format": "string",
    "image_bytes": "int64",
    "image_sha256": "string",
    "pixel_sha256": "string",
    "pixel_mean": "float32",
    "pixel_std": "float32",
    "qc_flags": "list<string>",
    "batch_size": "int32",
    "batch_slot": "int32",
    "batch_valid": "int32",
    "text_encode_ms": "float32",
    "denoise_ms": "float32",
    "decode_ms": "float32",
    "write_ms": "float32",
    "compile_ms": "float32",
    "includes_compile": "bool",
    "started_at": "timestamp",
    "finished_at": "timestamp",
    "run_id": "string",
    "job_fingerprint": "string",
    "model_sha256": "string",
    "precision": "string",
    "device_target": "string",
    "device_id": "int32",
    "host": "string",
    "mindspore_version": "string",
    "peak_memory_mb": "float32",
    "peak_device_memory_mb": "float32",
}
