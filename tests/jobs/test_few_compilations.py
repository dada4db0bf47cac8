"""How often a job's graphs are compiled, by processes as they really run."""

from collections import Counter

from jobs_shared import numbered, order, pixels_of, rows_of, run_job, write_csv

from jobs.run import run
from jobs.status import read_status

COLUMNS = ("id", "prompt", "width", "height")
SIZES = [(64 * w, 64 * h) for w in (1, 2) for h in (1, 2, 3, 4)]


def per_graph(folder, what="compiles"):
    """Count over all workers: {graph key: how often}."""
    total = Counter()
    for worker in read_status(folder)["workers"]:
        total.update(worker[what])
    return total


def test_eight_graphs_on_four_workers_are_compiled_by_few(tmp_path, checkpoint):
    """By half of them at most on average, whatever the times at which they start."""
    rows = [
        (f"r{i}", f"a picture {i} sleep=0.02", *SIZES[(i * 5 + i // 8) % 8])
        for i in range(160)
    ]
    manifest = write_csv(tmp_path / "m.csv", rows, COLUMNS)
    settings = ("runtime.batch_size=2", "runtime.shard_batches=2")
    costly = "compiling_pipeline:Compiling"
    asked = order(manifest, tmp_path / "four", checkpoint, *settings, workers=4)
    run(asked, pipeline=costly)
    compiled = per_graph(tmp_path / "four")
    assert len(compiled) == len(SIZES)
    assert compiled.total() <= len(SIZES) * 4 / 2
    run_job(manifest, tmp_path / "one", checkpoint, *settings, workers=1)
    assert pixels_of(tmp_path / "four") == pixels_of(tmp_path / "one")


def test_of_four_workers_that_start_together_one_compiles_a_graph(tmp_path, checkpoint):
    manifest = write_csv(tmp_path / "m.csv", numbered(12))
    settings = (f"runtime.compile_cache={tmp_path / 'cache'}", "sampling.steps=1")
    asked = order(manifest, tmp_path / "out", checkpoint, *settings, workers=4)
    assert run(asked).counts["ok"] == 12
    ready, loaded = per_graph(tmp_path / "out"), per_graph(tmp_path / "out", "loads")
    assert set((ready - loaded).values()) == {1}
    assert loaded.total() >= len(ready)  # at least one other worker had each
    again = order(manifest, tmp_path / "again", checkpoint, *settings, workers=2)
    run(again)
    assert per_graph(tmp_path / "again") == per_graph(tmp_path / "again", "loads")
    assert pixels_of(tmp_path / "again") == pixels_of(tmp_path / "out")
    assert all(row["peak_memory_mb"] > 100 for row in rows_of(tmp_path / "out"))
