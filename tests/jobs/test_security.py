"""Hostile folders, rows and words: nothing is written outside, run or shown raw."""

import io
import json
import shutil
import struct
import time
import zipfile
import zlib
from pathlib import Path

import inline_pool
import numpy as np
import pyarrow.parquet as pq
import pytest
from jobs_shared import FAKE, call, order, rows_of, run_arguments, write_csv

from jobs import cli, parts, run, seal
from jobs.compact import compact
from jobs.errors import JobError, OutputError
from jobs.findings import describe
from jobs.order import Order
from jobs.progress import Progress, counted
from jobs.repair import repair
from jobs.store import Store, make_folder, publish
from jobs.verify import verify

SECRET = "hunter2-do-not-tell"
ESCAPE = "\x1b]0;owned\x07\x1b[31m"


@pytest.fixture
def job(tmp_path, checkpoint, monkeypatch):
    """Give a function that runs rows inline in `out`, beside a folder `outside`."""
    inline_pool.install(monkeypatch)
    (tmp_path / "outside").mkdir()

    def run_rows(rows=None, names=("id", "prompt")):
        rows = rows or [(f"r{i}", f"a picture {i}") for i in range(4)]
        manifest = write_csv(tmp_path / "m.csv", rows, names)
        return run.run(order(manifest, tmp_path / "out", checkpoint), pipeline=FAKE)

    return run_rows


def empty(folder):
    return not any(folder.iterdir())


@pytest.mark.parametrize("name", ["images", "parts", "logs"])
def test_a_folder_that_leads_elsewhere_is_refused(job, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "outside")
    with pytest.raises(OutputError, match="it is a symbolic link"):
        job()
    assert empty(tmp_path / "outside")


def test_a_folder_of_images_that_leads_elsewhere_is_refused(job, tmp_path):
    images = tmp_path / "out" / "images"
    images.mkdir(parents=True)
    (tmp_path / "outside" / ".tmp-mine").write_text("mine")
    for i in range(256):
        (images / f"{i:02x}").symlink_to(tmp_path / "outside")
    with pytest.raises(OutputError, match="it is a symbolic link"):
        job()
    assert [p.name for p in (tmp_path / "outside").iterdir()] == [".tmp-mine"]


def test_a_link_made_while_the_job_runs_is_not_followed(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "ab").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError, match="symbolic link"):
        make_folder(tmp_path / "ab")


@pytest.mark.parametrize(
    "name", ["job.json", "status.json", "rows.npz", "results.parquet"]
)
def test_a_file_that_is_a_link_is_replaced_and_its_target_left_alone(
    job, tmp_path, name
):
    job()
    target = tmp_path / "outside" / name
    (tmp_path / "out" / name).rename(target)
    before = target.read_bytes()
    (tmp_path / "out" / name).symlink_to(target)
    assert any("symbolic link" in f.what for f in verify(tmp_path / "out").findings)
    job([(f"r{i}", f"a picture {i}") for i in range(5)])
    assert target.read_bytes() == before
    assert not (tmp_path / "out" / name).is_symlink()


def test_an_image_that_is_a_link_is_named_and_not_read(job, tmp_path):
    job()
    row = rows_of(tmp_path / "out")[0]
    image = tmp_path / "out" / row["image_path"]
    image.rename(tmp_path / "outside" / "x.png")
    image.symlink_to(tmp_path / "outside" / "x.png")
    (finding,) = verify(tmp_path / "out").findings
    assert finding.what == "is a symbolic link"


def test_a_trace_is_not_written_through_a_link(job, tmp_path, monkeypatch, capsys):
    job()
    target = tmp_path / "outside" / "rc"
    target.write_text("mine")
    (tmp_path / "out" / "log.txt").symlink_to(target)

    def fall(*_):
        raise RuntimeError(ESCAPE)

    monkeypatch.setattr("jobs.status.read_status", fall)
    with pytest.raises(SystemExit) as ended:
        cli.main(["status", str(tmp_path / "out")])
    assert ended.value.code == 3
    assert target.read_text() == "mine"
    assert "\x1b" not in capsys.readouterr().err


