"""diffusers folders: found, read strictly, and refused by the name of what is wrong."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sdxl.config import BASE, PRESETS, REFINER, TINY
from sdxl.convert import convert
from sdxl.diffusers_config import read_config
from sdxl.diffusers_json import text_json, unet_json, vae_json
from sdxl.safetensors_file import read_safetensors
from sdxl.weights import CheckpointError, open_checkpoint
from tests.sdxl.small_models import NARROW, numbers, write

LCM = replace(BASE, unet=replace(BASE.unet, time_cond_proj_dim=256))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A tiny folder that is never changed, and its arrays."""
    root = tmp_path_factory.mktemp("folder")
    arrays = numbers(TINY, "fp16")
    convert(write(root / "tiny.safetensors", arrays, "fp16"), root / "tiny")
    return root / "tiny", arrays


@pytest.fixture
def folder(sound, tmp_path):
    """A copy to be changed; its weights are links, as in a Hugging Face cache."""
    source, _ = sound
    shutil.copytree(source, tmp_path / "model", copy_function=link_weights)
    return tmp_path / "model"


def link_weights(source, target):
    if source.endswith(".safetensors"):
        Path(target).symlink_to(source)
    else:
        shutil.copyfile(source, target)


def is_sound(folder, arrays):
    checkpoint = open_checkpoint(folder)
    checkpoint.check()
    found = dict(checkpoint.tensors())
    return found.keys() == arrays.keys() and all(
        np.array_equal(found[name], array) for name, array in arrays.items()
    )


