"""A seed's noise against torch, numpy and itself."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl.noise import MAX_SEED, NoiseStream

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "numerics_noise.npz")
DRAWS = json.loads(str(GOLDEN["draws"]))
LARGE = json.loads(str(GOLDEN["large"]))
TORCH_TOLERANCE = 5e-7  # one unit in the last place of a float32 from 4 to 8

SEEDS = st.integers(0, MAX_SEED)
SHAPES = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), max_size=5)


@pytest.mark.parametrize("seed", DRAWS)
def test_torch_noise_is_torch_randn_draw_after_draw(seed):
    stream = NoiseStream("torch", int(seed))

    for n, shape in enumerate(DRAWS[seed]):
        ours, theirs = stream.draw(tuple(shape)), GOLDEN[f"{seed}_{n}"]
        assert ours.shape == theirs.shape
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TORCH_TOLERANCE)


def test_torch_noise_of_a_full_size_latent_is_torch_randn():
    ours = NoiseStream("torch", LARGE["seed"]).draw(tuple(LARGE["shape"]))

    thinned = ours.ravel()[:: LARGE["stride"]]
    np.testing.assert_allclose(
        thinned, GOLDEN["large_values"], rtol=0, atol=TORCH_TOLERANCE
    )


@settings(max_examples=200, deadline=None)
@given(SEEDS, SHAPES)
def test_torch_noise_is_live_torch_randn(seed, shapes):
    torch = pytest.importorskip("torch")
    generator = torch.Generator("cpu").manual_seed(seed)
    stream = NoiseStream("torch", seed)

    for shape in shapes:
        theirs = torch.randn(shape, generator=generator).numpy()
        np.testing.assert_allclose(
            stream.draw(tuple(shape)), theirs, rtol=0, atol=TORCH_TOLERANCE
        )


def test_numpy_noise_is_the_published_stream_of_seed_42():
    # The first normals that the world knows of seed 42.
    drawn = NoiseStream("numpy", 42).draw((4,))

    expected = [0.49671415, -0.1382643, 0.64768854, 1.52302986]
    np.testing.assert_allclose(drawn, expected, rtol=1e-7)


@given(SEEDS, SHAPES)
def test_numpy_noise_is_the_legacy_randn_rounded_once(seed, shapes):
    stream, state = NoiseStream("numpy", seed), np.random.RandomState(seed)

    for shape in shapes:
        expected = state.randn(*shape).astype(np.float32)
        np.testing.assert_array_equal(stream.draw(tuple(shape)), expected)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_streams_do_not_disturb_each_other_or_the_global_state(kind):
    before = np.random.get_state()[1].copy()
    alone = [NoiseStream(kind, seed).draw((1, 4, 8, 8)) for seed in (1, 2)]
    streams = [NoiseStream(kind, seed) for seed in (1, 2)]
    mixed = [stream.draw((1, 4, 8, 8)) for stream in reversed(streams)][::-1]

    np.testing.assert_array_equal(mixed, alone)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_noise_is_standard_normal(kind):
    # 65,536 draws: four standard errors of mean, deviation and of the share beyond 2.
    drawn = NoiseStream(kind, 3).draw((4, 128, 128)).astype(np.float64)

    assert abs(drawn.mean()) < 4 / 256
    assert abs(drawn.std() - 1) < 4 / 256 / 2**0.5
    assert abs((np.abs(drawn) > 2).mean() - 0.0455) < 4 * (0.0455 / 65_536) ** 0.5


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_seed_out_of_range_is_refused(kind, seed):
    with pytest.raises(ValueError, match=f"seed `{seed}` is outside 0 to 4294967295"):
        NoiseStream(kind, seed)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="noise `jax` is unknown"):
        NoiseStream("jax", 0)
