"""Two thousand damaged files: none costs more than one line."""

import subprocess
import sys
from pathlib import Path

import fuzz
import pytest
from jobs_shared import environment


@pytest.fixture(scope="module")
def kinds():
    return fuzz.samples()


def test_damaged_files_are_refused_in_one_line_or_read():
    # A process of its own: it forks, so that a reader that dies is only counted.
    script = Path(__file__).with_name("fuzz.py")
    done = subprocess.run(
        [sys.executable, str(script), "--cases", "2000", "--seed", "3"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2,000 cases" in done.stdout and " 0 wrong" in done.stdout


def test_the_sound_files_are_read(kinds, tmp_path):
    # What is refused undamaged would try nothing.
    for name, data in kinds.items():
        path = fuzz.settle(tmp_path, name, kinds)
        path.write_bytes(data)
        ended = fuzz.read(name, path)
        assert ended == ("refused" if "index" in name else "read"), name
        path.unlink()


def test_a_reader_that_falls_is_counted(kinds, tmp_path, monkeypatch):
    def fall(name, path):
        raise KeyError("no reader's own error")

    monkeypatch.setattr(fuzz, "read", fall)
    with pytest.raises(KeyError):
        fuzz.case(0, 1, kinds, tmp_path)
