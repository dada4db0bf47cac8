"""The output folder: files whole or not at all, one row per task, done by its row."""

import os
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jobs_shared import ROOT

from jobs import parts
from jobs.errors import MismatchError, OutputError
from jobs.parts import result_schema
from jobs.records import RESULT_COLUMNS, image_id
from jobs.store import Store, publish

SCHEMA = result_schema(pa.schema([("tag", pa.string())]))


@pytest.fixture
def folder(tmp_path):
    made = Store(tmp_path / "out")
    made.prepare_root()
    made.prepare()
    return made


def row(number, status="ok", index=0, **fields):
    return (
        dict.fromkeys(RESULT_COLUMNS)
        | {
            "image_id": image_id(f"r{number}", index),
            "prompt_id": f"r{number}",
            "image_index": index,
            "source_row": number,
            "status": status,
            "error_class": None if status == "ok" else "bug",
            "attempts": 1,
            "run_id": "run-1",
            "tag": f"t{number}",
        }
        | fields
    )


def compacted(folder, run_id="run-1", rows_read=100):
    folder.compact(SCHEMA, {"key": "value"}, run_id, rows_read)
    return pq.read_table(folder.results).to_pylist()


def test_a_published_file_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "f"
    publish(path, b"one")
    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:

            def die(*_, **__):
                raise KeyboardInterrupt

            patch.setattr(os, "fsync", die) if step == "fsync" else patch.setattr(
                "pathlib.Path.replace", die
            )
            with pytest.raises(KeyboardInterrupt):
                publish(path, b"two")
        assert path.read_bytes() == b"one"
        assert list(tmp_path.iterdir()) == [path]
    publish(path, b"three")
    assert path.read_bytes() == b"three"


def test_preparing_clears_what_a_killed_run_left_half_written(folder):
    (folder.root / "images" / "ab").mkdir()
    left = [
        folder.root / f".tmp-{'0' * 32}.parquet",
        folder.root / "parts" / f".tmp-{'1' * 32}",
        folder.root / "images" / "ab" / f".tmp-{'a' * 32}",
    ]
    kept = [
        folder.root / "images" / "ab" / "picture.png",
        folder.root / ".tmp-of-someone-else",
    ]
    for path in (*left, *kept):
        path.write_text("x")
    folder.prepare()
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in kept)
    # A half-written part is no part: nothing of it counts as done.
    assert folder.sources() == []


