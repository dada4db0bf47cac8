"""Requests -> tasks -> batches -> shards. Pure: it makes nothing.

    tasks     reads the manifest, lazily: one Task per image, every setting filled in
    batches   groups tasks that share one graph call, in the manifest's order
    shards    groups batches of one compiled graph into leases

Everything is a stream; only what was told apart or is waiting for its batch is kept.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from jobs.errors import printable
from jobs.images import init_size
from jobs.manifest import Manifest
from jobs.method import given, method_of
from jobs.records import (
    Batch,
    Rejected,
    Request,
    Shard,
    Task,
    derived_seed,
    hash64,
    image_id,
)
from jobs.resolved import Resolved
from jobs.sections import SamplingSection

OPEN_TASKS = 65_536


def checked(
    manifest: Manifest,
    resolved: Resolved,
    repeated: frozenset[int],
    limit: int | None = None,
) -> Iterator[Request | Rejected]:
    """Yield the rows, told apart where ids repeat and checked against the settings.

    Rows without an id that are equal in every column are numbered; a repeated id of the
    manifest's own rejects all rows but the first.
    """
    seen: dict[int, str] = {}
    copies: Counter[int] = Counter()
    for row in limited(manifest, limit):
        if repeated and isinstance(row, Request):
            row = _told_apart(row, repeated, seen, copies)
        if isinstance(row, Request):
            problem = _impossible(row, resolved)
            row = _rejected(row, problem) if problem else row
        yield row


def tasks_of(request: Request, resolved: Resolved) -> Iterator[Task]:
    """Resolve one request into its images."""
    for index in range(image_count(request, resolved)):
        yield task_of(request, resolved, index)


def task_of(request: Request, resolved: Resolved, index: int) -> Task:
    """Resolve the `index`-th image of a request: defaults are filled in here alone."""
    job = resolved.sampling
    width, height = size_of(request, resolved)
    method = method_of(request, job)
    negative = request.negative_prompt
    return Task(
        image_id=image_id(request.prompt_id, index),
        prompt_id=request.prompt_id,
        image_index=index,
        source_row=request.source_row,
        prompt=request.prompt,
        negative_prompt=job.negative_prompt if negative is None else negative,
        seed=_seed(request, job.seed, index),
        seed_source="derived" if request.seed is None else "manifest",
        sampler=method.sampler,
        discretization=method.discretization,
        guider=request.guider or resolved.guider,
        steps=method.steps,
        guidance_scale=given(request.guidance_scale, job.guidance_scale),
        **method.options,
        width=width,
        height=height,
        original_width=given(request.original_width, width),
        original_height=given(request.original_height, height),
        crop_top=given(request.crop_top, 0),
        crop_left=given(request.crop_left, 0),
        target_width=given(request.target_width, width),
        target_height=given(request.target_height, height),
        **_scores(request, resolved),
        **_thresholding(request, job),
        init_image=request.init_image,
        strength=given(request.strength, job.strength) if request.init_image else None,
        extras=request.extras,
    )


def size_of(request: Request, resolved: Resolved) -> tuple[int, int]:
    """Choose a size: the row's own, its ratio's, its initial image's, or the job's."""
    if request.ratio:
        return request.ratio
    if request.init_image and not (request.width or request.height):
        found = init_size(resolved.init_folder / request.init_image)
        return found or (resolved.width, resolved.height)
    return request.width or resolved.width, request.height or resolved.height


def batches(tasks: Iterable[Task], batch_size: int) -> Iterator[Batch]:
    """Group tasks that share a schedule, in order; the short ones come last."""
    waiting: dict[tuple[Any, ...], list[Task]] = {}
    held = 0
    for task in tasks:
        group = waiting.setdefault(task.schedule, [])
        group.append(task)
        held += 1
        if len(group) == batch_size:
            yield Batch(tasks=tuple(waiting.pop(task.schedule)))
            held -= batch_size
        elif held >= OPEN_TASKS:
            oldest = waiting.pop(next(iter(waiting)))
            yield Batch(tasks=tuple(oldest))
            held -= len(oldest)
    for group in waiting.values():
        yield Batch(tasks=tuple(group))


def shards(batches: Iterable[Batch], size: int) -> Iterator[Shard]:
    """Group batches of one graph into leases of `size` batches."""
    waiting: dict[tuple[Any, ...], list[Batch]] = {}
    number = 0
    for batch in batches:
        group = waiting.setdefault(batch.tasks[0].graph, [])
        group.append(batch)
        if len(group) == size:
            yield Shard(number=number, batches=tuple(group))
            number += 1
            group.clear()
    for group in waiting.values():
        if group:
            yield Shard(number=number, batches=tuple(group))
            number += 1


def shard_size(tasks: int, batch_size: int, workers: int, asked: int | None) -> int:
    """Choose how many batches a lease holds: few enough that the last ones even out."""
    if asked:
        return asked
    return max(1, min(8, tasks // (batch_size * workers * 4)))


def limited(manifest: Manifest, limit: int | None) -> Iterator[Request | Rejected]:
    """Yield the first `limit` rows, or all of them."""
    for row in manifest.rows():
        if limit is not None and row.source_row >= limit:
            return
        yield row


def _told_apart(
    row: Request, repeated: frozenset[int], seen: dict[int, str], copies: Counter[int]
) -> Request | Rejected:
    key = hash64(row.prompt_id)
    if key not in repeated:
        return row
    copies[key] += 1
    if copies[key] == 1:
        seen[key] = row.location
        return row
    if row.prompt_id == f"{row.content:016x}":
        return dataclasses.replace(row, prompt_id=f"{row.prompt_id}-{copies[key]}")
    shown = printable(row.prompt_id, 40)
    return _rejected(row, f"id: `{shown}` stands already at {seen[key]}")


def _impossible(row: Request, resolved: Resolved) -> str | None:
    """Say what can't be done about a combination of settings, each fine by itself."""
    if row.ratio and (row.width or row.height):
        return "ratio: stands beside a width or height; give one or the other"
    if row.strength is not None and not row.init_image:
        return "strength: does not apply without init_image"
    if row.aesthetic_score is not None and not resolved.scores_aesthetics:
        return "aesthetic_score: applies to a refiner alone"
    return method_of(row, resolved.sampling).problem


