"""The books of a job: what the manifest asks for against the rows that are there.

    manifest = ok + failed + invalid + pending, nothing twice, nothing unasked

A row is also held to its task: every setting that the manifest and the job's settings
give must stand in the row, so that a row that was changed by hand is named.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jobs import plan
from jobs.manifest import Manifest, open_manifest
from jobs.order import Order
from jobs.progress import counted
from jobs.records import RESULT_COLUMNS, Rejected, Task, hash64, invalid_row
from jobs.resolved import Resolved, resolve
from jobs.sections import RuntimeSection
from jobs.store import Store
from jobs.survey import location_of, survey

_NOT_COMPARED = {"attempts", "source_row"}
COMPARED = tuple(
    field.name
    for field in dataclasses.fields(Task)
    if field.name in RESULT_COLUMNS and field.name not in _NOT_COMPARED
)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a manifest asks for: sorted image ids, and a hash of each one's settings.

    `rows` counts the manifest's rows, `tasks` the images within the job's limit.
    """

    ids: np.ndarray
    settings: np.ndarray
    wanted: np.ndarray
    invalid: np.ndarray
    rows: int

    @property
    def tasks(self) -> int:
        return int(self.wanted.sum())


def read_manifest(
    order: Order, job: Mapping[str, Any], known: Store | None = None
) -> Asked:
    """Read the manifest once more, and resolve it as the job did.

    Args:
        known: the folder that holds what the job has seen of it, to be held to.

    Raises:
        ManifestError: it is not there, or can't be read.
        MismatchError: rows that the job has seen have changed or are gone.
    """
    manifest = open_manifest(
        order.manifest, prompt_column=order.prompt_column, id_column=order.id_column
    )
    resolved = resolved_again(order, job)
    found = survey(manifest, resolved)
    if known is not None:
        known.check_rows(
            found.ids,
            found.contents,
            True,
            lambda at: location_of(at, found, manifest, resolved),
        )
    ids, settings, wanted, invalid = [], [], [], []
    for row in _rows(manifest, resolved, found.repeated):
        if isinstance(row, Rejected):
            invalid.append(int(invalid_row(row, manifest.extras)["image_id"], 16))
            continue
        within = order.limit is None or row.source_row < order.limit
        for task in plan.tasks_of(row, resolved):
            ids.append(int(task.image_id, 16))
            settings.append(settings_hash(_settings_of(task)))
            wanted.append(within)
    order_of = np.argsort(np.array(ids, np.uint64), kind="stable")
    return Asked(
        np.array(ids, np.uint64)[order_of],
        np.array(settings, np.uint64)[order_of],
        np.array(wanted, bool)[order_of],
        np.sort(np.array(invalid, np.uint64)),
        found.rows,
    )


def resolved_again(order: Order, job: Mapping[str, Any]) -> Resolved:
    """Resolve a stored job's settings on any machine, without its checkpoint."""
    here = replace(order.config, runtime=RuntimeSection(device_target="CPU"))
    fields = job["fingerprint_fields"]
    return replace(
        resolve(here, native_size=0, kind=job["model"]["kind"]),
        width=fields["sampling.width"],
        height=fields["sampling.height"],
        precision=fields["model.precision"],
        batch_size=order.config.runtime.batch_size,
        jit_level=order.config.runtime.jit_level,
        init_folder=order.manifest.parent,
    )


def settings_hash(row: Mapping[str, Any]) -> int:
    """Hash what a row says of its task, floats at the precision of the results."""
    values = []
    for name in COMPARED:
        value = row.get(name)
        if value is not None and RESULT_COLUMNS[name] == "float32":
            value = struct.pack("<f", value)
        values.append(value)
    return hash64(repr(values))


def _settings_of(task: Task) -> dict[str, Any]:
    return {name: getattr(task, name) for name in COMPARED}


def _rows(
    manifest: Manifest, resolved: Resolved, repeated: frozenset[int]
) -> Iterator[Any]:
    rows = plan.checked(manifest, resolved, repeated)
    return counted(rows, f"balancing with {Path(manifest.path).name}")
