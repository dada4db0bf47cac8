"""Compiled graphs: one per key, counted and timed.

Design: a graph's shapes never change, so a key that compiles twice is a bug, and shows
in `Graphs.compiles`. Arrays go in and come out as numpy; what a batch reuses in every
step is put on the device once, with `on_device`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from sdxl import ops

Input = np.ndarray | Tensor


def set_up(device_target: str, device_id: int = 0, threads: int | None = None) -> None:
    """Choose device and graph mode for this process; call it before building a network.

    `threads` bounds the threads of CPU kernels, to two at the least: MindSpore always
    has a dispatching and a working one. It holds for the process: what is given after
    the first kernel has run comes too late and changes nothing.
    """
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        ms.set_device(device_target, device_id)
    except RuntimeError:  # a kernel has run: the device is chosen, and may be this one
        if (ms.get_context("device_target"), device_id) != (device_target, 0):
            raise
    if threads is not None:
        bound_threads(threads)


@cache
def bound_threads(threads: int) -> None:
    """Tell MindSpore, which refuses to be told twice, or after its first kernel."""
    with suppress(RuntimeError):
        ms.device_context.cpu.op_tuning.threads_num(threads)


def on_device(array: np.ndarray) -> Tensor:
    """Copy an array to where graphs read it."""
    return Tensor(np.ascontiguousarray(array))


class Graphs:
    """The graphs of one model, made when first asked for.

    `prefix` precedes their keys, to tell two models of one process apart. `compiles`
    and `compile_ms` go by key: how often it was compiled, which should be once, and how
    long that took in all.
    """

    def __init__(
        self, *, precision: str, jit_level: str, device_target: str, prefix: str = ""
    ) -> None:
        self.prefix = prefix
        self.suffix = f"{precision}-{jit_level}-{device_target.lower()}"
        self.jit_level = jit_level
        self.compiles: dict[str, int] = {}
        self.compile_ms: dict[str, float] = {}
        self._cells: dict[str, nn.Cell] = {}

    def run(self, name: str, make: Callable[[], nn.Cell], *inputs: Input) -> Any:
        """Run the graph `name`, whose cell `make` builds; return what it returns."""
        key = f"{self.prefix}{name}-{self.suffix}"
        if key not in self._cells:
            self._cells[key] = make().set_train(False)
            self._cells[key].set_jit_config(ms.JitConfig(jit_level=self.jit_level))
        cell = self._cells[key]
        tensors = [on_device(x) if isinstance(x, np.ndarray) else x for x in inputs]
        self._compile(key, cell, tensors)
        outputs = cell(*tensors)
        if isinstance(outputs, tuple):
            return tuple(output.asnumpy() for output in outputs)
        return outputs.asnumpy()

    def _compile(self, key: str, cell: nn.Cell, inputs: list[Tensor]) -> None:
        """Compile if these inputs need it; MindSpore keeps an entry per signature."""
        before, start = len(cell.compile_cache), time.perf_counter()
        cell.compile(*inputs)
        compiled = len(cell.compile_cache) - before
        if compiled == 0:
            return
        if ops.on_ascend():
            cell(*inputs)  # the device's engine finishes its build in the first run
        elapsed = (time.perf_counter() - start) * 1e3
        self.compiles[key] = self.compiles.get(key, 0) + compiled
        self.compile_ms[key] = self.compile_ms.get(key, 0.0) + elapsed

    def release(self, name: str = "") -> None:
        """Drop the graphs whose name begins so, and what they hold."""
        start = self.prefix + name
        for key in [key for key in self._cells if key.startswith(start)]:
            del self._cells[key]
