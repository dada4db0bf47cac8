"""SDXL's UNet: (B, 4, H, W) latents, timesteps and conditioning -> (B, 4, H, W).

Attribute names are the keys of the original checkpoint under `model.diffusion_model.`;
every layer of an input or output block takes (x, emb, context), so that a block is
a plain list. Figures: Podell et al. 2023, and the published configs.

What no step changes is computed before the first, by `UNet.prepare`: the embedding of
the conditioning vector, and every cross-attention's keys and values of the text. So
`context` is a tuple here: keys and values of the first transformer block that runs,
then of the second, and so on.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn
from mindspore import ops as msops

from sdxl import ops
from sdxl.conditioning import frequencies
from sdxl.config import UNetConfig
from sdxl.layers import Conv2d, Dense, GroupNorm, Identity, LayerNorm, SiLU

Context = tuple[Tensor, ...]


class Sinusoid(nn.Cell):
    """(B,) -> (B, width) float32: cosines, then sines, of geometric frequencies."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frequencies = Tensor(frequencies(width // 2))

    def construct(self, t: Tensor) -> Tensor:
        angle = t.reshape(-1, 1).astype(ms.float32) * self.frequencies
        return msops.concat((msops.cos(angle), msops.sin(angle)), -1)


class GuidanceSinusoid(nn.Cell):
    """LCM's embedding of a guidance scale: sines first, its own spacing, w = scale - 1.

    Luo et al. 2023 (Latent Consistency Models), section 4.3.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.frequencies = Tensor(frequencies(half, spaces=half - 1))

    def construct(self, guidance: Tensor) -> Tensor:
        w = (guidance.reshape(-1, 1).astype(ms.float32) - 1) * 1000
        angle = w * self.frequencies
        return msops.concat((msops.sin(angle), msops.cos(angle)), -1)


class TimeEmbed(nn.SequentialCell):
    """Dense, SiLU, Dense; a consistency model adds its guidance before the first."""

    def __init__(self, config: UNetConfig, dtype: ms.Type) -> None:
        width, time_dim = config.model_channels, config.time_embed_dim
        super().__init__(
            Dense(width, time_dim, dtype), SiLU(), Dense(time_dim, time_dim, dtype)
        )
        self.dtype = dtype
        self.sinusoid = Sinusoid(width)
        self.embeds_guidance = config.time_cond_proj_dim is not None
        if config.time_cond_proj_dim is not None:
            self.w_sinusoid = GuidanceSinusoid(config.time_cond_proj_dim)
            self.cond_proj = Dense(config.time_cond_proj_dim, width, dtype, bias=False)

    def construct(self, timestep: Tensor, guidance: Tensor | None) -> Tensor:
        x = self.sinusoid(timestep).astype(self.dtype)
        if self.embeds_guidance and guidance is not None:
            x = x + self.cond_proj(self.w_sinusoid(guidance).astype(self.dtype))
        for layer in self.cell_list:
            x = layer(x)
        return x


class InputConv(Conv2d):
    def construct(self, x: Tensor, emb: Tensor, context: Context) -> Tensor:
        return self.convolve(x, self.weight, self.bias)


class Downsample(nn.Cell):
    def __init__(self, channels: int, dtype: ms.Type) -> None:
        super().__init__()
        self.op = Conv2d(channels, channels, 3, dtype, stride=2, padding=1)

    def construct(self, x: Tensor, emb: Tensor, context: Context) -> Tensor:
        return self.op(x)


class Upsample(nn.Cell):
    def __init__(self, channels: int, dtype: ms.Type) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, dtype, padding=1)

    def construct(self, x: Tensor, emb: Tensor, context: Context) -> Tensor:
        return self.conv(ops.upsample_nearest(x))


class ResBlock(nn.Cell):
    """Two convolutions around an added time embedding, and a shortcut."""

    def __init__(
        self, config: UNetConfig, channels: int, channels_out: int, dtype: ms.Type
    ) -> None:
        super().__init__()
        groups = config.norm_groups
        self.in_layers = nn.SequentialCell(
            GroupNorm(channels, groups, activated=True),
            Identity(),
            Conv2d(channels, channels_out, 3, dtype, padding=1),
        )
        self.emb_layers = nn.SequentialCell(
            SiLU(), Dense(config.time_embed_dim, channels_out, dtype)
        )
        self.out_layers = nn.SequentialCell(
            GroupNorm(channels_out, groups, activated=True),
            Identity(),
            Identity(),
            Conv2d(channels_out, channels_out, 3, dtype, padding=1),
        )
        if channels == channels_out:
            self.skip_connection = Identity()
        else:
            self.skip_connection = Conv2d(channels, channels_out, 1, dtype)

    def construct(self, x: Tensor, emb: Tensor, context: Context) -> Tensor:
        h = self.in_layers[-1](self.in_layers[0](x), self.emb_layers(emb))

        h = self.out_layers[0](h)
        return self.out_layers[-1](h, None, self.skip_connection(x))


class CrossAttention(nn.Cell):
    """Attention from x to what `prepare` was given: x itself, or the text's states."""

    def __init__(
        self, width: int, context_dim: int | None, head_dim: int, dtype: ms.Type
    ) -> None:
        super().__init__()
        source = context_dim or width
        self.to_q = Dense(width, width, dtype, bias=False)
        self.to_k = Dense(source, width, dtype, bias=False)
        self.to_v = Dense(source, width, dtype, bias=False)
        self.to_out = nn.SequentialCell(Dense(width, width, dtype), Identity())
        self.attention = ops.Attention(width // head_dim, head_dim, fused=True)

    def prepare(self, context: Tensor) -> tuple[Tensor, Tensor]:
        return self.attention.prepare(self.to_k(context), self.to_v(context))

    def construct(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.to_out(self.attention.over(self.to_q(x), keys, values))


class GEGLU(nn.Cell):
    """value * gelu(gate), both halves of one projection (Shazeer 2020)."""

    def __init__(self, width: int, width_out: int, dtype: ms.Type) -> None:
        super().__init__()
        self.proj = Dense(width, 2 * width_out, dtype)
        self.gate = ops.GatedGelu()

    def construct(self, x: Tensor) -> Tensor:
        return self.gate(ops.dense(x, self.proj.weight), self.proj.bias)


class FeedForward(nn.Cell):
    def __init__(self, width: int, dtype: ms.Type) -> None:
        super().__init__()
        self.net = nn.SequentialCell(
            GEGLU(width, 4 * width, dtype), Identity(), Dense(4 * width, width, dtype)
        )

    def construct(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Cell):
    def __init__(
        self, width: int, context_dim: int, head_dim: int, dtype: ms.Type
    ) -> None:
        super().__init__()
        self.attn1 = CrossAttention(width, None, head_dim, dtype)
        self.ff = FeedForward(width, dtype)
        self.attn2 = CrossAttention(width, context_dim, head_dim, dtype)
        self.norm1 = LayerNorm(width)
        self.norm2 = LayerNorm(width)
        self.norm3 = LayerNorm(width)

    def construct(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        h = self.norm1(x)
        own_keys, own_values = self.attn1.prepare(h)
        x = x + self.attn1(h, own_keys, own_values)

        x = x + self.attn2(self.norm2(x), keys, values)

        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Cell):
    """Transformer blocks over the positions of a feature map, as a residual.

    `before` counts the transformer blocks of the network that run before these.
    """

    def __init__(
        self, config: UNetConfig, width: int, depth: int, dtype: ms.Type
    ) -> None:
        super().__init__()
        self.before = 0
        self.norm = GroupNorm(width, config.norm_groups, eps=1e-6)
        self.proj_in = Dense(width, width, dtype)
        self.transformer_blocks = nn.CellList(
            [
                BasicTransformerBlock(width, config.context_dim, config.head_dim, dtype)
                for _ in range(depth)
            ]
        )
        self.proj_out = Dense(width, width, dtype)

    def construct(self, x: Tensor, emb: Tensor, context: Context) -> Tensor:
        B, C, H, W = x.shape
        h = self.norm(x).reshape(B, C, H * W).transpose(0, 2, 1)  # (B, HW, C)

        h = self.proj_in(h)
        i = 2 * self.before
        for block in self.transformer_blocks:
            h = block(h, context[i], context[i + 1])
            i += 2
        h = self.proj_out(h)

        return x + h.transpose(0, 2, 1).reshape(B, C, H, W)


class Block(nn.SequentialCell):
    """The layers of one block, one after another."""

    def construct(self, x: Tensor, emb: Tensor, context: Context) -> Tensor:
        for layer in self.cell_list:
            x = layer(x, emb, context)
        return x


class UNet(nn.Cell):
    """Predict the noise in scaled latents.

    `x` (B, in_channels, H, W) comes in the network's dtype, `timestep` (B,) in float32,
    `prepared` from `prepare`; H and W are multiples of 2^(levels - 1). `guidance` (B,)
    reaches only a consistency model.
    """

    def __init__(self, config: UNetConfig, dtype: ms.Type) -> None:
        super().__init__()
        width, time_dim = config.model_channels, config.time_embed_dim
        self.dtype = dtype
        self.time_embed = TimeEmbed(config, dtype)
        self.label_emb = nn.SequentialCell(
            nn.SequentialCell(
                Dense(config.adm_in_channels, time_dim, dtype),
                SiLU(),
                Dense(time_dim, time_dim, dtype),
            )
        )
        self.input_blocks, skips = input_blocks(config, dtype)
        self.middle_block = middle_block(config, skips[-1], dtype)
        self.output_blocks = output_blocks(config, skips, dtype)
        self.out = nn.SequentialCell(
            GroupNorm(width, config.norm_groups, activated=True),
            Identity(),
            Conv2d(width, config.out_channels, 3, dtype, padding=1),
        )
        self.transformers = self._transformers()

    def _transformers(self) -> tuple[SpatialTransformer, ...]:
        """List the transformers in the order they run, and tell each its place."""
        blocks = (*self.input_blocks, self.middle_block, *self.output_blocks)
        layers = [layer for block in blocks for layer in block]
        found = [layer for layer in layers if isinstance(layer, SpatialTransformer)]
        before = 0
        for transformer in found:
            transformer.before = before
            before += len(transformer.transformer_blocks)
        return tuple(found)

    def prepare(self, context: Tensor, vector: Tensor) -> tuple[Tensor, ...]:
        """Compute what holds for all steps, of which `construct` takes the result.

        `context` (B, L, context_dim), `vector` (B, adm_in_channels).
        """
        prepared = (self.label_emb(vector.astype(self.dtype)),)
        for transformer in self.transformers:
            for block in transformer.transformer_blocks:
                keys, values = block.attn2.prepare(context)
                prepared = (*prepared, keys, values)
        return prepared

    def construct(
        self,
        x: Tensor,
        timestep: Tensor,
        prepared: tuple[Tensor, ...],
        guidance: Tensor | None = None,
    ) -> Tensor:
        emb = self.time_embed(timestep, guidance) + prepared[0]
        context = prepared[1:]

        skips = ()
        for block in self.input_blocks:
            x = block(x, emb, context)
            skips = (*skips, x)

        x = self.middle_block(x, emb, context)

        for block in self.output_blocks:
            x = block(msops.concat((x, skips[-1]), 1), emb, context)
            skips = skips[:-1]

        return self.out(x)


def input_blocks(config: UNetConfig, dtype: ms.Type) -> tuple[nn.CellList, list[int]]:
    """Build the downward half; also return the width of each block's output."""
    width = config.model_channels
    blocks = [Block([InputConv(config.in_channels, width, 3, dtype, padding=1)])]
    skips = [width]
    for level, mult in enumerate(config.channel_mult):
        for _ in range(config.num_res_blocks):
            layers = layers_of(config, level, width, dtype)
            width = mult * config.model_channels
            blocks.append(Block(layers))
            skips.append(width)
        if level < len(config.channel_mult) - 1:
            blocks.append(Block([Downsample(width, dtype)]))
            skips.append(width)
    return nn.CellList(blocks), skips


def middle_block(config: UNetConfig, width: int, dtype: ms.Type) -> Block:
    """Build what lies between the halves."""
    layers: list[nn.Cell] = [ResBlock(config, width, width, dtype)]
    if config.middle_depth is not None:
        layers += [
            SpatialTransformer(config, width, config.middle_depth, dtype),
            ResBlock(config, width, width, dtype),
        ]
    return Block(layers)


def output_blocks(config: UNetConfig, skips: list[int], dtype: ms.Type) -> nn.CellList:
    """Build the upward half, whose blocks take the skips from the last to the first."""
    blocks = []
    remaining, width = list(skips), skips[-1]
    for level in reversed(range(len(config.channel_mult))):
        for i in range(config.num_res_blocks + 1):
            layers = layers_of(config, level, width + remaining.pop(), dtype)
            width = config.channel_mult[level] * config.model_channels
            if level > 0 and i == config.num_res_blocks:
                layers.append(Upsample(width, dtype))
            blocks.append(Block(layers))
    return nn.CellList(blocks)


def layers_of(
    config: UNetConfig, level: int, channels: int, dtype: ms.Type
) -> list[nn.Cell]:
    """A residual block to the level's width, and its attention where it has some."""
    width = config.channel_mult[level] * config.model_channels
    depth = config.transformer_depth[level]
    layers: list[nn.Cell] = [ResBlock(config, channels, width, dtype)]
    if depth > 0:
        layers.append(SpatialTransformer(config, width, depth, dtype))
    return layers
