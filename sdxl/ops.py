"""The kernels whose best form depends on the device. Nothing else asks which it is.

Design: a choice is made once, when a cell is built, so that the compiled graph holds
one form only: that of the device which `graphs.set_up` chose, or, within `built_in`,
that of another one, to be looked at where there is none. Statistics (mean, variance,
softmax) are always computed in float32.

On CPU, what lies between matrix products and convolutions has fused kernels of our own
(`cpu_kernels`) wherever a C compiler is, and plain forms elsewhere. Of the plain ones
(MindSpore 2.8, 2 threads): a group norm takes 25 ms at (2, 320, 64, 64) as `GroupNorm`,
11 ms as two batch norms; nearest upsampling 63 ms as `interpolate` and 11 ms as a
broadcast; the `GeLU` primitive is the tanh approximation. Arithmetic between unlike
shapes is slow and keeps 16 bytes per element for good, gigabytes in all: hence
`add_row` and `add_per_channel`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import mindspore as ms
from mindspore import Tensor, nn
from mindspore import ops as msops
from mindspore.ops import Custom

from sdxl import cpu_kernels

UNIT_EPS = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """Which kernels cells are made of; `mark` ends the keys of graphs made of them.

    `flash_attention` is documented for Atlas A2 and later: float16, no more than 512
    numbers a head and a multiple of 16 of them, any number of queries and of keys.
    `max_scores` of an attention without it are held at a time, 256 MiB in float32.
    `kernels` is the path of the library of `cpu_kernels`, if there is one.
    """

    group_norm: bool
    flash_attention: bool
    max_scores: int = 2**26
    kernels: str = ""
    mark: str = ""


# 16 MiB of scores stay in the cache: at 1,024 positions that halves the time.
CPU = Form(group_norm=False, flash_attention=False, max_scores=2**22)
ASCEND = Form(group_norm=True, flash_attention=True)
ASCEND_SOFTMAX = Form(group_norm=True, flash_attention=False, mark="-softmax")
_form = CPU


def form() -> Form:
    """Give the form that cells are built in."""
    return _form


def form_of_cpu() -> Form:
    """Give the form of this machine's CPU: with our own kernels where they can be."""
    return replace(CPU, kernels=cpu_kernels.library())


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


def _own(name: str, shape_of: cpu_kernels.ShapeOf | None = None) -> Custom | None:
    """Give the form's kernel of our own, if it has any."""
    library = form().kernels
    return cpu_kernels.operator(library, name, shape_of) if library else None


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


class Convolve(nn.Cell):
    """Convolution over (B, C, H, W), its parameters given as inputs.

    Its bias is (C_out,). `shift` (B, C_out) is added to whole maps, `added`, which has
    the output's shape, to every number. `padding` is that of `layers.Conv2d`.
    """

    def __init__(
        self,
        channels_out: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: int | tuple[int, int, int, int] = 0,
    ) -> None:
        super().__init__()
        is_ours = (kernel, stride, padding) == (3, 1, 1)
        self.kernel = _own("convolve", _convolved) if is_ours else None
        self.adding = _own("convolve_add", _convolved) if is_ours else None
        self.convolve = msops.Conv2D(
            channels_out, kernel, pad_mode="pad", pad=padding, stride=stride
        )
        self.add_bias = msops.BiasAdd()

    def construct(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        shift: Tensor | None = None,
        added: Tensor | None = None,
    ) -> Tensor:
        if self.kernel is not None and x.dtype == ms.float32:
            if shift is not None:
                bias = add_row(shift, bias)
            if added is None:
                return self.kernel(x, weight, bias)
            return self.adding(x, weight, bias, added)

        y = self.add_bias(self.convolve(x, weight), bias)
        if shift is not None:
            y = add_per_channel(y, shift)
        return y if added is None else added + y


def _convolved(x: list[int], weight: list[int], *others: list[int]) -> list[int]:
    return [x[0], weight[0], x[2], x[3]]


