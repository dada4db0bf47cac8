"""The worker's own code without its process: hundreds of small runs in seconds.

What is made, written and committed is the same; what is left out is what the tests of
the pool look at: processes, pipes and their death.
"""

from fake_pipeline import FakePipeline

from jobs import run, store
from jobs.worker import Worker


class InlinePool:
    """Take the place of `jobs.pool.Pool`: one worker, in this process."""

    def __init__(self, specs, shards, observer, stop):
        self._shards = shards
        self._unmerged = []
        self._observer = observer
        spec = specs[0]
        info = {"mindspore_version": None}
        pipeline = FakePipeline(**spec.pipeline_options)
        self._worker = Worker(spec, pipeline, self, info)

    def run(self):
        for shard in self._shards:
            self._worker._inbox.put(shard)
        self._worker._inbox.put(None)
        self._worker.run()
        self._observer.tick([])

    def send(self, kind, **content):
        if kind == "batch":
            self._observer.batch_made(content["made"], content["failed"])
        elif kind == "part":
            self._observer.committed([status for _, status in content["done"]])
            self._unmerged.append(content["name"])
            if len(self._unmerged) >= store.MERGE_AT:
                self._worker._store.merge(self._unmerged)
                self._unmerged.clear()


def install(monkeypatch):
    """Run jobs inline, and hash the checkpoint once."""
    opened = {}

    def open_once(section, *rest):
        key = str(section.checkpoint)
        if key not in opened:
            opened[key] = original(section, *rest)
        return opened[key]

    original = run.open_model
    monkeypatch.setattr(run, "open_model", open_once)
    monkeypatch.setattr(run, "Pool", InlinePool)
