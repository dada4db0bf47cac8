"""Twenty runs of the soak: killed at bad moments, resumed, nothing lost or doubled."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import report
import soak_outcomes
from jobs_shared import ROOT, environment
from soak_outcomes import WRONG, Outcome

from jobs import crash

HERE = Path(__file__).parent
NOTHING_WRONG = dict.fromkeys(WRONG, 0)


def outcome(number=0, what="part.synced KILL", struck=True, aims=1, seed=1, **wrong):
    return Outcome(
        seed=seed,
        number=number,
        what=what,
        struck=struck,
        aims=aims,
        launches=2,
        seconds=1.0,
        **(NOTHING_WRONG | wrong),
    )


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
    assert "20 struck by SIGKILL" in done.stdout


def test_the_report_goes_between_its_markers(tmp_path):
    document = tmp_path / "d.md"
    document.write_text("a\n<!-- x -->\nold\n<!-- /x -->\nb\n")
    report.put_into(document, "new", "<!-- x -->", "<!-- /x -->")
    assert document.read_text() == "a\n<!-- x -->\nnew\n<!-- /x -->\nb\n"
    with pytest.raises(SystemExit):
        report.put_into(document, "new", "<!-- y -->", "<!-- /y -->")


@pytest.mark.parametrize("wrong", WRONG)
def test_an_outcome_with_anything_wrong_is_not_clean(wrong):
    assert outcome().clean
    assert not outcome(**{wrong: 1}).clean


def test_a_run_that_was_not_struck_proves_nothing():
    missed = outcome(struck=False)
    assert not missed.clean
    assert "NOT CLEAN" in missed.line()
    assert "1 runs" in soak_outcomes.summary([missed], 60)
    assert "0 struck" in soak_outcomes.summary([missed], 60)


def test_chunks_of_a_soak_add_up_in_one_file(tmp_path):
    kept = tmp_path / "outcomes.jsonl"
    again = outcome(3, "random all at step 4 of 58, 0.50", aims=3)
    for one in (outcome(1), again, outcome(0), outcome(2, seed=9), outcome(1)):
        soak_outcomes.append(kept, one)
    found = soak_outcomes.read(kept, seed=1)
    assert [o.number for o in found] == [0, 1, 3]
    text = soak_outcomes.summary(found, 60)
    assert "3 runs of 60 tasks (seed 1, numbers 0 to 3" in text
    assert "3 struck" in text
    assert "Ways: 2 crash point, 1 random all." in text
    assert "1 runs ended before" in text and "3 (3 aims)" in text
    assert "not run: [2]" in text


def test_what_is_wrong_stands_in_the_report():
    bad = replace(outcome(4), lost=2)
    text = soak_outcomes.summary([outcome(3), bad], 60)
    assert "| 2 | 0 | 0 | 0 | 0 | 0 |" in text and "- not clean: 4" in text


def test_every_crash_point_is_passed_by_the_code():
    source = "".join(p.read_text() for p in (ROOT / "jobs").glob("*.py"))
    for name in crash.POINTS:
        kind, step = name.split(".")
        assert f'"{kind}"' in source and f'"{step}"' in source, name