class GatedGelu(nn.Cell):
    """value * gelu(gate), halves of x + bias: (..., 2 W) and (2 W,) -> (..., W)."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = _own("geglu", lambda x, bias: [*x[:-1], x[-1] // 2])

    def construct(self, x: Tensor, bias: Tensor) -> Tensor:
        if self.kernel is not None and x.dtype == ms.float32:
            return self.kernel(x, bias)

        value, gate = msops.split(add_row(x, bias), x.shape[-1] // 2, -1)
        return value * gelu(gate)


class LayerNormalize(nn.Cell):
    """Layer norm (Ba et al. 2016) of float32, its parameters (W,) given as inputs."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.kernel = _own("layer_norm")
        self.settings = Tensor([eps], ms.float32)
        self.normalize = msops.LayerNorm(-1, -1, eps)

    def construct(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        if self.kernel is not None:
            return self.kernel(x, gamma, beta, self.settings)

        return self.normalize(x, gamma, beta)[0]


class GroupNormalize(nn.Cell):
    """Group norm (Wu and He 2018), its parameters (C,) given as inputs.

    Computed in float32, returned as it came; where `activated`, SiLU of that.
    """

    def __init__(self, groups: int, eps: float, *, activated: bool = False) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.activated = activated
        self.native = form().group_norm
        self.kernel = _own("group_norm_silu" if activated else "group_norm")
        self.settings = Tensor([groups, eps], ms.float32)
        self.standardize = msops.BatchNorm(is_training=True, epsilon=eps)
        self.scale = msops.BatchNorm(is_training=False, epsilon=UNIT_EPS)

    def construct(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        wide = x.astype(ms.float32)
        if self.kernel is not None:
            return self.kernel(wide, gamma, beta, self.settings).astype(x.dtype)

        y = self.plain(wide, gamma, beta).astype(x.dtype)
        return silu(y) if self.activated else y

    def plain(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        B, C, H, W = x.shape
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


class Softmax(nn.Cell):
    """softmax(scale * x) over the last axis of float32."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.kernel = _own("softmax")
        self.settings = Tensor([scale], ms.float32)
        self.softmax = msops.Softmax(-1)

    def construct(self, x: Tensor) -> Tensor:
        if self.kernel is not None:
            return self.kernel(x, self.settings)

        return self.softmax(x if self.scale == 1 else x * self.scale)


class Heads(nn.Cell):
    """Part (B, L, heads * d) into (B * heads, L, d), and join it again."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.kernel = _own("split_heads", lambda x: [x[0] * heads, x[1], x[2] // heads])
        self.joining = _own("join_heads", lambda x: [x[0] // heads, x[1], x[2] * heads])

    def construct(self, x: Tensor) -> Tensor:
        B, L, D = x.shape
        if self.heads == 1:
            return x
        if self.kernel is not None and x.dtype == ms.float32:
            return self.kernel(x)

        x = x.reshape(B, L, self.heads, D // self.heads).transpose(0, 2, 1, 3)
        return x.reshape(B * self.heads, L, D // self.heads)  # (B heads, L, d)

    def join(self, x: Tensor) -> Tensor:
        n, L, d = x.shape
        if self.heads == 1:
            return x
        if self.joining is not None and x.dtype == ms.float32:
            return self.joining(x)

        x = x.reshape(n // self.heads, self.heads, L, d).transpose(0, 2, 1, 3)
        return x.reshape(n // self.heads, L, self.heads * d)  # (B, L, heads d)


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
        self.split = Heads(heads)
        self.scores = msops.BatchMatMul(transpose_b=True)
        self.values = msops.BatchMatMul()
        # It scales for nothing in a kernel of ours; else queries are fewer than scores.
        self.scale_scores = bool(form().kernels)
        self.softmax = Softmax(self.scale if self.scale_scores else 1.0)

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
        B, L, _ = q.shape
        if self.fused and q.dtype == ms.float16:
            return msops.flash_attention_score(
                q, k, v, self.heads, scalar_value=self.scale, input_layout="BSH"
            )

        q = self.split(q if self.scale_scores else q * self.scale)
        n = B * self.heads
        groups = parts_of(n * L * k.shape[1], n, self.max_scores)
        if groups == 1:
            return self.split.join(self.attend_in_slices(q, k, v, mask))
        q = msops.split(q, n // groups, 0)
        k, v = msops.split(k, n // groups, 0), msops.split(v, n // groups, 0)
        out = ()
        for i in range(groups):
            out = (*out, self.attend_in_slices(q[i], k[i], v[i], mask))
        return self.split.join(msops.concat(out, 0))


@ms.ops.constexpr
def parts_of(scores: int, whole: int, most: int) -> int:
    """Return the fewest equal parts of a whole that keep within the most scores."""
    parts = -(-scores // most)
    while whole % parts and parts < whole:
        parts += 1
    return min(parts, whole)
