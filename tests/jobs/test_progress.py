"""Progress: a bar on a terminal, plain lines in a log, numbers that can be trusted."""

import gc
import io
import sys

import pytest

from jobs import progress
from jobs.progress import Progress, counted, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Let the test say what time it is."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


def test_a_log_gets_a_line_now_and_then_and_at_the_end(clock):
    stream = io.StringIO()
    with Progress(100, stream=stream) as shown:
        for _ in range(100):
            clock.now += 1
            shown.add(1, 0)
    lines = stream.getvalue().splitlines()
    assert lines == [
        "31/100 images (31.0 %), 1 img/s, ETA 1 min 9 s",
        "62/100 images (62.0 %), 1 img/s, ETA 38 s",
        "93/100 images (93.0 %), 1 img/s, ETA 7 s",
        "100/100 images (100.0 %), 1 img/s",
    ]


def test_failures_are_counted_apart(clock):
    stream = io.StringIO()
    with Progress(4, stream=stream) as shown:
        clock.now += 2
        shown.add(3, 1)
    assert stream.getvalue() == "4/4 images (100.0 %), 2 img/s, 1 failed\n"
    assert (shown.done, shown.failed) == (4, 1)


def test_the_rate_forgets_the_time_of_compiling(clock):
    shown = Progress(10_000, stream=io.StringIO())
    clock.now += 600  # the first batch compiles
    shown.add(1, 0)
    for _ in range(200):
        clock.now += 1
        shown.add(2, 0)
    assert shown.rate == pytest.approx(2.0)
    assert shown.eta_seconds == pytest.approx((10_000 - 401) / 2)


def test_before_the_first_image_there_is_no_estimate(clock):
    shown = Progress(5, stream=io.StringIO())
    assert (shown.rate, shown.eta_seconds) == (0.0, None)
    assert shown.line() == "0/5 images (0.0 %), 0 img/s"


def test_a_job_of_nothing_is_done():
    stream = io.StringIO()
    with Progress(0, stream=stream) as shown:
        assert shown.line().startswith("0/0 images (100.0 %)")
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_and_whole_lines_beside_it():
    stream = Terminal()
    with Progress(2, stream=stream) as shown:
        shown.add(1, 1)
        shown.say("a worker said \x1b[31m this")
    text = stream.getvalue()
    assert "100%" in text
    assert "failed=1" in text
    assert "a worker said \\x1b[31m this\n" in text


def test_a_count_of_a_short_reading_says_nothing(capsys):
    assert list(counted(range(5), "reading")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (59.6, "1 min"),
        (185, "3 min 5 s"),
        (3_600, "1 h"),
        (7_800, "2 h 10 min"),
        (86_399.9, "1 d"),
        (12 * 86_400 + 4 * 3_600 + 59, "12 d 4 h"),
    ],
)
def test_durations_read_as_people_say_them(seconds, text):
    assert duration(seconds) == text


def test_a_bar_whose_making_a_signal_broke_off_says_nothing(monkeypatch):
    """tqdm's own complains of what it lacks when it is collected."""
    complaints = []

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tqdm.tqdm._get_free_pos", interrupted)
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    with pytest.raises(KeyboardInterrupt):
        next(iter(counted(range(3), "rows")))
    gc.collect()
    assert complaints == []
