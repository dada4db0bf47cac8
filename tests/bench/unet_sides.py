"""Both sides of a comparison of UNets: ours and diffusers', on shared weights.

Each is made in a process of its own; `step(size)` compiles or warms up, and gives a
guided step from latents in numpy to the prediction in numpy, and figures about it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from mmap import mmap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdxl.config import PRESETS, VAE_FACTOR, ModelConfig
from sdxl.layouts import tensor_specs
from sdxl.random_weights import random_tensor
from sdxl.tensor_spec import TensorSpec

if TYPE_CHECKING:
    from sdxl.compile_cache import CompileCache

PREFIX = "model.diffusion_model."
GUIDANCE, SIGMA = 5.0, 7.5
TOKENS = 77
ALIGNMENT = 64

Step = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class SharedWeights:
    """What a loader needs of a checkpoint: tensors that lie in shared memory."""

    preset: str
    file: int
    path: Path = Path("shared memory")

    @property
    def config(self) -> ModelConfig:
        return PRESETS[self.preset]

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        return tuple(s for s in tensor_specs(self.config) if s.name.startswith(PREFIX))

    @cached_property
    def memory(self) -> mmap:
        return mmap(self.file, self.nbytes)

    @property
    def nbytes(self) -> int:
        return 4 * sum(padded(spec) for spec in self.specs)

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
        offset = 0
        for spec in self.specs:
            flat = np.frombuffer(
                self.memory, np.float32, math.prod(spec.shape), 4 * offset
            )
            offset += padded(spec)
            yield spec.name, flat.reshape(spec.shape)

    def fill(self) -> None:
        os.ftruncate(self.file, self.nbytes)
        for name, array in self.tensors():
            array[...] = random_tensor(name, array.shape)


def padded(spec: TensorSpec) -> int:
    """Count the numbers of a tensor, up to where the next one may begin."""
    return -(-math.prod(spec.shape) // ALIGNMENT) * ALIGNMENT


def inputs(config: ModelConfig) -> dict[str, np.ndarray]:
    """Draw the conditioning of one picture, the unconditional half first."""
    stream = np.random.RandomState(0)
    pooled = config.text_encoders[-1].width
    return {
        "context": stream.randn(2, TOKENS, config.unet.context_dim).astype(np.float32),
        "pooled": stream.randn(2, pooled).astype(np.float32),
        "sizes": np.array([[512, 512, 0, 0, 512, 512]] * 2, np.float32),
    }


def latents(config: ModelConfig, size: int) -> np.ndarray:
    side = size // VAE_FACTOR
    x = np.random.RandomState(1).randn(1, config.unet.in_channels, side, side)
    return (SIGMA * x).astype(np.float32)


class Ours:
    """The step graph as the pipeline runs it."""

    def __init__(
        self,
        weights: SharedWeights,
        threads: int,
        cache: CompileCache | None = None,
    ) -> None:
        from mindspore.nn.utils import no_init_parameters

        from sdxl.graphs import Graphs, set_up
        from sdxl.model import PRECISIONS, DiffusionModel
        from sdxl.weights import load_into

        set_up("CPU", threads=threads)
        self.config = weights.config
        with no_init_parameters():
            model = DiffusionModel(self.config, PRECISIONS["fp32"])
        load_into(model.diffusion_model, weights, PREFIX)
        self.graphs = Graphs(
            precision="fp32", jit_level="O2", device_target="CPU", cache=cache
        )
        self.unet = model.diffusion_model

    def step(self, size: int) -> tuple[Step, dict[str, float]]:
        """Compile; return the step and seconds that it does not include."""
        from sdxl.conditioning import Conditioning, sinusoid
        from sdxl.denoiser import Denoiser

        drawn = inputs(self.config)
        embedded = sinusoid(drawn["sizes"].reshape(-1), self.config.size_embed_dim)
        vector = np.concatenate((drawn["pooled"], embedded.reshape(2, -1)), axis=1)
        cond = Conditioning(
            context=drawn["context"][1:],
            vector=vector[1:],
            uncond_context=drawn["context"][:1],
            uncond_vector=vector[:1],
        )
        denoiser = Denoiser(unet=self.unet, graphs=self.graphs)
        scale, side = np.float32([GUIDANCE]), (size // VAE_FACTOR,) * 2
        denoiser.bind(cond, scale, side, "guided")
        start = time.perf_counter()
        denoise = denoiser.bind(cond, scale, side, "guided")
        context = time.perf_counter() - start
        denoise(latents(self.config, size), SIGMA)
        compiled = sum(self.graphs.compile_ms.values()) / 1e3
        return (lambda x: denoise(x, SIGMA)), {"context": context, "compile": compiled}


class Theirs:
    """diffusers' network in float32, eager, with guidance and scaling around it."""

    def __init__(self, weights: SharedWeights, threads: int) -> None:
        import torch

        from tests.golden.networks_oracle import build_unet

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.config = weights.config
        with torch.device("meta"):
            unet = build_unet(self.config)
        names = {spec.name: spec.diffusers[0] for spec in weights.specs}
        state = {names[n]: torch.from_numpy(x) for n, x in weights.tensors()}
        unet.load_state_dict(state, strict=True, assign=True)
        self.unet = unet.eval().requires_grad_(False)

    def step(self, size: int) -> tuple[Step, dict[str, float]]:
        """Warm up; return the step and its floating point operations."""
        import torch
        from torch.utils.flop_counter import FlopCounterMode

        from sdxl.schedule import precondition

        drawn = {k: torch.from_numpy(v) for k, v in inputs(self.config).items()}
        how = precondition("EpsScaling", SIGMA, quantize=True)
        added = {"text_embeds": drawn["pooled"], "time_ids": drawn["sizes"]}
        time_ = torch.tensor([float(how.time)] * 2)

        def step(x: np.ndarray) -> np.ndarray:
            both = torch.from_numpy(x * np.float32(how.c_in)).repeat(2, 1, 1, 1)
            F = self.unet(both, time_, drawn["context"], added_cond_kwargs=added).sample
            F = F[:1] + GUIDANCE * (F[1:] - F[:1])
            return x * np.float32(how.c_skip) + F.numpy() * np.float32(how.c_out)

        with FlopCounterMode(display=False) as counter:
            step(latents(self.config, size))
        return step, {"flop": counter.get_total_flops(), "peak": peak_flops()}


def peak_flops(side: int = 4096, rounds: int = 3) -> float:
    """Measure the fastest large float32 matrix product, in operations a second."""
    import torch

    a, b = torch.randn(side, side), torch.randn(side, side)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times)
