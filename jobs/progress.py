"""Progress on stderr: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import TextIO, TypeVar

from tqdm import tqdm

from jobs.errors import printable

LINE_SECONDS = 30.0
Row = TypeVar("Row")
Shown = TypeVar("Shown", bound="_Bar")
WINDOW_SECONDS = 120.0


class _Tqdm(tqdm):
    """tqdm, quiet about a bar whose making a signal broke off."""

    def __del__(self) -> None:
        with suppress(AttributeError):  # of what the bar has not got yet
            super().__del__()


class Progress:
    """Count images towards a total and say how fast and how long still.

    The rate is over the last two minutes, so that compiling at the start does not spoil
    the estimate for the rest.
    """

    def __init__(self, total: int, *, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._total = total
        self.done = 0
        self.failed = 0
        self._recent: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])
        self._last_line = time.monotonic()
        self._bar = None
        if self._stream.isatty():
            self._bar = _Tqdm(
                total=total,
                unit="img",
                file=self._stream,
                smoothing=0.1,
                dynamic_ncols=True,
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, made: int, failed: int) -> None:
        """Count images that are made, and tasks that failed."""
        self.done += made + failed
        self.failed += failed
        now = time.monotonic()
        self._recent.append((now, self.done))
        while len(self._recent) > 2 and now - self._recent[0][0] > WINDOW_SECONDS:
            self._recent.popleft()
        if self._bar is not None:
            self._bar.update(made + failed)
            if self.failed:
                self._bar.set_postfix(failed=self.failed)
        elif now - self._last_line > LINE_SECONDS or self.done == self._total:
            self._last_line = now
            self.say(self.line())

    @property
    def rate(self) -> float:
        """Images per second, lately."""
        (start, before), (end, after) = self._recent[0], self._recent[-1]
        return (after - before) / (end - start) if end > start else 0.0

    @property
    def eta_seconds(self) -> float | None:
        return (self._total - self.done) / self.rate if self.rate else None

    def line(self) -> str:
        """Put the state into one line for a log."""
        share = 100 * self.done / self._total if self._total else 100.0
        text = (
            f"{self.done}/{self._total} images ({share:.1f} %), {self.rate:.3g} img/s"
        )
        if self.failed:
            text += f", {self.failed} failed"
        if self.eta_seconds is not None and self.done < self._total:
            text += f", ETA {duration(self.eta_seconds)}"
        return text

    def say(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if self._bar is not None:
            self._bar.write(printable(text, 2_000), file=self._stream)
        else:
            print(printable(text, 2_000), file=self._stream, flush=True)


def counted(rows: Iterable[Row], what: str) -> Iterator[Row]:
    """Pass rows through, saying now and then how many went by; short reads say nothing.

    On a terminal it is a counter that goes away; in a log a line every `LINE_SECONDS`.
    """
    bar = _Tqdm(
        rows,
        desc=printable(what),
        unit=" rows",
        unit_scale=True,
        delay=2,
        leave=False,
        file=sys.stderr,
        mininterval=0.5 if sys.stderr.isatty() else LINE_SECONDS,
    )
    with bar:
        yield from bar


def tracked(items: Iterable[Row], total: int, what: str) -> Iterator[Row]:
    """Pass items through under a bar that tells the time left; short work has none."""
    bar = _Tqdm(
        items,
        total=total,
        desc=printable(what),
        unit=" files",
        delay=2,
        leave=False,
        file=sys.stderr,
        mininterval=0.5 if sys.stderr.isatty() else LINE_SECONDS,
    )
    with bar:
        yield from bar


class _Bar:
    """Show how much is done of how much, and the time left: call it with both."""

    def __init__(self, what: str, unit: str, *, scaled: bool = False) -> None:
        self._bar = _Tqdm(
            desc=printable(what),
            unit=unit,
            unit_scale=scaled,
            delay=1,
            leave=False,
            file=sys.stderr,
            mininterval=0.5 if sys.stderr.isatty() else LINE_SECONDS,
        )

    def __call__(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def say(self, text: str) -> None:
        """Print a line without tearing the bar."""
        self._bar.write(printable(text, 2_000), file=sys.stderr)

    def __enter__(self: Shown) -> Shown:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()


class StepBar(_Bar):
    """Show steps of a computation."""

    def __init__(self, what: str) -> None:
        super().__init__(what, "step")


class ByteBar(_Bar):
    """Show bytes read or written."""

    def __init__(self, what: str) -> None:
        super().__init__(what, "B", scaled=True)


def duration(seconds: float) -> str:
    """Write a duration for people: `42 s`, `3 min 5 s`, `2 h 10 min`, `12 d 4 h`."""
    whole = round(seconds)
    for unit, size, below, part in (
        ("d", 86_400, "h", 3_600),
        ("h", 3_600, "min", 60),
        ("min", 60, "s", 1),
    ):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {below}" if rest else "")
    return f"{whole} s"
