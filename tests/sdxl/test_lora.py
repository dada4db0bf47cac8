"""LoRA files: merged as diffusers merges them, or refused by what does not fit."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sdxl.config import BASE, REFINER, TINY
from sdxl.convert import convert
from sdxl.layouts import VAE_PREFIX, tensor_specs
from sdxl.lora import Lora, LoraSet
from sdxl.weights import CheckpointError, load_into, open_checkpoint
from tests.golden.lora_cases import RANK, SCALES, STYLES, modules, samples, write_lora
from tests.sdxl.small_models import numbers, write

GOLDEN = Path(__file__).parents[1] / "golden" / "lora_fused.npz"
QUERY = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
QUERY_WEIGHT = (
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
)
TEXT = "text_encoder_2.text_model.encoder.layers.1.self_attn"
FUSED = "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"


@pytest.fixture(scope="module")
def arrays():
    return numbers(TINY)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One file in each style, of the same numbers."""
    root = tmp_path_factory.mktemp("lora")
    return {style: write_lora(root / f"{style}.safetensors", style) for style in STYLES}


def merged(arrays, *loras):
    patch = LoraSet(loras, TINY)
    return {name: patch.apply(name, array) for name, array in arrays.items()}


def small(path, module=QUERY, up=(128, 2), down=(2, 128), metadata=None, **more):
    """Write a file of ones for a single module, as peft names it."""
    tensors = {
        f"{module}.lora_B.weight": np.ones(up, np.float32),
        f"{module}.lora_A.weight": np.ones(down, np.float32),
        **more,
    }
    save_file(tensors, path, metadata=metadata)
    return path


def refusal(path, config=TINY):
    with pytest.raises(CheckpointError) as caught:
        LoraSet([Lora(path=path)], config)
    return str(caught.value)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("style", STYLES)
def test_merged_weights_equal_diffusers(style, scale, files, arrays):
    """In every style, at every scale, each weight is diffusers' within 1e-6.

    The same tensors change and no other; kohya's files bring an alpha of half the rank.
    """
    found = merged(arrays, Lora(path=files[style], scale=scale))
    changed = sorted(n for n in found if not np.array_equal(found[n], arrays[n]))
    golden = np.load(GOLDEN)
    oracle = f"{'kohya' if 'kohya' in style else 'peft'} {scale}"
    assert changed == golden[f"{oracle} names"].tolist()
    ours = np.stack([samples(found[name]) for name in changed])
    np.testing.assert_allclose(ours, golden[oracle], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("style", STYLES)
def test_a_scale_of_zero_changes_nothing(style, files, arrays):
    """At scale 0 every array is the very object that went in."""
    found = merged(arrays, Lora(path=files[style], scale=0))
    assert all(found[name] is array for name, array in arrays.items())


@pytest.mark.filterwarnings("ignore")
def test_files_that_diffusers_saves_are_merged_as_it_merges_them(arrays, tmp_path):
    """Adapters with alpha and rank stabilization, saved by diffusers, at 0.7: 1e-6."""
    diffusers = pytest.importorskip("diffusers")
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    convert(write(tmp_path / "tiny.safetensors", arrays), tmp_path / "tiny")
    cls = diffusers.StableDiffusionXLPipeline
    pipeline = cls.from_pretrained(tmp_path / "tiny")
    settings = {
        "unet": peft.LoraConfig(
            r=4, lora_alpha=3, use_rslora=True, target_modules=["to_q", "ff.net.2"]
        ),
        "text_encoder_2": peft.LoraConfig(
            r=2,
            lora_alpha=5,
            alpha_pattern={"layers.0.self_attn.q_proj": 1},
            target_modules=["q_proj", "out_proj"],
        ),
    }
    layers, notes = {}, {}
    for name, config in settings.items():
        network = getattr(pipeline, name)
        network.add_adapter(config)
        torch.manual_seed(0)
        for parameter in network.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        state = peft.get_peft_model_state_dict(network)
        layers[f"{name}_lora_layers"] = state
        notes[f"{name}_lora_adapter_metadata"] = config.to_dict()
    cls.save_lora_weights(tmp_path / "lora", **layers, **notes)
    fresh = cls.from_pretrained(tmp_path / "tiny")
    fresh.load_lora_weights(str(tmp_path / "lora"))
    fresh.fuse_lora(components=[*settings], lora_scale=0.7)
    fresh.unload_lora_weights()
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    found = merged(arrays, Lora(path=file, scale=0.7))
    assert any(found[name] is not array for name, array in arrays.items())
    for spec in tensor_specs(TINY):
        if spec.component in settings and spec.diffusers:
            state = getattr(fresh, spec.component).state_dict()
            parts = [state[name].numpy() for name in spec.diffusers]
            theirs = spec.from_layout("diffusers", parts)
            np.testing.assert_allclose(found[spec.name], theirs, rtol=1e-6, atol=1e-6)


def test_the_sum_is_the_written_out_one(arrays, tmp_path):
    """W + scale * alpha / rank * up @ down, in float64, within float32's rounding."""
    rng = np.random.default_rng(0)
    up, down = rng.standard_normal((128, 8)), rng.standard_normal((8, 128))
    flat = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{flat}.lora_up.weight": up,
        f"{flat}.lora_down.weight": down,
        f"{flat}.alpha": np.array(2.0),
    }
    path = tmp_path / "x.safetensors"
    save_file({name: a.astype(np.float32) for name, a in tensors.items()}, path)
    found = merged(arrays, Lora(path=path, scale=0.7))[QUERY_WEIGHT]
    delta = 0.7 * 2 / 8 * up.astype(np.float32) @ down.astype(np.float32)
    expected = arrays[QUERY_WEIGHT] + delta.astype(np.float64)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("notes", "factor"),
    [
        (None, 1),
        ({"unet.lora_alpha": 3}, 3 / 4),
        ({"unet.lora_alpha": 3, "unet.use_rslora": True}, 3 / 2),
        ({"unet.lora_alpha": 3, "unet.alpha_pattern": {"attn1.to_q": 8}}, 2),
        ({"text_encoder.lora_alpha": 3}, 1),
    ],
)
def test_settings_in_the_file_scale_it(notes, factor, arrays, tmp_path):
    """Alpha is diffusers' where the file keeps its settings, and the rank without."""
    metadata = None if notes is None else {"lora_adapter_metadata": json.dumps(notes)}
    path = tmp_path / "x.safetensors"
    small(path, up=(128, 4), down=(4, 128), metadata=metadata)
    found = merged(arrays, Lora(path=path))[QUERY_WEIGHT]
    np.testing.assert_allclose(found - arrays[QUERY_WEIGHT], 4 * factor, rtol=1e-6)


