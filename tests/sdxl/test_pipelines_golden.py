"""Every system's pixels against diffusers' or k-diffusion's on the same weights."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.golden.pipelines_cases import RUNS, init_pixels

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "pipelines_pixels.npz")
BATCH = 2


def with_options(pipeline, scaling="EpsScaling", quantize_sigma=True):
    """Give the pipeline with another wrapping of the same compiled graphs."""
    changed = copy.copy(pipeline)
    changed.denoiser = replace(
        pipeline.denoiser, scaling=scaling, quantize=quantize_sigma
    )
    return changed


def model_of(run, pipeline_of):
    """Give what makes the run's pictures: one pipeline, or two in a row."""
    from sdxl.two_stage import Residents, TwoStage

    first = with_options(pipeline_of(run.model), **run.options)
    if not run.refined:
        return first
    loaders = {"base": lambda: first, "refiner": lambda: pipeline_of("tiny-refiner")}
    return TwoStage(Residents(loaders, one=False), finish_denoising=bool(run.seam))


def pixels_of(model, run):
    pictures, init = run.cases, None
    cond = model.encode(pictures, BATCH)
    if run.strength and not run.refined:
        init = model.encode_images(init_pixels(), pictures, BATCH)
    return model.decode(model.sample(cond, pictures, BATCH, init), BATCH)


@pytest.mark.parametrize("name", RUNS)
def test_the_pixels_are_those_of_the_oracle(name, pipeline_of):
    differences = np.abs(
        pixels_of(model_of(RUNS[name], pipeline_of), RUNS[name]).astype(int)
        - GOLDEN[name]
    )

    assert differences.max() <= 1
    assert (differences == 0).mean() > 0.999
