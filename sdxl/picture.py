"""What the model needs to know of a picture, and how a batch of them begins.

Design: a picture's random numbers come from one stream of its own seed, in this order:

1. with an initial image, the sample of its latents' posterior;
2. the noise that it starts from: alone, or added to those latents;
3. whatever its sampler adds, in every stage.

So nothing that shares its batch can change it, and a second stage goes on where the
first one ended. diffusers draws in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sdxl.conditioning import Conditions
from sdxl.noise import NoiseStream
from sdxl.samplers import Noise
from sdxl.schedule import initial_scale, last_part, sigmas


class Picture(Conditions, Protocol):
    """What a picture says of itself; None is the sampler's or schedule's default.

    `strength` counts for a picture that starts from an image; thresholding is done
    where a ratio is given.
    """

    prompt: str
    negative_prompt: str | None
    seed: int
    guidance_scale: float
    width: int
    height: int
    steps: int
    sampler: str
    discretization: str
    guider: str
    sigma_min: float | None
    sigma_max: float | None
    rho: float | None
    eta: float | None
    s_churn: float | None
    s_tmin: float | None
    s_tmax: float | None
    s_noise: float | None
    strength: float | None
    thresholding_ratio: float | None
    thresholding_maximum: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where the sampling of n pictures begins.

    `x` is (n, 4, h, w) float32 at noise level `levels[0]`; `levels` fall to 0, or to
    where the next stage takes over; `streams` are the pictures' random numbers.
    """

    x: np.ndarray
    levels: np.ndarray
    streams: Sequence[NoiseStream]


def levels_of(picture: Picture) -> np.ndarray:
    """List the falling noise levels of a picture's whole schedule, and 0."""
    return sigmas(
        picture.discretization,
        picture.steps,
        sigma_min=picture.sigma_min,
        sigma_max=picture.sigma_max,
        rho=picture.rho,
    )


def streams_of(pictures: Sequence[Picture], kind: str) -> list[NoiseStream]:
    """Open each picture's stream of random numbers."""
    return [NoiseStream(kind, picture.seed) for picture in pictures]


def from_noise(pictures: Sequence[Picture], kind: str, shape: tuple[int, ...]) -> Start:
    """Start pictures of latent `shape` (4, h, w) from noise alone."""
    streams, levels = streams_of(pictures, kind), levels_of(pictures[0])
    x = draw(streams, shape) * np.float32(initial_scale(levels[0]))
    return Start(x=x, levels=levels, streams=streams)


def from_latents(pictures: Sequence[Picture], kind: str, init: np.ndarray) -> Start:
    """Start from images' latents (n, 4, h, w), with noise added for `strength`.

    The first draw of each stream was the posterior's and is passed over. Raises
    ValueError where a picture has no strength.
    """
    strength = pictures[0].strength
    if strength is None:
        raise ValueError("a picture that starts from an image has no strength")
    streams = streams_of(pictures, kind)
    draw(streams, init.shape[1:])
    levels = last_part(levels_of(pictures[0]), strength)
    return noised(init, levels, streams)


def noised(
    latents: np.ndarray, levels: np.ndarray, streams: Sequence[NoiseStream]
) -> Start:
    """Add the first level's noise to latents (n, 4, h, w): SDEdit, Meng et al. 2021."""
    x = latents + draw(streams, latents.shape[1:]) * np.float32(levels[0])
    return Start(x=x, levels=levels, streams=streams)


def draw(streams: Sequence[NoiseStream], shape: tuple[int, ...]) -> np.ndarray:
    """Draw one array of `shape` from each stream: (n, *shape) float32."""
    return np.concatenate([stream.draw((1, *shape)) for stream in streams])


def step_noise(
    streams: Sequence[NoiseStream], shape: tuple[int, ...], size: int
) -> Noise:
    """Give a batch's noise: a row for each stream, the last one repeated to `size`."""

    def noise() -> np.ndarray:
        rows = draw(streams, shape)
        return np.concatenate((rows, *[rows[-1:]] * (size - len(rows))))

    return noise


def filled(count: int, batch_size: int) -> Iterator[tuple[list[int], int]]:
    """Yield rows for full batches, the last one repeated, and how many are valid."""
    for start in range(0, count, batch_size):
        rows = list(range(start, min(start + batch_size, count)))
        yield rows + rows[-1:] * (batch_size - len(rows)), len(rows)
