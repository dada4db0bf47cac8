"""Noise levels, times and scalings against diffusers, k-diffusion and exact sums."""

from decimal import Decimal, localcontext
from pathlib import Path

import numpy as np
import pytest

from sdxl.schedule import (
    DDPM_SIGMAS,
    DISCRETIZATIONS,
    SCALINGS,
    SIGMA_MAX,
    SIGMA_MIN,
    first_part,
    initial_scale,
    interpolated_index,
    last_part,
    nearest_index,
    outside_trained_range,
    precondition,
    sigmas,
)

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "numerics_schedule.npz")
TRAILING = [int(n.partition("_")[2]) for n in GOLDEN if n.startswith("trailing")]
LEADING = [int(n.partition("_")[2]) for n in GOLDEN if n.startswith("leading")]
# diffusers sums its betas in float32; its table is off by this share.
DIFFUSERS_TABLE = 5e-6
LEVELS = np.geomspace(0.02, 20, 100)


def test_the_table_is_exact_to_float32():
    with localcontext() as context:
        context.prec = 40
        low, high = Decimal("0.00085").sqrt(), Decimal("0.012").sqrt()
        alpha, exact = Decimal(1), []
        for t in range(1000):
            alpha *= 1 - (low + (high - low) * t / 999) ** 2
            exact.append(float(((1 - alpha) / alpha).sqrt()))

    np.testing.assert_allclose(DDPM_SIGMAS, exact, rtol=2**-24)


def test_the_table_ends_at_the_published_figures():
    assert round(SIGMA_MIN, 7) == 0.0291672
    assert round(SIGMA_MAX, 7) == 14.6146412
    assert DDPM_SIGMAS.dtype == np.float32
    assert not DDPM_SIGMAS.flags.writeable


@pytest.mark.parametrize("steps", TRAILING)
def test_legacy_is_diffusers_trailing_where_both_fall_on_the_same_indices(steps):
    ours = sigmas("LegacyDDPMDiscretization", steps)

    expected = GOLDEN[f"trailing_{steps}"]
    np.testing.assert_allclose(ours, expected, rtol=DIFFUSERS_TABLE)


@pytest.mark.parametrize(
    "steps, indices",
    [(4, [999, 749, 499, 249]), (20, range(999, 48, -50)), (1000, range(999, -1, -1))],
)
def test_legacy_takes_the_reference_indices(steps, indices):
    ours = sigmas("LegacyDDPMDiscretization", steps)

    np.testing.assert_array_equal(ours, [*DDPM_SIGMAS[list(indices)], 0])


@pytest.mark.parametrize("steps", LEADING)
def test_diffusers_discretization_is_diffusers_leading(steps):
    ours = sigmas("DiffusersDDPMDiscretization", steps)

    expected = GOLDEN[f"leading_{steps}"]
    np.testing.assert_allclose(ours, expected, rtol=DIFFUSERS_TABLE)


@pytest.mark.parametrize("n", range(len(GOLDEN["karras"])))
def test_edm_is_k_diffusions_karras(n):
    steps, low, high, rho = GOLDEN["karras"][n]
    options = {"sigma_min": low, "sigma_max": high, "rho": rho}

    ours = sigmas("EDMDiscretization", int(steps), **options)

    # k-diffusion raises to the rho in float32.
    np.testing.assert_allclose(ours, GOLDEN[f"karras_{n}"], rtol=1e-6)


def test_edm_walks_the_trained_range_unless_told_otherwise():
    ours = sigmas("EDMDiscretization", 20)

    np.testing.assert_allclose(ours[[0, -2]], [SIGMA_MAX, SIGMA_MIN], rtol=1e-6)
    # The indices of 20 Karras steps as both diffusers and the reference find them.
    assert nearest_index(ours[:3]).tolist() == [999, 962, 921]
    assert outside_trained_range(ours) is None


@pytest.mark.parametrize("name", DISCRETIZATIONS)
def test_levels_fall_to_zero_for_every_number_of_steps(name):
    for steps in range(1, DISCRETIZATIONS[name].max_steps + 1):
        levels = sigmas(name, steps)
        assert levels.shape == (steps + 1,)
        assert levels.dtype == np.float32
        assert (np.diff(levels) < 0).all()
        assert levels[-1] == 0


@pytest.mark.parametrize(
    "name, steps, options, message",
    [
        ("Karras", 4, {}, "discretization `Karras` is unknown, hint: LegacyDDPM"),
        ("LegacyDDPMDiscretization", 0, {}, "steps `0` is outside 1 to 1000"),
        ("DiffusersDDPMDiscretization", 1000, {}, "steps `1000` is outside 1 to 999"),
        ("LegacyDDPMDiscretization", 4, {"rho": 7.0}, "takes no `rho`"),
        ("EDMDiscretization", 4, {"sigma_min": 90.0}, "sigma_min `90.0` must lie"),
        ("EDMDiscretization", 4, {"sigma_min": 0.0}, "sigma_min `0.0` must lie"),
        ("EDMDiscretization", 4, {"rho": 0.0}, "rho `0.0` must be above 0"),
    ],
)
def test_what_makes_no_schedule_is_refused(name, steps, options, message):
    with pytest.raises(ValueError, match=message):
        sigmas(name, steps, **options)


def test_the_initial_scale_of_a_full_schedule_is_the_published_one():
    assert round(initial_scale(SIGMA_MAX), 6) == 14.648814