HOSTILE_IDS = [
    "../../outside/x",
    "/etc/passwd",
    "..\\..\\outside",
    "a/../../outside",
    "con",
    "x" * 512,
    "a\u202etxt",
    "images/../../outside",
    ESCAPE,
    "$(touch outside/x)",
    "-rf",
    "",
]


def test_no_id_or_prompt_becomes_a_path_outside(job, tmp_path):
    before = {p for p in tmp_path.rglob("*") if "out/" not in f"{p}"}
    job([(name, f"prompt of {name}") for name in HOSTILE_IDS])
    made = {p for p in tmp_path.rglob("*") if f"{tmp_path}/out" not in f"{p}"}
    assert made - before == {tmp_path / "m.csv"}
    for path in (tmp_path / "out" / "images").rglob("*.png"):
        assert len(path.stem) == 16 and int(path.stem, 16) >= 0
    assert len(rows_of(tmp_path / "out")) == len(HOSTILE_IDS)


def test_control_characters_never_reach_the_terminal_raw(tmp_path, checkpoint):
    rows = [("r0", f"raise={ESCAPE}"), (ESCAPE, "bad id"), ("r2", "kill-worker")]
    manifest = write_csv(tmp_path / "m.csv", rows)
    words = run_arguments(manifest, tmp_path / "out", checkpoint)
    done = call(*words, cwd=tmp_path)
    assert done.returncode == 4
    assert "\x1b" not in done.stdout + done.stderr
    plan = call("plan", manifest, "--checkpoint", checkpoint, cwd=tmp_path)
    assert plan.returncode == 4 and "\x1b" not in plan.stdout + plan.stderr


def test_what_the_runner_says_is_printable():
    stream = io.StringIO()
    Progress(1, stream=stream).say(f"worker is lost: {ESCAPE}")
    assert "\x1b" not in stream.getvalue() and "\\x1b" in stream.getvalue()


def test_a_file_s_name_is_printable_beside_a_count(monkeypatch, capsys):
    monkeypatch.setattr("jobs.progress.LINE_SECONDS", 0)
    rows = counted((time.sleep(0.3) for _ in range(10)), f"reading {ESCAPE}.csv")
    assert len(list(rows)) == 10
    shown = capsys.readouterr().err
    assert "reading" in shown and "\x1b" not in shown and "\x07" not in shown


def test_findings_are_printed_without_control_characters(job, tmp_path):
    job()
    path = tmp_path / "out" / "results.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0]["image_format"] = ESCAPE
    path.write_bytes(parts.encode(rows, table.schema.remove_metadata()))
    report = verify(tmp_path / "out")
    assert report.findings and "\x1b" not in describe(report)


