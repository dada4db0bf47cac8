"""Names and shapes of every tensor of a model, from its geometry alone.

Design: the networks are walked once, with both published names of each tensor side by
side, so there is no table of renames to go stale and any geometry has its lists. Order
is that of the modules: UNet, text encoders, autoencoder. Nothing here allocates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from sdxl.config import ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig
from sdxl.tensor_spec import Form, Kind, TensorSpec

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
LCM_NAME = UNET_PREFIX + "time_embed.cond_proj.weight"

Specs = Iterator[TensorSpec]


@lru_cache(maxsize=8)
def tensor_specs(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """List every tensor of the model, in module order."""
    found = list(_place(_unet(config.unet), UNET_PREFIX, "unet"))
    for index, text in enumerate(config.text_encoders):
        walk = _clip(text) if text.kind == "clip" else _openclip(text)
        component = "text_encoder" if text.kind == "clip" else "text_encoder_2"
        found += _place(walk, text_prefix(config, index), component)
    found += _place(_vae(config.vae), VAE_PREFIX, "vae")
    return tuple(found)


def original_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Map each original name to its shape."""
    return {spec.name: spec.shape for spec in tensor_specs(config)}


def text_prefix(config: ModelConfig, index: int) -> str:
    """Give the original prefix of text encoder `index`."""
    kind = config.text_encoders[index].kind
    inner = "transformer.text_model" if kind == "clip" else "model"
    return f"conditioner.embedders.{index}.{inner}."


def _place(specs: Specs, prefix: str, component: str) -> Specs:
    for spec in specs:
        yield replace(spec, name=prefix + spec.name, component=component)


# Building blocks: `old` and `new` name one module in the two published trees.


def _tensor(
    old: str, new: str, *shape: int, kind: Kind = "plain", form: Form = "same"
) -> TensorSpec:
    return TensorSpec(name=old, shape=shape, diffusers=(new,), kind=kind, form=form)


def _weight_bias(
    old: str, new: str, *shape: int, kind: Kind = "plain", form: Form = "same"
) -> Specs:
    yield _tensor(f"{old}.weight", f"{new}.weight", *shape, kind=kind, form=form)
    yield _tensor(f"{old}.bias", f"{new}.bias", shape[0], kind=kind)


def _linear(old: str, new: str, width_in: int, width_out: int) -> Specs:
    return _weight_bias(old, new, width_out, width_in)


def _conv(old: str, new: str, c_in: int, c_out: int, kernel: int = 3) -> Specs:
    return _weight_bias(old, new, c_out, c_in, kernel, kernel)


def _norm(old: str, new: str, width: int) -> Specs:
    return _weight_bias(old, new, width, kind="norm")


def _unet(config: UNetConfig) -> Specs:
    """Walk the UNet; `skips` are the widths the up path takes from the down path."""
    yield from _unet_embeddings(config)
    width, n = config.model_channels, config.num_res_blocks
    yield from _conv("input_blocks.0.0", "conv_in", config.in_channels, width)
    skips, block = [width], 1
    for level, (mult, depth) in enumerate(
        zip(config.channel_mult, config.transformer_depth, strict=True)
    ):
        for i in range(n):
            out, new = mult * config.model_channels, f"down_blocks.{level}"
            yield from _unet_layer(
                config, f"input_blocks.{block}", new, i, width, out, depth
            )
            width, block = out, block + 1
            skips.append(width)
        if level + 1 < len(config.channel_mult):
            down = f"down_blocks.{level}.downsamplers.0.conv"
            yield from _conv(f"input_blocks.{block}.0.op", down, width, width)
            block += 1
            skips.append(width)
    yield from _unet_middle(config, width)
    yield from _unet_up(config, width, skips)
    yield from _norm("out.0", "conv_norm_out", config.model_channels)
    yield from _conv("out.2", "conv_out", config.model_channels, config.out_channels)


def _unet_embeddings(config: UNetConfig) -> Specs:
    width, wide, adm = (
        config.model_channels,
        config.time_embed_dim,
        config.adm_in_channels,
    )
    yield from _linear("time_embed.0", "time_embedding.linear_1", width, wide)
    yield from _linear("time_embed.2", "time_embedding.linear_2", wide, wide)
    if (guidance := config.time_cond_proj_dim) is not None:
        new = "time_embedding.cond_proj.weight"
        yield _tensor("time_embed.cond_proj.weight", new, width, guidance)
    yield from _linear("label_emb.0.0", "add_embedding.linear_1", adm, wide)
    yield from _linear("label_emb.0.2", "add_embedding.linear_2", wide, wide)


def _unet_middle(config: UNetConfig, width: int) -> Specs:
    time, new = config.time_embed_dim, "mid_block"
    yield from _resnet("middle_block.0", f"{new}.resnets.0", width, width, time)
    if config.middle_depth is None:
        return
    yield from _transformer(
        config, "middle_block.1", f"{new}.attentions.0", width, config.middle_depth
    )
    yield from _resnet("middle_block.2", f"{new}.resnets.1", width, width, time)