def _rejected(row: Request, reason: str) -> Rejected:
    return Rejected(
        source_row=row.source_row,
        location=row.location,
        reason=reason,
        prompt_id=row.prompt_id,
        content=row.content,
        prompt=row.prompt,
        extras=row.extras,
    )


def _scores(request: Request, resolved: Resolved) -> dict[str, float | None]:
    """Give the aesthetic scores that only a refiner is conditioned on."""
    job = resolved.sampling
    names = ("aesthetic_score", "negative_aesthetic_score")
    if not resolved.scores_aesthetics:
        return dict.fromkeys(names)
    return {name: given(getattr(request, name), getattr(job, name)) for name in names}


def _thresholding(request: Request, job: SamplingSection) -> dict[str, float | None]:
    """Give dynamic thresholding's ratio and maximum; both None when it is off."""
    ratio = given(request.thresholding_ratio, job.thresholding_ratio)
    most = given(request.thresholding_maximum, job.thresholding_maximum)
    return {
        "thresholding_ratio": ratio,
        "thresholding_maximum": None if ratio is None else most,
    }


def image_count(request: Request, resolved: Resolved) -> int:
    return request.num_images or resolved.sampling.num_images


def _seed(request: Request, job_seed: int, index: int) -> int:
    if request.seed is None:
        return derived_seed(job_seed, request.prompt_id, index)
    from sdxl.noise import MAX_SEED

    return (request.seed + index) % (MAX_SEED + 1)
