"""Which models are in memory: all of them, or one at a time.

Design: MindSpore keeps the weights and the work space of a graph that has run until its
process ends, whatever is deleted. So where one model fits at a time, each lives in a
process of its own, which ends before the next one starts; this one holds no weights.
What crosses the pipe is small: conditioning, latents, random streams, pixels. The price
is a reading for each change of place, and a compilation or a loading from its cache.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from multiprocessing import util
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

from sdxl.memory import Peak, largest, peak_memory

if TYPE_CHECKING:
    from sdxl.pipeline import Pipeline

Loader = Callable[[], "Pipeline"]
END_SECONDS = 10
PR_SET_PDEATHSIG = 1
COUNTS = ("compiles", "compile_ms", "loads")
# What a second stage needs of a first one, and a caller of both.
METHODS = ("encode", "encode_images", "begin", "run", "decode")


class Remote:
    """A `Pipeline` in a process of its own: its methods, what it compiled and needed.

    `load` must be picklable. `close()` ends the process and frees its memory. Raises
    what the pipeline raises; EOFError when the process died.
    """

    def __init__(self, load: Loader) -> None:
        self.compiles: dict[str, int] = {}
        self.compile_ms: dict[str, float] = {}
        self.loads: dict[str, int] = {}
        self.memory: Peak = (0.0, None)
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        process = context.Process(target=serve, args=(other, load), daemon=True)
        process.start()
        other.close()
        # Python waits for its children before it ends: this one must be told first.
        self.close = util.Finalize(self, end, (self._pipe, process), exitpriority=10)
        self._receive()

    def peak_memory(self) -> Peak:
        """Give what its process needed at most, as it last said."""
        return self.memory

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in METHODS:
            raise AttributeError(name)
        return partial(self._call, name)

    def _call(self, method: str, *args: Any) -> Any:
        self._pipe.send((method, args))
        return self._receive()

    def _receive(self) -> Any:
        result, error, counts, self.memory = self._pipe.recv()
        for what in COUNTS:
            setattr(self, what, counts[what])
        if error is not None:
            raise error
        return result


def end(pipe: Connection, process: BaseProcess) -> None:
    """Tell a process to end, and see to it that it does."""
    pipe.close()
    process.join(END_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()


def serve(pipe: Connection, load: Loader) -> None:
    """Load a pipeline and answer calls until the other end is closed."""
    _die_with_parent()
    pipeline: Any = None
    method, args = None, ()
    while True:
        result, error = None, None
        try:
            if method is None:
                pipeline = load()
            else:
                result = getattr(pipeline, method)(*args)
        except Exception as caught:
            error = caught
        counts = {what: getattr(pipeline, what, {}) for what in COUNTS}
        try:
            pipe.send((result, error, counts, peak_memory()))
            method, args = pipe.recv()
        except (EOFError, OSError):
            return


def _die_with_parent() -> None:
    """Have the kernel end this process with its parent, in mid-call even (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Residents:
    """Pipelines by name, loaded when asked for; `one` at a time, if it must be."""

    def __init__(self, loaders: dict[str, Loader], *, one: bool) -> None:
        self.loaders = loaders
        self.one = one
        self._gone: dict[str, Counter[str]] = {}
        self._peak: Peak = (0.0, None)
        self._loaded: dict[str, Any] = {}

    def get(self, name: str) -> Pipeline:
        """Give a pipeline, loading it first where it is not there."""
        if name not in self._loaded:
            load = self.loaders[name]
            if self.one:
                self.release()
                self._loaded[name] = Remote(load)
            else:
                self._loaded[name] = load()
        return self._loaded[name]

    def release(self) -> None:
        """Let the pipelines of other processes go, keeping what was counted."""
        for pipeline in self._loaded.values():
            self._peak = largest(self._peak, pipeline.peak_memory())
            for what in COUNTS:
                self._gone.setdefault(what, Counter()).update(getattr(pipeline, what))
            pipeline.close()
        self._loaded.clear()

    def peak_memory(self) -> Peak:
        """Give the most that this process and one beside it needed, in MB."""
        here = peak_memory()
        if not self.one:
            return here
        for pipeline in self._loaded.values():
            self._peak = largest(self._peak, pipeline.peak_memory())
        return here[0] + self._peak[0], self._peak[1]

    def count(self, what: str) -> dict[str, Any]:
        """Add up one of `COUNTS` of the pipelines there and gone."""
        total = Counter(self._gone.get(what, {}))
        for pipeline in self._loaded.values():
            total.update(getattr(pipeline, what))
        return dict(total)
