"""Samplers: from noise at the first sigma to an image at the last, by name in SAMPLERS.

Design: a sampler knows only `denoise(x, sigma) -> x0`. It is plain numpy in float32 on
the host: latents are small, the network is large. Coefficients are python floats, in
double precision, and meet the arrays as float32. So every sampler can be proven with a
closed-form denoiser, and all of them run through one compiled graph.

    x        (B, 4, h, w) float32, at noise level sigmas[0]
    sigmas   (n + 1,) falling; the last is 0, or above 0 to stop in mid-noise
    noise    draws one array like x of standard normals, only where noise is added; the
             caller stacks one stream per image, so that batching changes nothing
    observe  is told (steps done, n) after each step; the caller owns progress

Names are the reference's; methods are as published, and cited one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from sdxl.steps import Churn, adams_weights, ancestral_step, exponential_step

Denoise = Callable[[np.ndarray, float], np.ndarray]
Noise = Callable[[], np.ndarray]
Observe = Callable[[int, int], None]


def sample_euler_edm(
    denoise: Denoise,
    x: np.ndarray,
    sigmas: np.ndarray,
    *,
    noise: Noise,
    observe: Observe | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = 999.0,
    s_noise: float = 1.0,
) -> np.ndarray:
    """Take Euler steps after churning (Karras et al. 2022, algorithm 2, Euler part)."""
    churn = Churn(s_churn / max(len(sigmas) - 1, 1), s_tmin, s_tmax, s_noise)
    for sigma, below in _walk(sigmas, observe):
        x, sigma = churn(x, sigma, noise)

        slope = (x - denoise(x, sigma)) / sigma
        x = x + slope * (below - sigma)
    return x


def sample_heun_edm(
    denoise: Denoise,
    x: np.ndarray,
    sigmas: np.ndarray,
    *,
    noise: Noise,
    observe: Observe | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = 999.0,
    s_noise: float = 1.0,
) -> np.ndarray:
    """Take Heun steps after churning (Karras et al. 2022, algorithm 2).

    A step to 0 is an Euler step, so n steps cost 2n - 1 evaluations.
    """
    churn = Churn(s_churn / max(len(sigmas) - 1, 1), s_tmin, s_tmax, s_noise)
    for sigma, below in _walk(sigmas, observe):
        x, sigma = churn(x, sigma, noise)

        slope = (x - denoise(x, sigma)) / sigma
        ahead = x + slope * (below - sigma)
        if below > 0:
            slope = (slope + (ahead - denoise(ahead, below)) / below) / 2
            ahead = x + slope * (below - sigma)
        x = ahead
    return x


def sample_euler_ancestral(
    denoise: Denoise,
    x: np.ndarray,
    sigmas: np.ndarray,
    *,
    noise: Noise,
    observe: Observe | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> np.ndarray:
    """Take Euler steps below the next level, then add noise up to it.

    The variance is DDIM's with the same eta (Song et al. 2021, equation 16): eta 0 is
    plain Euler, eta 1 the ancestral sampling of Ho et al. 2020. After k-diffusion.
    """
    for sigma, below in _walk(sigmas, observe):
        down, up = ancestral_step(sigma, below, eta)

        slope = (x - denoise(x, sigma)) / sigma
        x = x + slope * (down - sigma)

        if up > 0:
            x = x + noise() * (up * s_noise)
    return x


def sample_dpmpp_2s_ancestral(
    denoise: Denoise,
    x: np.ndarray,
    sigmas: np.ndarray,
    *,
    noise: Noise,
    observe: Observe | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> np.ndarray:
    """Take DPM-Solver++(2S) steps below the next level, then add noise up to it.

    Lu et al. 2022b, algorithm 1 with r = 1/2, whose two terms in D then become one; the
    ancestral noise is k-diffusion's. A step to 0 costs one evaluation, others two.
    """
    for sigma, below in _walk(sigmas, observe):
        down, up = ancestral_step(sigma, below, eta)

        x0 = denoise(x, sigma)
        if down > 0:
            middle = math.sqrt(sigma * down)
            x0 = denoise(exponential_step(x, x0, sigma, middle), middle)
        x = exponential_step(x, x0, sigma, down)

        if up > 0:
            x = x + noise() * (up * s_noise)
    return x


def sample_dpmpp_2m(
    denoise: Denoise,
    x: np.ndarray,
    sigmas: np.ndarray,
    *,
    noise: Noise,
    observe: Observe | None = None,
) -> np.ndarray:
    """Take DPM-Solver++(2M) steps (Lu et al. 2022b, algorithm 2).

    The first step and a step to 0 are first order. No noise is drawn.
    """
    before: tuple[float, np.ndarray] | None = None
    for sigma, below in _walk(sigmas, observe):
        x0 = denoise(x, sigma)

        ahead = x0
        if before is not None and below > 0:
            last_sigma, last_x0 = before
            weight = 0.5 * math.log(sigma / below) / math.log(last_sigma / sigma)
            ahead = x0 * (1 + weight) - last_x0 * weight
        x = exponential_step(x, ahead, sigma, below)

        before = sigma, x0
    return x


def sample_linear_multistep(
    denoise: Denoise,
    x: np.ndarray,
    sigmas: np.ndarray,
    *,
    noise: Noise,
    observe: Observe | None = None,
    order: int = 4,
) -> np.ndarray:
    """Take Adams-Bashforth steps of up to `order` on dx/dsigma, on the uneven levels.

    The slopes' weights are integrals of Lagrange polynomials, taken exactly; the first
    steps have as many slopes as there are. After k-diffusion. No noise is drawn.
    """
    slopes: list[np.ndarray] = []
    seen: list[float] = []
    for sigma, below in _walk(sigmas, observe):
        slopes = [*slopes, (x - denoise(x, sigma)) / sigma][-order:]
        seen = [*seen, sigma][-order:]

        for slope, weight in zip(slopes, adams_weights(seen, below), strict=True):
            x = x + slope * weight
    return x


def sample_lcm(
    denoise: Denoise,
    x: np.ndarray,
    sigmas: np.ndarray,
    *,
    noise: Noise,
    observe: Observe | None = None,
) -> np.ndarray:
    """Jump to the image and back up to the next level (Luo et al. 2023, algorithm 3).

    The published boundary weight of x, at most 7e-6 from index 19 on, is left out as in
    the reference. Only for consistency models.
    """
    for sigma, below in _walk(sigmas, observe):
        x = denoise(x, sigma)
        if below > 0:
            x = x + noise() * below
    return x


def _walk(sigmas: np.ndarray, observe: Observe | None) -> Iterator[tuple[float, float]]:
    """Yield (sigma, the next one) for each step, and report each finished step."""
    steps = len(sigmas) - 1
    for done, pair in enumerate(pairwise(float(sigma) for sigma in sigmas), start=1):
        yield pair
        if observe is not None:
            observe(done, steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """A method, the options it takes with their defaults, and what n steps cost.

    `adds_noise` says whether it draws noise with its default options.
    """

    run: Callable[..., np.ndarray]
    evaluations: Callable[[int], int] = lambda steps: steps
    options: Mapping[str, float] = field(default_factory=dict)
    adds_noise: bool = False

    def __call__(
        self,
        denoise: Denoise,
        x: np.ndarray,
        sigmas: np.ndarray,
        *,
        noise: Noise,
        observe: Observe | None = None,
        **options: float | None,
    ) -> np.ndarray:
        """Sample; an option that is None has its default.

        Raises ValueError for an option that this sampler does not take.
        """
        asked = {name: value for name, value in options.items() if value is not None}
        for name in asked.keys() - self.options.keys():
            taken = ", ".join(self.options) or "none"
            raise ValueError(f"option `{name}` is not taken here, hint: {taken}")
        return self.run(denoise, x, sigmas, noise=noise, observe=observe, **asked)


_CHURN = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": 999.0, "s_noise": 1.0}
_ANCESTRAL = {"eta": 1.0, "s_noise": 1.0}

SAMPLERS: dict[str, Sampler] = {
    "EulerEDMSampler": Sampler(run=sample_euler_edm, options=_CHURN),
    "HeunEDMSampler": Sampler(
        run=sample_heun_edm, options=_CHURN, evaluations=lambda steps: 2 * steps - 1
    ),
    "EulerAncestralSampler": Sampler(
        run=sample_euler_ancestral, options=_ANCESTRAL, adds_noise=True
    ),
    "DPMPP2SAncestralSampler": Sampler(
        run=sample_dpmpp_2s_ancestral,
        options=_ANCESTRAL,
        evaluations=lambda steps: 2 * steps - 1,
        adds_noise=True,
    ),
    "DPMPP2MSampler": Sampler(run=sample_dpmpp_2m),
    "LinearMultistepSampler": Sampler(run=sample_linear_multistep),
    "LCMSampler": Sampler(run=sample_lcm, adds_noise=True),
}
