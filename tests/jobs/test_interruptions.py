"""Signals, kills and full disks: every task has one row in the end, with its pixels.

The job of most tests has two pictures that wait for a gate, a file: while it is shut,
two workers are in mid-job, however fast or slow the machine is.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import time
from collections import Counter

import psutil
import pytest
from jobs_shared import (
    FAKE,
    call,
    command,
    environment,
    pixels_of,
    rows_of,
    run_arguments,
    run_job,
    start,
    write_csv,
)

from jobs.order import Order
from jobs.run import run
from jobs.signals import Stop, interruptible
from jobs.store import Store

SETTINGS = ("output.commit_every=1", "runtime.shard_batches=1")
PICTURES = 10


class Job:
    """A manifest, the gate two of its pictures wait for, and the pixels it should give.

    `whole` is the run that nothing interrupted.
    """

    def __init__(self, folder, checkpoint):
        self.folder, self.checkpoint = folder, checkpoint
        self.gate = folder / "gate"
        rows = [(f"r{i}", f"picture {i}") for i in range(PICTURES)]
        for i in (4, 5):
            rows[i] = (f"r{i}", f"wait-for={self.gate} {i}")
        self.manifest = write_csv(folder / "m.csv", [*rows, ("none", None)])
        self.gate.touch()
        run_job(self.manifest, folder / "whole", checkpoint)
        self.whole = pixels_of(folder / "whole")
        self.processes = []

    def arguments(self, name, *settings):
        return run_arguments(
            self.manifest, name, self.checkpoint, *SETTINGS, *settings, workers=2
        )

    def launch(self, *words):
        process = start(*words, cwd=self.folder)
        self.processes.append(process)
        return process

    def begin(self, name):
        """Start the job in a folder of its own and return in its middle."""
        self.gate.unlink(missing_ok=True)
        process = self.launch(*self.arguments(name))
        parts = self.folder / name / "parts"
        until(lambda: len(list(parts.glob("w*.parquet"))) >= 4, process)
        return process

    def status(self, name):
        done = call("status", name, "--json", cwd=self.folder)
        return json.loads(done.stdout)

    def finish(self, name):
        """Resume the folder and hold it to the run that nothing interrupted."""
        self.gate.touch()
        out = self.folder / name
        run(Order.stored(Store(out)), pipeline=FAKE)
        self.hold(name)

    def hold(self, name):
        out = self.folder / name
        rows = rows_of(out)
        ids = Counter(row["image_id"] for row in rows)
        assert max(ids.values()) == 1
        assert {r["image_id"]: r["pixel_sha256"] for r in rows} == self.whole
        assert Counter(r["status"] for r in rows) == {"ok": PICTURES, "invalid": 1}
        assert all((out / r["image_path"]).exists() for r in rows if r["image_path"])
        assert not list(out.rglob(".tmp-*"))
        assert not (out / "lock").exists()


@pytest.fixture(scope="module")
def made(tmp_path_factory, checkpoint):
    return Job(tmp_path_factory.mktemp("job"), checkpoint)


@pytest.fixture
def job(made):
    yield made
    made.gate.touch()
    for process in made.processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    made.processes.clear()


def until(condition, process=None, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def workers_of(process):
    children = psutil.Process(process.pid).children(recursive=True)
    return [c for c in children if "spawn_main" in " ".join(c.cmdline())]


def wait_until_gone(processes, seconds=10):
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert not alive, alive


def test_a_signal_finishes_the_batches_in_flight_and_can_be_resumed(job):
    process = job.begin("signal")
    workers = workers_of(process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    time.sleep(0.3)
    assert any(worker.is_running() for worker in workers)  # it finishes what it has
    job.gate.touch()
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == ""
    assert "stopping: finishing the batches in flight" in err
    assert err.splitlines()[-1].startswith("interrupted; `sdxl-jobs resume` goes on: ")
    assert "Traceback" not in err
    assert not (job.folder / "signal" / "results.parquet").exists()
    said = job.status("signal")
    assert said["state"] == "interrupted"
    assert 0 < said["counts"]["ok"] < PICTURES
    job.finish("signal")


def test_a_second_signal_does_not_wait(job):
    process = job.begin("second")
    workers = workers_of(process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)  # the gate is still shut
    assert process.returncode == 130
    assert "Traceback" not in err
    wait_until_gone(workers)


def test_a_signal_before_the_workers_are_ready_ends_at_once(job):
    process = job.launch(*job.arguments("early"))
    until((job.folder / "early" / "job.json").exists, process)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err
    job.finish("early")


def test_a_worker_killed_in_mid_job_costs_no_row(job):
    process = job.begin("worker")
    workers_of(process)[0].kill()
    job.gate.touch()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 4
    assert "is lost: killed by signal 9" in err
    assert out == "worker/results.parquet\n"
    assert f"{PICTURES} made now" in err.splitlines()[-1]
    job.hold("worker")


def test_a_run_killed_in_mid_job_leaves_no_worker_and_can_be_resumed(job):
    process = job.begin("killed")
    workers = workers_of(process)
    assert len(workers) == 2
    process.kill()
    process.communicate()
    wait_until_gone(workers)
    said = job.status("killed")
    assert said["state"] == "dead"
    assert said["counts"]["pending"] >= 2
    job.gate.touch()
    done = call("resume", "killed", cwd=job.folder)
    assert done.returncode == 4, done.stderr
    assert done.stdout == "killed/results.parquet\n"
    job.hold("killed")


def test_workers_that_are_still_loading_die_with_their_supervisor(job, tmp_path):
    slow = tmp_path / "slow-to-load.safetensors"
    slow.symlink_to(job.checkpoint)
    process = job.launch(*run_arguments(job.manifest, tmp_path / "out", slow))
    until(lambda: list(tmp_path.glob("out/logs/w*.log")), process)
    workers = workers_of(process)
    assert workers
    process.kill()
    process.communicate()
    wait_until_gone(workers)


def test_status_and_a_second_run_see_the_one_that_runs(job):
    process = job.begin("running")
    said = job.status("running")
    assert said["state"] == "running"
    counts = said["counts"]
    assert counts["ok"] >= 4
    assert counts["pending"] == PICTURES - counts["ok"] >= 2
    assert said["workers"]
    second = call(*job.arguments("running"), cwd=job.folder)
    assert second.returncode == 1
    assert f"in use by pid {process.pid} on" in second.stderr
    job.gate.touch()
    process.communicate(timeout=60)
    assert process.returncode == 4
    job.hold("running")


def test_a_disk_that_fills_up_stops_the_run_and_can_be_resumed(job):
    def limit_file_size():
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))

    done = subprocess.run(
        command(*job.arguments("full")),
        cwd=job.folder,
        env=environment(),
        preexec_fn=limit_file_size,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "error: " in done.stderr
    assert "hint: " in done.stderr
    assert done.stdout == ""
    job.finish("full")


@pytest.mark.parametrize("where", ["/proc/nowhere", "m.csv/inside"])
def test_an_output_folder_that_can_not_be_made_is_refused(job, where):
    done = call(*job.arguments(where), cwd=job.folder)
    assert done.returncode == 1
    assert done.stderr.startswith("error: can't make ")
    assert "Traceback" not in done.stderr


def test_a_signal_while_it_plans_ends_it_and_leaves_nothing_half_done(job, tmp_path):
    manifest = write_csv(tmp_path / "m.csv", ((f"r{i}", "p") for i in range(300_000)))
    words = run_arguments(manifest, tmp_path / "out", job.checkpoint)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        process = job.launch(*words)
        until((tmp_path / "out" / "parts").exists, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 130 and out == ""
        assert err.splitlines()[-1] == "interrupted" and "Traceback" not in err
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
            "images",
            "logs",
            "parts",
        ]
        (tmp_path / "out" / "parts").rmdir()


def test_a_signal_whose_exception_a_library_lost_is_heeded_all_the_same():
    stop = Stop()
    with interruptible(stop):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            stop.heed()


def test_a_second_run_is_refused_while_the_first_is_stopped(job):
    process = job.begin("stopped")
    process.send_signal(signal.SIGSTOP)
    second = call(*job.arguments("stopped"), cwd=job.folder)
    assert second.returncode == 1
    assert f"in use by pid {process.pid} on" in second.stderr
    process.send_signal(signal.SIGCONT)
    job.gate.touch()
    process.communicate(timeout=60)
    assert process.returncode == 4
    job.hold("stopped")