def test_the_schema_is_the_contracts_table():
    # Oracle: the table of result columns in the README.
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## The results") :].split("\n## ")[0]
    named = {
        name
        for line in section.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert named == set(RESULT_COLUMNS)
    kinds = {field.name: str(field.type) for field in result_schema()}
    assert kinds["image_id"] == kinds["status"] == kinds["host"] == "string"
    assert kinds["seed"] == kinds["source_row"] == kinds["image_bytes"] == "int64"
    assert kinds["steps"] == kinds["device_id"] == kinds["attempts"] == "int32"
    assert kinds["guidance_scale"] == kinds["compile_ms"] == "float"
    assert kinds["prompt_truncated"] == kinds["includes_compile"] == "bool"
    assert kinds["started_at"] == kinds["finished_at"] == "timestamp[us, tz=UTC]"
    assert kinds["qc_flags"].startswith("list<")


def test_an_ok_row_beats_a_later_failure_and_the_latest_failure_counts(folder):
    folder.write_part("a", [row(0), row(1, "failed", error_message="old")], SCHEMA)
    newer = row(1, "failed", error_message="new", attempts=2)
    folder.write_part("b", [row(0, "failed"), newer], SCHEMA)
    first, second = compacted(folder)
    assert (first["status"], first["error_class"]) == ("ok", None)
    assert second["error_message"] == "new"
    # Again from results.parquet and a new part: an ok row replaces a failure.
    folder.write_part("c", [row(1), row(2)], SCHEMA)
    assert [r["status"] for r in compacted(folder)] == ["ok", "ok", "ok"]


def test_compaction_keeps_one_row_per_task_in_manifest_order(folder, monkeypatch):
    monkeypatch.setattr(parts, "COMPACT_ROWS", 7)
    monkeypatch.setattr(parts, "GROUP_ROWS", 5)
    order = np.random.RandomState(0).permutation(60)
    for number, chunk in enumerate(np.split(order, 6)):
        rows = [row(int(n) // 2, index=int(n) % 2) for n in chunk]
        folder.write_part(f"p{number}", rows, SCHEMA)
    expected = [(n, i, f"t{n}") for n in range(30) for i in (0, 1)]
    for _ in range(2):  # from parts, then from results.parquet alone
        found = compacted(folder)
        places = [(r["source_row"], r["image_index"], r["tag"]) for r in found]
        assert places == expected
    assert folder.sources() == [folder.results]
    metadata = pq.read_schema(folder.results).metadata
    assert metadata[b"key"] == b"value"
    assert metadata[b"sdxl_jobs.schema_version"] == b"1"
    assert pq.read_schema(folder.results).equals(SCHEMA, check_metadata=False)


def test_compaction_reads_only_the_row_groups_it_needs(folder, monkeypatch):
    monkeypatch.setattr(parts, "COMPACT_ROWS", 10)
    monkeypatch.setattr(parts, "GROUP_ROWS", 10)
    folder.write_part("a", [row(n) for n in range(100)], SCHEMA)
    compacted(folder)
    read = []
    real = pq.ParquetFile.read_row_groups

    def noted(self, groups, *args, **kwargs):
        read.append(len(groups))
        return real(self, groups, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", noted)
    folder.write_part("b", [row(50, "failed")], SCHEMA)
    compacted(folder)
    assert sum(read) <= 2 * 10


def test_a_crash_between_the_results_and_their_parts_doubles_nothing(
    folder, monkeypatch
):
    folder.write_part("a", [row(0), row(1, "failed")], SCHEMA)

    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", die)
        with pytest.raises(KeyboardInterrupt):
            compacted(folder)
    assert folder.results.exists()
    assert len(folder.sources()) == 2
    assert folder.index().counts() == {"ok": 1, "failed": 1, "invalid": 0}
    assert len(compacted(folder)) == 2


def test_stale_invalid_rows_go_and_those_not_read_again_stay(folder):
    rows = [
        row(n, "invalid", run_id="run-0", error_class="invalid_row") for n in (1, 9)
    ]
    folder.write_part("a", [row(0), *rows], SCHEMA)
    found = compacted(folder, "run-1", rows_read=5)
    assert [(r["source_row"], r["status"]) for r in found] == [
        (0, "ok"),
        (9, "invalid"),
    ]


def test_columns_that_an_older_part_lacks_are_null(folder):
    bare = result_schema()
    old = row(0)
    del old["tag"]
    folder.write_part("a", [old], bare)
    folder.write_part("b", [row(1)], SCHEMA)
    assert [r["tag"] for r in compacted(folder)] == [None, "t1"]


@pytest.mark.parametrize("name", ["parts/w0-1.parquet", "results.parquet"])
@pytest.mark.parametrize("damage", ["cut", "text", "empty", "column"])
def test_a_damaged_file_is_named_in_one_line(folder, name, damage):
    folder.write_part("w0-1", [row(n) for n in range(50)], SCHEMA)
    if name == "results.parquet":
        compacted(folder)
    path = folder.root / name
    if damage == "column":
        pq.write_table(pa.table({"x": [1]}), path)
    else:
        whole = path.read_bytes()
        content = {"cut": whole[: len(whole) // 2], "text": b"hello", "empty": b""}
        path.write_bytes(content[damage])
    with pytest.raises(OutputError) as caught:
        folder.index()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_the_index_knows_what_is_done(folder):
    folder.write_part("a", [row(0), row(1, "failed"), row(2, "invalid")], SCHEMA)
    index = folder.index()
    names = [image_id(f"r{n}", 0) for n in range(4)]
    assert index.is_done(names).tolist() == [True, True, False, False]
    assert index.counts() == {"ok": 1, "failed": 1, "invalid": 1}
    assert not Store(folder.root / "none").index().is_done(names).any()


def test_reading_while_a_run_compacts_counts_every_row_once(folder, monkeypatch):
    # The reader has listed the parts when they are merged and removed under it.
    folder.write_part("a", [row(n) for n in range(5)], SCHEMA)
    real = parts.read
    pending = [True]

    def read_late(path, *args, **kwargs):
        if pending.pop() if pending else False:
            Store(folder.root).compact(SCHEMA, {}, "run-1", 5)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(parts, "read", read_late)
    assert folder.index().counts()["ok"] == 5


def hashes(*numbers):
    return np.array(numbers, np.uint64)


def check(folder, ids, contents, whole=True):
    return folder.check_rows(ids, contents, whole, lambda at: f"line {at}")


def test_appended_rows_are_counted_and_their_order_is_free(folder):
    assert check(folder, hashes(5, 3), hashes(50, 30)) == 2
    folder.remember_rows(hashes(5, 3), hashes(50, 30))
    assert check(folder, hashes(3, 9, 5), hashes(30, 90, 50)) == 1
    folder.remember_rows(hashes(3, 9, 5), hashes(30, 90, 50))
    assert check(folder, hashes(9, 5, 3), hashes(90, 50, 30)) == 0


def test_changed_rows_are_named_and_removed_ones_counted(folder):
    folder.remember_rows(hashes(5, 3, 7), hashes(50, 30, 70))
    with pytest.raises(MismatchError, match=r"2 rows .* changed .*: line 0, line 2$"):
        check(folder, hashes(7, 5, 3), hashes(71, 50, 31))
    with pytest.raises(MismatchError, match=r"1 rows .* gone"):
        check(folder, hashes(5, 7), hashes(50, 70))
    assert check(folder, hashes(5), hashes(50), whole=False) == 0


def test_a_long_list_of_changed_rows_is_cut(folder):
    ids = np.arange(100, dtype=np.uint64)
    folder.remember_rows(ids, ids)
    with pytest.raises(MismatchError, match=r"line 4, …$"):
        check(folder, ids, ids + np.uint64(1))


@pytest.mark.parametrize("content", [b"", b"PK", b"hello", "half"])
def test_damaged_bookkeeping_is_named(folder, content):
    folder.remember_rows(hashes(1, 2), hashes(1, 2))
    whole = (folder.root / "rows.npz").read_bytes()
    (folder.root / "rows.npz").write_bytes(
        whole[: len(whole) // 2] if content == "half" else content
    )
    with pytest.raises(OutputError, match=r"rows\.npz"):
        check(folder, hashes(1), hashes(1))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"asked": {}}', "[" * 9_000])
def test_a_job_file_that_is_none_is_named(folder, content):
    folder.job.write_text(content)
    with pytest.raises(OutputError, match=r"job\.json"):
        folder.read_job()


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="can't make"):
        Store(tmp_path / "file" / "out").prepare_root()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "images").write_text("x")
    with pytest.raises(OutputError, match="can't write"):
        Store(tmp_path / "out").prepare()


def test_error_classes_of_rows_are_known_to_the_index():
    # Oracle: the contract's list, in the README.
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = [x for x in text.splitlines() if "`error_class`" in x and "`oom`" in x]
    named = set(re.findall(r"`(\w+)`", line)) - {"error_class", "error_message"}
    assert set(parts.CLASSES) - {""} == named