def test_secrets_of_the_environment_reach_no_file(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    rows = [("r0", "a picture"), ("r1", "raise=broken"), ("r2", "kill-worker")]
    manifest = write_csv(tmp_path / "m.csv", rows)
    call(*run_arguments(manifest, tmp_path / "out", checkpoint), cwd=tmp_path)
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert any(p.suffix == ".log" for p in files)
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in str(rows_of(tmp_path / "out"))


class Bomb:
    """Unpickled, it would leave a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_nothing_is_unpickled_from_the_books(job, tmp_path):
    job()
    trap = tmp_path / "trap"
    sink = io.BytesIO()
    np.savez(sink, ids=np.array([Bomb(trap)], object), contents=np.zeros(1, np.uint64))
    with zipfile.ZipFile(sink, "a") as archive:
        archive.comment = (seal.NPZ_COMMENT + seal.ZEROS).encode()
    (tmp_path / "out" / "rows.npz").write_bytes(seal.seal(sink.getvalue(), ".npz"))
    with pytest.raises(OutputError, match=r"rows\.npz can't be read"):
        job()
    assert not trap.exists()


def test_an_image_that_claims_to_be_huge_is_not_decoded(job, tmp_path):
    job()
    out = tmp_path / "out"
    path = out / "results.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    image = out / rows[0]["image_path"]
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = bytearray(image.read_bytes())
    data[16:33] = header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    image.write_bytes(data)
    import hashlib

    rows[0]["image_sha256"] = hashlib.sha256(data).hexdigest()
    rows[0]["image_bytes"] = len(data)
    path.write_bytes(parts.encode(rows, table.schema.remove_metadata()))
    (finding,) = verify(out).findings
    assert "60000x60000" in finding.what or "can't be decoded" in finding.what


@pytest.mark.parametrize(
    "job_json",
    [
        {},
        [],
        {"asked": None},
        {"asked": {"config": [], "manifest": 3}},
        {"asked": {"config": {"model": {"checkpoint": {"a": 1}}}, "manifest": "x"}},
    ],
)
def test_a_hostile_job_file_that_is_sealed_ends_in_one_line(tmp_path, job_json):
    whole = dict.fromkeys(
        ("run_id", "asked", "fingerprint", "fingerprint_fields", "rows", "tasks")
    )
    if isinstance(job_json, dict):
        job_json = {**whole, **job_json}
        text = json.dumps(job_json | {"sha256": seal.ZEROS}, indent=2)
    else:
        text = json.dumps([{"sha256": seal.ZEROS}], indent=2)
    (tmp_path / "job.json").write_bytes(seal.seal(text.encode(), ".json"))
    with pytest.raises(JobError):
        Order.stored(Store(tmp_path))


def test_a_half_written_file_can_not_be_planted(tmp_path, monkeypatch):
    # A name that exists already, even as a link, is not written through.
    class Known:
        hex = "0" * 32

    monkeypatch.setattr("jobs.store.uuid.uuid4", Known)
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (tmp_path / f".tmp-{Known.hex}").symlink_to(outside)
    with pytest.raises(FileExistsError):
        publish(tmp_path / "x", b"data")
    assert outside.read_text() == "mine"


def test_repair_puts_nothing_aside_through_a_link(job, tmp_path):
    job()
    image = next((tmp_path / "out").glob("images/*/*.png"))
    image.write_bytes(b"changed")
    (tmp_path / "out" / "damaged").symlink_to(tmp_path / "outside")
    with pytest.raises(OutputError, match="damaged: it is a symbolic link"):
        repair(tmp_path / "out")
    assert empty(tmp_path / "outside") and image.read_bytes() == b"changed"


def test_repair_takes_a_link_for_a_folder_away_and_nothing_behind_it(job, tmp_path):
    job()
    (tmp_path / "out" / "parts").rmdir()
    shutil.copy(tmp_path / "out" / "results.parquet", tmp_path / "outside")
    (tmp_path / "out" / "parts").symlink_to(tmp_path / "outside")
    next((tmp_path / "out").glob("images/*/*.png")).write_bytes(b"changed")
    before = (tmp_path / "outside" / "results.parquet").read_bytes()
    found = {finding.path for finding in repair(tmp_path / "out").findings}
    assert "parts" in found and len(found) == 2
    assert (tmp_path / "outside" / "results.parquet").read_bytes() == before
    assert job().counts["ok"] == 4 and verify(tmp_path / "out").sound


def test_compact_removes_nothing_behind_a_link(job, tmp_path):
    job()
    (tmp_path / "out" / "parts").rmdir()
    shutil.copy(tmp_path / "out" / "results.parquet", tmp_path / "outside")
    (tmp_path / "out" / "parts").symlink_to(tmp_path / "outside")
    with pytest.raises(OutputError, match="parts: it is a symbolic link"):
        compact(tmp_path / "out")
    assert not empty(tmp_path / "outside")
