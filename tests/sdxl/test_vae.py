"""The autoencoder against diffusers', from golden files."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from sdxl.autoencoder import to_pixels
from tests.golden.networks_cases import LATENT_SIZES, normals, vae_inputs

GEOMETRIES = ("tiny", "tall")
TRAINED = Path(__file__).parents[2] / "checkpoints/tiny/base.safetensors"
# Measured with the trained autoencoder: 8.1, and 0.39 at an edge (11.2 cut off).
MEAN_LEVELS, EDGE_LEVELS = 12.0, 1.0


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


def test_every_place_of_a_picture_is_in_tiles_whose_weights_add_up_to_1():
    from sdxl.tiles import places, weights

    for length in range(128, 700, 7):
        starts = places(length, 128, 32)
        total = np.zeros(length)
        for start, part in zip(starts, weights(length, 128, starts), strict=True):
            total[start : start + 128] += part
            assert part.min() > 0

        assert np.abs(total - 1).max() < 1e-6
        assert starts[0] == 0 and starts[-1] == length - 128
        assert all(b - a <= 128 - 32 for a, b in pairwise(starts))
    assert places(100, 128, 32) == (0,)
    assert places(192, 128, 32) == (0, 64)
    assert places(256, 128, 32) == (0, 64, 128)


def test_what_looks_at_one_place_alone_is_the_same_in_tiles():
    """Enlarging each latent to 8x8 equal pixels: no tile, no seam, 1 float32 apart."""
    from sdxl.tiles import blended

    x = normals("large", (2, 3, 40, 56))
    shapes = set()

    def enlarge(part):
        shapes.add(part.shape)
        return part.repeat(8, axis=2).repeat(8, axis=3)

    found = blended(x, 16, 4, 8, enlarge)

    assert shapes == {(2, 3, 16, 16)}
    np.testing.assert_allclose(found, enlarge(x), rtol=3e-7, atol=1e-7)


def test_a_narrow_picture_is_tiled_along_its_length_only():
    from sdxl.tiles import blended

    x, shapes = normals("narrow", (1, 3, 8, 40)), []

    def enlarge(part):
        shapes.append(part.shape)
        return part.repeat(8, axis=2).repeat(8, axis=3)

    assert blended(x, 16, 4, 8, enlarge).shape == (1, 3, 64, 320)
    assert shapes == [(1, 3, 8, 16)] * 3


@pytest.fixture(scope="module")
def trained():
    """Give the autoencoder of the small trained model for tiles of a size in pixels."""
    from sdxl.autoencoder import Autoencoder
    from sdxl.pipeline import Pipeline

    pipeline = Pipeline.load(TRAINED)
    vae = pipeline.model.first_stage_model

    def autoencoder(tile):
        return Autoencoder(vae, pipeline.config.vae, pipeline.graphs, tile)

    return autoencoder


@pytest.fixture(scope="module")
def latents(trained):
    """Give the latents of two pictures of 384x512: smooth slopes, and edges."""
    y, x = np.mgrid[0:384, 0:512] / 384
    slope = np.stack((x, y, 1 - x), -1) / np.sqrt(2)
    edges = np.where((np.floor(6 * x) + np.floor(6 * y))[..., None] % 2, 0.2, 0.8)
    edges = edges * np.array([1.0, 0.6, 0.3])
    pictures = np.stack((slope.clip(0, 1), edges)) * 255
    mean, _ = trained(0).posterior(pictures.astype(np.uint8), 2)
    return mean


def test_a_large_picture_in_tiles_is_not_what_it_is_whole_but_has_no_edge(
    trained, latents, monkeypatch
):
    """Where two tiles meet in a smooth picture, beside the same tiles cut off there."""
    from sdxl import tiles

    whole = trained(0).decode(latents, 2).astype(int)
    faded = trained(256).decode(latents, 2) - whole
    monkeypatch.setattr(tiles, "weights", cut_off)
    cut = trained(256).decode(latents, 2) - whole
    edge, before = edges(faded), edges(cut)
    mean = np.abs(faded).mean()
    print(f"\ntiles: {mean:.1f} levels on average; edges {edge:.2f}, cut {before:.2f}")

    assert 0 < mean < MEAN_LEVELS
    assert before > 4 * EDGE_LEVELS > 4 * edge


def cut_off(length, tile, starts):
    """Weigh each place for the tile whose middle is nearest, and for no other."""
    middles = np.array(starts) + tile / 2
    places = np.arange(length) + 0.5
    owner = np.abs(places[:, None] - middles).argmin(1)
    return [
        (owner[start : start + tile] == i).astype(np.float32)
        for i, start in enumerate(starts)
    ]


def edges(difference):
    """Measure the mean jump, in levels, from one tile's pixels to the next one's.

    A picture of 384x512 has tiles at 0 and 128, and at 0, 128 and 256.
    """
    smooth = difference[0]
    jumps = [smooth[at] - smooth[at - 1] for at in (192,)]
    jumps += [smooth[:, at] - smooth[:, at - 1] for at in (192, 320)]
    return float(np.mean([np.abs(jump).mean() for jump in jumps]))


def test_a_picture_is_the_same_in_tiles_whatever_shares_its_batch(trained, latents):
    both = trained(256).decode(latents, 2)
    swapped = trained(256).decode(latents[::-1], 2)
    alone = trained(256).decode(latents[1:], 2)

    np.testing.assert_array_equal(swapped[::-1], both)
    np.testing.assert_array_equal(alone, both[1:])


def test_a_batch_of_more_pixels_than_the_bound_goes_through_in_parts(trained, latents):
    """Three pictures of half the bound each: two, then one and its copy."""
    narrow = np.concatenate((latents, latents[:1]))[:, :, :16, :32].copy()
    bounded = trained(256)
    parts, whole = bounded.decode(narrow, 3), trained(0).decode(narrow, 3)

    assert any("decode-b2-16x32" in key for key in bounded.graphs.compiles)
    assert np.abs(parts.astype(int) - whole).max() <= 1
    np.testing.assert_array_equal(parts[2], parts[0])


def test_a_picture_within_the_bound_is_decoded_whole(trained, latents):
    small = np.ascontiguousarray(latents[:, :, :32, :32])
    whole = trained(0).decode(small, 2)

    assert np.abs(trained(256).decode(small, 2).astype(int) - whole).max() <= 1
