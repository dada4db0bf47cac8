"""The UNet: names, shapes and counts as published, numbers against diffusers'."""

import math
from dataclasses import replace

import numpy as np
import psutil
import pytest

from sdxl.conditioning import sinusoid
from sdxl.config import BASE, PRESETS
from sdxl.layouts import tensor_specs
from tests.golden.networks_cases import GUIDANCE, LATENT_SIZES, unet_inputs

LCM = replace(BASE, unet=replace(BASE.unet, time_cond_proj_dim=256))
CONFIGS = PRESETS | {"lcm": LCM}
UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT, TEXT_2 = "conditioner.embedders.0.", "conditioner.embedders.1."


def build(config):
    from sdxl.graphs import set_up
    from sdxl.model import SDXL

    set_up("CPU")
    return SDXL(config, "fp32")


def count(config, prefix):
    """Count the tensors and the parameters under a prefix."""
    parameters = build(config).parameters_dict()
    shapes = [p.shape for name, p in parameters.items() if name.startswith(prefix)]
    return len(shapes), sum(math.prod(shape) for shape in shapes)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameter_names_and_shapes_are_those_of_the_checkpoint(name):
    config = CONFIGS[name]
    parameters = build(config).parameters_dict()

    assert {name: tuple(p.shape) for name, p in parameters.items()} == {
        spec.mindspore: spec.shape for spec in tensor_specs(config)
    }


@pytest.mark.parametrize(
    ("name", "prefix", "tensors", "parameters"),
    [
        ("base", "", 2_514, 3_468_837_868),
        ("base", UNET, 1_680, 2_567_463_684),
        ("base", TEXT, 196, 123_060_480),
        ("base", TEXT_2, 390, 694_659_841),
        ("base", VAE, 248, 83_653_863),
        ("refiner", "", 1_858, 3_037_840_364),
        ("refiner", UNET, 1_220, 2_259_526_660),
        ("lcm", UNET, 1_681, 2_567_463_684 + 256 * 320),
    ],
)
def test_tensors_and_parameters_are_as_many_as_published(
    name, prefix, tensors, parameters
):
    assert count(CONFIGS[name], prefix) == (tensors, parameters)


def test_the_full_network_is_built_without_memory_for_its_weights():
    build(PRESETS["tiny"])
    process = psutil.Process()
    before = process.memory_info().rss
    network = build(BASE)

    assert process.memory_info().rss - before < 100 * 2**20
    assert all(p.has_init for p in network.get_parameters())


def run(pipeline, size, mode, guidance=(0.0,) * 4):
    """Run the bare network, whose output a step of these coefficients gives."""
    from sdxl.denoiser import Context, Step

    inputs = unet_inputs(pipeline.config, size)
    zeros, ones = np.zeros(4, np.float32), np.ones(4, np.float32)
    unet = pipeline.model.model.diffusion_model
    prepared = pipeline.graphs.keep(
        "bare-context",
        lambda: Context(unet),
        inputs["context"],
        vector(pipeline.config, inputs),
    )
    return pipeline.graphs.run(
        f"bare-{mode}",
        lambda: Step(unet, mode),
        inputs["x"],
        zeros,
        ones,
        ones,
        inputs["timestep"],
        np.array(guidance, np.float32),
        *prepared,
    )


def vector(config, inputs):
    sizes = sinusoid(inputs["sizes"].reshape(-1), config.size_embed_dim)
    return np.concatenate((inputs["pooled"], sizes.reshape(4, -1)), axis=1)


@pytest.mark.parametrize("geometry", ["tiny", "tall"])
def test_predictions_equal_those_of_diffusers(geometry, pipeline_of, golden_of, worst):
    predicted = run(pipeline_of(geometry), LATENT_SIZES[geometry], "plain")

    assert worst(predicted, golden_of(geometry)["predicted"]) < 3e-5


@pytest.mark.parametrize("geometry", ["tiny", "tall"])
def test_the_conditioning_vector_equals_that_of_diffusers(
    geometry, pipeline_of, golden_of, worst
):
    config = pipeline_of(geometry).config
    inputs = unet_inputs(config, LATENT_SIZES[geometry])

    # Sines of sizes up to 2,300 in float32, where either side is off by 1e-4.
    assert worst(vector(config, inputs), golden_of(geometry)["vector"]) < 1e-4


def test_a_middle_without_attention_is_that_of_diffusers(pipeline_of, golden_of, worst):
    predicted = run(pipeline_of("short"), LATENT_SIZES["tiny"], "plain")

    assert worst(predicted, golden_of("short")["predicted"]) < 3e-5


def test_a_consistency_network_takes_its_guidance_as_diffusers_does(
    pipeline_of, golden_of, worst
):
    predicted = run(
        pipeline_of("consistency"), LATENT_SIZES["tiny"], "embedded", GUIDANCE
    )
    golden = golden_of("consistency")["predicted"]

    # Sines of angles up to 12,000 in float32, where either side is off by 2e-4.
    assert worst(predicted, golden) < 4e-4
    assert worst(predicted, golden[::-1]) > 0.1
