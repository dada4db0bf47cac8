"""The autoencoder against diffusers', from golden files."""

import numpy as np
import pytest

from sdxl.pipeline import to_pixels
from tests.golden.networks_cases import LATENT_SIZES, vae_inputs

GEOMETRIES = ("tiny", "tall")


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_decoder_equals_that_of_diffusers(geometry, pipeline_of, golden_of, worst):
    from sdxl.vae import Decode

    pipeline = pipeline_of(geometry)
    h, w = LATENT_SIZES[geometry]
    z, _ = vae_inputs((h, w))
    decoded = pipeline.graphs.run(
        f"decode-b3-{h}x{w}",
        lambda: Decode(pipeline.model.first_stage_model),
        np.repeat(z, 3, 0),
    )

    assert worst(decoded[:1], golden_of(geometry)["decoded"]) < 3e-5
    np.testing.assert_array_equal(decoded[1], decoded[0])


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_encoder_equals_that_of_diffusers(geometry, pipeline_of, golden_of, worst):
    from sdxl.vae import Encode

    pipeline = pipeline_of(geometry)
    _, picture = vae_inputs(LATENT_SIZES[geometry])
    mean, logvar = pipeline.graphs.run(
        "encode", lambda: Encode(pipeline.model.first_stage_model), picture
    )

    assert worst(mean, golden_of(geometry)["mean"]) < 2e-5
    assert worst(logvar, golden_of(geometry)["logvar"]) < 2e-5


def test_pixels_are_rounded_and_clipped_to_bytes():
    values = np.array([-1.5, -1.0, -0.999, 0.0, 0.0035, 1.0, 7.0], np.float32)
    images = np.broadcast_to(values, (1, 3, 1, 7))

    assert to_pixels(images)[0, 0, :, 0].tolist() == [0, 0, 0, 128, 128, 255, 255]


def test_a_picture_with_a_value_that_is_no_number_becomes_black_and_no_other_does():
    images = np.zeros((3, 3, 2, 2), np.float32)
    images[0, 1, 1, 0] = np.nan
    images[1, 0, 0, 0] = np.inf
    pixels = to_pixels(images)

    assert pixels[:2].max() == 0
    assert pixels[2].min() == 128
