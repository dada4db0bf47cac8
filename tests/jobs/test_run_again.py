"""A folder run again: nothing twice, nothing mixed, what is new is made."""

import pytest
from jobs_shared import (
    FAKE,
    numbered,
    order,
    pixels_of,
    rows_of,
    run_job,
    write_csv,
)

from jobs import pool
from jobs.errors import ExitCode, MismatchError
from jobs.order import Order
from jobs.run import run
from jobs.store import Store


def test_a_second_run_makes_nothing_and_starts_no_worker(
    run_rows, tmp_path, monkeypatch
):
    rows = [*numbered(3), ("bad", "raise=x"), ("none", None)]
    before = run_rows(rows)
    stored = rows_of(tmp_path / "out", "image_id", "pixel_sha256", "attempts")

    def forbidden(*_):
        raise AssertionError("a worker was started")

    monkeypatch.setattr(pool.Pool, "run", forbidden)
    again = run_rows(rows)
    assert again.made == 0
    assert again.counts == before.counts
    assert again.exit_code == ExitCode.PARTIAL
    names = ("image_id", "pixel_sha256", "attempts")
    assert rows_of(tmp_path / "out", *names) == stored


def test_other_settings_are_refused_by_name(run_rows, tmp_path):
    run_rows(numbered(2))
    with pytest.raises(MismatchError) as caught:
        run_rows(numbered(2), "sampling.guidance_scale=7")
    assert "sampling.guidance_scale: `5.0` there, `7.0` asked" in str(caught.value)
    assert "sampling.steps" not in str(caught.value)
    # What changes no pixels may change.
    assert run_rows(numbered(2), "runtime.batch_size=2", workers=2).made == 0


def test_another_checkpoint_is_refused(run_rows, tmp_path, checkpoint):
    from sdxl.config import PRESETS
    from sdxl.random_weights import write_random

    run_rows(numbered(1))
    other = tmp_path / "other.safetensors"
    write_random(other, PRESETS["tiny"], "fp16", seed=1)
    with pytest.raises(MismatchError, match="checkpoint"):
        run_job(tmp_path / "m.csv", tmp_path / "out", other)


def test_appended_rows_are_made_and_the_others_are_not(run_rows, tmp_path):
    run_rows(numbered(3), columns=("id", "prompt"))
    first = pixels_of(tmp_path / "out")
    summary = run_rows(numbered(5))
    assert summary.made == 2
    assert summary.counts["ok"] == 5
    assert first.items() <= pixels_of(tmp_path / "out").items()


def test_changed_and_removed_rows_are_refused(run_rows, tmp_path):
    rows = [("none", None), *numbered(4)]  # an invalid row first: places still hold
    run_rows(rows)
    changed = [*rows]
    changed[3] = ("r2", "another prompt")
    with pytest.raises(MismatchError, match=r"1 rows? .* changed .*m\.csv line 5"):
        run_rows(changed)
    with pytest.raises(MismatchError, match=r"1 rows? .* gone"):
        run_rows(rows[:-1])
    assert run_rows(rows).made == 0


def test_a_limit_makes_the_first_rows_and_later_the_rest(run_rows, tmp_path):
    rows = [*numbered(4), ("none", None), ("last", "p")]
    assert run_rows(rows, limit=2).counts == {"ok": 2, "failed": 0, "invalid": 0}
    assert run_rows(rows, limit=3).made == 1
    assert run_rows(rows).counts == {"ok": 5, "failed": 0, "invalid": 1}
    # A smaller limit later takes nothing away.
    assert run_rows(rows, limit=1).counts == {"ok": 5, "failed": 0, "invalid": 1}
    assert len(rows_of(tmp_path / "out")) == 6


def test_an_invalid_row_that_was_mended_is_made_and_its_old_row_is_gone(
    run_rows, tmp_path
):
    columns = ("id", "prompt", "width")
    rows = [("a", "p", 64), ("b", "q", 1000), ("c", None, 64)]
    summary = run_rows(rows, columns=columns)
    assert summary.counts == {"ok": 1, "failed": 0, "invalid": 2}
    rows[1] = ("b", "q", 128)
    summary = run_rows(rows, columns=columns)
    assert summary.made == 1
    assert summary.counts == {"ok": 2, "failed": 0, "invalid": 1}
    found = rows_of(tmp_path / "out")
    assert [(r["prompt_id"], r["status"]) for r in found] == [
        ("a", "ok"),
        ("b", "ok"),
        ("c", "invalid"),
    ]


def test_a_job_goes_on_with_the_order_it_was_started_with(tmp_path, checkpoint):
    manifest = write_csv(tmp_path / "m.csv", [("x", "p")], ("name", "Prompt"))
    asked = order(
        manifest,
        tmp_path / "out",
        checkpoint,
        "sampling.steps=3",
        prompt_column="Prompt",
        id_column="name",
    )
    run(asked, pipeline=FAKE)
    stored = Order.stored(Store(tmp_path / "out"))
    assert stored.config == asked.config
    assert (stored.prompt_column, stored.id_column) == ("Prompt", "name")
    assert run(stored, pipeline=FAKE).made == 0
