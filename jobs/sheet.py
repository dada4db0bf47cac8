"""A contact sheet: small pictures of a job, each over its prompt and seed.

Design: it reads rows and images and writes one file, so it can be made of any job, even
one that still runs. A picture that failed or can't be read has a tile that says so: a
sheet never looks better than the job.
"""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jobs import parts
from jobs.errors import ConfigError, OutputError, printable
from jobs.records import image_path
from jobs.store import Store, publish

COLUMNS = ["image_id", "source_row", "image_index", "prompt", "seed", "status"]
COLUMNS += ["error_class", "image_path", "image_format"]
KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
IMAGE_ID = re.compile("[0-9a-f]{16}")
PAPER, INK, FAINT, GAP = (255, 255, 255), (30, 30, 30), (225, 225, 225), 10
TEXT_SIZE, LINE_HEIGHT, LINES = 12, 15, 3


def make_sheet(
    folder: Path, *, out: Path | None, columns: int, limit: int, side: int
) -> Path:
    """Lay the first `limit` pictures of a job out in `columns`; return the file.

    `side` is the longer side of a tile's picture in pixels; the file is
    `contact_sheet.png` in the job's folder unless `out` names another.

    Raises:
        ConfigError: `out` has a suffix that is no picture's.
        OutputError: the folder has no rows, or the sheet can't be written.
    """
    out = out or folder / "contact_sheet.png"
    kind = KINDS.get(out.suffix.lower())
    if kind is None:
        raise ConfigError(f"--out {out}: use .png, .jpg or .webp")
    rows = first_rows(Store(folder), limit)
    if not rows:
        raise OutputError(
            f"{folder} has no result rows yet", hint="`sdxl-jobs status` says more"
        )
    tiles = [tile(folder, row, side) for row in rows]
    buffer = BytesIO()
    laid_out(tiles, columns).save(buffer, kind)
    publish(out, buffer.getvalue())
    return out


def first_rows(store: Store, limit: int) -> list[dict[str, Any]]:
    """Return the first rows of a job in the manifest's order, each image's best one."""
    sources = store.sources()
    masks = parts.winners(sources).masks
    found = []
    for path, mask in zip(sources, masks, strict=True):
        if not mask.any():
            continue
        table = parts.read(path, COLUMNS).filter(parts.as_mask(mask))
        order = table.select(["source_row", "image_index"]).to_pandas()
        nearest = order.sort_values(["source_row", "image_index"]).index[:limit]
        found += table.take(np.asarray(nearest)).to_pylist()
    found.sort(key=lambda row: (row["source_row"], row["image_index"]))
    return found[:limit]


def tile(folder: Path, row: dict[str, Any], side: int) -> Image.Image:
    """Draw one picture with its prompt and seed under it."""
    picture, trouble = read_picture(folder, row, side)
    if picture is None:
        picture = Image.new("RGB", (side, side), FAINT)
        pen = ImageDraw.Draw(picture)
        pen.text((GAP, side // 2), trouble, fill=INK, font=_font())
    prompt = printable(row["prompt"] or "(empty prompt)", 400)
    return drawn_under(picture, [prompt, f"seed {row['seed']}"], side)


def drawn_under(
    picture: Image.Image | np.ndarray, texts: Sequence[str], side: int
) -> Image.Image:
    """Draw texts under a picture; the first has two lines, each of the others one."""
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    paper = Image.new("RGB", (side, side + LINES * LINE_HEIGHT + GAP), PAPER)
    paper.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    pen = ImageDraw.Draw(paper)
    letters = max(8, side * 10 // (TEXT_SIZE * 6))
    lines: list[str] = []
    for text, most in zip(texts, (LINES - len(texts) + 1, 1, 1), strict=False):
        lines += textwrap.wrap(text, letters, max_lines=most, placeholder=" …")
    for i, line in enumerate(lines):
        pen.text((0, side + 4 + i * LINE_HEIGHT), line, fill=INK, font=_font())
    return paper


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(TEXT_SIZE)


def read_picture(
    folder: Path, row: dict[str, Any], side: int
) -> tuple[Image.Image | None, str]:
    """Return a row's picture, no larger than `side`, or why there is none.

    Only the place that the image id gives is read, whatever a row says.
    """
    if row["status"] != "ok":
        return None, row["error_class"] or row["status"]
    if not IMAGE_ID.fullmatch(row["image_id"]):
        return None, "damaged"
    suffix = Path(row["image_path"] or "").suffix.lstrip(".")
    path = folder / image_path(row["image_id"], suffix)
    try:
        if path.is_symlink() or path.parent.is_symlink():
            return None, "a link"
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=tuple(set(KINDS.values()))) as image:
                picture = image.convert("RGB")
    except FileNotFoundError:
        return None, "missing"
    except Exception:  # Pillow raises what it likes for damaged files
        return None, "damaged"
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture, ""


def laid_out(tiles: Sequence[Image.Image], columns: int) -> Image.Image:
    """Put tiles of one size into rows."""
    columns = min(columns, len(tiles))
    width, height = tiles[0].size
    rows = -(-len(tiles) // columns)
    size = (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP)
    paper = Image.new("RGB", size, PAPER)
    for i, one in enumerate(tiles):
        row, column = divmod(i, columns)
        paper.paste(one, (GAP + column * (width + GAP), GAP + row * (height + GAP)))
    return paper
