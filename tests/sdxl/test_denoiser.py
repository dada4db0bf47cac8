"""The step graph: guidance and preconditioning, one value per image."""

import numpy as np
import pytest

from sdxl.conditioning import Conditioning
from sdxl.schedule import DDPM_SIGMAS, precondition
from tests.golden.networks_cases import normals

SIZE = (16, 16)
GUIDANCE = np.array([1.0, 5.0, -2.0], np.float32)


@pytest.fixture(scope="module")
def denoiser(pipeline_of):
    return pipeline_of("tiny").denoiser


@pytest.fixture(scope="module")
def cond(pipeline_of):
    unet = pipeline_of("tiny").config.unet
    context = normals("contexts", (6, 77, unet.context_dim))
    vector = normals("vectors", (6, unet.adm_in_channels))
    return Conditioning(
        context=context[:3],
        vector=vector[:3],
        uncond_context=context[3:],
        uncond_vector=vector[3:],
    )


def swapped(cond):
    return Conditioning(
        context=cond.uncond_context,
        vector=cond.uncond_vector,
        uncond_context=cond.context,
        uncond_vector=cond.vector,
    )


def test_guidance_goes_from_the_unconditional_to_the_conditional_image(
    denoiser, cond, worst
):
    x = 10 * normals("noisy", (3, 4, *SIZE))
    guided = denoiser.bind(cond, GUIDANCE, SIZE, "guided")(x, 9.5)
    D_c = denoiser.bind(cond, GUIDANCE, SIZE, "plain")(x, 9.5)
    D_u = denoiser.bind(swapped(cond), GUIDANCE, SIZE, "plain")(x, 9.5)
    s = GUIDANCE.reshape(3, 1, 1, 1)

    assert worst(guided, D_u + s * (D_c - D_u)) < 1e-5
    assert worst(guided, D_c) > 0.1


def test_an_image_is_denoised_alike_in_every_slot_beside_any_others(denoiser, cond):
    x = 10 * normals("noisy", (3, 4, *SIZE))
    all_three = denoiser.bind(cond, GUIDANCE, SIZE, "guided")(x, 9.5)
    rows = [2, 0, 2]
    others = denoiser.bind(cond.take(rows), GUIDANCE[rows], SIZE, "guided")(
        x[rows], 9.5
    )

    np.testing.assert_array_equal(others, all_three[rows])


def test_batches_keep_what_was_computed_for_each_whatever_is_bound_after(
    denoiser, cond, worst
):
    x = 10 * normals("noisy", (3, 4, *SIZE))
    first = denoiser.bind(cond, GUIDANCE, SIZE, "guided")
    before = first(x, 9.5)
    other = denoiser.bind(swapped(cond), GUIDANCE, SIZE, "guided")(x, 9.5)

    np.testing.assert_array_equal(first(x, 9.5), before)
    assert worst(other, before) > 0.1


def test_the_text_is_projected_once_a_batch_and_not_in_any_step(
    denoiser, cond, monkeypatch
):
    ran = []
    keep = denoiser.graphs.keep
    monkeypatch.setattr(
        denoiser.graphs, "keep", lambda name, *a: ran.append(name) or keep(name, *a)
    )
    denoise = denoiser.bind(cond, GUIDANCE, SIZE, "guided")
    for sigma in (14.0, 3.0, 0.5):
        denoise(normals("noisy", (3, 4, *SIZE)), sigma)

    assert ran == ["context-b6"] + ["unet-b3-16x16-guided"] * 3


def test_sigma_is_quantized_to_the_trained_level_nearest_to_it(denoiser, cond):
    x = normals("noisy", (3, 4, *SIZE))
    denoise = denoiser.bind(cond, GUIDANCE, SIZE, "guided")
    level = float(DDPM_SIGMAS[400])

    np.testing.assert_array_equal(denoise(x, level * 1.0001), denoise(x, level))


@pytest.mark.parametrize("scaling", ["EpsScaling", "VScaling", "EDMScaling"])
def test_the_network_is_wrapped_in_the_coefficients_of_its_scaling(
    scaling, denoiser, cond, pipeline_of, worst
):
    from dataclasses import replace

    x, sigma = 5 * normals("noisy", (3, 4, *SIZE)), 3.0
    scaled = replace(denoiser, scaling=scaling, quantize=False)
    how = precondition(scaling, sigma, quantize=False)
    found = scaled.bind(cond, GUIDANCE, SIZE, "plain")(x, sigma)
    F = bare(pipeline_of("tiny"), cond, np.float32(how.c_in) * x, float(how.time))

    assert worst(found, how.c_skip * x + how.c_out * F) < 1e-5


def bare(pipeline, cond, x, time):
    """Run the plain step graph as the bare network."""
    from sdxl.denoiser import Context, Step

    unet = pipeline.model.model.diffusion_model
    prepared = pipeline.graphs.keep(
        "context-b3", lambda: Context(unet), cond.context, cond.vector
    )
    zeros, ones = np.zeros(3, np.float32), np.ones(3, np.float32)
    return pipeline.graphs.run(
        "unet-b3-16x16-plain",
        lambda: Step(unet, "plain"),
        x.astype(np.float32),
        zeros,
        ones,
        ones,
        np.full(3, time, np.float32),
        zeros,
        *prepared,
    )


def test_no_sigma_scale_or_text_compiles_the_graph_again(denoiser, cond, pipeline_of):
    x = normals("noisy", (3, 4, *SIZE))
    for sigma, scale in [(14.0, 1.0), (0.03, 7.5), (1, 0)]:
        denoiser.bind(cond, np.full(3, scale, np.float32), SIZE, "guided")(x, sigma)

    assert pipeline_of("tiny").compiles["unet-b3-16x16-guided-fp32-O2-cpu"] == 1
