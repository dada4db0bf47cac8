"""Compiled graphs: one per key, counted and timed.

Design: a graph's shapes never change, so a key that compiles twice is a bug, and shows
in `Graphs.compiles`. What a process before this one compiled is loaded from the compile
cache, where there is one. Arrays go in and come out as numpy; what a batch reuses in
every step is put on the device once, with `on_device`.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from sdxl import cpu_kernels, ops
from sdxl.compile_cache import CompileCache, uncached

Input = np.ndarray | Tensor


def set_up(
    device_target: str,
    device_id: int = 0,
    threads: int | None = None,
    *,
    flash_attention: bool | None = None,
) -> None:
    """Choose device and graph mode for this process; call it before building a network.

    `flash_attention` is for Ascend: None uses it on the cards that have it. `threads`
    bounds the threads of CPU kernels, to two at the least: MindSpore always has a
    dispatching and a working one. It holds for the process: what is given after the
    first kernel has run comes too late and changes nothing.
    """
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        ms.set_device(device_target, device_id)
    except RuntimeError:  # a kernel has run: the device is chosen, and may be this one
        if (ms.get_context("device_target"), device_id) != (device_target, 0):
            raise
    if threads is not None:
        bound_threads(threads)
    if device_target == "Ascend":
        keep_numbers()
        flash = has_flash_attention() if flash_attention is None else flash_attention
        ops.build_in(ops.ASCEND if flash else ops.ASCEND_SOFTMAX)
    else:
        cpu_kernels.set_threads(threads or len(os.sched_getaffinity(0)))
        ops.build_in(ops.form_of_cpu())


@cache
def keep_numbers() -> None:
    """Have a card compute what the graph says, each time alike: said once a process.

    By default the engine may halve the precision of what is in float32 (Atlas 910), or
    convolve it with 11 bits of mantissa, and add in any order. The autoencoder's values
    do not fit into float16, and a picture must come out again as it was.
    """
    precision = ms.device_context.ascend.op_precision
    precision.precision_mode("must_keep_origin_dtype")
    precision.conv_allow_hf32(False)
    ms.set_deterministic(True)


def has_flash_attention() -> bool:
    """Say whether this card is an Atlas A2 or later."""
    from mindspore._c_expression import MSContext  # as in mindspore.amp

    version = MSContext.get_instance().get_ascend_soc_version()
    return version not in ("ascend910", "ascend310", "ascend310p")


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
    and `compile_ms` go by key: how often it was made ready, which should be once, and
    how long that took in all; `loads`: how often from the compile cache.
    """

    def __init__(
        self,
        *,
        precision: str,
        jit_level: str,
        device_target: str,
        prefix: str = "",
        cache: CompileCache | None = None,
    ) -> None:
        self.cache = cache
        self.prefix = prefix
        mark = ops.form().mark
        self.suffix = f"{precision}-{jit_level}-{device_target.lower()}{mark}"
        self.jit_level = jit_level
        self.compiles: dict[str, int] = {}
        self.compile_ms: dict[str, float] = {}
        self.loads: dict[str, int] = {}
        self._cells: dict[str, nn.Cell] = {}
        self._shapes: dict[str, str] = {}

    def run(self, name: str, make: Callable[[], nn.Cell], *inputs: Input) -> Any:
        """Run the graph `name`, whose cell `make` builds; return what it returns."""
        outputs = self.keep(name, make, *inputs)
        if isinstance(outputs, tuple):
            return tuple(output.asnumpy() for output in outputs)
        return outputs.asnumpy()

    def keep(self, name: str, make: Callable[[], nn.Cell], *inputs: Input) -> Any:
        """Do as `run`, but leave what the graph returns on the device."""
        key = f"{self.prefix}{name}-{self.suffix}"
        if key not in self._cells:
            self._cells[key] = make().set_train(False)
            self._cells[key].set_jit_config(ms.JitConfig(jit_level=self.jit_level))
        cell = self._cells[key]
        tensors = [on_device(x) if isinstance(x, np.ndarray) else x for x in inputs]
        self._compile(key, cell, tensors)
        return cell(*tensors)

    def _compile(self, key: str, cell: nn.Cell, inputs: list[Tensor]) -> None:
        """Compile if these inputs need it; MindSpore keeps an entry per signature."""
        before, start = len(cell.compile_cache), time.perf_counter()
        loaded = self._make_ready(key, cell, inputs)
        compiled = len(cell.compile_cache) - before
        if compiled == 0:
            return
        elapsed = (time.perf_counter() - start) * 1e3
        self.compiles[key] = self.compiles.get(key, 0) + compiled
        self.compile_ms[key] = self.compile_ms.get(key, 0.0) + elapsed
        self.loads[key] = self.loads.get(key, 0) + loaded

    def _make_ready(self, key: str, cell: nn.Cell, inputs: list[Tensor]) -> bool:
        """Have MindSpore compile or load the graph; tell which."""
        shapes = _shapes(inputs)
        if self._shapes.get(key) == shapes:
            uncached(lambda: cell.compile(*inputs))  # does nothing, if all is well
            return False

        def compile_it() -> None:
            cell.compile(*inputs)
            if ms.get_context("device_target") == "Ascend":
                cell(*inputs)  # the device's engine finishes its build in the first run

        loaded = False
        if self.cache is None:
            uncached(compile_it)
        else:
            loaded = self.cache.ready(key, _signature(cell, shapes), compile_it)
        self._shapes[key] = shapes
        return loaded

    def release(self, name: str = "") -> None:
        """Drop the graphs whose name begins so, and what they hold."""
        start = self.prefix + name
        for key in [key for key in self._cells if key.startswith(start)]:
            del self._cells[key]
            self._shapes.pop(key, None)


def _shapes(tensors: Iterable[Tensor]) -> str:
    return " ".join(f"{x.dtype}{tuple(x.shape)}" for x in tensors)


def _signature(cell: nn.Cell, shapes: str) -> str:
    """Hash a graph's form, its inputs' shapes, its parameters' names and shapes."""
    parameters = cell.parameters_dict()
    lines = [repr(ops.form()), shapes, *parameters, _shapes(parameters.values())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
