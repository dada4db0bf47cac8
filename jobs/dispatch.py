"""Which shard for which worker: few compile a graph, and none is idle that could help.

    shards ──window──> by graph ──> a worker's own graph, the one with most work left
                                    else one that nobody has
                                    else, when it would be idle, another's: if that pays

A worker keeps the graphs it has. A graph that nobody has goes to whoever is free. Help
with another's graph costs a compilation, and pays when its work, shared among one more,
still takes longer than that; both are measured while the job runs. Nothing here changes
a picture: only where it is made.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Iterator
from typing import Any

from jobs.records import Shard

WINDOW_TASKS = 8_192
Graph = tuple[Any, ...]


class Dispatch:
    """Give out shards. It looks no more than `WINDOW_TASKS` tasks ahead."""

    def __init__(self, shards: Iterator[Shard]) -> None:
        self._shards = shards
        self._waiting: dict[Graph, deque[Shard]] = {}
        self._tasks: Counter[Graph] = Counter()
        self._has: dict[Hashable, set[Graph]] = {}
        self._seconds: dict[Graph, float] = {}
        self._cost: dict[Graph, float] = {}
        self._all_read = False

    def take(self, worker: Hashable, *, idle: bool) -> Shard | None:
        """Give a worker its next shard; None when there is none, or none that pays.

        One that is not idle is not sent to help others: it may yet have better to do.
        """
        self._read_ahead()
        has = self._has.setdefault(worker, set())
        owners = Counter(g for graphs in self._has.values() for g in graphs)
        own = [graph for graph in self._waiting if graph in has]
        free = [graph for graph in self._waiting if not owners[graph]]
        others = [g for g in self._waiting if idle and self._pays(g, owners[g])]
        for graphs in (own, free, others):
            if graphs:
                most = max(graphs, key=lambda g: self._tasks[g] / (owners[g] + 1))
                has.add(most)
                return self._pop(most)
        return None

    def measured(
        self, graph: Graph, tasks: int, seconds: float, preparing: float
    ) -> None:
        """Note what a batch took, and what of it went into making its graph ready."""
        if tasks:
            self._seconds[graph] = max(0.0, seconds - preparing) / tasks
        if preparing:
            self._cost[graph] = min(preparing, self._cost.get(graph, preparing))

    def forget(self, worker: Hashable) -> None:
        """Say that a worker's process has ended, and its graphs with it."""
        self._has.pop(worker, None)

    @property
    def exhausted(self) -> bool:
        """Tell whether nothing is left to give."""
        self._read_ahead()
        return not self._waiting

    def _pays(self, graph: Graph, owners: int) -> bool:
        cost = self._cost.get(graph) or max(self._cost.values(), default=0.0)
        seconds = self._seconds.get(graph)
        if seconds is None or not owners:
            return True
        return self._tasks[graph] * seconds / owners > cost

    def _pop(self, graph: Graph) -> Shard:
        shard = self._waiting[graph].popleft()
        self._tasks[graph] -= len(shard.tasks)
        if not self._waiting[graph]:
            del self._waiting[graph], self._tasks[graph]
        return shard

    def _read_ahead(self) -> None:
        while not self._all_read and self._tasks.total() < WINDOW_TASKS:
            shard = next(self._shards, None)
            if shard is None:
                self._all_read = True
                return
            graph = shard.batches[0].tasks[0].graph
            self._waiting.setdefault(graph, deque()).append(shard)
            self._tasks[graph] += len(shard.tasks)
