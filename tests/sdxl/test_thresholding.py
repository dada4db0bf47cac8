"""Dynamic thresholding against its definition and diffusers."""

import numpy as np
import pytest

from sdxl.thresholding import dynamic_threshold, thresholded


def test_values_inside_the_range_are_left_alone():
    x0 = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 4, 4, 4)

    np.testing.assert_array_equal(dynamic_threshold(x0, maximum=5.0), x0)


def test_the_quantile_of_each_image_becomes_one():
    # 0 … 100 has its 0.9 quantile at 90; the second image is a tenth of the first.
    first = np.arange(101, dtype=np.float32)
    x0 = np.stack([first, first / 10]).reshape(2, 1, 1, 101)

    held = dynamic_threshold(x0, ratio=0.9, maximum=1000.0)

    np.testing.assert_allclose(held[0].ravel(), np.minimum(first / 90, 1), rtol=1e-6)
    np.testing.assert_allclose(held[1], held[0], rtol=1e-6)


def test_a_maximum_of_one_just_clips():
    x0 = np.array([-3, -0.5, 0.25, 2], dtype=np.float32).reshape(1, 1, 2, 2)

    held = dynamic_threshold(x0)

    assert held.dtype == np.float32
    assert held.ravel().tolist() == [-1, -0.5, 0.25, 1]


def test_a_quantile_beyond_the_maximum_is_held_there():
    x0 = np.full((1, 1, 2, 2), 8, dtype=np.float32)

    assert (dynamic_threshold(x0, maximum=4.0) == 1).all()


@pytest.mark.parametrize("maximum", [1.0, 1.5, 10.0])
def test_it_is_diffusers_thresholding(maximum):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(thresholding=True, sample_max_value=maximum)
    x0 = np.random.RandomState(0).randn(3, 4, 16, 16).astype(np.float32) * 2

    theirs = scheduler._threshold_sample(torch.from_numpy(x0)).numpy()

    ours = dynamic_threshold(x0, maximum=maximum)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_a_wrapped_denoiser_is_thresholded():
    denoise = thresholded(lambda x, sigma: x * sigma, maximum=2.0)
    x = np.ones((1, 1, 2, 2), dtype=np.float32)

    assert (denoise(x, 0.5) == 0.5).all()
    assert (denoise(x, 3.0) == 1).all()


@pytest.mark.parametrize("ratio, maximum", [(0.0, 1.0), (1.1, 1.0), (0.995, 0.5)])
def test_settings_without_meaning_are_refused(ratio, maximum):
    with pytest.raises(ValueError, match="ratio"):
        dynamic_threshold(np.ones((1, 4)), ratio=ratio, maximum=maximum)
