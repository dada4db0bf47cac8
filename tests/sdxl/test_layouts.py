"""Names and shapes, held to published figures and to diffusers' own models."""

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from sdxl.config import BASE, REFINER, TINY
from sdxl.layouts import LCM_NAME, original_shapes, tensor_specs, text_prefix

LCM = replace(BASE, unet=replace(BASE.unet, time_cond_proj_dim=256))
CONFIGS = {"base": BASE, "refiner": REFINER, "lcm": LCM, "tiny": TINY}
GOLDEN = Path(__file__).parents[1] / "golden" / "layouts_diffusers.json"


def count(config, component):
    specs = [s for s in tensor_specs(config) if s.component == component]
    return len(specs), sum(s.size for s in specs)


@pytest.mark.parametrize(
    ("config", "component", "tensors", "parameters"),
    [
        (BASE, "unet", 1680, 2_567_463_684),
        (REFINER, "unet", 1220, 2_259_526_660),
        (LCM, "unet", 1681, 2_567_463_684 + 81_920),
        (BASE, "text_encoder", 196, 123_060_480),
        (BASE, "text_encoder_2", 390, 694_659_841),
        (REFINER, "text_encoder_2", 390, 694_659_841),
        (BASE, "vae", 248, 83_653_863),
    ],
)
def test_networks_have_the_published_numbers(config, component, tensors, parameters):
    """Each network has as many tensors and parameters as the released weights."""
    assert count(config, component) == (tensors, parameters)


@pytest.mark.parametrize(
    ("config", "tensors", "parameters"),
    [
        (BASE, 2514, 3_468_837_868),
        (REFINER, 1858, 3_037_840_364),
        (LCM, 2515, 3_468_919_788),
    ],
)
def test_single_files_have_the_published_numbers(config, tensors, parameters):
    """Base, refiner and LCM checkpoints have the published totals."""
    specs = tensor_specs(config)
    assert (len(specs), sum(s.size for s in specs)) == (tensors, parameters)


@pytest.mark.parametrize("part, number", [("encoder", 106), ("decoder", 138)])
def test_autoencoder_halves_have_the_published_numbers(part, number):
    """The autoencoder's encoder and decoder have 106 and 138 tensors."""
    prefix = f"first_stage_model.{part}."
    assert sum(name.startswith(prefix) for name in original_shapes(BASE)) == number


def test_names_and_shapes_fill_the_published_key_files_to_the_byte():
    """Listed as `name:(shape)` lines, they are as long as the reference's key files."""

    def length(config, name):
        return sum(len(f"{name(s)}:{s.shape}\n") for s in tensor_specs(config))

    assert length(BASE, lambda s: s.name) == 204_850
    assert length(REFINER, lambda s: s.mindspore) == 144_968


@pytest.mark.parametrize(
    ("config", "norms", "embeddings"),
    [(BASE, 512 + 50 + 130 + 104, 3), (REFINER, 376 + 130 + 104, 1)],
)
def test_mindspore_renames_norms_and_embeddings_only(config, norms, embeddings):
    """799 base and 611 refiner tensors have another name in MindSpore's layout."""
    renamed = [s for s in tensor_specs(config) if s.mindspore != s.name]
    ends = Counter(s.mindspore.rpartition(".")[2] for s in renamed)
    assert ends["gamma"] + ends["beta"] == norms
    assert ends["embedding_table"] == embeddings
    assert len(renamed) == norms + embeddings


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("layout", ["original", "mindspore", "diffusers"])
def test_no_two_tensors_share_a_name(config, layout):
    """Every layout gives every tensor a name of its own."""
    names = [name for s in tensor_specs(config) for name in s.names_in(layout)]
    assert len(names) == len(set(names))


def test_lcm_is_a_base_with_one_more_tensor():
    """LCM adds a (320, 256) weight for the guidance, without a bias, and no more."""
    lcm, base = original_shapes(LCM), original_shapes(BASE)
    assert lcm.items() - base.items() == {(LCM_NAME, (320, 256))}
    assert base.keys() < lcm.keys()


def test_text_encoders_stand_where_the_original_has_them():
    """The base has CLIP first and OpenCLIP second, the refiner OpenCLIP alone."""
    assert text_prefix(BASE, 0) == "conditioner.embedders.0.transformer.text_model."
    assert text_prefix(BASE, 1) == "conditioner.embedders.1.model."
    assert text_prefix(REFINER, 0) == "conditioner.embedders.0.model."


def digest(shapes):
    """Hash the names and shapes of one network."""
    lines = sorted(f"{name} {list(shape)}\n" for name, shape in shapes.items())
    return {
        "tensors": len(lines),
        "sha256": hashlib.sha256("".join(lines).encode()).hexdigest(),
    }


def diffusers_shapes(config, component):
    return {
        name: spec.shape_in("diffusers")
        for spec in tensor_specs(config)
        if spec.component == component
        for name in spec.diffusers
    }


@pytest.mark.parametrize("kind", CONFIGS)
def test_diffusers_lists_equal_the_recorded_ones(kind):
    """Names and shapes of each network are those of diffusers' full-size models."""
    for component, recorded in json.loads(GOLDEN.read_text())[kind].items():
        assert digest(diffusers_shapes(CONFIGS[kind], component)) == recorded


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.filterwarnings("ignore")
def test_diffusers_own_converter_gives_our_diffusers_lists(kind):
    """diffusers' single-file loader maps our original names to our diffusers names."""
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    from sdxl.diffusers_json import unet_json, vae_json

    config = CONFIGS[kind]
    shapes = original_shapes(config)
    file = {n: torch.empty(s, device="meta") for n, s in shapes.items()}
    found = {
        "unet": utils.convert_ldm_unet_checkpoint(file, unet_json(config)),
        "vae": utils.convert_ldm_vae_checkpoint(file, vae_json(config)),
    }
    for component, tensors in found.items():
        theirs = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        ours = diffusers_shapes(config, component)
        if kind == "lcm" and component == "unet":
            # Their loader does not know the guidance embedding.
            del ours["time_embedding.cond_proj.weight"]
        assert theirs == ours


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (BASE, ["output_blocks.2.2.conv", "output_blocks.5.2.conv"]),
        (
            REFINER,
            [
                "output_blocks.2.1.conv",
                "output_blocks.5.2.conv",
                "output_blocks.8.2.conv",
            ],
        ),
    ],
    ids=["base", "refiner"],
)
def test_upsamplers_come_after_what_their_block_has(config, parts):
    """The refiner's first up level has no attention, so its upsampler is second."""
    stem = "model.diffusion_model."
    names = [name.removeprefix(stem) for name in original_shapes(config)]
    found = [name for name in names if name.endswith(".conv.weight")]
    assert [n for n in found if "output" in n] == [f"{part}.weight" for part in parts]


def test_decoder_levels_count_from_the_finest():
    """Level 3 comes first and is wide; levels 1 and 0 narrow, with a shortcut each."""
    shapes = original_shapes(BASE)
    up = "first_stage_model.decoder.up."
    shortcuts = {n.removeprefix(up): s for n, s in shapes.items() if "nin_s" in n}
    assert shapes[f"{up}3.block.0.conv1.weight"] == (512, 512, 3, 3)
    assert shortcuts["1.block.0.nin_shortcut.weight"] == (256, 512, 1, 1)
    assert shortcuts["0.block.0.nin_shortcut.weight"] == (128, 256, 1, 1)
    assert f"{up}1.upsample.conv.weight" in shapes
    assert f"{up}0.upsample.conv.weight" not in shapes
