"""From prompts to pixels on one device, a batch at a time.

    pictures ──encode──> Conditioning ──sample──> latents ──decode──> pixels
               texts                    │  the step              uint8
               (cached)   encode_images ┘  graph, n times

Design: every stage runs graphs of a fixed batch size. A short batch is filled up by
repeating its last picture, and only the valid ones are returned; noise comes from each
picture's own seed. So nothing that shares a batch can change a picture. `begin` and
`run` are the halves of `sample`, for whoever puts two models behind each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sdxl.autoencoder import TILE, Autoencoder
from sdxl.cache_key import graphs_folder
from sdxl.compile_cache import CompileCache
from sdxl.conditioning import Conditioning, conditioning
from sdxl.config import PRESETS, VAE_FACTOR, ModelConfig
from sdxl.denoiser import Denoiser, Mode
from sdxl.graphs import Graphs, set_up
from sdxl.lora import Lora, LoraSet
from sdxl.memory import Peak, peak_memory
from sdxl.model import SDXL
from sdxl.picture import (
    Picture,
    Start,
    draw,
    filled,
    from_latents,
    from_noise,
    step_noise,
    streams_of,
)
from sdxl.random_weights import RandomCheckpoint
from sdxl.samplers import SAMPLERS, Denoise, Observe
from sdxl.texts import Texts
from sdxl.thresholding import thresholded
from sdxl.weights import load_into, open_checkpoint

SAMPLER_OPTIONS = ("eta", "s_churn", "s_tmin", "s_tmax", "s_noise")


class Pipeline:
    """One SDXL on one device, base, refiner or consistency model. `load` makes it."""

    def __init__(
        self,
        model: SDXL,
        config: ModelConfig,
        graphs: Graphs,
        *,
        noise: str = "numpy",
        scaling: str = "EpsScaling",
        quantize_sigma: bool = True,
        vae_tile: int = TILE,
    ) -> None:
        self.model = model
        self.config = config
        self.graphs = graphs
        self.noise = noise
        self.texts = Texts(model, config, graphs)
        self.autoencoder = Autoencoder(
            model.first_stage_model, config.vae, graphs, vae_tile
        )
        self.denoiser = Denoiser(
            unet=model.model.diffusion_model,
            graphs=graphs,
            scaling=scaling,
            quantize=quantize_sigma,
        )

    @classmethod
    def load(
        cls,
        checkpoint: Path | None,
        *,
        preset: str | None = None,
        precision: str = "fp32",
        jit_level: str = "O2",
        device_target: str = "CPU",
        device_id: int = 0,
        noise: str = "numpy",
        threads: int | None = None,
        flash_attention: bool | None = None,
        loras: Sequence[tuple[Path, float]] = (),
        scaling: str = "EpsScaling",
        quantize_sigma: bool = True,
        vae_tile: int = TILE,
        name: str = "",
        compile_cache: Path | None = None,
    ) -> Pipeline:
        """Read a checkpoint onto a device; None gives random weights of `preset`.

        `loras` are files and scales, merged while reading; `scaling` and
        `quantize_sigma` are `schedule.precondition`'s, `vae_tile` is `Autoencoder`'s;
        `name` precedes graph keys. Compiled graphs are kept below `compile_cache` for
        the processes to come.
        Raises `CheckpointError` when the checkpoint is not whole or not of that preset,
        or a LoRA does not fit.
        """
        set_up(device_target, device_id, threads, flash_attention=flash_attention)
        if checkpoint is None:
            stored = RandomCheckpoint(PRESETS[preset or "tiny"])
        else:
            stored = open_checkpoint(checkpoint, preset=preset)
        stored.check()
        cache = None
        if compile_cache is not None:
            cache = CompileCache(graphs_folder(compile_cache, stored.config))
        graphs = Graphs(
            precision=precision,
            jit_level=jit_level,
            device_target=device_target,
            prefix=name,
            cache=cache,
        )
        merged = LoraSet(
            [Lora(path=path, scale=scale) for path, scale in loras], stored.config
        )
        model = SDXL(stored.config, precision)
        load_into(model, stored, "", patch=merged.apply if loras else None)
        return cls(
            model,
            stored.config,
            graphs,
            noise=noise,
            scaling=scaling,
            quantize_sigma=quantize_sigma,
            vae_tile=vae_tile,
        )

    @property
    def compiles(self) -> dict[str, int]:
        """How often each graph key was compiled; more than once is a bug."""
        return self.graphs.compiles

    @property
    def compile_ms(self) -> dict[str, float]:
        """How long each graph key took to compile, in all."""
        return self.graphs.compile_ms

    @property
    def loads(self) -> dict[str, int]:
        """How often each graph key came from the compile cache."""
        return self.graphs.loads

    def peak_memory(self) -> Peak:
        """Give the most memory needed so far, in MB: host's, and device's if any."""
        return peak_memory()

    def encode(self, pictures: Sequence[Picture], batch_size: int) -> Conditioning:
        """Encode prompts and numbers; a text seen lately is not encoded again."""
        negatives = [self._negative(picture) for picture in pictures]
        wanted = [picture.prompt for picture in pictures]
        wanted += [text for text in negatives if text is not None]
        known = self.texts.encode(wanted, batch_size)

        texts = [known[picture.prompt] for picture in pictures]
        unconditional = [
            texts[i].zeroed() if text is None else known[text]
            for i, text in enumerate(negatives)
        ]
        return conditioning(self.config, texts, unconditional, pictures)

    def encode_images(
        self, pixels: np.ndarray, pictures: Sequence[Picture], batch_size: int
    ) -> np.ndarray:
        """Turn pixels (n, 8h, 8w, 3) uint8 into latents (n, 4, h, w) float32.

        They are drawn from the autoencoder's posterior with the first noise of each
        picture's stream, as `sample` expects of its `init`.
        """
        mean, deviation = self.autoencoder.posterior(pixels, batch_size)
        return mean + deviation * draw(streams_of(pictures, self.noise), mean.shape[1:])

    def sample(
        self,
        cond: Conditioning,
        pictures: Sequence[Picture],
        batch_size: int,
        init: np.ndarray | None = None,
        observe: Observe | None = None,
    ) -> np.ndarray:
        """Denoise to latents (n, 4, h, w) float32, from noise or from noised `init`.

        The pictures share size, sampler, steps, schedule and strength; guidance scale
        and seed are each one's own.
        """
        start = self.begin(pictures, init)
        return self.run(cond, pictures, batch_size, start, observe)

    def begin(self, pictures: Sequence[Picture], init: np.ndarray | None) -> Start:
        """Start pictures of one size and schedule: from noise, or from images' latents.

        With `init` (n, 4, h, w) the low end of the schedule is run, by `strength`.
        """
        if init is not None:
            return from_latents(pictures, self.noise, init)
        h, w = latent_size(pictures[0])
        return from_noise(pictures, self.noise, (self.config.unet.in_channels, h, w))

    def run(
        self,
        cond: Conditioning,
        pictures: Sequence[Picture],
        batch_size: int,
        start: Start,
        observe: Observe | None = None,
    ) -> np.ndarray:
        """Sample down the levels of `start`: latents (n, 4, h, w) float32."""
        parts = []
        for rows, valid in filled(len(pictures), batch_size):
            streams = [start.streams[row] for row in rows[:valid]]
            x = SAMPLERS[pictures[0].sampler](
                self._denoise(cond.take(rows), [pictures[row] for row in rows]),
                start.x[rows],
                start.levels,
                noise=step_noise(streams, start.x.shape[1:], batch_size),
                observe=observe,
                **{name: getattr(pictures[0], name) for name in SAMPLER_OPTIONS},
            )
            parts.append(x[:valid])
        return np.concatenate(parts)

    def decode(self, latents: np.ndarray, batch_size: int) -> np.ndarray:
        """Turn latents (n, 4, h, w) into pixels (n, 8h, 8w, 3) uint8, in float32.

        A picture with a value that is no number becomes all black.
        """
        return self.autoencoder.decode(latents, batch_size)

    def _negative(self, picture: Picture) -> str | None:
        """Say which text the unconditional branch encodes; None stands for zeros."""
        if picture.negative_prompt is None and self.config.kind == "refiner":
            return ""
        return picture.negative_prompt

    def _denoise(self, cond: Conditioning, pictures: Sequence[Picture]) -> Denoise:
        first = pictures[0]
        guidance = np.array([p.guidance_scale for p in pictures], np.float32)
        mode = self._mode(first.guider)
        denoise = self.denoiser.bind(cond, guidance, latent_size(first), mode)
        if first.thresholding_ratio is None:
            return denoise
        return thresholded(
            denoise,
            ratio=first.thresholding_ratio,
            maximum=first.thresholding_maximum or 1.0,
        )

    def _mode(self, guider: str) -> Mode:
        """Choose the step graph. A consistency model embeds its scale where it can.

        Under `VanillaCFG` it is guided like any other, without the embedding: the
        reference's way.
        """
        if guider == "VanillaCFG":
            return "guided"
        if guider == "IdentityGuider":
            embeds_guidance = self.config.unet.time_cond_proj_dim is not None
            return "embedded" if embeds_guidance else "plain"
        raise ValueError(
            f"guider `{guider}` is unknown, hint: VanillaCFG or IdentityGuider"
        )


def latent_size(picture: Picture) -> tuple[int, int]:
    """Give height and width of a picture's latents."""
    return picture.height // VAE_FACTOR, picture.width // VAE_FACTOR
