"""Every system's pixels against diffusers' or k-diffusion's on the same weights."""

import copy
import warnings
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


def test_a_consistency_model_is_guided_as_the_reference_does_when_asked(pipeline_of):
    # Its weights differ from the tiny ones by the embedding alone, which is then idle.
    pixels = pixels_of(pipeline_of("consistency"), RUNS["lcm_guided"])

    np.testing.assert_array_equal(
        pixels, pixels_of(pipeline_of("tiny"), RUNS["lcm_guided"])
    )


def test_the_whole_list_of_runs_compiles_each_graph_once(pipeline_of):
    for model in ("tiny", "tiny-refiner", "consistency"):
        assert set(pipeline_of(model).compiles.values()) == {1}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["lcm_embedded", "two_stage_20"])
def test_the_oracle_still_draws_what_the_golden_file_holds(name):
    for module in ("torch", "diffusers", "transformers"):
        pytest.importorskip(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tests.golden.pipelines_oracle import pixels_of as drawn

    assert np.abs(drawn(name).astype(int) - GOLDEN[name]).max() <= 1
