"""Layers that more than one network uses.

Design: parameters are created without data and without a random fill, since a loader
gives every one of them its array (`pipeline.Pipeline.load` checks that it did). Norms
keep their parameters and their arithmetic in float32 whatever the network's precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import mindspore as ms
from mindspore import Parameter, Tensor, nn
from mindspore import ops as msops
from mindspore.common.initializer import initializer

from sdxl import ops


def empty(shape: Sequence[int], dtype: ms.Type, name: str) -> Parameter:
    """A parameter that holds no memory yet when built under `no_init_parameters()`."""
    data = initializer("zeros", tuple(shape), dtype)
    return Parameter(data, name=name, requires_grad=False)


class Dense(nn.Cell):
    """x W^T + b over the last axis; weight (width_out, width_in)."""

    def __init__(
        self, width_in: int, width_out: int, dtype: ms.Type, *, bias: bool = True
    ) -> None:
        super().__init__()
        self.weight = empty((width_out, width_in), dtype, "weight")
        self.bias = empty((width_out,), dtype, "bias") if bias else None

    def construct(self, x: Tensor) -> Tensor:
        return ops.dense(x, self.weight, self.bias)


class Conv2d(nn.Cell):
    """Convolution with bias over (B, C, H, W); weight (C_out, C_in, kernel, kernel).

    `padding` is one number for the four sides, or (top, bottom, left, right) of zeros.
    What follows many a convolution can be given to it: `shift` (B, C_out), added to
    whole maps, and `added`, of the output's shape.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int,
        dtype: ms.Type,
        *,
        stride: int = 1,
        padding: int | tuple[int, int, int, int] = 0,
    ) -> None:
        super().__init__()
        shape = (channels_out, channels_in, kernel, kernel)
        self.weight = empty(shape, dtype, "weight")
        self.bias = empty((channels_out,), dtype, "bias")
        self.convolve = ops.Convolve(
            channels_out, kernel, stride=stride, padding=padding
        )

    def construct(
        self, x: Tensor, shift: Tensor | None = None, added: Tensor | None = None
    ) -> Tensor:
        return self.convolve(x, self.weight, self.bias, shift, added)


class Embedding(nn.Cell):
    """Rows of a table: (B, L) int32 -> (B, L, width)."""

    def __init__(self, rows: int, width: int, dtype: ms.Type) -> None:
        super().__init__()
        self.embedding_table = empty((rows, width), dtype, "embedding_table")

    def construct(self, ids: Tensor) -> Tensor:
        return msops.gather(self.embedding_table, ids, 0)


class LayerNorm(nn.Cell):
    """Layer norm over the last axis, computed in float32, returned as it came."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.gamma = empty((width,), ms.float32, "gamma")
        self.beta = empty((width,), ms.float32, "beta")
        self.normalize = ops.LayerNormalize(eps)

    def construct(self, x: Tensor) -> Tensor:
        y = self.normalize(x.astype(ms.float32), self.gamma, self.beta)
        return y.astype(x.dtype)


class GroupNorm(nn.Cell):
    """Group norm, and SiLU of it where `activated`: in float32, returned as it came."""

    def __init__(
        self,
        channels: int,
        groups: int,
        eps: float = 1e-5,
        *,
        activated: bool = False,
    ) -> None:
        super().__init__()
        self.gamma = empty((channels,), ms.float32, "gamma")
        self.beta = empty((channels,), ms.float32, "beta")
        self.normalize = ops.GroupNormalize(groups, eps, activated=activated)

    def construct(self, x: Tensor) -> Tensor:
        return self.normalize(x, self.gamma, self.beta)


class SiLU(nn.Cell):
    """`ops.silu` as a layer, where a checkpoint's numbering counts it."""

    def construct(self, x: Tensor) -> Tensor:
        return ops.silu(x)


class Identity(nn.Cell):
    """Nothing, where a checkpoint's numbering counts a dropout or a fused SiLU."""

    def construct(self, x: Tensor) -> Tensor:
        return x