def _unet_up(config: UNetConfig, width: int, skips: list[int]) -> Specs:
    levels, block = len(config.channel_mult), 0
    for level in reversed(range(levels)):
        new = f"up_blocks.{levels - 1 - level}"
        out, depth = (
            config.channel_mult[level] * config.model_channels,
            config.transformer_depth[level],
        )
        for i in range(config.num_res_blocks + 1):
            old = f"output_blocks.{block}"
            yield from _unet_layer(config, old, new, i, width + skips.pop(), out, depth)
            if level and i == config.num_res_blocks:
                place = 2 if depth else 1
                up = f"{new}.upsamplers.0.conv"
                yield from _conv(f"{old}.{place}.conv", up, out, out)
            width, block = out, block + 1


def _unet_layer(
    config: UNetConfig,
    old: str,
    new: str,
    index: int,
    c_in: int,
    c_out: int,
    depth: int,
) -> Specs:
    resnet, attention = f"{new}.resnets.{index}", f"{new}.attentions.{index}"
    yield from _resnet(f"{old}.0", resnet, c_in, c_out, config.time_embed_dim)
    if depth:
        yield from _transformer(config, f"{old}.1", attention, c_out, depth)


def _resnet(old: str, new: str, c_in: int, c_out: int, time: int) -> Specs:
    yield from _norm(f"{old}.in_layers.0", f"{new}.norm1", c_in)
    yield from _conv(f"{old}.in_layers.2", f"{new}.conv1", c_in, c_out)
    yield from _linear(f"{old}.emb_layers.1", f"{new}.time_emb_proj", time, c_out)
    yield from _norm(f"{old}.out_layers.0", f"{new}.norm2", c_out)
    yield from _conv(f"{old}.out_layers.3", f"{new}.conv2", c_out, c_out)
    if c_in != c_out:
        yield from _conv(
            f"{old}.skip_connection", f"{new}.conv_shortcut", c_in, c_out, 1
        )


def _transformer(
    config: UNetConfig, old: str, new: str, width: int, depth: int
) -> Specs:
    yield from _norm(f"{old}.norm", f"{new}.norm", width)
    yield from _linear(f"{old}.proj_in", f"{new}.proj_in", width, width)
    for i in range(depth):
        at = f".transformer_blocks.{i}"
        yield from _transformer_block(old + at, new + at, width, config.context_dim)
    yield from _linear(f"{old}.proj_out", f"{new}.proj_out", width, width)


def _transformer_block(old: str, new: str, width: int, context: int) -> Specs:
    yield from _attention(f"{old}.attn1", f"{new}.attn1", width, width)
    ff_in, ff_out = ".ff.net.0.proj", ".ff.net.2"
    yield from _linear(old + ff_in, new + ff_in, width, 8 * width)
    yield from _linear(old + ff_out, new + ff_out, 4 * width, width)
    yield from _attention(f"{old}.attn2", f"{new}.attn2", width, context)
    for norm in (".norm1", ".norm2", ".norm3"):
        yield from _norm(old + norm, new + norm, width)


def _attention(old: str, new: str, width: int, context: int) -> Specs:
    for part, width_in in (("to_q", width), ("to_k", context), ("to_v", context)):
        yield _tensor(f"{old}.{part}.weight", f"{new}.{part}.weight", width, width_in)
    yield from _linear(f"{old}.to_out.0", f"{new}.to_out.0", width, width)


def _clip(text: TextEncoderConfig) -> Specs:
    """Walk a Hugging Face CLIP text transformer; both trees have the same names."""
    width = text.width
    for table, rows in (
        ("token_embedding", text.vocab_size),
        ("position_embedding", text.context_length),
    ):
        old = f"embeddings.{table}.weight"
        yield _tensor(old, f"text_model.{old}", rows, width, kind="embedding")
    for i in range(text.layers):
        old = f"encoder.layers.{i}"
        new = f"text_model.{old}"
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            part = f".self_attn.{part}"
            yield from _linear(old + part, new + part, width, width)
        yield from _norm(f"{old}.layer_norm1", f"{new}.layer_norm1", width)
        yield from _linear(f"{old}.mlp.fc1", f"{new}.mlp.fc1", width, text.mlp_width)
        yield from _linear(f"{old}.mlp.fc2", f"{new}.mlp.fc2", text.mlp_width, width)
        yield from _norm(f"{old}.layer_norm2", f"{new}.layer_norm2", width)
    yield from _norm("final_layer_norm", "text_model.final_layer_norm", width)


def _openclip(text: TextEncoderConfig) -> Specs:
    """Walk an OpenCLIP text transformer; diffusers has Hugging Face names for it."""
    width, new = text.width, "text_model."
    position = f"{new}embeddings.position_embedding.weight"
    yield _tensor("positional_embedding", position, text.context_length, width)
    projection = "text_projection.weight"
    yield _tensor("text_projection", projection, width, width, form="transposed")
    yield TensorSpec(name="logit_scale", shape=(), diffusers=(), form="absent")
    for i in range(text.layers):
        yield from _openclip_block(
            f"transformer.resblocks.{i}", f"{new}encoder.layers.{i}", text
        )
    token = f"{new}embeddings.token_embedding.weight"
    yield _tensor(
        "token_embedding.weight", token, text.vocab_size, width, kind="embedding"
    )
    yield from _norm("ln_final", f"{new}final_layer_norm", width)


