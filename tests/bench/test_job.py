"""The comparison with diffusers: what it writes, measures and says."""

import sys
from dataclasses import replace
from datetime import datetime

import pytest

from sdxl.config import TINY
from sdxl.weights import open_checkpoint
from tests.bench.job import (
    THEIRS,
    arguments,
    describe,
    prompts,
    stages_of,
    summarize,
)
from tests.bench.measure import Run, run_all
from tests.bench.model import SMALL, write_model


def test_the_model_is_a_whole_diffusers_folder_written_once(tmp_path):
    config = replace(TINY, native_size=256)
    folder = write_model(tmp_path / "model", config)
    found = open_checkpoint(folder)
    found.check()
    assert found.config.unet == TINY.unet
    (folder / "mark").touch()
    assert write_model(folder, config) == folder
    assert (folder / "mark").exists()
    assert not [path for path in tmp_path.iterdir() if path != folder]


def test_the_small_sdxl_is_the_one_described():
    widths = [SMALL.unet.model_channels * m for m in SMALL.unet.channel_mult]
    assert widths == [64, 128, 256]
    assert SMALL.unet.transformer_depth == (0, 2, 4)
    context = sum(text.width for text in SMALL.text_encoders)
    assert context == SMALL.unet.context_dim


def test_prompts_are_distinct_and_have_seeds():
    rows = prompts(64)
    assert len({row["prompt"] for row in rows}) == len({r["seed"] for r in rows}) == 64
    assert rows[:16] == prompts(16)


def test_a_run_is_timed_to_the_end_of_its_last_process(tmp_path):
    words = [[sys.executable, "-c", f"import time; time.sleep({s})"] for s in (0, 0.7)]
    run = run_all(words, {})
    assert 0.7 < run.seconds < 10
    assert run.peak_bytes > 2**20


def test_a_run_that_fails_says_what_it_said():
    with pytest.raises(RuntimeError, match="no such thing"):
        run_all([[sys.executable, "-c", "raise SystemExit('no such thing')"]], {})


def rounds():
    first = {"cold": Run(30, 4 * 10**9), "warm": Run(22, 10**9), "2x1": Run(20, 10**9)}
    second = {"cold": Run(26, 10**9), "warm": Run(25, 10**9), "2x1": Run(25, 10**9)}
    return [first, second, second]


def test_ratios_are_taken_within_a_round():
    report = summarize(rounds(), 10)
    assert report["ratios"]["warm"]["median"] == 1.0
    assert report["ratios"]["warm"]["most"] == pytest.approx(1.1)
    assert report["ratios"]["cold"]["most"] == 1.5
    assert report["runs"]["cold"]["peak_gb"] == 4.0
    assert report["runs"]["2x1"]["seconds_per_image"] == 2.5


def test_the_best_arrangement_of_diffusers_counts():
    found = [found | {"1x2": Run(10, 1)} for found in rounds()]
    assert summarize(found, 10)["ratios"]["warm"]["median"] == 2.5
    assert {*THEIRS} == {"2x1", "1x2"}


def test_the_report_says_what_is_met_and_what_is_missed():
    report = summarize(rounds(), 10)
    report["pixels"] = {"pictures": 10, "largest": 1, "equal": 0.9996}
    report["stages"] = {"text": 0.1, "denoise": 1.0}
    text = describe(report)
    assert "ours warm / diffusers: 1.000 (1.000 to 1.100)" in text
    assert "at most 1.10 is wanted: met" in text
    assert "at most 1 levels apart, at least 99.960 % of values equal" in text
    report["ratios"]["warm"]["median"] = 1.2
    assert "at most 1.10 is wanted: missed" in describe(report)


def test_stages_are_the_mean_over_pictures():
    names = ("text_encode_ms", "denoise_ms", "decode_ms", "write_ms")
    row = dict.fromkeys(names, 2e3) | {"started_at": datetime.fromtimestamp(105)}
    later = {"compile_ms": 0.0, "started_at": datetime.fromtimestamp(109)}
    found = stages_of([row | {"compile_ms": 8e3}, row | later], started=100.0)
    assert (found["denoise"], found["compile"]) == (2.0, 4.0)
    assert found["before the first"] == 5.0


def test_its_options_have_defaults(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["job"])
    asked = arguments()
    assert (asked.prompts, asked.workers, asked.batch_size) == (64, 2, 4)
    assert asked.theirs == ["2x1"]
