"""Pieces that steps are made of: how far down, how much noise, which weights.

Numbers are python floats, arrays keep their dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


def ancestral_step(sigma: float, below: float, eta: float) -> tuple[float, float]:
    """Split a step to `below`: the level to step down to, the noise to add after it.

    down² + up² = below², so the variance of the next level is kept.
    """
    spread = math.sqrt(max(sigma**2 - below**2, 0.0))
    up = min(below, eta * below * spread / sigma)
    return math.sqrt(below**2 - up**2), up


def adams_weights(seen: list[float], below: float) -> list[float]:
    """Integrate each Lagrange polynomial on the levels `seen` from the last to `below`.

    Gauss-Legendre points, enough to be exact for polynomials of this degree.
    """
    points, shares = np.polynomial.legendre.leggauss((len(seen) + 1) // 2)
    half = (below - seen[-1]) / 2
    at = seen[-1] + half * (points + 1)
    weights = []
    for node in seen:
        others = [other for other in seen if other != node]
        basis = math.prod(((at - o) / (node - o) for o in others), start=np.ones(()))
        weights.append(float(half * np.sum(shares * basis)))
    return weights


@dataclass(frozen=True, slots=True)
class Churn:
    """Raise the noise level by a share of itself, with the noise that belongs there."""

    share: float
    low: float
    high: float
    s_noise: float

    def __call__(
        self, x: np.ndarray, sigma: float, noise: Callable[[], np.ndarray]
    ) -> tuple[np.ndarray, float]:
        if not (self.share > 0 and self.low <= sigma <= self.high):
            return x, sigma
        raised = sigma * (1 + min(self.share, math.sqrt(2) - 1))
        return x + noise() * (math.sqrt(raised**2 - sigma**2) * self.s_noise), raised


def exponential_step(
    x: np.ndarray, x0: np.ndarray, sigma: float, below: float
) -> np.ndarray:
    """Solve the ODE exactly for a constant x0: keep below/sigma of the way from it."""
    return x * (below / sigma) + x0 * (1 - below / sigma)
