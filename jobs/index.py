"""Which tasks have a row, and what became of each: what resuming subtracts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jobs import parts
from jobs.parts import CLASSES, STATUSES


@dataclass(frozen=True, slots=True)
class Index:
    """Which tasks have a row: sorted image ids (uint64), and what became of each.

    With `again`, a mask, all is done but the rows it marks: they are to be retried.
    """

    ids: np.ndarray
    status: np.ndarray
    attempts: np.ndarray
    classes: np.ndarray
    again: np.ndarray | None = None

    def retrying(self, only: Iterable[str] | None) -> Index:
        """Mark the failed rows, or those of some error classes, to be made again."""
        again = self.status == STATUSES.index("failed")
        if only is not None:
            codes = [CLASSES.index(name) for name in only]
            again &= np.isin(self.classes, codes)
        return replace(self, again=again)

    def counts(self) -> dict[str, int]:
        return {s: int((self.status == i).sum()) for i, s in enumerate(STATUSES)}

    def is_done(self, image_ids: Sequence[str]) -> np.ndarray:
        """Tell which images are made or failed for good; an invalid row is neither."""
        return self.are_done(_numbers(image_ids))

    def are_done(self, images: np.ndarray) -> np.ndarray:
        """Tell the same of image numbers (uint64)."""
        at = parts.lookup(self.ids, images)
        if not len(self.ids):
            return (at >= 0) | (self.again is not None)
        if self.again is not None:
            return (at < 0) | ~self.again[at]
        return (at >= 0) & (self.status[at] != STATUSES.index("invalid"))

    def attempts_of(self, image_ids: Sequence[str]) -> np.ndarray:
        """Give how often each image was tried so far."""
        at = parts.lookup(self.ids, _numbers(image_ids))
        if not len(self.ids):
            return np.zeros(len(at), np.int32)
        return np.where(at >= 0, self.attempts[at], 0)


def _numbers(image_ids: Sequence[str]) -> np.ndarray:
    return np.array([int(i, 16) for i in image_ids], np.uint64)
