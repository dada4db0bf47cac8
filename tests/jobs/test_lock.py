"""The folder's lock: one holder, named to the second comer; a dead one has one heir."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time

import pytest
from lock_contender import contend

from jobs import lock
from jobs.errors import LockedError, OutputError
from jobs.lock import FolderLock, is_alive, read_holder


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(lock, "WATCH_SECONDS", 0.05)


def identity(tmp_path):
    """Give what a holder of this process writes."""
    with FolderLock(tmp_path):
        return read_holder(tmp_path / "lock")


def left_behind(tmp_path, **changes):
    """Leave the lock of a holder that is like this process but for `changes`."""
    holder = identity(tmp_path) | {"token": "another"} | changes
    (tmp_path / "lock").write_text(json.dumps(holder))


def ended_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_second_comer_is_told_who_holds_the_folder(tmp_path):
    with FolderLock(tmp_path):
        with pytest.raises(LockedError) as caught:
            FolderLock(tmp_path).__enter__()
        assert f"pid {os.getpid()} on {socket.gethostname()} since 20" in str(
            caught.value
        )
        # The second comer, on leaving, takes nothing from the holder.
        assert read_holder(tmp_path / "lock")["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    left_behind(tmp_path, pid=ended_pid())
    with FolderLock(tmp_path):
        assert read_holder(tmp_path / "lock")["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_only_has_the_number_of_the_dead_one_is_not_the_holder(tmp_path):
    left_behind(tmp_path, process_started=1.0)
    with FolderLock(tmp_path):
        pass


@pytest.mark.parametrize("age", [0, 3_600], ids=["fresh", "stale"])
def test_the_lock_of_another_host_counts_while_it_is_renewed(tmp_path, age):
    left_behind(tmp_path, host="elsewhere", pid=ended_pid())
    then = time.time() - age
    os.utime(tmp_path / "lock", (then, then))
    if age:
        with FolderLock(tmp_path):
            pass
    else:
        with pytest.raises(LockedError, match="on elsewhere"):
            FolderLock(tmp_path).__enter__()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "5", '{"pid": 1}', '{"host": 5, "pid": "x"}', "\xff", "[" * 9_000],
    ids=lambda text: text[:12],
)
def test_a_torn_lock_file_of_old_is_taken_over_and_never_a_trace(tmp_path, content):
    path = tmp_path / "lock"
    path.write_text(content, encoding="latin-1")
    os.utime(path, (1, 1))
    with FolderLock(tmp_path):
        assert read_holder(path)["pid"] == os.getpid()


@pytest.mark.parametrize("pid", ["x", -1, 0, 10**30, None, [1]])
def test_a_holder_without_a_possible_process_is_dead(tmp_path, pid):
    holder = identity(tmp_path) | {"pid": pid}
    (tmp_path / "lock").write_text("")
    assert not is_alive(tmp_path / "lock", holder)


def test_the_lock_is_renewed_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.02)
    with FolderLock(tmp_path):
        os.utime(tmp_path / "lock", (1, 1))
        deadline = time.monotonic() + 10
        while (tmp_path / "lock").stat().st_mtime < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_holder_that_was_taken_for_dead_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.02)
    with FolderLock(tmp_path) as held:
        held.check()
        left_behind_by_heir = read_holder(tmp_path / "lock") | {"token": "heir"}
        (tmp_path / "lock").write_text(json.dumps(left_behind_by_heir))
        with pytest.raises(LockedError, match="taken over"):
            for _ in range(500):
                held.check()
                time.sleep(0.01)
    assert read_holder(tmp_path / "lock")["token"] == "heir"


def test_a_folder_that_can_not_be_written_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="can't lock"):
        FolderLock(tmp_path / "not there").__enter__()


ROUNDS = 20


@pytest.mark.parametrize("left", ["nothing", "dead"])
def test_of_racing_processes_exactly_one_wins(tmp_path, left):
    context = multiprocessing.get_context("spawn")
    contenders = 4
    go, stop = context.Barrier(contenders + 1), context.Barrier(contenders + 1)
    queue = context.Queue()
    workers = [
        context.Process(
            target=contend, args=(tmp_path, ROUNDS, go, stop, queue), daemon=True
        )
        for _ in range(contenders)
    ]
    dead = ended_pid()
    for worker in workers:
        worker.start()
    for round_number in range(ROUNDS):
        if left == "dead":
            left_behind(tmp_path, pid=dead)
        go.wait(30)
        outcomes = sorted(queue.get(timeout=30) for _ in range(contenders))
        assert outcomes == ["refused"] * (contenders - 1) + ["won"], round_number
        stop.wait(30)
        deadline = time.monotonic() + 10
        while (tmp_path / "lock").exists() and time.monotonic() < deadline:
            time.sleep(0.001)
    for worker in workers:
        worker.join(10)
        assert worker.exitcode == 0


def test_a_lock_can_be_looked_at_now(tmp_path):
    with FolderLock(tmp_path) as held:
        held.check(now=True)
        heir = read_holder(tmp_path / "lock") | {"token": "heir"}
        (tmp_path / "lock").write_text(json.dumps(heir))
        held.check()
        with pytest.raises(LockedError, match="taken over"):
            held.check(now=True)
