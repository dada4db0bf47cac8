"""Base, then refiner: `Pipeline`'s protocol over two models.

    noise ──base──> latents at the seam ──refiner──> latents ──decode──> pixels
            levels above it               levels below it

Design: `stage2strength` decides which low end of the schedule is the refiner's. With
`finish_denoising` it takes the latents at the seam, noise and all, and goes on: one
walk down one schedule, 35 + 5 steps of 40 at 0.15. Without, the base walks all of it,
and the refiner adds noise again. Every picture keeps its prompt, seed and guidance
scale, and its one stream of random numbers, in both.

Source: Podell et al. 2023, section 2.5. The seam is the reference's; diffusers has the
same as `denoising_end` and `denoising_start`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from sdxl.conditioning import Conditioning
from sdxl.memory import Peak
from sdxl.picture import Picture, Start, levels_of, noised
from sdxl.pipeline import Pipeline
from sdxl.residents import Residents
from sdxl.samplers import Observe
from sdxl.schedule import last_part

PREFIX = "refiner-"


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoConditionings:
    """What each stage is conditioned on; the refiner's may be encoded later."""

    base: Conditioning
    refiner: Conditioning | None


class Part(NamedTuple):
    """Pictures of one size and schedule, on their way through both stages."""

    cond: TwoConditionings
    pictures: Sequence[Picture]
    init: np.ndarray | None = None


