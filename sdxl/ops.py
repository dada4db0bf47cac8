"""The kernels whose best form depends on the device. Nothing else asks which it is.

Design: a choice is made once, when a cell is built, so that the compiled graph holds
one form only: that of the device which `graphs.set_up` chose, or, within `built_in`,
that of another one, to be looked at where there is none. Statistics (mean, variance,
softmax) are always computed in float32.

On CPU (MindSpore 2.8, 2 threads): a group norm takes 25 ms at (2, 320, 64, 64) as
`GroupNorm`, 11 ms as two batch norms; nearest upsampling 63 ms as `interpolate` and
11 ms as a broadcast; the `GeLU` primitive is the tanh approximation. Arithmetic between
unlike shapes is slow and keeps 16 bytes per element for good, gigabytes in all: hence
`add_row` and `add_per_channel`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mindspore as ms
from mindspore import Tensor, nn
from mindspore import ops as msops

UNIT_EPS = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """Which kernels cells are made of; `mark` ends the keys of graphs made of them.

    `flash_attention` is documented for Atlas A2 and later: float16, no more than 512
    numbers a head and a multiple of 16 of them, any number of queries and of keys.
    `max_scores` of an attention without it are held at a time, 256 MiB in float32.
    """

    group_norm: bool
    flash_attention: bool
    max_scores: int = 2**26
    mark: str = ""


# 16 MiB of scores stay in the cache: at 1,024 positions that halves the time.
CPU = Form(group_norm=False, flash_attention=False, max_scores=2**22)
ASCEND = Form(group_norm=True, flash_attention=True)
ASCEND_SOFTMAX = Form(group_norm=True, flash_attention=False, mark="-softmax")
_form = CPU


def form() -> Form:
    """Give the form that cells are built in."""
    return _form


def build_in(form: Form) -> Form:
    """Build cells in this form from now on; return the one before.

    It changes no cell that is built, and not where anything runs.
    """
    global _form
    before, _form = _form, form
    return before


@contextmanager
def built_in(form: Form) -> Iterator[None]:
    """Build cells in a form, whatever device this process has, until the block ends."""
    before = build_in(form)
    try:
        yield
    finally:
        build_in(before)


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


def dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b over the last axis; weight (width_out, width_in)."""
    y = msops.dense(x, weight)
    return y if bias is None else add_row(y, bias)


def add_row(x: Tensor, row: Tensor) -> Tensor:
    """Add an array to each of those that `x` is made of: its last axes are `row`'s."""
    return msops.bias_add(x.reshape(-1, row.size), row.reshape(-1)).reshape(x.shape)


def add_per_channel(x: Tensor, offset: Tensor) -> Tensor:
    """Add (B, C) numbers to the maps of (B, C, H, W)."""
    B, C, H, W = x.shape
    y = msops.bias_add(x.reshape(1, B * C, H, W), offset.reshape(-1))
    return y.reshape(B, C, H, W)


class GroupNormalize(nn.Cell):
    """Group norm (Wu and He 2018) in float32, its parameters (C,) given as inputs."""

    def __init__(self, groups: int, eps: float) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.native = form().group_norm
        self.standardize = msops.BatchNorm(is_training=True, epsilon=eps)
        self.scale = msops.BatchNorm(is_training=False, epsilon=UNIT_EPS)

    def construct(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        B, C, H, W = x.shape
        x = x.astype(ms.float32)
        if self.native:
            return msops.group_norm(x, self.groups, gamma, beta, self.eps)

        # A group of an image is a channel of one wide image, whose batch statistics
        # are the group's. The kernel may write its moving statistics: they get
        # arrays of their own.
        n = B * self.groups
        y = x.reshape(1, n, (C // self.groups) * H, W)
        one, zero = msops.ones((n,), ms.float32), msops.zeros((n,), ms.float32)
        mean, variance = msops.zeros_like(zero), msops.ones_like(one)
        y = self.standardize(y, one, zero, mean, variance)[0].reshape(B, C, H, W)

        # Of mean 0 and variance 1 already: what remains is scale and shift.
        mean = msops.zeros_like(beta)
        variance = msops.zeros_like(gamma) + (1 - UNIT_EPS)
        return self.scale(y, gamma, beta, mean, variance)[0]


class Attention(nn.Cell):
    """softmax(Q K^T / sqrt(d) + mask) V over (B, L, heads * d) arrays.

    `fused` asks for flash attention where the form has it: in float16, and never with a
    mask. Heads are independent of each other, and so are queries: many go through in
    equal groups of heads, then in equal slices of queries. An autoencoder's 16,384
    positions would otherwise need gigabytes of scores.
    """

    def __init__(self, heads: int, head_dim: int, *, fused: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.scale = 1 / math.sqrt(head_dim)
        fits = head_dim % 16 == 0 and head_dim <= 512
        self.fused = fused and fits and form().flash_attention
        self.max_scores = form().max_scores
        self.scores = msops.BatchMatMul(transpose_b=True)
        self.values = msops.BatchMatMul()
        self.softmax = msops.Softmax(-1)

    def split(self, x: Tensor) -> Tensor:
        B, L, D = x.shape
        if self.heads == 1:
            return x
        x = x.reshape(B, L, self.heads, D // self.heads).transpose(0, 2, 1, 3)
        return x.reshape(B * self.heads, L, D // self.heads)  # (B heads, L, d)

    def prepare(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Bring keys and values into the form that `over` takes, once for many."""
        if self.fused and k.dtype == ms.float16:
            return k, v
        return self.split(k), self.split(v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = self.scores(q, k).astype(ms.float32)
        if mask is not None:
            scores = add_row(scores, mask)
        return self.values(self.softmax(scores).astype(v.dtype), v)

    def attend_in_slices(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor:
        n, L, _ = q.shape
        slices = parts_of(n * L * k.shape[1], L, self.max_scores)
        if slices == 1 or mask is not None:
            return self.attend(q, k, v, mask)
        out = ()
        for part in msops.split(q, L // slices, 1):
            out = (*out, self.attend(part, k, v, None))
        return msops.concat(out, 1)

    def construct(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        k, v = self.prepare(k, v)
        return self.over(q, k, v, mask)

    def over(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Attend to prepared keys and values."""
        B, L, D = q.shape
        if self.fused and q.dtype == ms.float16:
            return msops.flash_attention_score(
                q, k, v, self.heads, scalar_value=self.scale, input_layout="BSH"
            )

        q = self.split(q * self.scale)
        n = B * self.heads
        groups = parts_of(n * L * k.shape[1], n, self.max_scores)
        if groups == 1:
            out = self.attend_in_slices(q, k, v, mask)
        else:
            q = msops.split(q, n // groups, 0)
            k, v = msops.split(k, n // groups, 0), msops.split(v, n // groups, 0)
            out = ()
            for i in range(groups):
                out = (*out, self.attend_in_slices(q[i], k[i], v[i], mask))
            out = msops.concat(out, 0)
        if self.heads == 1:
            return out
        out = out.reshape(B, self.heads, L, D // self.heads)
        return out.transpose(0, 2, 1, 3).reshape(B, L, D)


@ms.ops.constexpr
def parts_of(scores: int, whole: int, most: int) -> int:
    """Return the fewest equal parts of a whole that keep within the most scores."""
    parts = -(-scores // most)
    while whole % parts and parts < whole:
        parts += 1
    return min(parts, whole)
