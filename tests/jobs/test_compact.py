"""compact merges what is there, of a job that is done or not, and loses nothing."""

import inline_pool
import pyarrow.parquet as pq
import pytest
from jobs_shared import FAKE, order, rows_of, write_csv

from jobs import cli, run, seal
from jobs.compact import compact
from jobs.errors import OutputError
from jobs.order import Order
from jobs.store import Store


@pytest.fixture
def half(tmp_path, checkpoint, monkeypatch):
    """A job that was killed after its pictures, before it was compacted."""
    inline_pool.install(monkeypatch)
    rows = [(f"r{i}", f"a picture {i}", f"tag {i}", None) for i in range(6)]
    rows.append(("bad", "x", "tag", "65"))
    manifest = write_csv(tmp_path / "m.csv", rows, ("id", "prompt", "tag", "width"))
    asked = order(manifest, tmp_path / "out", checkpoint, "output.commit_every=2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "compact", lambda *_: None)
        run.run(asked, pipeline=FAKE)
    return tmp_path / "out"


def test_rows_of_all_parts_are_merged_in_order_with_their_own_columns(half):
    before = Store(half).index().counts()
    assert compact(half) == half / "results.parquet"
    rows = rows_of(half)
    assert [r["prompt_id"] for r in rows] == [*(f"r{i}" for i in range(6)), "bad"]
    assert rows[3]["tag"] == "tag 3"
    assert (
        Store(half).index().counts() == before == {"ok": 6, "failed": 0, "invalid": 1}
    )
    assert not list((half / "parts").iterdir())
    assert seal.broken(half / "results.parquet") is None
    metadata = pq.read_schema(half / "results.parquet").metadata
    assert b"sdxl_jobs.job" in metadata and b"sdxl_jobs.manifest_sha256" in metadata


def test_a_job_goes_on_after_it(half):
    with (Order.stored(Store(half)).manifest).open("a") as file:
        file.write("r9,one more,tag,\n")
    compact(half)
    run.run(Order.stored(Store(half)), pipeline=FAKE)
    assert len(rows_of(half)) == 8


def test_it_is_the_same_twice(half):
    compact(half)
    rows = rows_of(half)
    cli.main(["compact", str(half)])
    assert rows_of(half) == rows


def test_a_folder_without_rows_is_refused(half):
    for path in (half / "parts").iterdir():
        path.unlink()
    with pytest.raises(OutputError, match="has no rows yet"):
        compact(half)


def test_a_torn_part_is_one_line_and_nothing_is_merged(half):
    part = sorted((half / "parts").glob("*.parquet"))[0]
    part.write_bytes(part.read_bytes()[:40])
    there = sorted(half.rglob("*"))
    with pytest.raises(OutputError, match=f"can't read .*{part.name}"):
        compact(half)
    assert sorted(half.rglob("*")) == there