def test_the_nearest_index_is_the_least_distance_in_sigma():
    by_search = np.abs(DDPM_SIGMAS[:, None].astype(np.float64) - LEVELS).argmin(axis=0)

    np.testing.assert_array_equal(nearest_index(LEVELS), by_search)
    np.testing.assert_array_equal(nearest_index(DDPM_SIGMAS), np.arange(1000))


def test_the_interpolated_index_is_diffusers_own():
    ours = interpolated_index(GOLDEN["sigmas"])

    # The tables differ by a few 1e-6 in sigma, neighbours by at least 0.4 percent.
    np.testing.assert_allclose(ours, GOLDEN["times"], rtol=0, atol=5e-4)


@pytest.mark.parametrize(
    "options, numbers",
    [
        ({"sigma_min": 0.002, "sigma_max": 80.0}, "sigma 0.002 to 80 leaves"),
        ({"sigma_min": 0.002}, "sigma 0.002 to 14.61 leaves"),
        ({"sigma_max": 20.0}, "sigma 0.02917 to 20 leaves"),
    ],
)
def test_a_range_outside_training_is_told_in_numbers(options, numbers):
    message = outside_trained_range(sigmas("EDMDiscretization", 10, **options))

    assert message.startswith(numbers)
    assert "0.02917 to 14.61" in message


@pytest.mark.parametrize("name", DISCRETIZATIONS)
def test_default_ranges_are_inside_training(name):
    for steps in (1, 4, 40):
        assert outside_trained_range(sigmas(name, steps)) is None


def test_a_range_given_in_rounded_figures_is_inside_training():
    rounded = {"sigma_min": 0.0292, "sigma_max": 14.6146}

    assert outside_trained_range(sigmas("EDMDiscretization", 9, **rounded)) is None


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("scaling", ["EpsScaling", "VScaling"])
def test_a_network_that_predicts_perfectly_gives_the_image_back(scaling, quantize):
    levels = DDPM_SIGMAS.astype(np.float64) if quantize else LEVELS
    image, noise = 0.7, -1.3
    x = image + levels * noise
    # v = alpha noise - sigma_vp image (Salimans and Ho 2022).
    v = (noise - levels * image) / np.sqrt(1 + levels**2)
    predicted = {"EpsScaling": noise, "VScaling": v}[scaling]

    c = precondition(scaling, levels, quantize=quantize)

    np.testing.assert_allclose(c.c_skip * x + c.c_out * predicted, image, rtol=1e-12)
    # The network's input is x in the variance-preserving form, of unit variance.
    np.testing.assert_allclose(c.c_in, 1 / np.sqrt(1 + levels**2), rtol=1e-12)


@pytest.mark.parametrize("quantize", [True, False])
def test_quantizing_moves_every_coefficient_to_the_nearest_level(quantize):
    off_grid = 0.0485
    on_grid = float(DDPM_SIGMAS[nearest_index(off_grid)])

    c = precondition("EpsScaling", off_grid, quantize=quantize)

    sigma = on_grid if quantize else off_grid
    assert c.c_out == -sigma
    assert c.c_in == 1 / np.sqrt(sigma**2 + 1)
    assert (c.time % 1 == 0) == quantize


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_scaling_is_diffusers_own(prediction):
    skip, out, scale, time = GOLDEN[f"edm_{prediction}"].T

    c = precondition("EDMScaling", GOLDEN["sigmas"])

    # diffusers calls the same mixture by the sign of its c_out.
    sign = 1 if prediction == "epsilon" else -1
    expected = (skip, sign * out, scale, time)
    np.testing.assert_allclose(np.array(c), expected, rtol=2e-7, atol=1e-7)


def test_v_scaling_with_edm_noise_differs_in_time_alone():
    edm, plain = (
        precondition(scaling, LEVELS, quantize=False)
        for scaling in ("VScalingWithEDMcNoise", "VScaling")
    )

    np.testing.assert_array_equal(edm[:3], plain[:3])
    np.testing.assert_allclose(edm.time, 0.25 * np.log(LEVELS), rtol=1e-15)


def test_an_unknown_scaling_names_the_known_ones():
    with pytest.raises(ValueError, match="scaling `Eps` is unknown, hint: EpsScaling"):
        precondition("Eps", 1.0)
    assert len(SCALINGS) == 4


@pytest.mark.parametrize(
    "steps, strength, first, last",
    [
        # The reference's splits of base and refiner, and its img2img default.
        (40, 0.15, 35, 5),
        (20, 0.15, 18, 2),
        (50, 0.15, 44, 6),
        (40, 0.3, 29, 11),
        (40, 0.75, 11, 29),
        (40, 1.0, 0, 40),
        (40, 0.01, 40, 0),
        (1, 0.99, 1, 0),
        (1, 1.0, 0, 1),
    ],
)
def test_a_schedule_is_split_as_the_reference_splits_it(steps, strength, first, last):
    levels = sigmas("LegacyDDPMDiscretization", steps)
    high, low = first_part(levels, strength), last_part(levels, strength)

    assert (len(high) - 1, len(low) - 1) == (first, last)
    np.testing.assert_array_equal(np.append(high, low[1:]), levels)


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_a_strength_outside_0_to_1_is_refused(strength):
    with pytest.raises(ValueError, match="is outside 0 to 1"):
        last_part(sigmas("LegacyDDPMDiscretization", 4), strength)
