"""mindone's network and decoder on the CPU: what its operators lack, and their times.

    python -m tests.bench.mindone_parts MODEL MINDONE --batch 4

mindone 0.5.0 calls operators of `mindspore.mint` that have no CPU kernel. They are
replaced here by those of `mindspore.ops` with the same meaning, before mindone is
imported; its network is then compiled as one graph. Its decoder is timed as one graph
and as mindone's pipeline runs it, operator by operator. MINDONE is a folder made with
`pip install --no-deps --target MINDONE mindone==0.5.0 transformers==4.57.1
huggingface-hub==0.36.0 trampoline omegaconf==2.3.0 antlr4-python3-runtime==4.9.3
tokenizers==0.22.1`: its requirements are not this project's.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, nn, ops
from mindspore.common.initializer import initializer

from tests.bench.measure import bind


class Linear(nn.Cell):
    def __init__(self, width_in, width_out, bias=True, dtype=ms.float32, **_):
        super().__init__()
        self.in_features, self.out_features = width_in, width_out
        self.weight = parameter((width_out, width_in))
        self.bias = parameter((width_out,)) if bias else None

    def construct(self, x, *_):
        return ops.dense(x, self.weight, self.bias)


class Conv2d(nn.Cell):
    def __init__(self, a, b, kernel_size, stride=1, padding=0, bias=True, **_):
        super().__init__()
        kernel = kernel_size if isinstance(kernel_size, int) else kernel_size[0]
        stride = stride if isinstance(stride, int) else stride[0]
        padding = padding if isinstance(padding, int) else padding[0]
        self.weight = parameter((b, a, kernel, kernel))
        self.bias = parameter((b,)) if bias else None
        self.convolve = ops.Conv2D(
            b, kernel, pad_mode="pad", pad=padding, stride=stride
        )
        self.add = ops.BiasAdd()

    def construct(self, x):
        y = self.convolve(x, self.weight)
        return y if self.bias is None else self.add(y, self.bias)


class GroupNorm(nn.Cell):
    def __init__(self, num_groups, num_channels, eps=1e-5, affine=True, **_):
        super().__init__()
        self.groups, self.eps = num_groups, eps
        self.weight, self.bias = parameter((num_channels,)), parameter((num_channels,))

    def construct(self, x):
        return ops.group_norm(x, self.groups, self.weight, self.bias, self.eps)


class LayerNorm(nn.Cell):
    def __init__(self, shape, eps=1e-5, elementwise_affine=True, bias=True, **_):
        super().__init__()
        width = shape if isinstance(shape, int) else shape[-1]
        self.weight, self.bias = parameter((width,)), parameter((width,))
        self.normalize = ops.LayerNorm(-1, -1, eps)

    def construct(self, x):
        return self.normalize(x, self.weight, self.bias)[0]


class SiLU(nn.Cell):
    def construct(self, x):
        return x * ops.sigmoid(x)


class Gelu(nn.Cell):
    def __init__(self, *_, **__):
        super().__init__()

    def construct(self, x):
        return gelu(x)


class Embedding(nn.Cell):
    def __init__(self, rows, width, padding_idx=None, **_):
        super().__init__()
        self.weight = parameter((rows, width))

    def construct(self, ids):
        return ops.gather(self.weight, ids, 0)


class Dropout(nn.Cell):
    def __init__(self, *_, **__):
        super().__init__()

    def construct(self, x):
        return x


def parameter(shape) -> ms.Parameter:
    return ms.Parameter(initializer("ones", shape, ms.float32))


def gelu(x, approximate="none"):
    return x * (0.5 * ops.erf(x * math.sqrt(0.5)) + 0.5)


def gated(self, x):
    """GEGLU without the `chunk` method of a tensor."""
    y = self.proj(x)
    value, gate = ops.split(y, y.shape[-1] // 2, -1)
    return value * gelu(gate)


def interpolate(x, size=None, scale_factor=None, mode="nearest", **_):
    """Double height and width, the only use there is of it here."""
    B, C, H, W = x.shape
    x = ops.broadcast_to(x.reshape(B * C, H, 1, W, 1), (B * C, H, 2, W, 2))
    return x.reshape(B, C, 2 * H, 2 * W)


def chunk(x, count, dim=0):
    return ops.split(x, x.shape[dim] // count, dim)


def replace_operators() -> None:
    """Put operators that the CPU has in the place of those it lacks."""
    for layer in (Linear, Conv2d, GroupNorm, LayerNorm, SiLU, Dropout, Embedding):
        setattr(mint.nn, layer.__name__, layer)
    mint.nn.GELU = Gelu
    functions = mint.nn.functional
    functions.gelu, functions.interpolate = gelu, interpolate
    functions.silu = lambda x, inplace=False: x * ops.sigmoid(x)
    functions.linear = lambda x, weight, bias=None: ops.dense(x, weight, bias)
    functions.sigmoid = mint.sigmoid = ops.sigmoid
    functions.softmax = mint.softmax = lambda x, dim=-1, dtype=None: ops.softmax(x, dim)
    mint.chunk, mint.cat, mint.concat = chunk, concat, concat
    mint.stack = lambda tensors, dim=0: ops.stack(tuple(tensors), dim)
    mint.matmul, mint.bmm, mint.where = ops.matmul, ops.bmm, ops.where
    mint.sin, mint.cos, mint.exp = ops.sin, ops.cos, ops.exp
    mint.pow, mint.sqrt, mint.tanh = ops.pow, ops.sqrt, ops.tanh
    mint.add, mint.sub = lambda a, b, alpha=1: a + b, lambda a, b, alpha=1: a - b
    mint.mul, mint.div = lambda a, b: a * b, lambda a, b: a / b
    mint.baddbmm = lambda i, a, b, beta=1, alpha=1: beta * i + alpha * ops.bmm(a, b)
    mint.permute = lambda x, axes: ops.transpose(x, tuple(axes))
    mint.transpose = ops.swapaxes
    mint.sum = lambda x, dim=None, keepdim=False, **_: x.sum(dim, keepdims=keepdim)
    mint.argmax = lambda x, dim=None, keepdim=False: Tensor(x.asnumpy().argmax(dim))
    mint.triu = lambda x, diagonal=0: Tensor(np.triu(x.asnumpy(), diagonal))
    mint.arange = arange
    mint.zeros = lambda *s, dtype=ms.float32, **_: ops.zeros(sizes(s), dtype)
    mint.ones = lambda *s, dtype=ms.float32, **_: ops.ones(sizes(s), dtype)
    mint.full = lambda s, v, dtype=ms.float32, **_: ops.full(s, v, dtype=dtype)
    mint.zeros_like = lambda x, dtype=None, **_: ops.zeros(x.shape, dtype or x.dtype)
    mint.ones_like = lambda x, dtype=None, **_: ops.ones(x.shape, dtype or x.dtype)


def concat(tensors, dim=0):
    return ops.concat(tuple(tensors), dim)


def arange(start=0, end=None, step=1, dtype=None):
    if end is None:
        start, end = 0, start
    return ops.arange(start, end, step).astype(dtype or ms.int64)


def sizes(shape) -> tuple[int, ...]:
    return tuple(shape[0]) if isinstance(shape[0], list | tuple) else tuple(shape)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.mindone_parts")
    parser.add_argument("model", type=Path)
    parser.add_argument("mindone", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=int, default=256)
    asked = parser.parse_args()
    bind(asked.threads)
    sys.path.insert(0, str(asked.mindone))
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    replace_operators()
    print(json.dumps(measure(asked)))


def measure(asked: argparse.Namespace) -> dict[str, float]:
    """Time a guided step and the decoding of a batch: seconds of each."""
    from mindone.diffusers import AutoencoderKL, UNet2DConditionModel
    from mindone.diffusers.models import activations

    activations.GEGLU.construct = gated
    n, side = asked.batch, asked.size // 8
    unet = network(UNet2DConditionModel, asked.model / "unet")
    vae = network(AutoencoderKL, asked.model / "vae")
    x = Tensor(np.zeros((2 * n, 4, side, side), np.float32))
    config = json.loads((asked.model / "unet" / "config.json").read_text())
    pooled = (
        config["projection_class_embeddings_input_dim"]
        - 6 * config["addition_time_embed_dim"]
    )
    width = config["cross_attention_dim"]
    context = Tensor(np.zeros((2 * n, 77, width), np.float32))
    vector = Tensor(np.zeros((2 * n, pooled), np.float32))
    numbers = Tensor(np.zeros((2 * n, 6), np.float32))
    step = Step(unet)
    first, later = timed(step, x, context, vector, numbers)
    decode_first, decode = timed(Decode(vae), x[:n])
    ms.set_context(mode=ms.PYNATIVE_MODE)
    _, eager = timed(Decode(vae), x[:n])
    return {
        "step": later,
        "decode": decode,
        "decode, eager": eager,
        "first step": first,
        "first decode": decode_first,
    }


class Step(nn.Cell):
    def __init__(self, unet) -> None:
        super().__init__()
        self.unet = unet

    def construct(self, x, context, vector, numbers):
        known = {"text_embeds": vector, "time_ids": numbers}
        time_step = ops.fill(ms.float32, (x.shape[0],), 500)
        return self.unet(
            x, time_step, context, added_cond_kwargs=known, return_dict=False
        )[0]


class Decode(nn.Cell):
    def __init__(self, vae) -> None:
        super().__init__()
        self.vae = vae

    def construct(self, z):
        return self.vae.decode(z, return_dict=False)[0]


def network(kind, folder: Path) -> nn.Cell:
    """Build a network of the folder's geometry; its numbers don't matter here."""
    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in config.items() if not k.startswith("_")}
    return kind(**config).set_train(False)


def timed(cell: nn.Cell, *inputs: Tensor) -> tuple[float, float]:
    """Time the first call, which compiles, and the least of three more."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        cell(*inputs).asnumpy()
        times.append(time.perf_counter() - start)
    return times[0], min(times[1:])


if __name__ == "__main__":
    main()