def test_text_projections_get_their_rows(arrays, tmp_path):
    """The key projection's LoRA changes the middle third of the fused weight only."""
    path = small(tmp_path / "k.safetensors", f"{TEXT}.k_proj", (32, 1), (1, 32))
    change = merged(arrays, Lora(path=path))[FUSED] - arrays[FUSED]
    np.testing.assert_allclose(change[32:64], 1, rtol=1e-6)
    assert not change[:32].any() and not change[64:].any()


def test_several_files_add_up(arrays, tmp_path):
    """Two files on one weight are both merged, each with its scale."""
    loras = [
        Lora(path=small(tmp_path / f"{scale}.safetensors"), scale=scale)
        for scale in (0.5, -2.0)
    ]
    patch = LoraSet(loras, TINY)
    change = patch.apply(QUERY_WEIGHT, arrays[QUERY_WEIGHT]) - arrays[QUERY_WEIGHT]
    np.testing.assert_allclose(change, 2 * (0.5 - 2), rtol=1e-6)
    assert patch.files() == [lora.path for lora in loras]


def test_half_precision_is_merged_in_single(arrays, tmp_path):
    """A float16 weight is widened first: a small change is not rounded away."""
    path = small(tmp_path / "x.safetensors")
    half = arrays[QUERY_WEIGHT].astype(np.float16)
    found = LoraSet([Lora(path=path, scale=1e-6)], TINY).apply(QUERY_WEIGHT, half)
    assert found.dtype == np.float32
    assert np.array_equal(found, half.astype(np.float32) + np.float32(2e-6))


