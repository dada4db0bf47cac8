"""What a picture is conditioned on, beside its noise: text, and numbers of its size.

Design: the numbers are embedded on the host in float32, where integers are exact; the
reference embeds them in float16, where those above 2048 are not. Plain numpy.

The conditional branch is the prompt's text, an empty prompt being text like any other.
The unconditional branch is the negative prompt's. A base model that is given none has
zeros there, hidden states and pooled vector alike, and the same sizes: so SDXL-Base was
trained, and so diffusers does with `negative_prompt=None`. A negative prompt that is
given is encoded, even `""`. A refiner that is given none encodes `""`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sdxl.config import ModelConfig

MAX_PERIOD = 10_000
# A refiner's scores, where a picture brings none: wished for, and guided away from.
AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5


class Conditions(Protocol):
    """Numbers that a picture is conditioned on.

    Sizes in pixels: of the source, of the cut from it, of the picture to make. Scores
    are a refiner's; None is 6.0, and 2.5 for the unconditional branch.
    """

    original_width: int
    original_height: int
    crop_top: int
    crop_left: int
    target_width: int
    target_height: int
    aesthetic_score: float | None
    negative_aesthetic_score: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """One encoded text: hidden states (77, D) and pooled vector (P,), float32."""

    hidden: np.ndarray
    pooled: np.ndarray

    def zeroed(self) -> Text:
        """The unconditional text of a base model."""
        return Text(
            hidden=np.zeros_like(self.hidden), pooled=np.zeros_like(self.pooled)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """Contexts (n, 77, D) and vectors (n, V) of both branches, float32."""

    context: np.ndarray
    vector: np.ndarray
    uncond_context: np.ndarray
    uncond_vector: np.ndarray

    def __len__(self) -> int:
        return len(self.context)

    def take(self, indices: Sequence[int]) -> Conditioning:
        """Pick pictures, also the same one repeatedly."""
        rows = np.asarray(indices)
        return Conditioning(
            context=self.context[rows],
            vector=self.vector[rows],
            uncond_context=self.uncond_context[rows],
            uncond_vector=self.uncond_vector[rows],
        )

    def halves(self) -> tuple[np.ndarray, np.ndarray]:
        """Context and vector of both branches, the unconditional first: (2n, …)."""
        return (
            np.concatenate((self.uncond_context, self.context)),
            np.concatenate((self.uncond_vector, self.vector)),
        )

    def conditional(self) -> tuple[np.ndarray, np.ndarray]:
        """Context and vector of the conditional branch: (n, …)."""
        return self.context, self.vector


def frequencies(half: int, *, spaces: int | None = None) -> np.ndarray:
    """Return (half,) float32: 1, falling evenly in logarithm, 1e-4 after `spaces`."""
    steps = np.arange(half) / (spaces or half)
    return np.exp(-math.log(MAX_PERIOD) * steps).astype(np.float32)


def sinusoid(values: np.ndarray, width: int) -> np.ndarray:
    """Embed (n,) numbers: (n, width) float32, cosines first, then sines."""
    values = np.asarray(values, np.float32).reshape(-1, 1)
    angles = values * frequencies(width // 2)
    return np.concatenate((np.cos(angles), np.sin(angles)), axis=1)


def numbers_of(
    config: ModelConfig, picture: Conditions, *, negative: bool
) -> list[float]:
    """List the numbers of one branch in the order of the vector."""
    numbers = [
        picture.original_height,
        picture.original_width,
        picture.crop_top,
        picture.crop_left,
    ]
    if config.kind == "base":
        return [*numbers, picture.target_height, picture.target_width]
    return [*numbers, _score(picture, negative)]


def _score(picture: Conditions, negative: bool) -> float:
    if negative:
        score, default = picture.negative_aesthetic_score, NEGATIVE_AESTHETIC_SCORE
    else:
        score, default = picture.aesthetic_score, AESTHETIC_SCORE
    return default if score is None else score


def vectors(
    config: ModelConfig,
    texts: Sequence[Text],
    pictures: Sequence[Conditions],
    negative: bool,
) -> np.ndarray:
    """Join pooled texts and embedded numbers: (n, adm_in_channels) float32."""
    rows = []
    for text, picture in zip(texts, pictures, strict=True):
        numbers = numbers_of(config, picture, negative=negative)
        embedded = sinusoid(np.array(numbers), config.size_embed_dim)
        rows.append(np.concatenate((text.pooled, embedded.reshape(-1))))
    return np.stack(rows)


def conditioning(
    config: ModelConfig,
    texts: Sequence[Text],
    unconditional: Sequence[Text],
    pictures: Sequence[Conditions],
) -> Conditioning:
    """Assemble both branches of n pictures from their encoded texts and numbers."""
    return Conditioning(
        context=np.stack([text.hidden for text in texts]),
        vector=vectors(config, texts, pictures, negative=False),
        uncond_context=np.stack([text.hidden for text in unconditional]),
        uncond_vector=vectors(config, unconditional, pictures, negative=True),
    )
