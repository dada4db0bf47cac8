"""Twenty runs of the soak: killed at bad moments, resumed, nothing lost or doubled."""

import re
import subprocess
import sys
from pathlib import Path

import soak
from jobs_shared import ROOT, environment

from jobs import crash

HERE = Path(__file__).parent


def test_jobs_killed_at_bad_moments_lose_and_double_nothing():
    # A process of its own: it forks supervisors, which this one had better not.
    done = subprocess.run(
        [sys.executable, str(HERE / "soak.py"), "--runs", "20", "--seed", "7"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| 0 | 0 | 0 | 0 | 0 | 0 |" in done.stdout
    struck = re.search(r"(\d+) struck by SIGKILL", done.stdout)
    assert struck and int(struck[1]) >= 12, done.stdout


def test_the_report_goes_between_its_markers(tmp_path):
    document = tmp_path / "d.md"
    document.write_text(f"a\n{soak.START}\nold\n{soak.END}\nb\n")
    soak.put_into(document, "new")
    assert document.read_text() == f"a\n{soak.START}\nnew\n{soak.END}\nb\n"


def test_an_outcome_that_lost_a_row_is_not_clean():
    good = dict.fromkeys(("lost", "doubled", "differ", "orphans", "findings"), 0)
    common = {"number": 0, "what": "", "struck": True, "hung": False, "launches": 1}
    assert soak.Outcome(**common, **good).clean
    for name in good:
        assert not soak.Outcome(**common, **(good | {name: 1})).clean


def test_every_crash_point_is_passed_by_the_code():
    source = "".join(p.read_text() for p in (ROOT / "jobs").glob("*.py"))
    for name in crash.POINTS:
        kind, step = name.split(".")
        assert f'"{kind}"' in source and f'"{step}"' in source, name
