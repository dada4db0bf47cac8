"""The runner with the real, small network: the same pixels however work is split."""

import pytest
from jobs_shared import ROOT, order, pixels_of, rows_of

from jobs.run import run
from jobs.status import read_status

PARTI = ROOT / "tests" / "data" / "parti_prompts.tsv"


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory, checkpoint):
    """The first prompts of a real manifest on one worker and on two."""
    folder = tmp_path_factory.mktemp("real")
    for workers in (1, 2):
        asked = order(
            PARTI,
            folder / f"w{workers}",
            checkpoint,
            "runtime.batch_size=4",
            "runtime.shard_batches=1",
            workers=workers,
            limit=6,
            prompt_column="Prompt",
        )
        summary = run(asked)
        assert summary.counts == {"ok": 6, "failed": 0, "invalid": 0}
    return folder / "w1", folder / "w2"


def test_one_worker_and_two_give_the_same_pixels(two_runs):
    one, two = map(pixels_of, two_runs)
    assert one == two
    assert len(set(one.values())) == 6


def test_each_worker_compiles_each_graph_once_the_short_last_batch_included(two_runs):
    for folder in two_runs:
        compiled = [worker["compiles"] for worker in read_status(folder)["workers"]]
        assert any(compiled)  # on a busy machine one worker may do all
        assert {count for graphs in compiled for count in graphs.values()} == {1}
        assert {row["batch_valid"] for row in rows_of(folder)} == {4, 2}
        assert {row["batch_size"] for row in rows_of(folder)} == {4}


def test_the_rows_say_which_software_made_them(two_runs):
    row = rows_of(two_runs[0])[0]
    assert row["mindspore_version"].startswith("2.")
    assert row["includes_compile"]
    assert row["compile_ms"] > 0
    assert row["denoise_ms"] > 0
