"""What each process of the lock's race does; a module of its own to be spawned."""

from jobs.errors import LockedError
from jobs.lock import FolderLock


def contend(folder, rounds, go, stop, queue):
    """Try to lock the folder each round; say whether this process won."""
    for _ in range(rounds):
        go.wait()
        try:
            with FolderLock(folder):
                queue.put("won")
                stop.wait()
        except LockedError:
            queue.put("refused")
            stop.wait()
