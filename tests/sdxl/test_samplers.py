"""Samplers against exact solutions, k-diffusion, diffusers and their own algebra."""

import importlib.util
import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from sdxl.noise import NoiseStream
from sdxl.samplers import SAMPLERS
from sdxl.schedule import DDPM_SIGMAS, edm, initial_scale, sigmas
from sdxl.steps import adams_weights, ancestral_step

GOLDEN_FILE = Path(__file__).parents[1] / "golden" / "numerics_samplers.npz"
GOLDEN = np.load(GOLDEN_FILE)
CASES = list(enumerate(json.loads(str(GOLDEN["cases"]))))
SHAPE = (2, 4, 8, 8)
SEED = 7
# Noisy settings of every sampler, for what must hold however noise is added.
NOISY = {name: {} for name in SAMPLERS} | {
    "EulerEDMSampler": {"s_churn": 4.0, "s_noise": 1.01},
    "HeunEDMSampler": {"s_churn": 4.0, "s_tmin": 0.1, "s_tmax": 10.0},
    "EulerAncestralSampler": {"eta": 0.7},
}
# The data of the exact tests: normal, with this mean and deviation.
MEAN, SPREAD, TOP, BOTTOM = 0.3, 0.5, 14.6, 0.03


def fake_denoise(x, sigma):
    """Answer with something smooth, bounded and far from linear, as the oracles had."""
    mixed = x + 0.3 * np.roll(x, 1, axis=-1)
    return 0.6 * np.tanh(mixed / (1 + sigma**2) ** 0.5) + 0.05 * x / (1 + sigma)


def exact_denoise(x, sigma):
    """Give the mean of the data that x may come from: exact for normal data."""
    return (SPREAD**2 * x + sigma**2 * MEAN) / (SPREAD**2 + sigma**2)


def no_noise():
    raise AssertionError("no noise should be drawn")


def run_case(number, case, dtype):
    """Run what an oracle ran, on the noise that it drew, in `dtype`."""
    levels = GOLDEN[f"levels_{number}"]
    start = np.random.RandomState(SEED).randn(*SHAPE) * initial_scale(levels[0])
    if case["oracle"].startswith("k-diffusion"):
        stream = NoiseStream("numpy", SEED + 1)
    else:
        stream = NoiseStream("torch", SEED)
    return SAMPLERS[case["sampler"]](
        lambda x, sigma: fake_denoise(x, sigma).astype(dtype),
        start.astype(np.float32).astype(dtype),
        levels,
        noise=lambda: stream.draw(SHAPE).astype(dtype),
        **case["options"],
    )