def _openclip_block(old: str, new: str, text: TextEncoderConfig) -> Specs:
    width = text.width
    yield from _norm(f"{old}.ln_1", f"{new}.layer_norm1", width)
    for part, shape in (("weight", (3 * width, width)), ("bias", (3 * width,))):
        yield TensorSpec(
            name=f"{old}.attn.in_proj_{part}",
            shape=shape,
            diffusers=tuple(f"{new}.self_attn.{x}_proj.{part}" for x in "qkv"),
            form="qkv",
        )
    yield from _linear(
        f"{old}.attn.out_proj", f"{new}.self_attn.out_proj", width, width
    )
    yield from _norm(f"{old}.ln_2", f"{new}.layer_norm2", width)
    yield from _linear(f"{old}.mlp.c_fc", f"{new}.mlp.fc1", width, text.mlp_width)
    yield from _linear(f"{old}.mlp.c_proj", f"{new}.mlp.fc2", text.mlp_width, width)


def _vae(config: VAEConfig) -> Specs:
    widths = [config.ch * mult for mult in config.ch_mult]
    z, n = config.z_channels, config.num_res_blocks
    yield from _vae_encoder(widths, z, n)
    yield from _vae_decoder(widths, z, n)
    yield from _conv("quant_conv", "quant_conv", 2 * z, 2 * z, 1)
    yield from _conv("post_quant_conv", "post_quant_conv", z, z, 1)


def _vae_encoder(widths: list[int], z: int, blocks: int) -> Specs:
    old, new, width = "encoder", "encoder", widths[0]
    yield from _conv(f"{old}.conv_in", f"{new}.conv_in", 3, width)
    for level, out in enumerate(widths):
        down, block = f"{old}.down.{level}", f"{new}.down_blocks.{level}"
        for i in range(blocks):
            yield from _vae_resnet(
                f"{down}.block.{i}", f"{block}.resnets.{i}", width, out
            )
            width = out
        if level + 1 < len(widths):
            sampler = f"{block}.downsamplers.0.conv"
            yield from _conv(f"{down}.downsample.conv", sampler, width, width)
    yield from _vae_middle(old, new, width)
    yield from _norm(f"{old}.norm_out", f"{new}.conv_norm_out", width)
    yield from _conv(f"{old}.conv_out", f"{new}.conv_out", width, 2 * z)


def _vae_decoder(widths: list[int], z: int, blocks: int) -> Specs:
    """Walk the decoder: original levels count up from the finest, diffusers' down."""
    old, new, width = "decoder", "decoder", widths[-1]
    yield from _conv(f"{old}.conv_in", f"{new}.conv_in", z, width)
    yield from _vae_middle(old, new, width)
    for level in reversed(range(len(widths))):
        up, block = f"{old}.up.{level}", f"{new}.up_blocks.{len(widths) - 1 - level}"
        for i in range(blocks + 1):
            resnet = f"{block}.resnets.{i}"
            yield from _vae_resnet(f"{up}.block.{i}", resnet, width, widths[level])
            width = widths[level]
        if level:
            sampler = f"{block}.upsamplers.0.conv"
            yield from _conv(f"{up}.upsample.conv", sampler, width, width)
    yield from _norm(f"{old}.norm_out", f"{new}.conv_norm_out", width)
    yield from _conv(f"{old}.conv_out", f"{new}.conv_out", width, 3)


def _vae_middle(old: str, new: str, width: int) -> Specs:
    yield from _vae_resnet(
        f"{old}.mid.block_1", f"{new}.mid_block.resnets.0", width, width
    )
    attn, block = f"{old}.mid.attn_1", f"{new}.mid_block.attentions.0"
    yield from _norm(f"{attn}.norm", f"{block}.group_norm", width)
    for part, name in (
        ("q", "to_q"),
        ("k", "to_k"),
        ("v", "to_v"),
        ("proj_out", "to_out.0"),
    ):
        yield from _weight_bias(
            f"{attn}.{part}", f"{block}.{name}", width, width, 1, 1, form="matrix"
        )
    yield from _vae_resnet(
        f"{old}.mid.block_2", f"{new}.mid_block.resnets.1", width, width
    )


def _vae_resnet(old: str, new: str, c_in: int, c_out: int) -> Specs:
    yield from _norm(f"{old}.norm1", f"{new}.norm1", c_in)
    yield from _conv(f"{old}.conv1", f"{new}.conv1", c_in, c_out)
    yield from _norm(f"{old}.norm2", f"{new}.norm2", c_out)
    yield from _conv(f"{old}.conv2", f"{new}.conv2", c_out, c_out)
    if c_in != c_out:
        yield from _conv(f"{old}.nin_shortcut", f"{new}.conv_shortcut", c_in, c_out, 1)