class TwoStage:
    """A base and a refiner on one device. `load` makes it."""

    def __init__(
        self,
        residents: Residents,
        *,
        stage2strength: float = 0.15,
        finish_denoising: bool = True,
        keep_base: bool = False,
    ) -> None:
        self.residents = residents
        self.stage2strength = stage2strength
        self.finish_denoising = finish_denoising
        self.keep_base = keep_base
        self._base_latents: np.ndarray | None = None

    @classmethod
    def load(
        cls,
        checkpoint: Path | None,
        *,
        refiner_checkpoint: Path | None,
        refiner_preset: str | None = None,
        stage2strength: float = 0.15,
        finish_denoising: bool = True,
        keep_base: bool = False,
        resident: Literal["both", "one"] = "both",
        preset: str | None = None,
        loras: Sequence[tuple[Path, float]] = (),
        scaling: str = "EpsScaling",
        **shared: Any,
    ) -> TwoStage:
        """Read both checkpoints onto a device, or with `resident` "one" the base's.

        LoRAs and scaling are the base's; `shared` are the other arguments of
        `Pipeline.load`. Raises `CheckpointError` like it.
        """
        base = partial(
            Pipeline.load,
            checkpoint,
            preset=preset,
            loras=loras,
            scaling=scaling,
            **shared,
        )
        if refiner_checkpoint is None:
            refiner_preset = refiner_preset or "tiny-refiner"
        refiner = partial(
            Pipeline.load,
            refiner_checkpoint,
            preset=refiner_preset,
            name=PREFIX,
            **shared,
        )
        residents = Residents({"base": base, "refiner": refiner}, one=resident == "one")
        residents.get("base")
        if resident == "both":
            residents.get("refiner")
        return cls(
            residents,
            stage2strength=stage2strength,
            finish_denoising=finish_denoising,
            keep_base=keep_base,
        )

    @property
    def base(self) -> Pipeline:
        return self.residents.get("base")

    @property
    def refiner(self) -> Pipeline:
        return self.residents.get("refiner")

    @property
    def compiles(self) -> dict[str, int]:
        """How often each graph key was compiled: once, or once per loading."""
        return self.residents.count("compiles")

    @property
    def compile_ms(self) -> dict[str, float]:
        """How long each graph key took to compile, in all."""
        return self.residents.count("compile_ms")

    @property
    def loads(self) -> dict[str, int]:
        """How often each graph key came from the compile cache."""
        return self.residents.count("loads")

    def peak_memory(self) -> Peak:
        """Give the most memory needed so far, in MB: host's, and device's if any."""
        return self.residents.peak_memory()

    @property
    def whole_leases(self) -> bool:
        """Tell whether `sample_all` saves much: each change of place loads a model.

        The base's pictures could only be kept by another change.
        """
        return self.residents.one and not self.keep_base

    def encode(self, pictures: Sequence[Picture], batch_size: int) -> TwoConditionings:
        """Encode prompts and numbers for each stage that is there."""
        return TwoConditionings(
            base=self.base.encode(pictures, batch_size),
            refiner=None
            if self.residents.one
            else self.refiner.encode(pictures, batch_size),
        )

    def encode_images(
        self, pixels: np.ndarray, pictures: Sequence[Picture], batch_size: int
    ) -> np.ndarray:
        """Turn pixels (n, 8h, 8w, 3) uint8 into the base's latents, as `Pipeline` does.

        The base then walks from the picture's strength down to the seam.
        """
        return self.base.encode_images(pixels, pictures, batch_size)

    def sample(
        self,
        cond: TwoConditionings,
        pictures: Sequence[Picture],
        batch_size: int,
        init: np.ndarray | None = None,
        observe: Observe | None = None,
    ) -> np.ndarray:
        """Denoise in both stages: latents (n, 4, h, w) float32.

        `observe` hears of each stage's steps where both are resident.
        """
        part = Part(cond=cond, pictures=pictures, init=init)
        return self.sample_all([part], batch_size, observe)[0]

    def sample_all(
        self, parts: Sequence[Part], batch_size: int, observe: Observe | None = None
    ) -> list[np.ndarray]:
        """Sample several parts, all of them in the base before any in the refiner.

        So where one model fits at a time, they change places once for all parts.
        """
        observe = None if self.residents.one else observe
        parts = [Part(*part) for part in parts]
        starts = [self._base_stage(part, batch_size, observe) for part in parts]
        return [
            self._refiner_stage(part, start, batch_size, observe)
            for part, start in zip(parts, starts, strict=True)
        ]

    def decode(self, latents: np.ndarray, batch_size: int) -> np.ndarray:
        """Turn latents into pixels with the refiner's autoencoder."""
        return self.refiner.decode(latents, batch_size)

    def base_pixels(self, batch_size: int) -> np.ndarray | None:
        """Decode what the base made of the last part sampled, if it is to be kept.

        Pixels (n, 8h, 8w, 3) uint8; still noisy where the base stopped at the seam.
        """
        if self._base_latents is None:
            return None
        return self.base.decode(self._base_latents, batch_size)

    def _base_stage(
        self, part: Part, batch_size: int, observe: Observe | None
    ) -> Start:
        """Run the base; return where the refiner starts."""
        start = self.base.begin(part.pictures, part.init)
        high, low = self._split(part.pictures[0], start.levels)
        first = Start(x=start.x, levels=high, streams=start.streams)
        latents = self.base.run(
            part.cond.base, part.pictures, batch_size, first, observe
        )
        if self.keep_base:
            self._base_latents = latents
        if self.finish_denoising:
            return Start(x=latents, levels=low, streams=start.streams)
        return noised(latents, low, start.streams)

    def _refiner_stage(
        self, part: Part, start: Start, batch_size: int, observe: Observe | None
    ) -> np.ndarray:
        cond = part.cond.refiner
        if cond is None:
            cond = self.refiner.encode(part.pictures, batch_size)
        return self.refiner.run(cond, part.pictures, batch_size, start, observe)

    def _split(
        self, picture: Picture, levels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Divide the base's levels: which are walked by it, which by the refiner.

        The seam lies where it lies in the whole schedule, also for a picture that
        starts from an image: one that starts below it is the refiner's alone.
        """
        low = last_part(levels_of(picture), self.stage2strength)
        if not self.finish_denoising:
            return levels, low
        kept = min(len(low), len(levels))
        return levels[: len(levels) + 1 - kept], levels[len(levels) - kept :]
