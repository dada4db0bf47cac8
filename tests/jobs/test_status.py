"""status believes the rows, and of status.json only what the runner wrote."""

import inline_pool
import pytest
from jobs_shared import FAKE, numbered, order, write_csv

from jobs import run
from jobs.status import describe, read_status


@pytest.fixture
def job(tmp_path, checkpoint, monkeypatch):
    inline_pool.install(monkeypatch)
    manifest = write_csv(tmp_path / "m.csv", numbered(3))
    run.run(order(manifest, tmp_path / "out", checkpoint), pipeline=FAKE)
    return tmp_path / "out"


def test_a_finished_job_says_so(job):
    said = read_status(job)
    assert said["state"] == "finished"
    assert said["counts"] == {"ok": 3, "failed": 0, "invalid": 0, "pending": 0}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '{"state": "finished", "workers": [{}]}',
        '{"state": "finished", "images_per_s": "fast"}',
        "[" * 100_000,
        "\x00\xff",
    ],
)
def test_another_status_file_is_not_believed(job, text):
    (job / "status.json").write_text(text)
    said = read_status(job)
    assert said["state"] == "dead" and said["workers"] == []
    assert said["counts"]["ok"] == 3
    assert "3 ok" in describe(said)
