"""Pictures <-> latents through the VAE's graphs, in batches; large ones in tiles.

Design: the decoder's memory grows with the pixels that it has in hand, so that they are
bounded. A batch that has more goes through in parts, which changes nothing. A picture
that has more by itself goes through in tiles, which does: norms and attention see a
tile instead of all. Tiles fade into each other over a quarter of their side. What is
tiled depends on its size alone, not on the device: the same job gives the same pixels
everywhere. All is in float32: SDXL's decoder overflows float16.
"""

from __future__ import annotations

import numpy as np

from sdxl.config import VAE_FACTOR, VAEConfig
from sdxl.graphs import Graphs
from sdxl.picture import filled
from sdxl.tiles import blended
from sdxl.vae import VAE, Decode, Encode

# Pixels in hand at a time, as the side of a square: four pictures of 1024x1024.
TILE = 2048


class Autoencoder:
    """Both directions of one VAE. `tile` is in pixels, a side; 0 is without bound."""

    def __init__(
        self, vae: VAE, config: VAEConfig, graphs: Graphs, tile: int = TILE
    ) -> None:
        self.vae = vae
        self.config = config
        self.graphs = graphs
        self.tile = tile // VAE_FACTOR

    def decode(self, latents: np.ndarray, batch_size: int) -> np.ndarray:
        """Turn latents (n, 4, h, w) into pixels (n, 8h, 8w, 3) uint8.

        A picture with a value that is no number becomes all black.
        """
        _, _, h, w = latents.shape
        mean, factor = latent_statistics(self.config)
        z = (latents / factor + mean).astype(np.float32)
        most = self.tile**2 or batch_size * h * w
        decode = self._decode if h * w <= most else self._in_tiles
        parts = []
        for rows, valid in filled(len(z), min(batch_size, max(1, most // (h * w)))):
            parts.append(to_pixels(decode(z[rows])[:valid]))
        return np.concatenate(parts)

    def posterior(
        self, pixels: np.ndarray, batch_size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode pixels (n, 8h, 8w, 3) uint8: mean and deviation of their latents.

        Both are (n, 4, h, w) float32, scaled as the network knows latents.
        """
        _, H, W, _ = pixels.shape
        offset, factor = latent_statistics(self.config)
        x = (pixels.astype(np.float32) / 127.5 - 1).transpose(0, 3, 1, 2)
        means, deviations = [], []
        for rows, valid in filled(len(x), batch_size):
            name = f"encode-b{len(rows)}-{H // VAE_FACTOR}x{W // VAE_FACTOR}"
            mean, logvar = self.graphs.run(name, lambda: Encode(self.vae), x[rows])
            means.append((mean[:valid] - offset) * factor)
            deviations.append(np.exp(0.5 * logvar[:valid]) * factor)
        return np.concatenate(means), np.concatenate(deviations)

    def _decode(self, z: np.ndarray) -> np.ndarray:
        B, _, h, w = z.shape
        name = f"decode-b{B}-{h}x{w}"
        return self.graphs.run(name, lambda: Decode(self.vae), z)

    def _in_tiles(self, z: np.ndarray) -> np.ndarray:
        return blended(z, self.tile, self.tile // 4, VAE_FACTOR, self._decode)


def latent_statistics(vae: VAEConfig) -> tuple[np.ndarray, np.ndarray]:
    """Give mean and factor, (1, 4 or 1, 1, 1) float32: ours = (z - mean) factor."""
    mean = np.float32(vae.latents_mean or (0.0,)).reshape(1, -1, 1, 1)
    deviation = np.float32(vae.latents_std or (1.0,)).reshape(1, -1, 1, 1)
    return mean, np.float32(vae.scale_factor) / deviation


def to_pixels(images: np.ndarray) -> np.ndarray:
    """Round (n, 3, H, W) in [-1, 1] to (n, H, W, 3) uint8 as diffusers does."""
    finite = np.isfinite(images).all(axis=(1, 2, 3), keepdims=True)
    images = np.where(finite, images, -1)
    pixels = ((images / 2 + 0.5).clip(0, 1) * 255).round()
    return pixels.transpose(0, 2, 3, 1).astype(np.uint8)
