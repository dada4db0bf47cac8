"""From prompts to pixels on one device, a batch at a time.

    pictures ──encode──> Conditioning ──sample──> latents ──decode──> pixels
               texts                   the step              uint8
               (cached)                graph, n times

Design: every stage runs graphs of a fixed batch size. A short batch is filled up by
repeating its last picture, and only the valid ones are returned; noise comes from each
picture's own seed. So nothing that shares a batch can change a picture.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore import ops as msops

from sdxl.conditioning import Conditioning, Sizes, Text, conditioning
from sdxl.config import PRESETS, VAE_FACTOR, ModelConfig
from sdxl.denoiser import Denoiser, Mode
from sdxl.graphs import Graphs, set_up
from sdxl.model import SDXL
from sdxl.noise import NoiseStream
from sdxl.random_weights import RandomCheckpoint
from sdxl.samplers import SAMPLERS, Observe
from sdxl.schedule import initial_scale, sigmas
from sdxl.tokenizer import END_ID, Tokenizer
from sdxl.vae import Decode, Encode
from sdxl.weights import load_into, open_checkpoint

CACHED_TEXTS = 256
SAMPLER_OPTIONS = ("eta", "s_churn", "s_tmin", "s_tmax", "s_noise")


class Picture(Sizes, Protocol):
    """What a picture says of itself; None is the sampler's or schedule's default."""

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


class EncodeText(nn.Cell):
    """Run every text encoder: end positions, ids of each -> hidden states, pooled."""

    def __init__(self, model: SDXL) -> None:
        super().__init__(auto_prefix=False)
        self.embedders = model.conditioner.embedders

    def construct(self, end: Tensor, *ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden, pooled = (), None
        for i in range(len(ids)):
            states, vector = self.embedders[i](ids[i], end)
            hidden = (*hidden, states.astype(ms.float32))
            if vector is not None:
                pooled = vector.astype(ms.float32)
        return msops.concat(hidden, -1), pooled


class Pipeline:
    """One SDXL on one device. `load` makes it."""

    def __init__(
        self, model: SDXL, config: ModelConfig, graphs: Graphs, *, noise: str = "numpy"
    ) -> None:
        self.model = model
        self.config = config
        self.graphs = graphs
        self.noise = noise
        self.denoiser = Denoiser(unet=model.model.diffusion_model, graphs=graphs)
        self._tokenizers = [Tokenizer(e.pad_id) for e in config.text_encoders]
        self._texts: OrderedDict[tuple[str, int], Text] = OrderedDict()

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
    ) -> Pipeline:
        """Read a checkpoint onto a device; None gives random weights of `preset`.

        Raises `CheckpointError` when it is not whole or not of that preset.
        """
        set_up(device_target, device_id, threads)
        graphs = Graphs(
            precision=precision, jit_level=jit_level, device_target=device_target
        )
        if checkpoint is None:
            stored = RandomCheckpoint(PRESETS[preset or "tiny"])
        else:
            stored = open_checkpoint(checkpoint, preset=preset)
        stored.check()
        model = SDXL(stored.config, precision)
        load_into(model, stored, "")
        return cls(model, stored.config, graphs, noise=noise)

    @property
    def compiles(self) -> dict[str, int]:
        """How often each graph key was compiled; more than once is a bug."""
        return self.graphs.compiles

    @property
    def compile_ms(self) -> dict[str, float]:
        """How long each graph key took to compile, in all."""
        return self.graphs.compile_ms

    def encode(self, pictures: Sequence[Picture], batch_size: int) -> Conditioning:
        """Encode prompts and sizes; a text seen lately is not encoded again."""
        negatives = [self._negative(picture) for picture in pictures]
        wanted = [picture.prompt for picture in pictures]
        wanted += [text for text in negatives if text is not None]
        known = self._encode_texts(wanted, batch_size)

        texts = [known[picture.prompt] for picture in pictures]
        unconditional = [
            texts[i].zeroed() if text is None else known[text]
            for i, text in enumerate(negatives)
        ]
        return conditioning(self.config, texts, unconditional, pictures)

    def sample(
        self,
        cond: Conditioning,
        pictures: Sequence[Picture],
        batch_size: int,
        observe: Observe | None = None,
    ) -> np.ndarray:
        """Denoise from each picture's own noise: latents (n, 4, h, w) float32.

        The pictures share size, sampler, steps and schedule; guidance scale and seed
        are each one's own.
        """
        parts = []
        for rows, valid in filled(len(pictures), batch_size):
            part = [pictures[row] for row in rows]
            x = self._sample_batch(cond.take(rows), part, observe)
            parts.append(x[:valid])
        return np.concatenate(parts)

    def decode(self, latents: np.ndarray, batch_size: int) -> np.ndarray:
        """Turn latents (n, 4, h, w) into pixels (n, 8h, 8w, 3) uint8, in float32.

        A picture with a value that is no number becomes all black.
        """
        _, _, h, w = latents.shape
        vae = self.model.first_stage_model
        z = (latents / self.config.vae.scale_factor).astype(np.float32)
        parts = []
        for rows, valid in filled(len(z), batch_size):
            images = self.graphs.run(
                f"decode-b{len(rows)}-{h}x{w}", lambda: Decode(vae), z[rows]
            )
            parts.append(to_pixels(images[:valid]))
        return np.concatenate(parts)

    def encode_images(
        self, pixels: np.ndarray, batch_size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Turn pixels (n, 8h, 8w, 3) uint8 into the posterior of their latents.

        Returns mean and standard deviation, (n, 4, h, w) float32, both scaled as the
        network knows latents.
        """
        _, H, W, _ = pixels.shape
        vae, scale = self.model.first_stage_model, self.config.vae.scale_factor
        x = (pixels.astype(np.float32) / 127.5 - 1).transpose(0, 3, 1, 2)
        means, deviations = [], []
        for rows, valid in filled(len(x), batch_size):
            name = f"encode-b{len(rows)}-{H // VAE_FACTOR}x{W // VAE_FACTOR}"
            mean, logvar = self.graphs.run(name, lambda: Encode(vae), x[rows])
            means.append(mean[:valid] * np.float32(scale))
            deviations.append(np.exp(0.5 * logvar[:valid]) * np.float32(scale))
        return np.concatenate(means), np.concatenate(deviations)

    def _negative(self, picture: Picture) -> str | None:
        """Say which text the unconditional branch encodes; None stands for zeros."""
        if picture.negative_prompt is None and self.config.kind == "refiner":
            return ""
        return picture.negative_prompt

    def _encode_texts(self, texts: Iterable[str], batch_size: int) -> dict[str, Text]:
        """Encode distinct texts. Batch size is in the cache's key: it shows in 1e-6."""
        distinct = dict.fromkeys(texts)
        missing = [text for text in distinct if (text, batch_size) not in self._texts]
        fresh: dict[str, Text] = {}
        for rows, valid in filled(len(missing), batch_size):
            part = [missing[row] for row in rows]
            hidden, pooled = self._run_encoders(part)
            for i in range(valid):
                fresh[part[i]] = Text(hidden=hidden[i], pooled=pooled[i])

        found = {
            text: fresh[text] if text in fresh else self._texts[text, batch_size]
            for text in distinct
        }
        self._remember(found, batch_size)
        return found

    def _run_encoders(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = [tokenizer(texts)[0] for tokenizer in self._tokenizers]
        end = (ids[-1] == END_ID).argmax(axis=1).astype(np.int32)
        name = f"text-b{len(texts)}"
        return self.graphs.run(name, lambda: EncodeText(self.model), end, *ids)

    def _remember(self, texts: dict[str, Text], batch_size: int) -> None:
        for text, encoded in texts.items():
            self._texts[text, batch_size] = encoded
            self._texts.move_to_end((text, batch_size))
        while len(self._texts) > CACHED_TEXTS:
            self._texts.popitem(last=False)

    def _sample_batch(
        self, cond: Conditioning, pictures: Sequence[Picture], observe: Observe | None
    ) -> np.ndarray:
        first = pictures[0]
        h, w = first.height // VAE_FACTOR, first.width // VAE_FACTOR
        guidance = np.array([p.guidance_scale for p in pictures], np.float32)
        denoise = self.denoiser.bind(cond, guidance, (h, w), self._mode(first.guider))
        levels = sigmas(
            first.discretization,
            first.steps,
            sigma_min=first.sigma_min,
            sigma_max=first.sigma_max,
            rho=first.rho,
        )
        noise = noise_of(pictures, self.noise, (1, self.config.unet.in_channels, h, w))
        return SAMPLERS[first.sampler](
            denoise,
            noise() * np.float32(initial_scale(levels[0])),
            levels,
            noise=noise,
            observe=observe,
            **{option: getattr(first, option) for option in SAMPLER_OPTIONS},
        )

    def _mode(self, guider: str) -> Mode:
        if guider == "VanillaCFG":
            return "guided"
        if guider == "IdentityGuider":
            embeds_guidance = self.config.unet.time_cond_proj_dim is not None
            return "embedded" if embeds_guidance else "plain"
        raise ValueError(
            f"guider `{guider}` is unknown, hint: VanillaCFG or IdentityGuider"
        )


def filled(count: int, batch_size: int) -> Iterator[tuple[list[int], int]]:
    """Yield rows for full batches, the last one repeated, and how many are valid."""
    for start in range(0, count, batch_size):
        rows = list(range(start, min(start + batch_size, count)))
        yield rows + rows[-1:] * (batch_size - len(rows)), len(rows)


def noise_of(
    pictures: Sequence[Picture], kind: str, shape: tuple[int, ...]
) -> Callable[[], np.ndarray]:
    """Draw a batch's noise, each picture's from its own stream, which goes on."""
    streams = [NoiseStream(kind, picture.seed) for picture in pictures]
    return lambda: np.concatenate([stream.draw(shape) for stream in streams])


def to_pixels(images: np.ndarray) -> np.ndarray:
    """Round (n, 3, H, W) in [-1, 1] to (n, H, W, 3) uint8 as diffusers does."""
    finite = np.isfinite(images).all(axis=(1, 2, 3), keepdims=True)
    images = np.where(finite, images, -1)
    pixels = ((images / 2 + 0.5).clip(0, 1) * 255).round()
    return pixels.transpose(0, 2, 3, 1).astype(np.uint8)
