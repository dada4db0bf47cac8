"""How much arithmetic a network asks for, from its geometry alone.

Counted are the matrix products and convolutions, two operations a multiplication; norms
and activations are a percent of it. `h` and `w` are a latent's.
"""

from __future__ import annotations

from itertools import pairwise

from sdxl.config import (
    VAE_FACTOR,
    ModelConfig,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
)

TEXT = 77


def dense(rows: int, width_in: int, width_out: int) -> int:
    return 2 * rows * width_in * width_out


def conv(a: int, b: int, area: int, kernel: int = 3) -> int:
    """Count a convolution from `a` to `b` channels at `area` positions."""
    return dense(area, a * kernel * kernel, b)


def attention(queries: int, keys: int, width: int) -> int:
    """Count scores and their product with the values, all heads together."""
    return 2 * dense(queries, width, keys)


def res_block(a: int, b: int, area: int, embedding: int = 0) -> int:
    skip = conv(a, b, area, 1) if a != b else 0
    return conv(a, b, area) + conv(b, b, area) + dense(1, embedding, b) + skip


def transformer(width: int, depth: int, area: int, context: int) -> int:
    """Count a spatial transformer of `depth` blocks; none where that is 0."""
    square = dense(area, width, width)
    itself = 4 * square + attention(area, area, width)
    text = 2 * square + 2 * dense(TEXT, context, width) + attention(area, TEXT, width)
    feed = dense(area, width, 8 * width) + dense(area, 4 * width, width)
    return bool(depth) * (2 * square + depth * (itself + text + feed))


def unet(config: UNetConfig, h: int, w: int) -> int:
    """Count one evaluation for one image; guidance takes two."""
    embedding, context = config.time_embed_dim, config.context_dim
    widths = [mult * config.model_channels for mult in config.channel_mult]
    areas = [(h >> level) * (w >> level) for level in range(len(widths))]
    last = len(widths) - 1

    def block(a: int, level: int) -> int:
        width, area = widths[level], areas[level]
        depth = config.transformer_depth[level]
        return res_block(a, width, area, embedding) + transformer(
            width, depth, area, context
        )

    here = widths[0]
    total = conv(config.in_channels, here, areas[0])
    skips = [here]
    for level, width in enumerate(widths):
        for _ in range(config.num_res_blocks):
            total += block(here, level)
            here = width
            skips.append(here)
        if level < last:
            total += conv(here, here, areas[level + 1])
            skips.append(here)

    total += res_block(here, here, areas[-1], embedding)
    if config.middle_depth is not None:
        total += transformer(here, config.middle_depth, areas[-1], context)
        total += res_block(here, here, areas[-1], embedding)

    for level in reversed(range(len(widths))):
        for _ in range(config.num_res_blocks + 1):
            total += block(here + skips.pop(), level)
            here = widths[level]
        if level:
            total += conv(here, here, areas[level - 1])
    return total + conv(here, config.out_channels, areas[0])


def decoder(config: VAEConfig, h: int, w: int) -> int:
    """Count the autoencoder's way from a latent to a picture."""
    widths = [mult * config.ch for mult in reversed(config.ch_mult)]
    here, area = widths[0], h * w
    total = conv(config.z_channels, config.z_channels, area, 1)
    total += conv(config.z_channels, here, area) + 2 * res_block(here, here, area)
    total += 4 * conv(here, here, area, 1) + attention(area, area, here)
    for level, width in enumerate(widths):
        blocks = [here, *[width] * (config.num_res_blocks + 1)]
        total += sum(res_block(a, b, area) for a, b in pairwise(blocks))
        here = width
        if level < len(widths) - 1:
            area *= 4
            total += conv(here, here, area)
    return total + conv(here, 3, area)


def text_encoder(config: TextEncoderConfig) -> int:
    """Count one text."""
    width = config.width
    mlp = 2 * dense(TEXT, width, config.mlp_width)
    return config.layers * (
        4 * dense(TEXT, width, width) + attention(TEXT, TEXT, width) + mlp
    )


def picture(
    config: ModelConfig, height: int, width: int, *, steps: int, guided: bool
) -> int:
    """Count one picture, from its text to its pixels."""
    h, w = height // VAE_FACTOR, width // VAE_FACTOR
    texts = sum(text_encoder(text) for text in config.text_encoders)
    network = steps * (1 + guided) * unet(config.unet, h, w)
    return texts + network + decoder(config.vae, h, w)
