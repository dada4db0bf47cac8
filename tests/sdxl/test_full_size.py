"""The full-size base network, on a machine of 24 GB: `make test-full`."""

import resource
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from tests.golden.networks_cases import cases

PEAK_GB = 18


@pytest.mark.full
def test_the_base_network_makes_a_picture_of_256_in_two_steps():
    from sdxl.pipeline import Pipeline

    marks = [time.perf_counter()]
    pipeline = Pipeline.load(None, preset="base")
    marks.append(time.perf_counter())
    case = replace(cases("tiny")[0], width=256, height=256, steps=2)
    cond = pipeline.encode([case], 1)
    marks.append(time.perf_counter())
    latents = pipeline.sample(cond, [case], 1)
    marks.append(time.perf_counter())
    pixels = pipeline.decode(latents, 1)
    marks.append(time.perf_counter())

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    seconds = " ".join(f"{value:.1f}" for value in np.diff(marks))
    compiles = {key: round(ms) for key, ms in pipeline.compile_ms.items()}
    print(f"\nload, encode, sample, decode: {seconds} s", file=sys.stderr)
    print(f"of which compiling: {compiles} ms; peak {peak:.1f} GB", file=sys.stderr)

    unet = pipeline.model.model.diffusion_model
    assert sum(p.size for p in unet.get_parameters()) == 2_567_463_684
    assert pixels.shape == (1, 256, 256, 3)
    assert np.isfinite(latents).all()
    assert pixels.std() > 20
    assert set(pipeline.compiles.values()) == {1}
    assert peak < PEAK_GB