def relative_error(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def label(value):
    if isinstance(value, dict):
        options = "".join(f" {k}={v}" for k, v in value["options"].items())
        return f"{value['sampler']}: {value['oracle']}{options}"
    return ""


@pytest.mark.parametrize("number, case", CASES, ids=label)
def test_a_trajectory_ends_where_the_oracles_does(number, case):
    ours = run_case(number, case, np.float32)

    # Multistep weights of up to 5 make more of the rounding.
    tolerance = 5e-6 if "Multistep" in case["sampler"] else 1e-6
    assert ours.dtype == np.float32
    assert relative_error(ours, GOLDEN[f"end_{number}"]) < tolerance


K_DIFFUSION = [(n, c) for n, c in CASES if c["oracle"].startswith("k-")]


@pytest.mark.parametrize("number, case", K_DIFFUSION, ids=label)
def test_in_double_precision_nothing_but_rounding_is_left(number, case):
    ours = run_case(number, case, np.float64)

    assert relative_error(ours, GOLDEN[f"end_{number}"]) < 2e-14


def test_the_oracles_still_say_what_the_golden_file_holds():
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    if importlib.util.find_spec("k_diffusion") is None:
        pytest.skip("k-diffusion is not installed")
    oracles = runpy.run_path(str(GOLDEN_FILE.with_suffix(".py")))

    live = oracles["make"]()

    assert live.keys() == set(GOLDEN)
    for key in live.keys() - {"cases"}:
        np.testing.assert_allclose(live[key], GOLDEN[key], rtol=1e-5, atol=1e-6)


def errors_by_steps(name, counts):
    """Measure the error at sigma 0.03 of the noiseless ODE, whose end is known."""
    quiet = {"eta": 0.0} if "eta" in SAMPLERS[name].options else {}
    x = np.array([[14.6, -29.2]])
    shrunk = np.sqrt((SPREAD**2 + BOTTOM**2) / (SPREAD**2 + TOP**2))
    exact = MEAN + (x - MEAN) * shrunk
    for steps in counts:
        levels = edm(steps + 1, sigma_min=BOTTOM, sigma_max=TOP, rho=7.0)
        end = SAMPLERS[name](exact_denoise, x, levels, noise=no_noise, **quiet)
        yield np.abs(end - exact).max()


@pytest.mark.parametrize(
    "name, order, error_of_64",
    [
        ("EulerEDMSampler", 1, 2.7e-2),
        ("EulerAncestralSampler", 1, 2.7e-2),
        ("HeunEDMSampler", 2, 1.3e-3),
        ("DPMPP2SAncestralSampler", 2, 7e-4),
        ("DPMPP2MSampler", 2, 1.3e-3),
    ],
)
def test_the_error_falls_with_the_order_of_the_method(name, order, error_of_64):
    coarse, fine, finest = errors_by_steps(name, [64, 128, 256])

    assert coarse < error_of_64
    assert np.log2(coarse / fine) == pytest.approx(order, abs=0.04)
    assert np.log2(fine / finest) == pytest.approx(order, abs=0.02)


def test_multistep_gains_more_than_three_orders_until_its_start_shows():
    coarse, fine, finest = errors_by_steps("LinearMultistepSampler", [64, 128, 256])

    assert coarse < 1.1e-4
    assert np.log2(coarse / fine) > 3.7
    assert np.log2(fine / finest) > 3.5


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_multistep_weights_integrate_polynomials_below_their_order_exactly(order):
    levels = [9.0, 5.0, 2.5, 1.0][-order:]

    weights = adams_weights(levels, 0.3)

    for power in range(order):
        exact = (0.3 ** (power + 1) - 1) / (power + 1)
        values = [level**power for level in levels]
        assert np.dot(weights, values) == pytest.approx(exact, rel=1e-13)


def output_variance(name, spread, levels, **options):
    """Compute the variance of what a sampler makes of normal data, exactly.

    The sampler is linear then. Started on one basis vector, and handed another one for
    each draw of noise, it returns the weight of each; their squares add up.
    """
    basis = iter(np.eye(len(levels) + 1))
    return np.sum(
        SAMPLERS[name](
            lambda x, sigma: x * spread**2 / (spread**2 + sigma**2),
            next(basis) * np.hypot(spread, levels[0]),
            levels,
            noise=lambda: next(basis),
            **options,
        )
        ** 2
    )


@pytest.mark.parametrize(
    "name, options",
    [
        ("EulerEDMSampler", {"s_churn": 5.0}),
        ("EulerEDMSampler", {"s_churn": 99.0, "s_tmin": 0.1, "s_tmax": 5.0}),
        ("HeunEDMSampler", {"s_churn": 5.0}),
        ("EulerAncestralSampler", {}),
        ("EulerAncestralSampler", {"eta": 0.5}),
        ("DPMPP2SAncestralSampler", {}),
        ("DPMPP2SAncestralSampler", {"eta": 0.5}),
        ("LCMSampler", {}),
    ],
)
def test_a_point_stays_at_exactly_the_noise_level_of_the_schedule(name, options):
    levels = edm(21, sigma_min=BOTTOM, sigma_max=TOP, rho=7.0)

    variance = output_variance(name, 0.0, levels, **options)

    assert variance == pytest.approx(BOTTOM**2, rel=1e-14)


@pytest.mark.parametrize(
    "name, order, options",
    [
        ("EulerAncestralSampler", 1, {}),
        ("EulerAncestralSampler", 1, {"eta": 0.5}),
        ("DPMPP2SAncestralSampler", 2, {}),
        ("EulerEDMSampler", 1, {"s_churn": 4.0}),
        ("HeunEDMSampler", 2, {"s_churn": 4.0}),
    ],
)
def test_the_variance_of_normal_data_is_kept_to_the_order_of_the_method(
    name, order, options
):
    target = SPREAD**2 + BOTTOM**2
    errors = [
        output_variance(
            name,
            SPREAD,
            edm(steps + 1, sigma_min=BOTTOM, sigma_max=TOP, rho=7.0),
            **options,
        )
        / target
        - 1
        for steps in (256, 512)
    ]

    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ancestral_noise_is_that_of_ddim(eta):
    # Song et al. 2021, equation 16, divided by sqrt(alpha) to leave the scaled form.
    sigma, below = (float(level) for level in DDPM_SIGMAS[[700, 600]])
    alpha, alpha_below = (1 / (1 + level**2) for level in (sigma, below))
    deviation = (
        eta * ((1 - alpha_below) / (1 - alpha) * (1 - alpha / alpha_below)) ** 0.5
    )

    down, up = ancestral_step(sigma, below, eta)

    assert up == pytest.approx(deviation / alpha_below**0.5, rel=1e-12)
    assert down == pytest.approx(
        ((1 - alpha_below - deviation**2) / alpha_below) ** 0.5, rel=1e-12
    )


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_evaluates_as_often_as_it_says(name, steps):
    asked = []
    SAMPLERS[name](
        lambda x, sigma: asked.append(sigma) or fake_denoise(x, sigma),
        np.ones(SHAPE, dtype=np.float32),
        sigmas("LegacyDDPMDiscretization", steps),
        noise=lambda: np.zeros(SHAPE, dtype=np.float32),
    )

    assert len(asked) == SAMPLERS[name].evaluations(steps)


@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_is_drawn_if_the_sampler_says_so(name):
    drawn = []
    SAMPLERS[name](
        fake_denoise,
        np.ones(SHAPE, dtype=np.float32),
        sigmas("LegacyDDPMDiscretization", 5),
        noise=lambda: drawn.append(1) or np.zeros(SHAPE, dtype=np.float32),
    )

    assert len(drawn) == (4 if SAMPLERS[name].adds_noise else 0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_is_the_same_bit_for_bit_in_any_batch(name):
    levels = sigmas("EDMDiscretization", 6)
    starts = NoiseStream("numpy", 0).draw((3, 4, 8, 8)) * initial_scale(levels[0])

    def run(members):
        streams = [NoiseStream("numpy", 10 + member) for member in members]
        return SAMPLERS[name](
            fake_denoise,
            starts[members],
            levels,
            noise=lambda: np.concatenate([s.draw((1, 4, 8, 8)) for s in streams]),
            **NOISY[name],
        )

    batch = run([2, 0, 1])
    for slot, member in enumerate([2, 0, 1]):
        np.testing.assert_array_equal(batch[slot : slot + 1], run([member]))


@pytest.mark.parametrize("name", ["EulerEDMSampler", "HeunEDMSampler"])
def test_stopping_in_mid_noise_and_going_on_is_one_run(name):
    levels = sigmas("LegacyDDPMDiscretization", 20)
    x = NoiseStream("numpy", 0).draw(SHAPE) * initial_scale(levels[0])

    whole = SAMPLERS[name](fake_denoise, x, levels, noise=no_noise)
    middle = SAMPLERS[name](fake_denoise, x, levels[:15], noise=no_noise)
    rest = SAMPLERS[name](fake_denoise, middle, levels[14:], noise=no_noise)

    np.testing.assert_array_equal(rest, whole)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_start_is_left_untouched_and_no_steps_give_it_back(name):
    x = NoiseStream("numpy", 0).draw(SHAPE)
    kept = x.copy()
    stream = NoiseStream("numpy", 1)

    for levels in (np.array([1.0, 0.5, 0.0]), np.array([1.0])):
        end = SAMPLERS[name](
            fake_denoise, x, levels, noise=lambda: stream.draw(SHAPE), **NOISY[name]
        )
        np.testing.assert_array_equal(x, kept)

    np.testing.assert_array_equal(end, kept)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_observer_hears_of_every_step(name):
    heard = []
    SAMPLERS[name](
        fake_denoise,
        np.ones(SHAPE, dtype=np.float32),
        sigmas("LegacyDDPMDiscretization", 3),
        noise=lambda: np.zeros(SHAPE, dtype=np.float32),
        observe=lambda done, steps: heard.append((done, steps)),
    )

    assert heard == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_option_that_a_sampler_does_not_take_is_refused_unless_it_is_none(name):
    x, levels = np.ones(SHAPE, dtype=np.float32), np.array([1.0, 0.0])

    SAMPLERS[name](fake_denoise, x, levels, noise=no_noise, r=None)
    with pytest.raises(ValueError, match="option `r` is not taken here, hint: "):
        SAMPLERS[name](fake_denoise, x, levels, noise=no_noise, r=0.5)


def test_declared_options_are_the_functions_own_defaults():
    for sampler in SAMPLERS.values():
        defaults = sampler.run.__kwdefaults__
        assert {name: defaults[name] for name in sampler.options} == sampler.options
