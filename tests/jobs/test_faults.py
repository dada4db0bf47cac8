"""The fault table of docs/reliability.md: what is injected, seen, stored and returned.

Errors of the disk are injected at the named points of `jobs.crash`, where the system
would raise them; everything else is the real thing.
"""

import os
import re
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
from jobs_shared import FAKE, ROOT, numbered, rows_of, run_arguments, write_csv

from jobs import cli, crash, pool, run, slot

TABLE = ROOT / "docs" / "reliability.md"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(pool, "BACK_OFF_SECONDS", 0.01)
    monkeypatch.setattr(slot, "FIRST_CALL_SECONDS", 1.0)
    monkeypatch.setitem(run.run.__kwdefaults__, "pipeline", FAKE)
    yield
    crash.arm(None)


class Bench:
    """A job of eight pictures on the command line, and what it printed."""

    def __init__(self, folder, checkpoint, capfd):
        self.folder = folder
        self.output = folder / "out"
        self.checkpoint = checkpoint
        self.capfd = capfd
        self.seen = self.all_seen = ""
        self.write(numbered(8))

    def write(self, rows):
        self.manifest = write_csv(self.folder / "m.csv", rows)

    def run(self, *settings, workers=1, command=None):
        base = ("runtime.batch_size=2", "output.commit_every=2")
        words = command or run_arguments(
            self.manifest,
            self.output,
            self.checkpoint,
            *base,
            *settings,
            workers=workers,
        )
        code = 0
        try:
            cli.main([str(word) for word in words])
        except SystemExit as ended:
            code = ended.code
        out, self.seen = self.capfd.readouterr()
        assert "Traceback" not in self.seen + out
        self.all_seen += self.seen
        return int(code)

    def resume(self, *words):
        return self.run(command=["resume", self.output, *words])

    def rows(self):
        return rows_of(self.output, "status", "error_class", "attempts", "prompt_id")

    def statuses(self):
        return Counter(row["status"] for row in self.rows())

    def class_of(self, prompt_id):
        return {r["prompt_id"]: r["error_class"] for r in self.rows()}[prompt_id]

    def sees(self, pattern):
        lines = self.seen.splitlines()
        assert any(re.fullmatch(pattern, line) for line in lines), self.seen


@pytest.fixture
def bench(tmp_path, checkpoint, capfd, request):
    """Give a bench, and hold what was seen to what the table says is seen."""
    bench = Bench(tmp_path, checkpoint, capfd)
    yield bench
    quoted = quotes(request.node.originalname)
    lines = bench.all_seen.splitlines()
    matched = [q for q in quoted if any(re.fullmatch(q, line) for line in lines)]
    assert matched or not quoted or not lines, (quoted, bench.all_seen)


def table_rows():
    text = TABLE.read_text(encoding="utf-8")
    table = text.split("## The fault table")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in row[1:-1].split(" | ")] for row in rows]


def quotes(name):
    """Give the lines that a test's row quotes as patterns: `…`, DIR, numbers vary."""
    (cell,) = [row[1] for row in table_rows() if f"::{name}`" in row[-1]]
    found = [a or b for a, b in re.findall(r"``(.+?)``|`(.+?)`", cell)]
    patterns = [re.escape(quote).replace("…", ".*") for quote in found]
    patterns = [re.sub(r"\bDIR\b", ".*", pattern) for pattern in patterns]
    return [re.sub(r"(?<!w)\b\d+\b", r"[\\d.]+", pattern) for pattern in patterns]


def with_word(word):
    rows = numbered(8)
    rows[3] = ("r3", f"a picture {word}")
    return rows


def test_a_worker_is_killed_once(bench, tmp_path):
    bench.write(with_word(f"kill-once={tmp_path / 'once'}"))
    assert bench.run() == 0
    bench.sees(r"worker w0-\S+ is lost: killed by signal 9")
    assert bench.statuses() == {"ok": 8}


def test_a_task_kills_its_worker_each_time(bench):
    bench.write(with_word("kill-worker"))
    assert bench.run() == 4
    bench.sees(r"worker w0-\S+ is lost: killed by signal 9")
    bench.sees(r"finished: 7 ok, 1 failed, 0 invalid; 7 made now at \S+ img/s")
    assert bench.class_of("r3") == "worker_lost"


def test_a_device_call_hangs(bench):
    bench.write(with_word("sleep=1000"))
    started = time.monotonic()
    assert bench.run("runtime.batch_timeout=3") == 4
    assert time.monotonic() - started < 60
    bench.sees(
        r"worker w0-\S+ is lost: a call ran for over \S+ s \(runtime.batch_timeout\)"
    )
    assert bench.statuses() == {"ok": 7, "failed": 1}
    assert bench.class_of("r3") == "timeout"


def test_no_worker_can_start(bench, checkpoint, tmp_path):
    bench.checkpoint = tmp_path / "refuse-to-load.safetensors"
    shutil.copy(checkpoint, bench.checkpoint)
    assert bench.run(workers=2) == 1
    bench.sees(
        r"error: no worker is left; the last one said: RuntimeError: this device "
        r"can't start"
    )
    assert not (bench.output / "results.parquet").exists()


def test_a_module_can_not_be_imported(bench, monkeypatch):
    monkeypatch.setitem(run.run.__kwdefaults__, "pipeline", "no_such_module:Pipeline")
    assert bench.run() == 1
    bench.sees(
        r"error: no worker is left; the last one said: ModuleNotFoundError: No module "
        r"named 'no_such_module'"
    )


