"""What becomes of a dead worker's lease: which task may have killed it?

What it had begun is suspect, and costs an attempt; the rest was only waiting. Suspects
are tried again batch by batch, the next time task by task, so that innocents come away.
A task is given up when it was alone, and that for the last time it may be tried.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from jobs.plan import batches
from jobs.records import Batch, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenBack:
    """Batches to be made by others, and the task that no one is to try again."""

    batches: tuple[Batch, ...]
    given_up: Task | None


def give_back(
    pending: Sequence[Task], begun: Collection[str], *, most: int, batch_size: int
) -> GivenBack:
    """Sort what a dead worker had; `begun` holds image ids, `most` is attempts."""
    suspects = [
        replace(task, attempts=task.attempts + 1)
        for task in pending
        if task.image_id in begun
    ]
    waiting = [task for task in pending if task.image_id not in begun]
    given_up = None
    if len(suspects) == 1 and suspects[0].tries >= most:
        given_up = suspects.pop()
    parted = (
        *_parted(suspects, batch_size),
        *batches((t for t in waiting if not t.tries), batch_size),
        *batches((t for t in waiting if t.tries), 1),
    )
    return GivenBack(batches=parted, given_up=given_up)


def _parted(suspects: Sequence[Task], batch_size: int) -> Iterator[Batch]:
    again = any(task.tries > 1 for task in suspects)
    return batches(suspects, 1 if again else batch_size)
