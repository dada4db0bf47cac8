"""Read and check a manifest in a stream: csv, tsv, jsonl or Parquet -> rows.

    file ──> cells (strings or typed values, with their line) ──> Request | Rejected

A manifest that can't be understood as a whole (no prompt column, not Parquet at all) is
an error. A row that can't be used is a `Rejected` with file, line and reason, and the
rows around it are made. Memory does not grow with the number of rows.

A bare empty cell of a CSV or TSV means "not given"; a quoted one (`""`) is empty text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs import settings
from jobs.cells import (
    READERS,
    Cells,
    columns_of,
    first_keys,
    jsonl_cells,
    parquet_schema,
    plain_type,
)
from jobs.errors import ManifestError, file_beside, nearest, printable
from jobs.records import RESULT_COLUMNS, Rejected, Request, hash64

MAX_EXTRAS = 1_000
PATH_HINT = "give the path of a .csv, .tsv, .parquet or .jsonl file"
MAX_ID = 512
PLAIN_ID = re.compile(r"[A-Za-z0-9_-]{1,512}")
MAX_PROMPT = 100_000
FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """An open manifest. `rows` may be called again: each call reads from the start."""

    path: Path
    format: str
    columns: tuple[str, ...] | None
    prompt_column: str
    id_column: str

    def rows(self) -> Iterator[Request | Rejected]:
        """Yield every row of the file, checked, in its order."""
        for source_row, cells in enumerate(READERS[self.format](self.path)):
            yield self._check(source_row, cells)

    @cached_property
    def extras(self) -> dict[str, str]:
        """Name the columns that pass through, with their arrow types.

        JSON lines have no header, so this reads such a file once.

        Raises:
            ManifestError: a name collides with a column of the results.
        """
        if self.format == "parquet":
            schema = parquet_schema(self.path)
            found = {n: str(plain_type(schema.field(n).type)) for n in schema.names}
        elif self.columns is not None:
            found = dict.fromkeys(self.columns, "string")
        else:
            names: dict[str, str] = {}
            for cells in jsonl_cells(self.path):
                names.update(dict.fromkeys(cells.values, "string"))
                if len(names) > MAX_EXTRAS:
                    raise ManifestError(
                        f"{self.path}: its lines have over {MAX_EXTRAS} different keys",
                        hint="put what is not a setting under one key",
                    )
            found = names
        extras = {n: t for n, t in found.items() if n not in self._known}
        for name in extras:
            if name in RESULT_COLUMNS:
                raise ManifestError(
                    f"{self.path}: column `{name}` has the name of a result column",
                    hint="rename it: unknown columns pass through to the results",
                )
        return extras

    def extras_schema(self) -> pa.Schema:
        """Give the columns that pass through as arrow fields."""
        if self.format == "parquet":
            schema = parquet_schema(self.path)
            return pa.schema(
                [(n, plain_type(schema.field(n).type)) for n in self.extras]
            )
        return pa.schema([(name, pa.string()) for name in self.extras])

    @cached_property
    def _known(self) -> set[str]:
        return {self.id_column, self.prompt_column, *settings.parsers()}

    @cached_property
    def _parsers(self) -> list[tuple[str, settings.Parser]]:
        """List the settings that a row of this file can carry, and how to read each."""
        known = settings.parsers().items()
        if self.columns is None:
            return list(known)
        return [(name, parse) for name, parse in known if name in self.columns]

    @cached_property
    def _place(self) -> str:
        return f"{self.path.name} {'row' if self.format == 'parquet' else 'line'}"

    def _check(self, source_row: int, cells: Cells) -> Request | Rejected:
        values = cells.values
        extras = tuple([self._passed(values.get(name)) for name in self.extras])
        content = _content_hash(values) if values else hash64(f"row {source_row}")
        location = f"{self._place} {cells.number}"
        asked = values.get(self.id_column)
        try:
            if cells.problem:
                raise ValueError(cells.problem)
            prompt_id = f"{content:016x}" if asked is None else _checked_id(asked)
            prompt = _checked_prompt(values.get(self.prompt_column))
            given = self._settings(values)
        except ValueError as error:
            prompt = values.get(self.prompt_column)
            return Rejected(
                source_row=source_row,
                location=location,
                reason=str(error),
                prompt_id=f"{content:016x}" if asked is None else _safe_id(asked),
                content=content,
                prompt=_writable(prompt[:MAX_PROMPT])
                if isinstance(prompt, str)
                else None,
                extras=extras,
            )
        return Request(
            source_row=source_row,
            location=location,
            prompt_id=prompt_id,
            content=content,
            prompt=prompt,
            extras=extras,
            **given,
        )

    def _settings(self, values: dict[str, Any]) -> dict[str, Any]:
        given = {}
        for name, parse in self._parsers:
            value = values.get(name)
            if value is None:
                continue
            try:
                given[name] = parse(value)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return given

    def _passed(self, value: Any) -> Any:
        if self.format == "parquet" or value is None:
            return value
        if isinstance(value, str):
            return _writable(value)
        return _writable(json.dumps(value, ensure_ascii=False))


def open_manifest(
    path: Path, *, prompt_column: str = "prompt", id_column: str = "id"
) -> Manifest:
    """Open a manifest, told by its suffix, and check its columns.

    Raises:
        ManifestError: missing file, unknown suffix, not what its suffix says, no prompt
            column, a column that would collide with the results.
    """
    try:
        there, folder = path.is_file(), path.is_dir()
    except OSError as error:  # a folder on the way that may not be searched
        raise ManifestError(f"{path}: {error.strerror}") from None
    if folder:
        raise ManifestError(f"{path}: is a folder", hint=PATH_HINT)
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ManifestError(
            f"{path}: unknown kind of manifest `{path.suffix}`",
            hint="use .csv, .tsv, .parquet or .jsonl",
        )
    if not there:
        raise ManifestError(
            f"{path}: no such file", hint=file_beside(path, FORMATS, PATH_HINT)
        )
    columns = columns_of(path, kind)
    manifest = Manifest(
        path=path,
        format=kind,
        columns=columns,
        prompt_column=prompt_column,
        id_column=id_column,
    )
    present = columns if columns is not None else first_keys(path)
    if prompt_column not in present:
        raise ManifestError(
            f"{path}: no column `{prompt_column}`",
            hint=f"name it with --prompt-column; {nearest(prompt_column, present)}",
        )
    if id_column != "id" and id_column not in present:
        raise ManifestError(
            f"{path}: no column `{id_column}`", hint=nearest(id_column, present)
        )
    if columns is not None:
        manifest.extras  # noqa: B018  a collision is an error before anything runs
    return manifest


def _checked_id(value: Any) -> str:
    if isinstance(value, str) and PLAIN_ID.fullmatch(value):
        return value
    text = str(value)
    plain = isinstance(value, str | int) and not isinstance(value, bool)
    if not plain or not text.strip():
        raise ValueError(f"id: `{printable(text, 40)}` can't be an id")
    if len(text) > MAX_ID:
        raise ValueError(f"id: {len(text)} characters, at most {MAX_ID} are allowed")
    settings.text(text)
    if not text.isprintable():
        raise ValueError(f"id: `{printable(text, 40)}` holds control characters")
    parts = text.replace("\\", "/").split("/")
    if parts[0] == "" or ".." in parts:
        raise ValueError(f"id: `{printable(text, 40)}` reads as a path out of a folder")
    return text


def _safe_id(value: Any) -> str:
    return _writable(str(value)[:MAX_ID])


def _checked_prompt(value: Any) -> str:
    if value is None:
        raise ValueError('prompt: missing (write "" for an empty prompt)')
    try:
        text = settings.text(value)
    except ValueError as error:
        raise ValueError(f"prompt: {error}") from None
    if len(text) > MAX_PROMPT:
        raise ValueError(f"prompt: {len(text)} characters, at most {MAX_PROMPT}")
    return text


def _writable(text: str) -> str:
    """Replace what UTF-8 can't hold, so that a bad row can still be written down."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _content_hash(values: dict[str, Any]) -> int:
    """Hash a row by its names and values, whatever the order of its columns."""
    given = [f"{k}\x1f{values[k]}" for k in sorted(values) if values[k] is not None]
    return hash64("\x1e".join(given))


# Cells of each format -------------------------------------------------------------
