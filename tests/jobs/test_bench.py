"""The table of this machine: its rows, its times, what it says when it can't."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from jobs_shared import ROOT, call, environment
from stepping_pipeline import COMPILE_SECONDS, STEP_SECONDS

from jobs.bench import Wanted, row_of, run, trials
from jobs.bench_process import options_of, tasks_of
from jobs.bench_table import describe, table
from jobs.config import load
from jobs.errors import ConfigError, ModelError, WorkerError
from jobs.stages import pipeline_name

CPU = ("runtime.workers=1",)


def wanted(*settings, **options):
    options = {"preset": "tiny", "runs": 2} | options
    return Wanted(config=load(None, [*CPU, *settings]), **options)


def fake(trial, pipeline="SteppingPipeline"):
    return replace(trial, pipeline=f"stepping_pipeline:{pipeline}")


def test_the_reference_s_table_has_its_four_rows():
    rows = trials(wanted(preset="base", reference=True))
    assert [row.name for row in rows] == [
        "SDXL-Base",
        "SDXL-Base",
        "SDXL-Refiner",
        "SDXL-Base + Refiner",
    ]
    sampling = [row.resolved.sampling for row in rows]
    assert [s.steps for s in sampling] == [40, 20, 40, 20]
    assert [s.sampler for s in sampling][1] == "DPMPP2MSampler"
    assert (sampling[1].discretization, sampling[1].rho) == ("EDMDiscretization", 7.0)
    assert [row.from_image for row in rows] == [False, False, True, False]
    assert sampling[2].strength == 0.75
    assert {(r.resolved.width, r.resolved.height) for r in rows} == {(1024, 1024)}
    assert [pipeline_name(r.resolved) for r in rows] == [
        "sdxl.pipeline:Pipeline.load"
    ] * 3 + ["sdxl.two_stage:TwoStage.load"]


def test_a_preset_means_random_weights_of_both_models():
    config = load(ROOT / "configs" / "base_euler40.yaml", CPU)
    rows = trials(Wanted(config=config, preset="tiny", reference=True, size=(64, 128)))
    for row in rows:
        assert row.resolved.model.checkpoint is None
        assert (row.resolved.width, row.resolved.height) == (64, 128)
    assert rows[2].resolved.model.preset == "tiny-refiner"
    options = options_of(rows[3])
    assert (options["checkpoint"], options["refiner_checkpoint"]) == (None, None)
    assert (options["preset"], options["refiner_preset"]) == ("tiny", "tiny-refiner")
    assert rows[3].name == "SDXL-Base of width 32 + Refiner"


def test_the_job_as_it_is_set_is_the_default_row(checkpoint):
    asked = wanted(
        f"model.checkpoint={json.dumps(str(checkpoint))}",
        "sampling.steps=7",
        preset=None,
    )
    (row,) = trials(asked)
    assert (row.resolved.sampling.steps, row.resolved.width) == (7, 128)
    assert options_of(row)["checkpoint"] == checkpoint
    assert options_of(row)["compile_cache"] is None  # what is timed is compiled anew
    (warm,) = trials(replace(asked, warm=True))
    assert options_of(warm)["compile_cache"] == row.resolved.compile_cache
    assert trials(replace(asked, steps=3))[0].resolved.sampling.steps == 3


def test_what_can_not_be_used_is_refused_before_anything_runs():
    with pytest.raises(ConfigError, match="unknown preset `tinny`"):
        trials(wanted(preset="tinny"))
    with pytest.raises(ModelError, match=r"none\.safetensors"):
        trials(wanted("model.checkpoint=none.safetensors", preset=None))


def test_no_two_runs_have_a_text_in_common():
    (trial,) = trials(wanted("runtime.batch_size=2"))
    prompts = [task.prompt for n in range(3) for task in tasks_of(trial, n)]
    assert len(set(prompts)) == 6


def test_the_first_generation_s_extra_time_is_the_compilation():
    (trial,) = trials(wanted("runtime.batch_size=2", steps=10, size=(64, 64)))
    row = row_of(trial, run(fake(trial)))
    assert row["compile_s"] == pytest.approx(COMPILE_SECONDS, abs=0.25)
    assert row["seconds_per_image"] >= 10 * STEP_SECONDS / 2
    assert row["least"] <= row["seconds_per_image"] <= row["most"]
    assert row["first_s"] > COMPILE_SECONDS + 10 * STEP_SECONDS
    assert (row["runs"], row["steps_made"], row["batch_size"]) == (2, 10, 2)
    assert row["stages_ms"]["denoise_ms"] >= 10 * STEP_SECONDS / 2 * 1e3
    assert row["arithmetic"]["step"]["ms"] == row["stages_ms"]["denoise_ms"] / 10
    assert row["flash_attention"] is False
    assert row["peak_memory_mb"] > 10


def test_a_refiner_starts_from_an_image_and_its_steps_are_those_made(capfd):
    trial = trials(wanted(reference=True, size=(64, 128), steps=8))[2]
    row = row_of(trial, run(fake(trial)))
    assert row["steps_made"] == 6
    assert "8 (6 made)" in describe({"versions": VERSIONS, "rows": [row]})


def test_a_step_that_asks_the_network_twice_is_not_counted_as_once():
    asked = wanted("sampling.sampler=HeunEDMSampler", size=(64, 64), steps=2)
    (trial,) = trials(asked)
    assert row_of(trial, run(fake(trial)))["arithmetic"] == {}


def test_a_process_that_dies_is_an_error_that_says_how():
    (trial,) = trials(wanted())
    with pytest.raises(WorkerError, match="killed by signal 9") as caught:
        run(fake(trial, "DyingPipeline"))
    assert "memory" in caught.value.hint
    broken = replace(trial, pipeline="stepping_pipeline:Nothing")
    with pytest.raises(WorkerError, match="AttributeError"):
        run(broken)


VERSIONS = {
    "mindspore": "2.8.0",
    "numpy": "1.26.4",
    "cann": "8.3.0",
    "driver": None,
    "device": "910B3",
    "cores": 8,
    "python": "3.11.7",
}
ROW = {
    "model": "SDXL-Base",
    "weights": "random",
    "width": 1024,
    "height": 1024,
    "flash_attention": True,
    "sampler": "DPMPP2MSampler",
    "discretization": "EDMDiscretization",
    "steps": 20,
    "steps_made": 20,
    "jit_level": "O2",
    "precision": "fp16",
    "batch_size": 1,
    "load_s": 61.0,
    "compile_s": 631.394,
    "seconds_per_image": 3.62,
    "least": 3.6,
    "most": 3.7,
    "runs": 3,
    "stages_ms": {"text_encode_ms": 20.0, "denoise_ms": 3100.0, "decode_ms": 500.0},
    "arithmetic": {"step": {"flops": 10**12, "ms": 155.0}},
    "peak_memory_mb": 9000.0,
}


def test_the_table_is_the_reference_s():
    lines = describe({"versions": VERSIONS, "rows": [ROW]}).splitlines()
    assert lines[0] == (
        "910B3, 8 cores, MindSpore 2.8.0, CANN 8.3.0, driver -, NumPy 1.26.4"
    )
    cells = [cell.strip() for cell in lines[4].strip("|").split("|")]
    assert cells == [
        "SDXL-Base",
        "1024x1024",
        "ON",
        "DPMPP2M Karras",
        "20",
        "O2",
        "631.39 s",
        "3.62 (3.6 to 3.7)",
    ]
    assert "denoise 3.1 s, decode 0.5 s; fp16, batch 1, median of 3" in lines[6]


def test_kernels_and_networks_are_told_as_shares_of_the_peak():
    conv = {"name": "conv", "shape": "2x8", "ms": 2.0, "flops": 10**9, "of_peak": 0.5}
    norm = {"name": "norm", "shape": "2x8", "ms": 1.0, "flops": 0, "of_peak": None}
    ops = {"peak": 1e13, "dtype": "fp16", "ops": [conv, norm]}
    text = describe({"versions": VERSIONS, "rows": [ROW], "ops": ops})
    assert "matrix product: 10000 GFLOP/s in fp16" in text
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "| conv | 2x8 | 2 | 500 | 50% |" in rows
    assert "| norm | 2x8 | 1 | | |" in rows
    assert "| SDXL-Base step | 1024x1024 | 155 | 6452 | 65% |" in rows


def test_columns_are_as_wide_as_what_they_hold():
    assert table(["a", "bcd"], [["xx", "y"]]) == [
        "| a  | bcd |",
        "| -- | --- |",
        "| xx | y   |",
    ]


@pytest.mark.parametrize("size", ["100x100", "64", "ax64", "64x64x64", "0x64"])
def test_a_size_that_is_none_is_refused(tmp_path, size):
    done = call("bench", "--size", size, cwd=tmp_path)
    assert done.returncode == 1
    assert f"--size `{size}`" in done.stderr
    assert "1024x768" in done.stderr


def test_the_command_measures_a_real_network(tmp_path):
    words = ["bench", "--preset", "tiny", "--size", "64x64", "--steps", "2"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "jobs",
            *words,
            "--runs",
            "1",
            "--workers",
            "1",
            "--json",
        ],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,  # three graphs are compiled, perhaps beside other work
    )
    assert done.returncode == 0, done.stderr
    assert "or so of arithmetic" in done.stderr
    report = json.loads(done.stdout)
    (row,) = report["rows"]
    assert row["model"] == "SDXL-Base of width 32"
    assert (row["steps_made"], row["runs"], row["weights"]) == (2, 1, "random")
    assert row["compile_s"] > row["seconds_per_image"] > 0
    assert report["versions"]["mindspore"].startswith("2.")
