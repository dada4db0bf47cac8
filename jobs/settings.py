"""What each setting of a picture may be: one table for config files and manifest rows.

A parser takes whatever a CSV cell, a Parquet value or a YAML scalar gives and returns
the typed value, or raises ValueError with the reason: `1000 is not a multiple of 64`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from functools import cache
from typing import Any

from jobs.errors import nearest, printable

Parser = Callable[[Any], Any]

MAX_SIDE = 8192
SIZE_STEP = 64
MAX_SIZE_CONDITION = 65_535


def parse(name: str, value: Any) -> Any:
    """Read one setting; ValueError says what is wrong with it."""
    return parsers()[name](value)


@cache
def parsers() -> dict[str, Parser]:
    """Map every setting that a row may carry to its parser."""
    from sdxl.noise import MAX_SEED
    from sdxl.samplers import SAMPLERS
    from sdxl.schedule import DISCRETIZATIONS
    from sdxl.sizes import size_of

    size = _whole(1, MAX_SIZE_CONDITION)
    crop = _whole(0, MAX_SIZE_CONDITION)
    return {
        "negative_prompt": text,
        "seed": _whole(0, MAX_SEED),
        "num_images": _whole(1, 100_000),
        "width": side,
        "height": side,
        "ratio": lambda value: size_of(shown(value)),
        "steps": _whole(1, 1000),
        "sampler": _one_of("sampler", SAMPLERS),
        "discretization": _one_of("discretization", DISCRETIZATIONS),
        "guider": _one_of("guider", ("VanillaCFG", "IdentityGuider")),
        "guidance_scale": _number(0, 100),
        "sigma_min": _number(1e-6, 1e6),
        "sigma_max": _number(1e-6, 1e6),
        "rho": _number(1e-3, 1e3),
        "eta": _number(0, 100),
        "s_churn": _number(0, 1e6),
        "s_tmin": _number(0, 1e6),
        "s_tmax": _number(0, 1e6),
        "s_noise": _number(0, 100),
        "original_width": size,
        "original_height": size,
        "crop_top": crop,
        "crop_left": crop,
        "target_width": size,
        "target_height": size,
        "init_image": path,
        "strength": _number(0, 1),
        "aesthetic_score": _number(0, 100),
        "negative_aesthetic_score": _number(0, 100),
        "thresholding_ratio": _number(1e-3, 1),
        "thresholding_maximum": _number(1, 1e6),
    }


def text(value: Any) -> str:
    """Take text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise ValueError(f"expected text, found {type(value).__name__}")
    if value.isascii():
        return value
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"holds half a surrogate pair at character {error.start + 1}"
        ) from None
    return value


def path(value: Any) -> str:
    """Take the path of a file, as text."""
    name = text(value)
    if not name or "\0" in name or len(name) > 4096:
        raise ValueError(f"`{shown(name)}` is not a path")
    return name


def side(value: Any) -> int:
    """Take a width or height: a multiple of 64 pixels, so that every level halves."""
    pixels = _whole(SIZE_STEP, MAX_SIDE)(value)
    if pixels % SIZE_STEP:
        below = pixels - pixels % SIZE_STEP
        raise ValueError(
            f"{pixels} is not a multiple of {SIZE_STEP} "
            f"(near: {below}, {below + SIZE_STEP})"
        )
    return pixels


def _whole(least: int, most: int) -> Parser:
    def parse_whole(value: Any) -> int:
        try:
            number = _as_int(value)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"`{shown(value)}` is not a whole number") from None
        if not least <= number <= most:
            raise ValueError(f"{shown(number)} is outside {least} to {most}")
        return number

    return parse_whole


def _as_int(value: Any) -> int:
    if not _is_numeric(value):
        raise TypeError
    if isinstance(value, str):
        if len(value) > 40 or "_" in value:
            raise ValueError
        try:
            return int(value)
        except ValueError:
            value = float(value)  # pandas writes a column with gaps as 128.0
    if not isinstance(value, int) and value != int(value):
        raise ValueError
    return int(value)


def _is_numeric(value: Any) -> bool:
    """Tell what stands for a number; a truth value, bytes or a date do not."""
    return not isinstance(value, bool) and isinstance(
        value, str | int | float | Decimal
    )


def _number(least: float, most: float) -> Parser:
    def parse_number(value: Any) -> float:
        try:
            if not _is_numeric(value) or (isinstance(value, str) and "_" in value):
                raise TypeError
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"`{shown(value)}` is not a number") from None
        if not math.isfinite(number) or not least <= number <= most:
            raise ValueError(f"{shown(value)} is outside {least:g} to {most:g}")
        return number

    return parse_number


def _one_of(what: str, known: Any) -> Parser:
    names = frozenset(known)

    def parse_name(value: Any) -> str:
        if isinstance(value, str) and value in names:
            return value
        raise ValueError(
            f"unknown {what} `{shown(value)}`; {nearest(str(value)[:100], names)}"
        )

    return parse_name


def shown(value: Any) -> str:
    """Put a value into a message: one short line, whatever it is."""
    try:
        return printable(str(value), 40)
    except ValueError:  # Python writes out no whole number of over 4,300 digits
        return "a huge number"
