"""Noise levels: the trained table, the discretizations that walk it, preconditioning.

Design: everything is in terms of sigma, the standard deviation of the noise in
`x = x0 + sigma * noise`. The 1000 trained levels are one table; a discretization picks
`steps` falling levels and a final 0; the network's own time is looked up from sigma.
Everything is plain numpy, so that a schedule is data, never part of a compiled graph.

Names of discretizations and scalings are the reference's. Sources: Ho et al. 2020 (DDPM
schedule), Karras et al. 2022 (EDM: equation 5 and table 1), Podell et al. 2023 (SDXL).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

TRAIN_STEPS = 1000


def _trained_sigmas() -> np.ndarray:
    """Compute sqrt((1 - a) / a) of the `scaled linear` betas: (1000,) float64."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, TRAIN_STEPS) ** 2
    alphas = np.cumprod(1 - betas)
    return np.sqrt((1 - alphas) / alphas)


DDPM_SIGMAS: np.ndarray = _trained_sigmas().astype(np.float32)
"""The trained levels, rising: (1000,) float32, 0.0291672 to 14.6146412."""
DDPM_SIGMAS.flags.writeable = False

SIGMA_MIN = float(DDPM_SIGMAS[0])
SIGMA_MAX = float(DDPM_SIGMAS[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Discretization:
    """A way to pick noise levels: falling levels without the final 0, and its options.

    `defaults` names every option that the discretization takes.
    """

    levels: Callable[..., np.ndarray]
    max_steps: int
    defaults: dict[str, float] = field(default_factory=dict)


def sigmas(
    discretization: str,
    steps: int,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float | None = None,
) -> np.ndarray:
    """List the falling noise levels of `steps` steps, then 0: (steps + 1,) float32.

    None stands for the discretization's default. Raises ValueError for an unknown name,
    for steps out of range and for an option that the discretization does not take.
    """
    chosen = DISCRETIZATIONS.get(discretization)
    if chosen is None:
        names = ", ".join(DISCRETIZATIONS)
        raise ValueError(f"discretization `{discretization}` is unknown, hint: {names}")
    if not 1 <= steps <= chosen.max_steps:
        raise ValueError(
            f"steps `{steps}` is outside 1 to {chosen.max_steps} of {discretization}"
        )
    asked = {"sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho}
    options = {name: value for name, value in asked.items() if value is not None}
    for name in options.keys() - chosen.defaults.keys():
        raise ValueError(f"{discretization} takes no `{name}`")
    levels = chosen.levels(steps, **(chosen.defaults | options))
    return np.append(levels, 0).astype(np.float32)


def legacy_ddpm(steps: int) -> np.ndarray:
    """Pick trained levels evenly from the top: indices floor(999 - 999 i / steps).

    1000 steps walk the whole table.
    """
    if steps == TRAIN_STEPS:
        return DDPM_SIGMAS[::-1]
    last = TRAIN_STEPS - 1
    return DDPM_SIGMAS[np.linspace(last, 0, steps, endpoint=False).astype(int)]


def diffusers_ddpm(steps: int) -> np.ndarray:
    """Pick trained levels as diffusers' `leading` spacing with an offset of 1 does.

    It never starts at the top: 40 steps begin at index 976, sigma 12.74.
    """
    return DDPM_SIGMAS[np.arange(steps)[::-1] * (TRAIN_STEPS // steps) + 1]


def edm(steps: int, *, sigma_min: float, sigma_max: float, rho: float) -> np.ndarray:
    """Space levels evenly in sigma^(1/rho) (Karras et al. 2022, equation 5)."""
    if not 0 < sigma_min < sigma_max:
        raise ValueError(
            f"sigma_min `{sigma_min}` must lie between 0 and sigma_max `{sigma_max}`"
        )
    if not rho > 0:
        raise ValueError(f"rho `{rho}` must be above 0")
    ramp = np.linspace(0, 1, steps)
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (top + ramp * (bottom - top)) ** rho


DISCRETIZATIONS: dict[str, Discretization] = {
    "LegacyDDPMDiscretization": Discretization(
        levels=legacy_ddpm, max_steps=TRAIN_STEPS
    ),
    # The reference's default range, 0.002 to 80, lies outside what SDXL was trained on.
    "EDMDiscretization": Discretization(
        levels=edm,
        max_steps=TRAIN_STEPS,
        defaults={"sigma_min": SIGMA_MIN, "sigma_max": SIGMA_MAX, "rho": 7.0},
    ),
    "DiffusersDDPMDiscretization": Discretization(
        levels=diffusers_ddpm, max_steps=TRAIN_STEPS - 1
    ),
}


def last_part(levels: np.ndarray, strength: float) -> np.ndarray:
    """Keep the low end of a schedule, which img2img and the refiner run.

    Of the n + 1 levels, the final 0 among them, int(strength (n + 1)) stay: 40 steps at
    strength 0.75 keep 30 levels, 29 steps. One level, no step, is left at least. Raises
    ValueError for a strength outside 0 to 1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength `{strength}` is outside 0 to 1")
    return levels[len(levels) - max(int(strength * len(levels)), 1) :]


def first_part(levels: np.ndarray, strength: float) -> np.ndarray:
    """Keep the high end of a schedule, down to where `last_part` of it begins.

    The base stops there in mid-noise and the refiner goes on: 40 steps at strength 0.15
    are split 35 + 5. Raises ValueError for a strength outside 0 to 1.
    """
    return levels[: len(levels) + 1 - len(last_part(levels, strength))]


def initial_scale(sigma: float) -> float:
    """Give the factor from unit noise to a start at `sigma`: sqrt(1 + sigma^2)."""
    return float(np.sqrt(1 + float(sigma) ** 2))


def nearest_index(sigma: np.ndarray | float) -> np.ndarray:
    """Find the trained level nearest in sigma, as the reference quantizes: int64."""
    table = DDPM_SIGMAS.astype(np.float64)
    middles = (table[1:] + table[:-1]) / 2
    return np.searchsorted(middles, np.asarray(sigma, dtype=np.float64), side="left")


def interpolated_index(sigma: np.ndarray | float) -> np.ndarray:
    """Find the fractional trained index, linear in log sigma: float64, as diffusers.

    Levels outside the table give its ends. diffusers rounds it for the DPM solvers and
    feeds it as it is for Euler.
    """
    logs = np.log(DDPM_SIGMAS.astype(np.float64))
    return np.interp(np.log(sigma), logs, np.arange(TRAIN_STEPS))


def outside_trained_range(levels: np.ndarray) -> str | None:
    """Say, in numbers, when `levels` leave what eps-trained weights know; else None.

    The final 0 is no level: nothing is evaluated there.
    """
    known = np.asarray(levels, dtype=np.float64)
    known = known[known > 0]
    low, high = known.min(), known.max()
    # The ends are often given rounded: 0.0292 and 14.6146 are meant as the table's.
    if low >= 0.99 * SIGMA_MIN and high <= 1.001 * SIGMA_MAX:
        return None
    return (
        f"sigma {low:.4g} to {high:.4g} leaves the trained range "
        f"{SIGMA_MIN:.4g} to {SIGMA_MAX:.4g}: weights trained to predict noise give "
        "wrong pictures there, hint: leave sigma_min and sigma_max out"
    )


class Preconditioning(NamedTuple):
    """D(x) = c_skip x + c_out F(c_in x, time): float64, each shaped as sigma."""

    c_skip: np.ndarray
    c_out: np.ndarray
    c_in: np.ndarray
    time: np.ndarray


def precondition(
    scaling: str,
    sigma: np.ndarray | float,
    *,
    quantize: bool = True,
    sigma_data: float = 0.5,
) -> Preconditioning:
    """Compute by which coefficients a network F becomes the denoiser D(x, sigma).

    `quantize` moves sigma to the nearest trained level, for all coefficients, as the
    reference does; without it sigma is used as it is and time is fractional, as in
    diffusers. Networks that read log sigma for time know no table and ignore it.
    `sigma_data` counts for EDMScaling only. Raises ValueError for an unknown scaling.
    """
    if scaling not in SCALINGS:
        names = ", ".join(SCALINGS)
        raise ValueError(f"scaling `{scaling}` is unknown, hint: {names}")
    coefficients, log_time = SCALINGS[scaling]
    sigma = np.asarray(sigma, dtype=np.float64)
    if log_time:
        time = np.log(sigma) / 4
    elif quantize:
        time = nearest_index(sigma)
        sigma = DDPM_SIGMAS[time].astype(np.float64)
    else:
        time = interpolated_index(sigma)
    return Preconditioning(
        *coefficients(sigma, sigma_data), np.asarray(time, dtype=np.float64)
    )


Coefficients = tuple[np.ndarray, np.ndarray, np.ndarray]


def _eps(sigma: np.ndarray, _: float) -> Coefficients:
    """The network predicts the noise."""
    return np.ones_like(sigma), -sigma, 1 / np.sqrt(sigma**2 + 1)


def _v(sigma: np.ndarray, _: float) -> Coefficients:
    """The network predicts v (Salimans and Ho 2022)."""
    total = sigma**2 + 1
    return 1 / total, -sigma / np.sqrt(total), 1 / np.sqrt(total)


def _edm(sigma: np.ndarray, sigma_data: float) -> Coefficients:
    """The network predicts Karras' mixture of noise and image (2022, table 1)."""
    total = sigma**2 + sigma_data**2
    return (
        sigma_data**2 / total,
        sigma * sigma_data / np.sqrt(total),
        1 / np.sqrt(total),
    )


SCALINGS: dict[str, tuple[Callable[[np.ndarray, float], Coefficients], bool]] = {
    "EpsScaling": (_eps, False),
    "VScaling": (_v, False),
    "EDMScaling": (_edm, True),
    "VScalingWithEDMcNoise": (_v, True),
}
"""By the reference's names: coefficients, and whether time is ln(sigma) / 4."""
