"""Pixels <-> PNG, JPEG, WebP with the settings inside; hashes; is it black or constant.

The bytes depend on the pixels and the settings alone, not on time or machine, so that
equal tasks give equal files.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin

from jobs.settings import MAX_SIDE, SIZE_STEP

EXTENSIONS = {"png": "png", "jpeg": "jpg", "webp": "webp"}
# Of photograph-like pictures, for estimates; files of flat drawings are smaller.
BYTES_PER_PIXEL = {"png": 1.6, "jpeg": 0.45, "webp": 0.25}
INIT_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
METADATA_KEY = "sdxl_jobs"
BLACK_LEVEL = 2
MAX_EXIF = 60_000  # a JPEG holds 64 KB of it
MAX_CUT = 1_000


@dataclass(frozen=True, slots=True)
class Encoded:
    """An image file in memory and what the results say of it."""

    data: bytes
    image_sha256: str
    pixel_sha256: str


def encode(
    pixels: np.ndarray,
    kind: str,
    settings: Mapping[str, Any],
    *,
    quality: int = 95,
    png_level: int = 3,
) -> Encoded:
    """Encode (H, W, 3) uint8 pixels; `settings` goes into the file's metadata as JSON.

    `pixel_sha256` is of the decoded RGB bytes, row by row: what a reader will get.
    """
    image = Image.fromarray(pixels, "RGB")
    text = _settings_text(settings, kind)
    buffer = io.BytesIO()
    if kind == "png":
        info = PngImagePlugin.PngInfo()
        info.add_text(METADATA_KEY, text)
        image.save(buffer, "PNG", pnginfo=info, compress_level=png_level)
    else:
        exif = Image.Exif()
        exif[ExifTags.Base.ImageDescription] = text
        options = {"subsampling": 0} if kind == "jpeg" else {"method": 4}
        image.save(buffer, kind.upper(), quality=quality, exif=exif, **options)
    data = buffer.getvalue()
    seen = pixels if kind == "png" else decode(data)
    return Encoded(data, hashlib.sha256(data).hexdigest(), pixel_sha256(seen))


def _settings_text(settings: Mapping[str, Any], kind: str) -> str:
    """Write the settings as JSON; long texts are cut where the format has no room."""
    text = json.dumps(settings, ensure_ascii=True, sort_keys=True)
    if kind == "png" or len(text) <= MAX_EXIF:
        return text
    cut = {k: v[:MAX_CUT] if isinstance(v, str) else v for k, v in settings.items()}
    return json.dumps(cut | {"cut": True}, ensure_ascii=True, sort_keys=True)


def decode(data: bytes) -> np.ndarray:
    """Decode an image file to (H, W, 3) uint8."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def size(data: bytes) -> tuple[int, int]:
    """Read width and height from an image file's header, decoding nothing."""
    with Image.open(io.BytesIO(data)) as image:
        return image.size


def read_settings(data: bytes) -> dict[str, Any]:
    """Read back the settings that `encode` put into a file."""
    with Image.open(io.BytesIO(data)) as image:
        text = image.info.get(METADATA_KEY)
        if text is None:
            text = image.getexif().get(ExifTags.Base.ImageDescription, "{}")
    return json.loads(text)


def init_size(path: Path) -> tuple[int, int] | None:
    """Read an initial image's size, cut to multiples of 64; None where it can't be."""
    try:
        with Image.open(path, formats=INIT_FORMATS) as image:
            width, height = image.size
    except (OSError, ValueError, Image.DecompressionBombError):
        return None  # reading it in earnest says why
    if min(width, height) < SIZE_STEP or max(width, height) > MAX_SIDE:
        return None
    return width - width % SIZE_STEP, height - height % SIZE_STEP


def read_init(path: Path, width: int, height: int) -> np.ndarray:
    """Read an initial image at the given size: (height, width, 3) uint8.

    Resized as the reference does, by Pillow's default filter (bicubic); transparency is
    dropped.

    Raises:
        OSError: it is missing, of an unknown kind, or too large to be unpacked safely.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=INIT_FORMATS) as image:
                picture = image.convert("RGB").resize((width, height))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise OSError(f"init_image {path.name}: too many pixels") from None
    except (OSError, ValueError, SyntaxError) as error:  # Pillow: broken PNG chunks
        reason = getattr(error, "strerror", None) or "not a readable image"
        raise OSError(f"init_image {path.name}: {reason}") from None
    return np.asarray(picture)


def pixel_sha256(pixels: np.ndarray) -> str:
    """Hash (H, W, 3) uint8 pixels, row by row."""
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def flags(pixels: np.ndarray) -> list[str]:
    """Say what is wrong with a picture at a glance: `black`, `constant`."""
    found = []
    if int(pixels.max()) <= BLACK_LEVEL:
        found.append("black")
    if (pixels == pixels[:1, :1]).all():
        found.append("constant")
    return found
