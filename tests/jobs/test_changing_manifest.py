"""A manifest that changes under a job: it is named, and no good row pays for it."""

import hashlib

import inline_pool
import pytest
from jobs_shared import FAKE, numbered, order, rows_of, write_csv

from jobs import run
from jobs.errors import ManifestError, MismatchError
from jobs.findings import describe
from jobs.order import Order
from jobs.repair import repair
from jobs.store import Store
from jobs.verify import verify

ROWS = numbered(6)


@pytest.fixture
def job(tmp_path, checkpoint, monkeypatch):
    """Give a function that runs the job of `m.csv`; its rows are written before."""
    inline_pool.install(monkeypatch)
    write_csv(tmp_path / "m.csv", ROWS)

    def go():
        asked = order(tmp_path / "m.csv", tmp_path / "out", checkpoint)
        return run.run(asked, pipeline=FAKE)

    return go


@pytest.fixture
def once_planned(tmp_path, monkeypatch):
    """Give a function that has the manifest changed when it was read once."""

    def change(rows):
        original = run._Run._announce

        def announce(self, found):
            write_csv(tmp_path / "m.csv", rows)
            original(self, found)

        monkeypatch.setattr(run._Run, "_announce", announce)
        return lambda: monkeypatch.setattr(run._Run, "_announce", original)

    return change


def test_rows_appended_in_mid_run_wait_for_the_next(job, tmp_path, once_planned):
    again = [*ROWS, ("r6", "a new one"), ("r0", "an id that stands already")]
    undo = once_planned(again)
    assert job().counts == {"ok": 6, "failed": 0, "invalid": 0}
    undo()
    assert verify(tmp_path / "out").sound
    assert job().counts == {"ok": 7, "failed": 0, "invalid": 1}


@pytest.mark.parametrize(
    ("rows", "where"),
    [
        ([*ROWS[:3], ("r3", "another text"), *ROWS[4:]], "m.csv line 5"),
        (ROWS[:4], "its end"),
        ([*ROWS[:4], ("r4", None), ROWS[5]], "m.csv line 7"),
    ],
)
def test_a_manifest_changed_in_mid_run_stops_it(
    job, tmp_path, once_planned, rows, where
):
    undo = once_planned(rows)
    with pytest.raises(ManifestError, match=f"while it was read: {where}"):
        job()
    undo()
    write_csv(tmp_path / "m.csv", ROWS)
    assert job().counts == {"ok": 6, "failed": 0, "invalid": 0}
    prompts = {row["prompt_id"]: row["prompt"] for row in rows_of(tmp_path / "out")}
    assert prompts == dict(ROWS)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (ROWS[:2], "4 rows that .* was started with are gone"),
        ([("r0", "changed"), *ROWS[1:]], "1 rows .* have changed .* m.csv line 2"),
    ],
)
def test_good_rows_are_not_dropped_for_a_manifest_that_changed(
    job, tmp_path, rows, said
):
    job()
    before = hashlib.sha256((tmp_path / "out" / "results.parquet").read_bytes())
    write_csv(tmp_path / "m.csv", rows)
    report = repair(tmp_path / "out")
    (finding,) = report.findings
    assert finding.kind == "manifest" and not report.repaired
    assert "not balanced" in describe(report)
    with pytest.raises(MismatchError, match=said) as refused:
        run.run(Order.stored(Store(tmp_path / "out")), pipeline=FAKE)
    assert str(refused.value) in finding.what
    after = hashlib.sha256((tmp_path / "out" / "results.parquet").read_bytes())
    assert after.digest() == before.digest()


def test_appended_rows_are_pending_and_nothing_is_wrong(job, tmp_path):
    job()
    write_csv(tmp_path / "m.csv", [*ROWS, ("r6", "a new one")])
    report = verify(tmp_path / "out")
    assert report.sound and report.counts["pending"] == 1
