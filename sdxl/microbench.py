"""Single kernels at SDXL's sizes, beside the device's fastest matrix product.

Each is timed as a compiled graph of its own, on data that is on the device already: the
least of several times, since whatever else runs can only make one longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore import ops as msops

from sdxl import flops, ops
from sdxl.layers import Conv2d, Dense, GroupNorm, LayerNorm

DTYPES = {"fp32": ms.float32, "fp16": ms.float16}
SQUARE = 2048
LEAST_SECONDS, MOST_TIMES = 0.5, 50
Report = dict[str, Any]


class Call(nn.Cell):
    """A function of tensors as a cell."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def construct(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def random(shape: tuple[int, ...], dtype: ms.Type) -> Tensor:
    values = np.random.RandomState(0).standard_normal(shape).astype(np.float32)
    return Tensor(values).astype(dtype)


def seconds_of(cell: nn.Cell, *inputs: Tensor, jit_level: str = "O2") -> float:
    """Time a cell's graph: the least of several calls, its first one left out."""
    cell.set_train(False)
    cell.set_jit_config(ms.JitConfig(jit_level=jit_level))
    settled(cell(*inputs))
    times: list[float] = []
    while (sum(times) < LEAST_SECONDS and len(times) < MOST_TIMES) or len(times) < 3:
        start = time.perf_counter()
        settled(cell(*inputs))
        times.append(time.perf_counter() - start)
    return min(times)


def settled(output: Tensor) -> None:
    """Wait until an output is there, without copying it from a card."""
    if ms.get_context("device_target") == "CPU":
        output.asnumpy()
    else:
        ms.runtime.synchronize()


@cache
def peak(precision: str, jit_level: str = "O2") -> float:
    """Measure the operations a second of a matrix product of 2048 squared."""
    a = random((SQUARE, SQUARE), DTYPES[precision])
    seconds = seconds_of(Call(msops.matmul), a, a, jit_level=jit_level)
    return flops.dense(SQUARE, SQUARE, SQUARE) / seconds


def kernels(precision: str, jit_level: str = "O2") -> Report:
    """Time the kernels that a full-size network spends its time in."""
    dtype, best = DTYPES[precision], peak(precision, jit_level)
    found = []
    for name, shape, count, cell, inputs in _kernels(dtype):
        filled(cell)
        seconds = seconds_of(cell, *inputs, jit_level=jit_level)
        found.append(
            {
                "name": name,
                "shape": shape,
                "ms": seconds * 1e3,
                "flops": count,
                "of_peak": count / seconds / best if count else None,
            }
        )
    return {"peak": best, "dtype": precision, "ops": found}


def filled(cell: nn.Cell) -> None:
    """Give a cell's parameters numbers."""
    for parameter in cell.get_parameters():
        values = random(parameter.shape, parameter.dtype) * 0.02
        parameter.set_data(values.astype(parameter.dtype))


def _kernels(dtype: ms.Type) -> list[tuple[str, str, int, nn.Cell, tuple]]:
    """List name, shape, operations, cell and inputs; guided, so batches of two."""
    B = 2
    maps = {(c, s): random((B, c, s, s), dtype) for c, s in ((320, 64), (1280, 16))}
    rows = {(n, c): random((B, n, c), dtype) for n, c in ((1024, 640), (256, 1280))}
    wide = random((B, 1024, 2560), dtype)
    text = random((B, 77, 640), dtype)
    found: list[tuple[str, str, int, nn.Cell, tuple]] = []
    for (c, s), x in maps.items():
        count = B * flops.conv(c, c, s * s)
        shape = f"{B}x{c}x{s}x{s}"
        convolve = Conv2d(c, c, 3, dtype, padding=1)
        found.append(("conv 3x3", shape, count, convolve, (x,)))
        found.append(("group norm", shape, 0, GroupNorm(c, 32), (x,)))
        found.append(("silu", shape, 0, Call(ops.silu), (x,)))
    for (n, c), x in rows.items():
        shape = f"{B}x{n}x{c}"
        count = flops.dense(B * n, c, 8 * c)
        found.append((f"dense to {8 * c}", shape, count, Dense(c, 8 * c, dtype), (x,)))
        found.append(("layer norm", shape, 0, LayerNorm(c), (x,)))
        itself = ops.Attention(c // 64, 64, fused=True)
        count = B * flops.attention(n, n, c)
        found.append(("self-attention", shape, count, itself, (x, x, x)))
    x = rows[1024, 640]
    count = B * flops.attention(1024, 77, 640)
    across = ops.Attention(10, 64)
    shape = f"{B}x1024x77x640"
    found.append(("cross-attention", shape, count, across, (x, text, text)))
    found.append(("gelu", f"{B}x1024x2560", 0, Call(ops.gelu), (wide,)))
    return found
