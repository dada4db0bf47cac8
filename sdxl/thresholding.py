"""Dynamic thresholding: hold a guided image inside the range it was trained on.

Design: a wrapper around `denoise`, so that neither samplers nor the compiled graph know
of it. It sees x0 after guidance, where Imagen has it; the reference thresholds the two
halves before guidance, which lets guidance leave the range again.
"""

from __future__ import annotations

import numpy as np

from sdxl.samplers import Denoise


def thresholded(
    denoise: Denoise, *, ratio: float = 0.995, maximum: float = 1.0
) -> Denoise:
    """Wrap `denoise` so that every x0 it gives is thresholded."""
    return lambda x, sigma: dynamic_threshold(
        denoise(x, sigma), ratio=ratio, maximum=maximum
    )


def dynamic_threshold(
    x0: np.ndarray, *, ratio: float = 0.995, maximum: float = 1.0
) -> np.ndarray:
    """Pull each image's values into -1 … 1 (Saharia et al. 2022, section 2.3).

    Values are clipped at the `ratio` quantile of their magnitudes, held between 1 and
    `maximum`, and divided by it; a `maximum` of 1 just clips. It is made for pixels:
    the latents of SDXL reach ±4 and lose contrast. (B, …) float32 in and out. Raises
    ValueError for a ratio outside 0 to 1 or a maximum below 1.
    """
    if not 0 < ratio <= 1 or not maximum >= 1:
        raise ValueError(f"ratio `{ratio}` must be in 0 to 1, maximum `{maximum}` >= 1")
    B = x0.shape[0]
    magnitudes = np.abs(x0).reshape(B, -1)  # (B, C*H*W)
    limits = np.quantile(magnitudes, ratio, axis=1).clip(1, maximum)
    limits = limits.astype(np.float32).reshape(B, *[1] * (x0.ndim - 1))  # (B, 1, 1, 1)
    return np.clip(x0, -limits, limits) / limits
