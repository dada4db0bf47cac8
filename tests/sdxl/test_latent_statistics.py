"""How the autoencoder's latents become the network's, and back."""

import numpy as np

from sdxl.autoencoder import latent_statistics
from sdxl.config import PRESETS


def test_playground_s_statistics_follow_the_published_formula():
    """diffusers decodes z = x std / scale + mean (Playground v2.5), per channel."""
    vae = PRESETS["playground"].vae
    x = np.random.RandomState(0).randn(2, 4, 3, 5).astype(np.float32)
    std = np.float32(vae.latents_std).reshape(1, 4, 1, 1)
    centre = np.float32(vae.latents_mean).reshape(1, 4, 1, 1)

    mean, factor = latent_statistics(vae)
    z = x / factor + mean

    np.testing.assert_allclose(z, x * std / 0.5 + centre, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose((z - mean) * factor, x, atol=1e-5)


def test_sdxl_scales_its_latents_by_one_factor():
    mean, factor = latent_statistics(PRESETS["base"].vae)
    assert (mean.item(), factor.item()) == (0, np.float32(0.13025))