@pytest.mark.filterwarnings("ignore")
def test_a_network_is_loaded_with_it_merged(arrays, files, tmp_path):
    """As a patch of `load_into`, it fills the Cells with the merged weights."""
    from mindspore import float32

    from sdxl.layouts import UNET_PREFIX
    from sdxl.unet import UNet

    lora = Lora(path=files["kohya"], scale=0.7)
    network = UNet(TINY.unet, float32)
    checkpoint = open_checkpoint(write(tmp_path / "x.safetensors", arrays))
    patch = LoraSet([lora], TINY).apply
    load_into(network, checkpoint, UNET_PREFIX, patch=patch)
    found = dict(network.parameters_and_names())
    name = QUERY_WEIGHT.removeprefix(UNET_PREFIX)
    expected = merged(arrays, lora)[QUERY_WEIGHT]
    assert np.array_equal(found[name].asnumpy(), expected)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("unet.mid_block.attentions.7.proj_in.lora_A.weight", "is it an SDXL LoRA"),
        ("lora_unet_nothing.lora_up.weight", "is it an SDXL LoRA"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha", "is it an SDXL LoRA"),
        ("lora_unet_middle_block_1_proj_in.hada_w1_a", "LoHa, LoKr, DoRA"),
        ("lora_unet_middle_block_1_proj_in.dora_scale", "LoHa, LoKr, DoRA"),
        (f"{VAE_PREFIX}encoder.conv_in.lora_A.weight", "is it an SDXL LoRA"),
        ("lora_unet_out_0.lora_up.weight", "is it an SDXL LoRA"),
    ],
)
def test_a_key_that_matches_nothing_is_refused(key, hint, tmp_path):
    """It is named and counted; no part of such a file is merged."""
    path = small(tmp_path / "x.safetensors", **{key: np.ones((2, 2), np.float32)})
    message = refusal(path)
    assert f"1 tensors match nothing in the model (`{key}`)" in message
    assert hint in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"up": (128, 3)},
            r"[128, 3] fp32 times [2, 128] fp32 does not fit [128, 128]",
        ),
        ({"up": (64, 2)}, "does not fit [128, 128]"),
        ({"down": (2, 64)}, "does not fit [128, 128]"),
        ({"up": (128, 0), "down": (0, 128)}, "does not fit"),
        ({f"{QUERY}.alpha": np.ones(2, np.float32)}, "alpha is no number"),
        ({f"{QUERY}.alpha": np.array(np.nan, np.float32)}, "its scale is nan"),
        ({f"{QUERY}.lora.up.weight": np.ones((128, 2), np.float32)}, "has two `up`"),
        ({"metadata": {"lora_adapter_metadata": "["}}, "no JSON object"),
        (
            {"metadata": {"lora_adapter_metadata": '{"unet.use_dora": true}'}},
            "`unet.use_dora` is not supported",
        ),
        (
            {"metadata": {"lora_adapter_metadata": '{"unet.lora_alpha": "x"}'}},
            "`unet.lora_alpha` is 'x', no number",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused(options, words, tmp_path):
    """Shapes, scales and settings are checked before anything is merged."""
    assert words in refusal(small(tmp_path / "x.safetensors", **options))


def test_half_a_pair_is_refused(files, tmp_path):
    """A module with `up` and no `down` is named."""
    tensors = load_file(files["peft"])
    del tensors[f"{QUERY}.lora_A.weight"]
    save_file(tensors, tmp_path / "x.safetensors")
    assert f"`{QUERY}` has no `down` weight" in refusal(tmp_path / "x.safetensors")


def test_another_models_file_is_refused(files):
    """The tiny model's LoRA does not fit the base or the refiner."""
    assert "does not fit" in refusal(files["peft"], BASE)
    assert "match nothing" in refusal(files["peft"], REFINER)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    """Missing files, pickles and damage are one line."""
    assert "No such file" in refusal(tmp_path / "none.safetensors")
    assert "must be a .safetensors" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "config", [BASE, REFINER, TINY], ids=["base", "refiner", "tiny"]
)
def test_no_flat_name_means_two_modules(config):
    """Dots made underscores, kohya's names of all modules still differ."""
    from sdxl.lora import _module_names

    names = [
        name
        for spec in tensor_specs(config)
        if spec.component != "vae" and len(spec.shape) > 1
        for module in spec.diffusers
        for name in {*_module_names(spec, module)}
    ]
    assert len(names) == len(set(names))


def test_the_files_reach_every_kind_of_layer():
    """The files of these tests cover both text encoders and 290 modules."""
    networks = [network for network, _, _ in modules().values()]
    assert {*networks} == {"unet", "text_encoder", "text_encoder_2"}
    assert len(networks) > 290 and RANK == 4
