"""Whatever the manifest and the order of events, books balance and pixels are one.

Oracle: a plain count of what was asked for, and the run that nothing stopped.
"""

import json
import os
import shutil
from collections import Counter

import inline_pool
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jobs_shared import FAKE, order, rows_of

from jobs import run
from jobs.verify import verify

SLOW = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ids = st.none() | st.sampled_from(["a", "b", "c", "ü", "x y", "../x", "", "\x1b"])
prompts = st.none() | words | st.sampled_from(["make-nan", "raise=x", "make-black"])
asked_rows = st.fixed_dictionaries(
    {"id": ids, "prompt": prompts},
    optional={
        "num_images": st.sampled_from([1, 2, 3, 0, "two"]),
        "width": st.sampled_from([64, 128, 65, -1, None]),
        "seed": st.sampled_from([0, 7, 2**32 - 1, 2**32, 1.5]),
        "tag": words,
    },
)


@pytest.fixture(autouse=True)
def inline(monkeypatch):
    inline_pool.install(monkeypatch)
    monkeypatch.setattr(os, "fsync", lambda _: None)


def run_rows(folder, checkpoint, rows, *settings_):
    shutil.rmtree(folder / "out", ignore_errors=True)
    return again(folder, checkpoint, rows, *settings_)


def again(folder, checkpoint, rows, *settings_):
    path = folder / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    asked = order(path, folder / "out", checkpoint, *settings_)
    return run.run(asked, pipeline=FAKE)


def is_valid(row):
    """Say, by the contract's words, whether a row can be made."""
    given = {name: value for name, value in row.items() if value is not None}
    return (
        "prompt" in given
        and "\0" not in given["prompt"]
        and given.get("id", "x") not in ("../x", "", "\x1b")
        and given.get("num_images", 1) in (1, 2, 3)
        and given.get("width", 64) in (64, 128)
        and given.get("seed", 0) in (0, 7, 2**32 - 1)
    )


@SLOW
@given(rows=st.lists(asked_rows, min_size=1, max_size=8))
def test_every_row_is_accounted_for_once(tmp_path, checkpoint, rows):
    rows = [{"id": "first", "prompt": "a"}, *rows]
    summary = run_rows(tmp_path, checkpoint, rows, "runtime.batch_size=3")
    images = invalid = 0
    seen = set()
    for row in rows:
        name = row["id"]
        if not is_valid(row) or (name is not None and name in seen):
            invalid += 1
            continue
        seen.add(name)
        images += row.get("num_images", 1)
    found = rows_of(tmp_path / "out", "image_id", "status", "source_row")
    assert len({r["image_id"] for r in found}) == len(found) == images + invalid
    counts = Counter(r["status"] for r in found)
    assert counts["invalid"] == invalid == summary.counts["invalid"]
    assert {r["source_row"] for r in found} == set(range(len(rows)))
    report = verify(tmp_path / "out")
    assert report.sound, report.findings
    assert report.counts == counts + Counter(dict.fromkeys(report.counts, 0))
    assert report.counts["pending"] == 0 and report.tasks == images


def picture_of(folder):
    rows = rows_of(folder, "prompt_id", "image_index", "status", "pixel_sha256")
    return {(r["prompt_id"], r["image_index"]): r["pixel_sha256"] for r in rows}


@SLOW
@given(
    shuffled=st.permutations(range(9)),
    batch=st.integers(1, 4),
    lease=st.integers(1, 3),
    commit=st.integers(1, 5),
    stop=st.integers(0, 6),
    cut=st.integers(1, 9),
)
def test_pixels_depend_on_nothing_but_the_task(
    tmp_path, checkpoint, monkeypatch, shuffled, batch, lease, commit, stop, cut
):
    # Order of rows, size of batches, leases and parts, where it stopped, what was
    # appended: the same pictures.
    rows = [
        {"id": f"r{i}", "prompt": f"a picture {i}", "num_images": 1 + i % 2}
        for i in range(9)
    ]
    rows[4]["prompt"] = "make-nan"
    plain = tmp_path / "plain"
    if not plain.exists():
        plain.mkdir()
        run_rows(plain, checkpoint, rows)
    mixed = [rows[i] for i in shuffled]
    options = (
        f"runtime.batch_size={batch}",
        f"runtime.shard_batches={lease}",
        f"output.commit_every={commit}",
    )
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, stop)
        run_rows(tmp_path, checkpoint, mixed[:cut], *options)
    again(tmp_path, checkpoint, mixed, *options)
    assert picture_of(tmp_path / "out") == picture_of(plain / "out")


def stop_after(patch, batches):
    """Ask the worker to stop once so many batches are made."""
    original = inline_pool.InlinePool.send
    made = []

    def send(self, kind, **content):
        original(self, kind, **content)
        if kind == "batch":
            made.append(kind)
            if len(made) >= batches:
                self._worker._stop.set()

    patch.setattr(inline_pool.InlinePool, "send", send)
