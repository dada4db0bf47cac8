"""Requests -> tasks -> batches -> shards. Pure: it makes nothing.

    survey    reads the manifest once: counts, bad rows, repeated ids
    tasks     reads it again, lazily: one Task per image, every setting filled in
    batches   groups tasks that share one graph call, in the manifest's order
    shards    groups batches of one compiled graph into leases

Memory: the survey keeps 16 bytes per row, everything after it is a stream.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from operator import attrgetter
from typing import Any

import numpy as np

from jobs.config import Resolved, SamplingSection
from jobs.errors import printable
from jobs.images import init_size
from jobs.manifest import Manifest
from jobs.progress import counted
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
from jobs.store import Index

SHOWN_REJECTIONS = 1_000
OPEN_TASKS = 65_536
CHUNK = 8_192


@dataclass(slots=True, kw_only=True)
class Survey:
    """What one reading of the manifest found.

    `ids` and `contents` are uint64 arrays, one entry per request: the hash of the
    prompt id and of the whole row. `repeated` holds the hashes of ids that stand more
    than once.
    """

    rows: int = 0
    tasks: int = 0
    pending: int = 0
    invalid: int = 0
    rejections: list[Rejected] = field(default_factory=list)
    graphs: Counter[tuple[int, int, str]] = field(default_factory=Counter)
    image_steps: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    contents: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    repeated: frozenset[int] = frozenset()
    warnings: Counter[str] = field(default_factory=Counter)

    @property
    def requests(self) -> int:
        return self.rows - self.invalid


def survey(
    manifest: Manifest,
    resolved: Resolved,
    limit: int | None = None,
    index: Index | None = None,
) -> Survey:
    """Count what the manifest asks for; one reading, a second one where ids repeat.

    With an `index` of what is done, also count the tasks that are still to make.
    """
    found = _survey(manifest, resolved, limit, index, frozenset())
    repeated = _repeated(found.ids)
    if repeated:
        found = _survey(manifest, resolved, limit, index, repeated)
    return found


def _survey(
    manifest: Manifest,
    resolved: Resolved,
    limit: int | None,
    index: Index | None,
    repeated: frozenset[int],
) -> Survey:
    ids, contents = array("Q"), array("Q")
    names: list[str] = []
    done = 0
    eps_trained = resolved.model.scaling == "EpsScaling"
    found = Survey(repeated=repeated)
    rows = checked(manifest, resolved, repeated, limit)
    for row in counted(rows, f"reading {manifest.path.name}"):
        found.rows += 1
        if isinstance(row, Rejected):
            found.invalid += 1
            if len(found.rejections) < SHOWN_REJECTIONS:
                found.rejections.append(row)
            continue
        ids.append(hash64(row.prompt_id))
        contents.append(row.content)
        images = _images(row, resolved)
        found.tasks += images
        if eps_trained and (warning := _method(row, resolved.sampling).warning):
            found.warnings[warning] += 1
        width, height = size_of(row, resolved)
        guider = row.guider or resolved.guider
        steps = row.steps or resolved.sampling.steps
        found.graphs[width, height, guider] += images
        found.image_steps[width, height, steps] += images
        if index is not None:
            names.extend(image_id(row.prompt_id, i) for i in range(images))
            if len(names) >= CHUNK:
                done += int(index.is_done(names).sum())
                names.clear()
    if index is not None:
        done += int(index.is_done(names).sum())
    found.pending = found.tasks - done
    found.ids = np.array(ids, np.uint64)
    found.contents = np.array(contents, np.uint64)
    return found


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
        if isinstance(row, Request):
            row = _told_apart(row, repeated, seen, copies)
        if isinstance(row, Request):
            problem = _impossible(row, resolved)
            row = _rejected(row, problem) if problem else row
        yield row


def tasks_of(request: Request, resolved: Resolved) -> Iterator[Task]:
    """Resolve one request into its images."""
    for index in range(_images(request, resolved)):
        yield task_of(request, resolved, index)


def task_of(request: Request, resolved: Resolved, index: int) -> Task:
    """Resolve the `index`-th image of a request: defaults are filled in here alone."""
    job = resolved.sampling
    width, height = size_of(request, resolved)
    method = _method(request, job)
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
        guidance_scale=_first(request.guidance_scale, job.guidance_scale),
        **method.options,
        width=width,
        height=height,
        original_width=_first(request.original_width, width),
        original_height=_first(request.original_height, height),
        crop_top=_first(request.crop_top, 0),
        crop_left=_first(request.crop_left, 0),
        target_width=_first(request.target_width, width),
        target_height=_first(request.target_height, height),
        **_scores(request, resolved),
        **_thresholding(request, job),
        init_image=request.init_image,
        strength=_first(request.strength, job.strength) if request.init_image else None,
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


def _repeated(ids: np.ndarray) -> frozenset[int]:
    ordered = np.sort(ids)
    return frozenset(ordered[1:][ordered[1:] == ordered[:-1]].tolist())


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
    return _method(row, resolved.sampling).problem


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
    return {name: _first(getattr(request, name), getattr(job, name)) for name in names}


def _thresholding(request: Request, job: SamplingSection) -> dict[str, float | None]:
    """Give dynamic thresholding's ratio and maximum; both None when it is off."""
    ratio = _first(request.thresholding_ratio, job.thresholding_ratio)
    most = _first(request.thresholding_maximum, job.thresholding_maximum)
    return {
        "thresholding_ratio": ratio,
        "thresholding_maximum": None if ratio is None else most,
    }


