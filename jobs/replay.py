"""One picture made again from its result row, and held to the row's pixel hash."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jobs import images
from jobs.books import resolved_again
from jobs.devices import cores
from jobs.errors import ConfigError, ModelError, OutputError
from jobs.model import open_model
from jobs.order import Order
from jobs.records import RESULT_COLUMNS, Task, picture_settings, task_row
from jobs.stages import load_pipeline, make, pipeline_name, pipeline_options
from jobs.store import Store, publish


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What came of it. `same` tells whether the pixels are those of the row."""

    image_id: str
    expected: str
    found: str

    @property
    def same(self) -> bool:
        return self.expected == self.found


def replay(
    folder: Path,
    image_id: str,
    *,
    out: Path | None = None,
    pipeline: str | None = None,
) -> Replay:
    """Make the picture of a row again, in a graph of the same batch size.

    With `out`, the picture is written there; nothing in the folder changes.

    Raises:
        OutputError: there is no such row, or it has no picture.
        ModelError: the checkpoint is not the one that made it.
    """
    store = Store(folder)
    job = store.read_job()
    order = Order.stored(store)
    row = find_row(store, image_id)
    resolved = replace(
        resolved_again(order, job),
        batch_size=row["batch_size"],
        device_target=row["device_target"],
    )
    model = open_model(order.config.model)
    if model.sha256 != row["model_sha256"]:
        raise ModelError(
            f"{model.path} is not the checkpoint that made `{image_id}`",
            hint=f"its SHA-256 was {row['model_sha256']}",
        )
    options = pipeline_options(resolved, cores())
    maker = load_pipeline(pipeline or pipeline_name(resolved), options)
    task = task_again(row)
    made = make(maker, [task], resolved.batch_size, resolved.init_folder)
    encoded = images.encode(
        made.pixels[0],
        row["image_format"],
        picture_settings(task_row(task, ())),
        quality=order.config.output.quality,
        png_level=order.config.output.png_level,
    )
    if out is not None:
        publish(out, encoded.data)
    return Replay(
        image_id=image_id, expected=row["pixel_sha256"], found=encoded.pixel_sha256
    )


def find_row(store: Store, image_id: str) -> dict[str, Any]:
    """Find the row of a picture that is made."""
    try:
        int(image_id, 16)
    except ValueError:
        raise ConfigError(
            f"`{image_id}` is not an image id",
            hint="it is 16 hex digits: a file's name",
        ) from None
    rows = store.rows_of(image_id)
    made = [row for row in rows if row["status"] == "ok"]
    if made:
        return made[-1]
    what = f"is {rows[-1]['status']}" if rows else "has no row"
    raise OutputError(
        f"`{image_id}` {what} in {store.root}",
        hint="an image id is a picture's file name without its suffix",
    )


def task_again(row: dict[str, Any]) -> Task:
    """Rebuild a task from its row.

    Results hold numbers in single precision; the shortest decimal that gives the same
    single is taken for what was asked.
    """
    given = {}
    for field in dataclasses.fields(Task):
        if field.name not in RESULT_COLUMNS or field.name == "attempts":
            continue
        value = row.get(field.name)
        if value is not None and RESULT_COLUMNS[field.name] == "float32":
            value = float(str(np.float32(value)))
        given[field.name] = value
    return Task(**given)
