"""One reading of a manifest: counts, bad rows, repeated ids, what is still to make.

Memory: 16 bytes per row.
"""

from __future__ import annotations

import itertools
from array import array
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from jobs.index import Index
from jobs.manifest import Manifest
from jobs.method import method_of
from jobs.plan import checked, image_count, size_of
from jobs.progress import counted
from jobs.records import Rejected, Request, hash64, image_number
from jobs.resolved import Resolved

SHOWN_REJECTIONS = 1_000
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
    images = array("Q")
    kinds: Counter[tuple[int, int, str, int]] = Counter()
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
        count = image_count(row, resolved)
        method = method_of(row, resolved.sampling)
        if eps_trained and method.warning:
            found.warnings[method.warning] += 1
        guider = row.guider or resolved.guider
        kinds[(*size_of(row, resolved), guider, method.steps)] += count
        if index is not None:
            images.extend([image_number(row.prompt_id, i) for i in range(count)])
            if len(images) >= CHUNK:
                found.pending += _pending(images, index)
    for (width, height, guider, steps), count in kinds.items():
        found.tasks += count
        found.graphs[width, height, guider] += count
        found.image_steps[width, height, steps] += count
    if index is None:
        found.pending = found.tasks
    else:
        found.pending += _pending(images, index)
    found.ids = np.array(ids, np.uint64)
    found.contents = np.array(contents, np.uint64)
    return found


def location_of(
    position: int, found: Survey, manifest: Manifest, resolved: Resolved
) -> str:
    """Say where the request at a position of a survey stands in the manifest."""
    rows = checked(manifest, resolved, found.repeated)
    requests = (row for row in rows if isinstance(row, Request))
    return next(itertools.islice(requests, position, None)).location


def _pending(images: array[int], index: Index) -> int:
    """Count the images that are still to make, and empty the array."""
    done = index.are_done(np.array(images, np.uint64))
    del images[:]
    return int((~done).sum())


def _repeated(ids: np.ndarray) -> frozenset[int]:
    ordered = np.sort(ids)
    return frozenset(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
