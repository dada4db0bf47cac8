"""Points of the commit protocol: each is reached, killed at, and survived."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from jobs_shared import environment

from jobs import crash

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def disarmed():
    yield
    crash.arm(None)


def test_a_job_killed_at_any_point_is_resumed_to_the_same_result():
    # A process of its own: it forks, which this one had better not.
    done = subprocess.run(
        [sys.executable, str(HERE / "crash_each_point.py")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" ok\n") == len(crash.POINTS)


def test_a_point_does_nothing_unless_it_is_named():
    crash.point("image", "written")
    crash.arm("part.written:1:EIO")
    crash.point("image", "written")
    with pytest.raises(OSError, match="Input/output error"):
        crash.point("part", "written")


def test_the_nth_passing_is_counted():
    crash.arm("part.written:3:ENOSPC")
    crash.point("part", "written")
    crash.point("part", "written")
    with pytest.raises(OSError) as raised:
        crash.point("part", "written")
    assert raised.value.errno == errno.ENOSPC
    crash.point("part", "written")


def test_of_several_processes_one_is_struck(tmp_path):
    once = tmp_path / "once"
    crash.arm(f"part.written:1:EIO:{once}")
    with pytest.raises(OSError):
        crash.point("part", "written")
    assert once.exists()
    crash.arm(f"part.written:1:EIO:{once}")  # as another process would
    crash.point("part", "written")


def test_an_order_reaches_child_processes(monkeypatch):
    crash.arm("part.written:1:EIO")
    code = "from jobs import crash; crash.point('part', 'written')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 1 and "Input/output error" in done.stderr
