"""The KL autoencoder: pictures (B, 3, 8H, 8W) in [-1, 1] <-> latents (B, 4, H, W).

Attribute names are the keys of the original checkpoint under `first_stage_model.`. It
always computes in float32: SDXL's published decoder overflows float16.
"""

from __future__ import annotations

from itertools import pairwise

import mindspore as ms
from mindspore import Tensor, nn
from mindspore import ops as msops

from sdxl import ops
from sdxl.config import VAEConfig
from sdxl.layers import Conv2d, GroupNorm, Identity

EPS = 1e-6
DTYPE = ms.float32


class ResnetBlock(nn.Cell):
    def __init__(self, channels: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(channels, groups, EPS, activated=True)
        self.conv1 = Conv2d(channels, channels_out, 3, DTYPE, padding=1)
        self.norm2 = GroupNorm(channels_out, groups, EPS, activated=True)
        self.conv2 = Conv2d(channels_out, channels_out, 3, DTYPE, padding=1)
        self.shortcut = channels != channels_out
        if self.shortcut:
            self.nin_shortcut = Conv2d(channels, channels_out, 1, DTYPE)

    def construct(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))

        if self.shortcut:
            x = self.nin_shortcut(x)
        return self.conv2(self.norm2(h), None, x)


class AttnBlock(nn.Cell):
    """Self-attention of one head over positions; projections are 1x1 convolutions."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels, groups, EPS)
        self.q = Conv2d(channels, channels, 1, DTYPE)
        self.k = Conv2d(channels, channels, 1, DTYPE)
        self.v = Conv2d(channels, channels, 1, DTYPE)
        self.proj_out = Conv2d(channels, channels, 1, DTYPE)
        self.attention = ops.Attention(1, channels)

    def construct(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        h = self.norm(x)

        q = self.q(h).reshape(B, C, H * W).transpose(0, 2, 1)  # (B, HW, C)
        k = self.k(h).reshape(B, C, H * W).transpose(0, 2, 1)
        v = self.v(h).reshape(B, C, H * W).transpose(0, 2, 1)
        h = self.attention(q, k, v)

        h = h.transpose(0, 2, 1).reshape(B, C, H, W)
        return x + self.proj_out(h)


class Downsample(nn.Cell):
    """Halve the size; zeros are added below and to the right only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, DTYPE, stride=2, padding=(0, 1, 0, 1))

    def construct(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Cell):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, DTYPE, padding=1)

    def construct(self, x: Tensor) -> Tensor:
        return self.conv(ops.upsample_nearest(x))


class Middle(nn.Cell):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def construct(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Cell):
    """The blocks of one resolution, then its change of size where it has one."""

    def __init__(self, widths: list[int], groups: int) -> None:
        super().__init__()
        self.block = nn.CellList(
            [ResnetBlock(a, b, groups) for a, b in pairwise(widths)]
        )

    def blocks(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x


class DownLevel(Level):
    def __init__(self, widths: list[int], groups: int, *, last: bool) -> None:
        super().__init__(widths, groups)
        self.downsample = Identity() if last else Downsample(widths[-1])

    def construct(self, x: Tensor) -> Tensor:
        return self.downsample(self.blocks(x))


class UpLevel(Level):
    def __init__(self, widths: list[int], groups: int, *, last: bool) -> None:
        super().__init__(widths, groups)
        self.upsample = Identity() if last else Upsample(widths[-1])

    def construct(self, x: Tensor) -> Tensor:
        return self.upsample(self.blocks(x))


class Encoder(nn.Cell):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        groups = config.norm_groups
        self.conv_in = Conv2d(3, config.ch, 3, DTYPE, padding=1)
        levels, width = [], config.ch
        for i, mult in enumerate(config.ch_mult):
            widths = [width] + [mult * config.ch] * config.num_res_blocks
            levels.append(DownLevel(widths, groups, last=i == len(config.ch_mult) - 1))
            width = widths[-1]
        self.down = nn.CellList(levels)
        self.mid = Middle(width, groups)
        self.norm_out = GroupNorm(width, groups, EPS, activated=True)
        self.conv_out = Conv2d(width, 2 * config.z_channels, 3, DTYPE, padding=1)

    def construct(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        x = self.mid(x)
        return self.conv_out(self.norm_out(x))


class Decoder(nn.Cell):
    """`up` is numbered by resolution, finest first, and runs from its end."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        groups = config.norm_groups
        width = config.ch_mult[-1] * config.ch
        self.conv_in = Conv2d(config.z_channels, width, 3, DTYPE, padding=1)
        self.mid = Middle(width, groups)
        levels = []
        for i, mult in reversed(list(enumerate(config.ch_mult))):
            widths = [width] + [mult * config.ch] * (config.num_res_blocks + 1)
            levels.insert(0, UpLevel(widths, groups, last=i == 0))
            width = widths[-1]
        self.up = nn.CellList(levels)
        self.norm_out = GroupNorm(width, groups, EPS, activated=True)
        self.conv_out = Conv2d(width, 3, 3, DTYPE, padding=1)
        self.levels = len(levels)

    def construct(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for i in range(self.levels):
            x = self.up[self.levels - 1 - i](x)
        return self.conv_out(self.norm_out(x))


class VAE(nn.Cell):
    """Both halves of one checkpoint. `scale_factor` is the pipeline's business."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        z = config.z_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = Conv2d(2 * z, 2 * z, 1, DTYPE)
        self.post_quant_conv = Conv2d(z, z, 1, DTYPE)


class Decode(nn.Cell):
    """Latents (B, 4, H, W), already unscaled -> pictures in about [-1, 1]."""

    def __init__(self, vae: VAE) -> None:
        super().__init__(auto_prefix=False)
        self.vae = vae

    def construct(self, z: Tensor) -> Tensor:
        return self.vae.decoder(self.vae.post_quant_conv(z))


class Encode(nn.Cell):
    """Pictures in [-1, 1] -> (mean, log variance) of the latents, each (B, 4, H, W)."""

    def __init__(self, vae: VAE) -> None:
        super().__init__(auto_prefix=False)
        self.vae = vae

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        moments = self.vae.quant_conv(self.vae.encoder(x))
        mean, logvar = msops.split(moments, moments.shape[1] // 2, 1)
        return mean, msops.minimum(msops.maximum(logvar, -30.0), 20.0)
