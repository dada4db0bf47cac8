"""Base and refiner in a row: who walks which steps, what may not change a picture."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

from sdxl.residents import Remote
from sdxl.weights import CheckpointError, open_checkpoint
from tests.golden.pipelines_cases import RUNS, init_pixels

BATCH = 2
CASES = RUNS["two_stage_20"].cases


@pytest.fixture
def stages_of(pipeline_of):
    """Build the two stages over the shared pipelines."""
    from sdxl.residents import Residents
    from sdxl.two_stage import TwoStage

    loaders = {
        "base": lambda: pipeline_of("tiny"),
        "refiner": lambda: pipeline_of("tiny-refiner"),
    }
    return lambda **options: TwoStage(Residents(loaders, one=False), **options)


def quick(**changes):
    return [replace(case, **({"steps": 7} | changes)) for case in CASES]


def halve(cond, pictures):
    """Stand in for the network where only steps are counted."""
    return lambda x, sigma: x * np.float32(0.5)


def latents_of(stages, pictures, **options):
    return stages.sample(stages.encode(pictures, BATCH), pictures, BATCH, **options)


@pytest.mark.parametrize(
    ("steps", "strength", "finish", "expected"),
    [
        (40, 0.15, True, [35, 5]),
        (20, 0.15, True, [18, 2]),
        (40, 0.3, True, [29, 11]),
        (20, 0.15, False, [20, 2]),
        (4, 0.15, True, [4]),
    ],
)
def test_the_steps_are_split_as_in_the_reference(
    steps, strength, finish, expected, stages_of, monkeypatch
):
    stages = stages_of(stage2strength=strength, finish_denoising=finish)
    for stage in (stages.base, stages.refiner):
        monkeypatch.setattr(stage, "_denoise", halve)
    heard = []
    pictures = quick(steps=steps)
    latents_of(stages, pictures, observe=lambda done, n: heard.append((done, n)))

    assert [n for done, n in heard if done == n] == expected


@pytest.mark.parametrize(
    ("strength", "expected"), [(0.75, [12, 2]), (0.1, [1]), (0.01, [])]
)
def test_a_picture_from_an_image_joins_the_schedule_at_its_strength(
    strength, expected, stages_of, monkeypatch
):
    stages, heard = stages_of(), []
    for stage in (stages.base, stages.refiner):
        monkeypatch.setattr(stage, "_denoise", halve)
    pictures = quick(steps=20, strength=strength)
    init = stages.encode_images(init_pixels(), pictures, BATCH)
    latents_of(
        stages, pictures, init=init, observe=lambda done, n: heard.append((done, n))
    )

    assert [n for done, n in heard if done == n] == expected


@pytest.mark.parametrize("finish", [True, False])
def test_a_picture_is_bit_equal_in_every_slot_and_beside_any_others(finish, stages_of):
    stages = stages_of(stage2strength=0.4, finish_denoising=finish)
    pictures = quick(sampler="EulerAncestralSampler")
    together = latents_of(stages, pictures)

    np.testing.assert_array_equal(latents_of(stages, pictures[::-1]), together[::-1])
    np.testing.assert_array_equal(latents_of(stages, pictures[1:]), together[1:])


def test_several_parts_give_what_each_gives_alone(stages_of):
    from sdxl.two_stage import Part

    stages = stages_of(stage2strength=0.4)
    some = [quick(), quick(steps=5, sampler="EulerAncestralSampler")[:1]]
    parts = [Part(cond=stages.encode(p, BATCH), pictures=p) for p in some]

    for found, pictures in zip(stages.sample_all(parts, BATCH), some, strict=True):
        np.testing.assert_array_equal(found, latents_of(stages, pictures))


def test_the_bases_picture_is_kept_when_asked(stages_of):
    kept = stages_of(keep_base=True, finish_denoising=False, stage2strength=0.4)
    pictures = quick()
    refined = kept.decode(latents_of(kept, pictures), BATCH)
    base = kept.base
    alone = base.decode(
        base.sample(base.encode(pictures, BATCH), pictures, BATCH), BATCH
    )

    np.testing.assert_array_equal(kept.base_pixels(BATCH), alone)
    assert (refined != alone).mean() > 0.1

    plain = stages_of()
    latents_of(plain, pictures)
    assert plain.base_pixels(BATCH) is None


def test_one_model_at_a_time_gives_the_same_pictures(stages_of):
    from sdxl.two_stage import TwoStage

    pictures = quick(steps=20)
    expected = latents_of(stages_of(), pictures)
    alternating = TwoStage.load(
        None, refiner_checkpoint=None, noise="torch", threads=2, resident="one"
    )
    found = latents_of(alternating, pictures)
    pixels = alternating.decode(found, BATCH)
    compiled = alternating.compiles
    alternating.residents.release()

    np.testing.assert_array_equal(found, expected)
    assert pixels.shape == (2, 64, 128, 3)
    assert set(compiled.values()) == {1}
    assert {
        "unet-b2-8x16-guided-fp32-O2-cpu",
        "refiner-unet-b2-8x16-guided-fp32-O2-cpu",
    } <= compiled.keys()
    assert alternating.compiles == compiled


def test_what_a_model_in_another_process_raises_is_raised_here():
    with pytest.raises(CheckpointError, match="no preset `tinny`"):
        Remote(partial(open_checkpoint, Path("nowhere"), preset="tinny"))


SCRIPT = """
import os, signal, sys
from sdxl.residents import Remote

class Idle:
    compiles, compile_ms = {}, {}

if __name__ == "__main__":
    remote = Remote(Idle)
    print(remote.close._args[1].pid, flush=True)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["done", "killed"])
def test_no_process_is_left_behind(how, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, tmp_path / "script.py", how]
    path = {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        command, env=os.environ | path, capture_output=True, text=True, timeout=60
    )
    deadline = time.monotonic() + 10
    while psutil.pid_exists(int(done.stdout)) and time.monotonic() < deadline:
        time.sleep(0.05)

    assert done.returncode == (0 if how == "done" else -9), done.stderr
    assert not psutil.pid_exists(int(done.stdout))