@pytest.mark.parametrize(
    ("word", "kind"),
    [("raise=device-lost", "device"), ("raise=oom", "oom"), ("raise=broken", "bug")],
)
def test_the_device_fails(bench, word, kind):
    bench.write(with_word(word))
    assert bench.run() == 4
    bench.sees(r"finished: 7 ok, 1 failed, 0 invalid; 7 made now at \S+ img/s")
    assert bench.class_of("r3") == kind


@pytest.mark.parametrize("word", ["make-nan", "make-black"])
def test_the_output_is_no_picture(bench, word):
    bench.write(with_word(word))
    assert bench.run() == 4
    assert bench.class_of("r3") == "nan"
    assert len(list(bench.output.glob("images/*/*.png"))) == 7


REASONS = {
    "ENOSPC": "No space left on device",
    "EIO": "Input/output error",
    "EROFS": "Read-only file system",
}


@pytest.mark.parametrize("error", REASONS)
@pytest.mark.parametrize("point", ["image.written:3", "part.synced:2", "rows.written"])
def test_the_disk_fails(bench, error, point):
    name, _, nth = point.partition(":")
    crash.arm(f"{name}:{nth or 1}:{error}")
    assert bench.run() == 1
    bench.sees(f"error: .*{REASONS[error]}.*")
    bench.sees("hint: make room or repair the folder, then `sdxl-jobs resume` it")
    crash.arm(None)
    assert bench.resume() == 0
    assert bench.statuses() == {"ok": 8}


def test_the_disk_fails_under_the_runner_s_own_files(bench):
    for point in ("job.written", "status.synced", "results.written"):
        crash.arm(f"{point}:1:ENOSPC")
        assert bench.run() == 1, point
        bench.sees("error: can't go on in .*: No space left on device")
        crash.arm(None)
    assert bench.resume() == 0


def test_a_full_disk_that_is_real(bench):
    disk = bench.folder / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=400k tmpfs {disk} 2>/dev/null"):
        pytest.skip("can't mount a small file system here")
    try:
        bench.output = disk / "out"
        bench.write(numbered(300))
        assert bench.run() == 1
        bench.sees("error: .*No space left on device.*")
        os.system(f"mount -o remount,size=20m {disk}")
        assert bench.resume() == 0
        assert bench.statuses() == {"ok": 300}
    finally:
        os.system(f"umount -l {disk}")


def test_the_folder_vanishes(bench, monkeypatch):
    gone = bench.folder / "gone"
    original = run._Run.batch_made

    def vanish(self, made, failed):
        if bench.output.exists():
            bench.output.rename(gone)
        original(self, made, failed)

    monkeypatch.setattr(run._Run, "batch_made", vanish)
    bench.write(numbered(40, "a picture {} sleep=0.05"))
    assert bench.run() == 1
    bench.sees("error: .*No such file or directory.*")
    monkeypatch.setattr(run._Run, "batch_made", original)
    (gone / "lock").unlink()  # its process is this one, which lives on
    gone.rename(bench.output)
    assert bench.resume() == 0
    assert bench.statuses() == {"ok": 40}


def test_the_clock_jumps(bench, monkeypatch):
    bench.write(with_word("make-nan"))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 400 * 86_400)
    assert bench.run() == 4
    for part in bench.output.glob("parts/*"):
        os.utime(part, (0, 0))
    monkeypatch.setattr(time, "time", lambda: real() + 400 * 86_400)
    bench.write([*with_word("make-nan"), ("r8", "one more")])
    assert bench.run() == 4
    assert bench.statuses() == {"ok": 8, "failed": 1}


def test_the_manifest_was_changed(bench):
    assert bench.run() == 0
    bench.write(with_word("changed"))
    assert bench.run() == 1
    bench.sees(
        r"error: 1 rows of the manifest have changed since .*/out was started: "
        r"m.csv line 5"
    )
    assert bench.statuses() == {"ok": 8}


def test_the_checkpoint_was_changed(bench, tmp_path):
    assert bench.run() == 0
    data = bytearray(Path(bench.checkpoint).read_bytes())
    data[-1] ^= 1
    bench.checkpoint = tmp_path / "other.safetensors"
    bench.checkpoint.write_bytes(data)
    assert bench.run() == 1
    bench.sees(r"error: .*/out belongs to another job: checkpoint: `\w+` there, .*")


def test_the_number_of_workers_was_changed(bench):
    bench.write(numbered(8, "a picture {} kill-once=" + str(bench.folder / "once")))
    crash.arm("results.written:1:EIO")
    assert bench.run(workers=1) == 1
    crash.arm(None)
    assert bench.resume("--workers", 3) == 0
    assert bench.statuses() == {"ok": 8}


def test_every_row_of_the_table_is_backed_by_a_test():
    rows = table_rows()
    assert len(rows) > 20 and all(len(row) == 5 for row in rows)
    named = [
        re.fullmatch(r"`(test_\w+)::(test_\w+)`", row[-1]).groups() for row in rows
    ]
    for module, name in named:
        source = (Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8")
        assert f"def {name}(" in source, (module, name)
    here = set(re.findall(r"^def (test_\w+)", Path(__file__).read_text(), re.M))
    assert here - {"test_every_row_of_the_table_is_backed_by_a_test"} <= {
        name for _, name in named
    }