SIGMA_OPTIONS = ("sigma_min", "sigma_max", "rho")
OPTIONS = (*SIGMA_OPTIONS, "eta", "s_churn", "s_tmin", "s_tmax", "s_noise")
_asked_options = attrgetter(*OPTIONS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How a request is sampled: names, steps, and every option's effective value.

    An option is None where it does not apply. `problem` says what can't be done about
    the combination, each part of which is fine by itself.
    """

    sampler: str
    discretization: str
    steps: int
    options: dict[str, float | None]
    problem: str | None
    warning: str | None


def _method(request: Request, job: SamplingSection) -> Method:
    return _resolved_method(
        request.sampler or job.sampler,
        request.discretization or job.discretization,
        request.steps or job.steps,
        _asked_options(request),
        _asked_options(job),
    )


@lru_cache(maxsize=65_536)
def _resolved_method(
    sampler: str,
    discretization: str,
    steps: int,
    asked: tuple[float | None, ...],
    usual: tuple[float | None, ...],
) -> Method:
    """Resolve a combination once: a manifest repeats few of them many times."""
    from sdxl.samplers import SAMPLERS
    from sdxl.schedule import DISCRETIZATIONS, outside_trained_range, sigmas

    spacing = DISCRETIZATIONS[discretization]
    defaults = {**SAMPLERS[sampler].options, **spacing.defaults}
    options: dict[str, float | None] = dict.fromkeys(OPTIONS)
    problem = None
    for name, by_row, by_job in zip(OPTIONS, asked, usual, strict=True):
        if name in defaults:
            options[name] = _first(by_row, _first(by_job, defaults[name]))
        elif by_row is not None:
            owner = discretization if name in SIGMA_OPTIONS else sampler
            problem = f"{name}: does not apply to {owner}"
    if steps > spacing.max_steps:
        problem = f"steps: {steps} is above the {spacing.max_steps} of {discretization}"
    low, high = options["sigma_min"], options["sigma_max"]
    if low is not None and high is not None and low >= high:
        problem = f"sigma_min: {low:g} is not below sigma_max, {high:g}"
    warning = None
    if not problem:
        asked_sigmas = dict(zip(OPTIONS[:3], (low, high, options["rho"]), strict=True))
        warning = outside_trained_range(sigmas(discretization, steps, **asked_sigmas))
    return Method(
        sampler=sampler,
        discretization=discretization,
        steps=steps,
        options=options,
        problem=problem,
        warning=warning,
    )


def _images(request: Request, resolved: Resolved) -> int:
    return request.num_images or resolved.sampling.num_images


def _seed(request: Request, job_seed: int, index: int) -> int:
    if request.seed is None:
        return derived_seed(job_seed, request.prompt_id, index)
    from sdxl.noise import MAX_SEED

    return (request.seed + index) % (MAX_SEED + 1)


def _first(value: Any, default: Any) -> Any:
    return default if value is None else value
