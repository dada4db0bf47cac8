"""The kernels whose best form depends on the device. Nothing else asks which it is.

Design: a choice is made once, when a cell is built, so that the compiled graph holds
one form only. Statistics (mean, variance, softmax) are always computed in float32.

On CPU (MindSpore 2.8, 2 threads): a group norm takes 25 ms at (2, 320, 64, 64) as
`GroupNorm` and 10 ms as a batch norm of the same numbers; nearest upsampling 63 ms as
`interpolate` and 11 ms as a broadcast; the `GeLU` primitive is the tanh approximation.
"""

from __future__ import annotations

import math

import mindspore as ms
from mindspore import Tensor, nn
from mindspore import ops as msops

# Attention scores held at a time: 256 MiB in float32.
MAX_SCORES = 2**26


def on_ascend() -> bool:
    """Say whether the process computes on an Ascend NPU."""
    return ms.get_context("device_target") == "Ascend"


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x)."""
    return x * msops.sigmoid(x)


def gelu(x: Tensor) -> Tensor:
    """x * Phi(x) with the exact error function (Hendrycks and Gimpel 2016)."""
    return x * (0.5 * msops.erf(x * math.sqrt(0.5)) + 0.5)


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the form OpenAI's CLIP was trained with."""
    return x * msops.sigmoid(1.702 * x)


def upsample_nearest(x: Tensor) -> Tensor:
    """Double height and width: (B, C, H, W) -> (B, C, 2H, 2W)."""
    B, C, H, W = x.shape
    x = x.reshape(B * C, H, 1, W, 1)
    x = msops.broadcast_to(x, (B * C, H, 2, W, 2))
    return x.reshape(B, C, 2 * H, 2 * W)


class GroupStandardize(nn.Cell):
    """Bring each group of channels of each image to mean 0 and variance 1, in float32.

    The affine part of a group norm is the caller's (`layers.GroupNorm`).
    """

    def __init__(self, groups: int, eps: float) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.native = on_ascend()
        self.batch_norm = msops.BatchNorm(is_training=True, epsilon=eps)

    def construct(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        x = x.astype(ms.float32)
        if self.native:
            ones = msops.ones((C,), ms.float32)
            zeros = msops.zeros((C,), ms.float32)
            return msops.group_norm(x, self.groups, ones, zeros, self.eps)

        # A group of an image is a channel of one wide image, whose batch statistics
        # are the group's. The kernel may write its moving statistics: they get
        # arrays of their own.
        n = B * self.groups
        y = x.reshape(1, n, (C // self.groups) * H, W)
        scale, shift = msops.ones((n,), ms.float32), msops.zeros((n,), ms.float32)
        mean, variance = msops.zeros_like(shift), msops.ones_like(scale)
        y = self.batch_norm(y, scale, shift, mean, variance)[0]
        return y.reshape(B, C, H, W)


class Attention(nn.Cell):
    """softmax(Q K^T / sqrt(d) + mask) V over (B, L, heads * d) arrays.

    `fused` asks for the device's flash attention, which exists on Ascend in float16.
    Queries are independent of each other, so long ones go through in equal slices:
    an autoencoder's 16,384 positions would otherwise need gigabytes of scores.
    """

    def __init__(self, heads: int, head_dim: int, *, fused: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.scale = 1 / math.sqrt(head_dim)
        self.fused = fused and on_ascend()
        self.scores = msops.BatchMatMul(transpose_b=True)
        self.values = msops.BatchMatMul()
        self.softmax = msops.Softmax(-1)

    def split(self, x: Tensor) -> Tensor:
        B, L, D = x.shape
        x = x.reshape(B, L, self.heads, D // self.heads)
        return x.transpose(0, 2, 1, 3)  # (B, heads, L, d)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = self.scores(q, k).astype(ms.float32)
        if mask is not None:
            scores = scores + mask
        return self.values(self.softmax(scores).astype(v.dtype), v)

    def construct(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        B, L, D = q.shape
        if self.fused and q.dtype == ms.float16 and mask is None:
            return msops.flash_attention_score(
                q, k, v, self.heads, scalar_value=self.scale, input_layout="BSH"
            )

        q, k, v = self.split(q * self.scale), self.split(k), self.split(v)
        slices = slices_of(B * self.heads * L * k.shape[2], L)
        if slices == 1:
            out = self.attend(q, k, v, mask)
        else:
            out = ()
            for part in msops.split(q, L // slices, 2):
                out = (*out, self.attend(part, k, v, mask))
            out = msops.concat(out, 2)
        return out.transpose(0, 2, 1, 3).reshape(B, L, D)


@ms.ops.constexpr
def slices_of(scores: int, queries: int) -> int:
    """Return the fewest equal slices of the queries that keep within `MAX_SCORES`."""
    slices = 1
    while scores // slices > MAX_SCORES and queries % (2 * slices) == 0:
        slices *= 2
    return slices
