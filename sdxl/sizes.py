"""The picture sizes SDXL was trained on, by the names of their ratios.

Names and sizes are the reference's 28, among them two smaller squares; figures from
Podell et al. 2023, appendix I.
"""

from __future__ import annotations

from difflib import get_close_matches

RATIOS: dict[str, tuple[int, int]] = {
    "0.5": (704, 1408),
    "0.52": (704, 1344),
    "0.57": (768, 1344),
    "0.6": (768, 1280),
    "0.68": (832, 1216),
    "0.72": (832, 1152),
    "0.78": (896, 1152),
    "0.82": (896, 1088),
    "0.88": (960, 1088),
    "0.94": (960, 1024),
    "1.0": (1024, 1024),
    "1.0_768": (768, 768),
    "1.0_512": (512, 512),
    "1.07": (1024, 960),
    "1.13": (1088, 960),
    "1.21": (1088, 896),
    "1.29": (1152, 896),
    "1.38": (1152, 832),
    "1.46": (1216, 832),
    "1.67": (1280, 768),
    "1.75": (1344, 768),
    "1.91": (1344, 704),
    "2.0": (1408, 704),
    "2.09": (1472, 704),
    "2.4": (1536, 640),
    "2.5": (1600, 640),
    "2.89": (1664, 576),
    "3.0": (1728, 576),
}
"""Ratio name to (width, height) in pixels."""


def size_of(ratio: str) -> tuple[int, int]:
    """Look up (width, height) of a ratio name such as `0.78`.

    A name may be written as a number reads: `1`, `1.00` and `.5` are `1.0` and `0.5`.
    Raises ValueError naming the nearest known name.
    """
    if (size := RATIOS.get(_plain(ratio))) is not None:
        return size
    raise ValueError(f"ratio `{ratio}` is unknown, hint: {_nearest(ratio)}")


def _plain(ratio: str) -> str:
    """Write a number as the table does; leave anything else alone."""
    try:
        return str(float(ratio)) if "_" not in ratio else ratio
    except ValueError:
        return ratio.strip()


def _nearest(ratio: str) -> str:
    """Name the known ratio nearest in value, or in letters when it is no number."""
    try:
        value = float(ratio.partition("_")[0])
        return min(RATIOS, key=lambda name: abs(float(name.partition("_")[0]) - value))
    except ValueError:
        return next(iter(get_close_matches(ratio, RATIOS, n=1, cutoff=0)), "1.0")
