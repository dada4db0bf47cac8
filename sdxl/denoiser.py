"""The step graph: noisy latents in, the picture's latents as the network sees them out.

Design: preconditioning, both halves of classifier-free guidance, the network and their
combination are one compiled graph, so that a sampler's step is one launch. Sigma,
guidance scale and conditioning are inputs, one value per image: any sampler, step
count, scale or seed runs through the same graph. Samplers see a `denoise(x, sigma)`.
What the conditioning comes to inside the network is the same in all steps: a smaller
graph computes it once per batch, and it stays on the device.

                      ┌ c_in·x ─┬─ uncond ─ UNet ─┐
    x (B, 4, h, w) ───┤         └─ cond ─── UNet ─┴─ F ─┐
                      └ c_skip·x ────────── + c_out·F ──┴─ D_u + s(D_c - D_u) = x0
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore import ops as msops

from sdxl.conditioning import Conditioning
from sdxl.graphs import Graphs, on_device
from sdxl.samplers import Denoise
from sdxl.schedule import precondition
from sdxl.unet import UNet

# guided: both halves, combined. plain: the conditional half alone. embedded: the same,
# its guidance scale an input of the network (latent consistency models).
Mode = Literal["guided", "plain", "embedded"]


class Context(nn.Cell):
    """Context and vector -> what `Step` takes of them, `unet.UNet.prepare`'s result.

    Both are (B, …), or (2B, …) for a guided step, the unconditional half first.
    """

    def __init__(self, unet: UNet) -> None:
        super().__init__(auto_prefix=False)
        self.unet = unet

    def construct(self, context: Tensor, vector: Tensor) -> tuple[Tensor, ...]:
        return self.unet.prepare(context, vector)


class Step(nn.Cell):
    """x (B, 4, h, w) -> x0 (B, 4, h, w), float32.

    `c_skip`, `c_out`, `c_in`, `timestep` and `guidance` are (B,) float32, `prepared`
    comes from `Context`.
    """

    def __init__(self, unet: UNet, mode: Mode) -> None:
        super().__init__(auto_prefix=False)
        self.unet = unet
        self.dtype = unet.dtype
        self.guided = mode == "guided"
        self.embedded = mode == "embedded"

    def construct(
        self,
        x: Tensor,
        c_skip: Tensor,
        c_out: Tensor,
        c_in: Tensor,
        timestep: Tensor,
        guidance: Tensor,
        *prepared: Tensor,
    ) -> Tensor:
        scaled = x * c_in.reshape(-1, 1, 1, 1)
        if self.guided:
            scaled = msops.concat((scaled, scaled), 0)  # (2B, 4, h, w)
            timestep = msops.concat((timestep, timestep), 0)

        w = guidance if self.embedded else None
        F = self.unet(scaled.astype(self.dtype), timestep, prepared, w)
        F = F.astype(ms.float32)

        if self.guided:
            F_u, F_c = msops.split(F, x.shape[0], 0)
            F = F_u + guidance.reshape(-1, 1, 1, 1) * (F_c - F_u)
        return x * c_skip.reshape(-1, 1, 1, 1) + F * c_out.reshape(-1, 1, 1, 1)


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """Makes `denoise` for a batch. `scaling` and `quantize` are `precondition`'s."""

    unet: UNet
    graphs: Graphs
    scaling: str = "EpsScaling"
    quantize: bool = True
    name: str = "unet"

    def bind(
        self,
        cond: Conditioning,
        guidance: np.ndarray,
        size: tuple[int, int],
        mode: Mode,
    ) -> Denoise:
        """Return `denoise(x, sigma) -> x0` for these B images of latent size (h, w).

        `guidance` is (B,) float32. x and x0 are (B, 4, h, w) float32.
        """
        B, (h, w) = len(guidance), size
        key = f"{self.name}-b{B}-{h}x{w}-{mode}"
        scale = on_device(guidance.astype(np.float32))
        prepared = self._prepare(cond, mode)

        def denoise(x: np.ndarray, sigma: float) -> np.ndarray:
            how = precondition(self.scaling, sigma, quantize=self.quantize)
            scalars = [np.full(B, value, np.float32) for value in how]
            return self.graphs.run(
                key, lambda: Step(self.unet, mode), x, *scalars, scale, *prepared
            )

        return denoise

    def _prepare(self, cond: Conditioning, mode: Mode) -> tuple[Tensor, ...]:
        context, vector = cond.halves() if mode == "guided" else cond.conditional()
        dtype = np.float16 if self.unet.dtype == ms.float16 else np.float32
        return self.graphs.keep(
            f"context-b{len(context)}",
            lambda: Context(self.unet),
            context.astype(dtype),
            vector.astype(dtype),
        )