def change(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def shard(file, pieces, index_name, shard_name):
    """Cut one weight file into shards with an index."""
    table, _ = read_safetensors(file)
    names, weight_map = list(table), {}
    for i in range(pieces):
        name = shard_name.format(i + 1, pieces)
        part = {key: table[key].read() for key in names[i::pieces]}
        write(file.parent / name, part, "fp16")
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (file.parent / index_name).write_text(json.dumps(index))
    file.unlink()


def configs(config, root):
    """Write the `config.json` of each network of a geometry."""
    content = {"unet": unet_json(config), "vae": vae_json(config)}
    for text in config.text_encoders:
        suffix = "" if text.kind == "clip" else "_2"
        content[f"text_encoder{suffix}"] = text_json(text)
    paths = {name: root / f"{name}.json" for name in content}
    for name, path in paths.items():
        path.write_text(json.dumps(content[name]))
    return paths


@pytest.mark.parametrize(
    "config",
    [LCM, *PRESETS.values(), *NARROW.values()],
    ids=["lcm", *PRESETS, *(f"narrow {name}" for name in NARROW)],
)
def test_a_geometry_survives_its_config_files(config, tmp_path):
    """Writing a geometry as diffusers' settings and reading it back changes nothing."""
    assert read_config(configs(config, tmp_path)) == config


PUBLISHED = {
    "sample_size": 128,
    "block_out_channels": [384, 768, 1536, 1536],
    "down_block_types": [
        "DownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    ],
    "up_block_types": [
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "UpBlock2D",
    ],
    "attention_head_dim": [6, 12, 24, 24],
    "transformer_layers_per_block": 4,
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": 2560,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "use_linear_projection": True,
    "upcast_attention": None,
    "_diffusers_version": "0.19.0.dev0",
}


def test_the_refiners_published_settings_are_the_refiner(tmp_path):
    """Few fields, one depth for all levels: the defaults stand for the rest."""
    paths = configs(REFINER, tmp_path)
    paths["unet"].write_text(json.dumps(PUBLISHED))
    assert read_config(paths) == REFINER


def test_a_folder_gives_its_arrays_and_geometry(sound):
    """All networks are read, through their own names and forms."""
    folder, arrays = sound
    assert is_sound(folder, arrays)
    checkpoint = open_checkpoint(folder, preset="tiny")
    assert (checkpoint.layout, checkpoint.config) == ("diffusers", TINY)
    with pytest.raises(CheckpointError, match="has preset `tiny`, not that of `base`"):
        open_checkpoint(folder, preset="base")


def test_the_files_are_weights_and_settings(sound):
    """What is hashed is what the arrays and the geometry were read from."""
    folder, _ = sound
    names = [str(path.relative_to(folder)) for path in open_checkpoint(folder).files()]
    assert names == sorted(
        f"{network}/{name}"
        for network, stem in (
            ("text_encoder", "model"),
            ("text_encoder_2", "model"),
            ("unet", "diffusion_pytorch_model"),
            ("vae", "diffusion_pytorch_model"),
        )
        for name in ("config.json", f"{stem}.safetensors")
    )


@pytest.mark.parametrize(
    ("network", "field", "value"),
    [
        ("unet", "act_fn", "gelu"),
        ("unet", "addition_embed_type", None),
        ("unet", "attention_head_dim", [1, 2, 3]),
        ("unet", "block_out_channels", [32, 48, 128]),
        ("unet", "block_out_channels", "32"),
        ("unet", "class_embed_type", "projection"),
        ("unet", "conv_in_kernel", 1),
        ("unet", "cross_attention_dim", 32),
        ("unet", "down_block_types", ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"]),
        ("unet", "flip_sin_to_cos", False),
        ("unet", "layers_per_block", [2, 2, 2]),
        ("unet", "mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("unet", "mid_block_type", ["UNetMidBlock2D"]),
        ("unet", "norm_eps", 1e-6),
        ("unet", "norm_num_groups", 7),
        ("unet", "projection_class_embeddings_input_dim", 352),
        ("unet", "resnet_time_scale_shift", "scale_shift"),
        ("unet", "time_cond_proj_dim", "256"),
        ("unet", "transformer_layers_per_block", [[1], [1], [2]]),
        ("unet", "up_block_types", ["UpBlock2D"] * 3),
        ("unet", "use_linear_projection", False),
        ("vae", "block_out_channels", [32, 32, 64]),
        ("vae", "down_block_types", ["AttnDownEncoderBlock2D"] * 4),
        ("vae", "latent_channels", 16),
        ("vae", "latents_mean", [0.0, 0.0, 0.0]),
        ("vae", "latents_std", [1.0, 1.0, 1.0, 0.0]),
        ("vae", "scaling_factor", "x"),
        ("vae", "shift_factor", 0.1),
        ("vae", "use_quant_conv", False),
        ("text_encoder", "hidden_act", "gelu"),
        ("text_encoder", "num_attention_heads", 3),
        ("text_encoder", "vocab_size", 32_000),
        ("text_encoder_2", "hidden_act", "quick_gelu"),
        ("text_encoder_2", "layer_norm_eps", 1e-6),
        ("text_encoder_2", "max_position_embeddings", 248),
        ("text_encoder_2", "projection_dim", 64),
    ],
)
def test_a_geometry_we_cannot_run_is_refused_by_its_field(
    network, field, value, folder
):
    """A setting that would change the pictures in silence is named instead."""
    change(folder / network / "config.json", **{field: value})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert f"{network}/config.json: `{field}` is" in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "{", "\udcff", "[" * 100_000])
def test_settings_that_are_no_json_are_refused(content, folder):
    """A damaged `config.json` is one line that names the file."""
    path = folder / "vae" / "config.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"vae/config\.json: "):
        open_checkpoint(folder)


def test_a_weight_of_another_shape_than_the_settings_is_named(folder):
    """Settings and weights that disagree are refused by the tensor's name."""
    change(folder / "text_encoder" / "config.json", intermediate_size=64)
    with pytest.raises(CheckpointError, match=r"`text_encoder/text_model\.encoder\."):
        open_checkpoint(folder).check()


@pytest.mark.parametrize(
    ("index", "shards"),
    [
        (
            "diffusion_pytorch_model.safetensors.index.json",
            "diffusion_pytorch_model-{:05}-of-{:05}.safetensors",
        ),
        (
            "diffusion_pytorch_model.safetensors.index.fp16.json",
            "diffusion_pytorch_model.fp16-{:05}-of-{:05}.safetensors",
        ),
    ],
    ids=["plain", "fp16"],
)
def test_shards_are_read_as_one(index, shards, folder, sound):
    """A network cut into three files reads the same; the index belongs to its files."""
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    shard(file, 3, index, shards)
    assert is_sound(folder, sound[1])
    assert folder / "unet" / index in open_checkpoint(folder).files()


def test_the_fp16_variant_serves_where_the_plain_file_is_missing(folder, sound):
    """Networks may differ in this; where both files are there the plain one is read."""
    for network, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        plain = folder / network / f"{stem}.safetensors"
        plain.rename(folder / network / f"{stem}.fp16.safetensors")
    (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"junk")
    assert is_sound(folder, sound[1])


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a\\b.safetensors", 7]
)
def test_an_index_cannot_leave_its_folder(name, folder):
    """Paths in an index are refused: a shard lies beside it."""
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.unlink()
    index = file.with_suffix(".safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
    with pytest.raises(CheckpointError, match="no file beside the index"):
        open_checkpoint(folder)


def test_a_missing_shard_is_named(folder):
    """An index without one of its files says which."""
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    shard(file, 2, f"{file.name}.index.json", "part-{}-of-{}.safetensors")
    (folder / "unet" / "part-2-of-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard `part-2-of-2\.safetensors`"):
        open_checkpoint(folder)


def test_an_index_that_disagrees_with_its_shards_is_refused(folder):
    """A tensor that the index has and its shard has not is named."""
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    shard(file, 2, f"{file.name}.index.json", "part-{}-of-{}.safetensors")
    index = folder / "unet" / f"{file.name}.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["more.weight"] = "part-1-of-2.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"`more\.weight` is in the index only"):
        open_checkpoint(folder)


def test_pickled_weights_are_refused(folder):
    """A folder with `*.bin` weights alone is refused with the way out."""
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match="safe_serialization"):
        open_checkpoint(folder)


def test_a_network_that_is_not_there_is_named(folder):
    """An incomplete folder says what is missing; a single network says its place."""
    shutil.rmtree(folder / "vae")
    with pytest.raises(CheckpointError, match=r"no `vae/config\.json`"):
        open_checkpoint(folder)
    with pytest.raises(CheckpointError, match="one network alone"):
        open_checkpoint(folder / "unet")


def test_older_and_shorter_names_are_read(folder, sound):
    """The autoencoder's first attention names, and text names without their prefix."""
    rename(
        folder / "vae" / "diffusion_pytorch_model.safetensors",
        {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"},
    )
    rename(folder / "text_encoder" / "model.safetensors", {"text_model.": ""})
    assert is_sound(folder, sound[1])


def rename(file, names):
    table, _ = read_safetensors(file)
    arrays = {}
    for name, stored in table.items():
        for modern, old in names.items():
            name = name.replace(modern, old)
        arrays[name] = stored.read()
    file.unlink()
    write(file, arrays, "fp16")
