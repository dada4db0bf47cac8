"""Conversion: bit-equal round trips, files other programs load, whole or not at all."""

import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from sdxl.config import BASE, PRESETS, TINY
from sdxl.convert import convert, inspect, layout_of
from sdxl.layouts import LCM_NAME, tensor_specs
from sdxl.stored import from_bytes, to_bytes
from sdxl.weights import CheckpointError, open_checkpoint
from tests.sdxl.small_models import NARROW, numbers, write

PROJECTION = "conditioner.embedders.1.model.text_projection"
FUSED = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
SCALE = "conditioner.embedders.1.model.logit_scale"
ATTENTION = "first_stage_model.encoder.mid.attn_1.q.weight"


@pytest.fixture(autouse=True)
def narrow_presets(monkeypatch):
    """Make the narrow geometries known, as files are recognised among the presets."""
    monkeypatch.setitem(PRESETS, "narrow base", NARROW["base"])
    monkeypatch.setitem(PRESETS, "narrow refiner", NARROW["refiner"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    arrays = numbers(TINY)
    return write(tmp_path_factory.mktemp("tiny") / "tiny.safetensors", arrays), arrays


@pytest.fixture(scope="module")
def tiny_folder(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder") / "tiny"
    convert(tiny[0], folder)
    return folder


def is_same(path, arrays):
    checkpoint = open_checkpoint(path)
    checkpoint.check()
    found = dict(checkpoint.tensors())
    return found.keys() == arrays.keys() and all(
        found[name].dtype == array.dtype and np.array_equal(found[name], array)
        for name, array in arrays.items()
    )


@pytest.mark.parametrize(
    ("kind", "tensors"), [("base", 2514), ("refiner", 1858), ("lcm", 2515)]
)
def test_every_layout_keeps_every_bit(kind, tensors, tmp_path):
    """original → MindSpore → diffusers → original is the same file, byte for byte.

    With the full lists of names, and each stage read alone gives the same arrays.
    """
    arrays = numbers(NARROW[kind], "fp16")
    assert len(arrays) == tensors
    start = write(tmp_path / "a.safetensors", arrays, "fp16")
    stages = [start, tmp_path / "b.ckpt", tmp_path / "c", tmp_path / "d.safetensors"]
    for src, dst in pairwise(stages):
        convert(src, dst)
        assert is_same(dst, arrays)
    assert stages[-1].read_bytes() == start.read_bytes()


@pytest.mark.parametrize("src", ["a.safetensors", "b.ckpt", "c"])
@pytest.mark.parametrize("dst", ["x.safetensors", "x.ckpt", "x"])
def test_any_layout_becomes_any_other(src, dst, tiny, tiny_folder, tmp_path):
    """All nine pairs of layouts give the same arrays."""
    path, arrays = tiny
    if src == "c":
        path = tiny_folder
    elif src == "b.ckpt":
        convert(path, tmp_path / src)
        path = tmp_path / src
    convert(path, tmp_path / dst)
    assert is_same(tmp_path / dst, arrays)


def test_a_bfloat16_file_keeps_its_type(tiny, tmp_path):
    """bfloat16 is read as float32, yet converted it stays bfloat16 with equal bits."""
    convert(tiny[0], tmp_path / "b.ckpt", dtype="bf16")
    convert(tmp_path / "b.ckpt", tmp_path / "b.safetensors")
    assert inspect(tmp_path / "b.safetensors").dtypes == ("bf16",)
    first, second = (
        open_checkpoint(tmp_path / f"b.{s}") for s in ("ckpt", "safetensors")
    )
    assert is_same(first.path, dict(second.tensors()))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("dst", ["x.safetensors", "x.ckpt", "x"])
def test_values_are_rounded_once_to_the_type_asked_for(dtype, dst, tiny, tmp_path):
    """Each value is the nearest of its new type, whatever the layout."""
    path, arrays = tiny
    convert(path, tmp_path / dst, dtype=dtype)
    checkpoint = open_checkpoint(tmp_path / dst)
    assert checkpoint.dtypes == (dtype,)
    for name, array in checkpoint.tensors():
        nearest = from_bytes(to_bytes(arrays[name], dtype, name), dtype)
        assert np.array_equal(array.reshape(-1), nearest)


def test_the_forms_are_those_of_each_layout(tiny, tiny_folder):
    """Projection transposed, fused rows split, attention dense, the scale kept."""
    _, arrays = tiny
    table = open_checkpoint(tiny_folder).table
    text, vae = "text_encoder_2/text_model.encoder.layers.0.self_attn.", "vae/encoder."
    found = table["text_encoder_2/text_projection.weight"].read()
    assert np.array_equal(found, arrays[PROJECTION].T)
    for part, name in enumerate("qkv"):
        rows = arrays[FUSED][32 * part : 32 * (part + 1)]
        assert np.array_equal(table[f"{text}{name}_proj.weight"].read(), rows)
    found = table[f"{vae}mid_block.attentions.0.to_q.weight"].read()
    assert np.array_equal(found, arrays[ATTENTION][:, :, 0, 0])
    assert open_checkpoint(tiny_folder).metadata["logit_scale"] == str(
        float(arrays[SCALE])
    )


def test_a_value_too_large_for_the_type_is_refused(tiny, tmp_path):
    """70000 has no fp16; the tensor is named, nothing is left behind; bf16 can."""
    _, arrays = tiny
    large = {**arrays, SCALE: np.float32(70_000).reshape(())}
    src = write(tmp_path / "large.safetensors", large)
    with pytest.raises(CheckpointError, match=r"logit_scale`: 1 values are too large"):
        convert(src, tmp_path / "x.safetensors", dtype="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["large.safetensors"]
    convert(src, tmp_path / "x.safetensors", dtype="bf16")


@pytest.mark.parametrize("dst", ["x.safetensors", "x.ckpt", "x"])
def test_a_conversion_that_is_stopped_leaves_nothing(dst, tiny, tmp_path):
    """Interrupted half-way, no file, no folder and nothing temporary is there."""

    def stop(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tiny[0], tmp_path / dst, progress=stop)
    assert not [*tmp_path.iterdir()]


def test_progress_counts_bytes_to_the_end(tiny, tmp_path):
    """The callback gets growing numbers of bytes, and the total last."""
    calls = []
    convert(tiny[0], tmp_path / "x.ckpt", progress=lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    assert done == sorted(done) and len({total for _, total in calls}) == 1
    assert calls[-1][0] == calls[-1][1] == 4 * sum(s.size for s in tensor_specs(TINY))


def test_what_exists_is_never_replaced(tiny, tmp_path):
    """A file or folder of that name is refused, and stays as it is."""
    (tmp_path / "x.safetensors").write_text("mine")
    (tmp_path / "x").mkdir()
    for name in ("x.safetensors", "x"):
        with pytest.raises(CheckpointError, match="exists"):
            convert(tiny[0], tmp_path / name)
    assert (tmp_path / "x.safetensors").read_text() == "mine"


@pytest.mark.parametrize(
    ("dst", "options", "words"),
    [
        ("x.pt", {}, "names no layout"),
        ("x.ckpt", {"layout": "original"}, r"ends in \.safetensors"),
        ("x.safetensors", {"dtype": "int8"}, "no dtype `int8`"),
        ("none/x.safetensors", {}, "no such folder"),
    ],
)
def test_a_target_that_makes_no_sense_is_refused(dst, options, words, tiny, tmp_path):
    """Names, types and places that cannot be are refused before any work."""
    with pytest.raises(CheckpointError, match=words):
        convert(tiny[0], tmp_path / dst, **options)


def test_a_source_that_is_not_whole_is_not_converted(tiny, tmp_path):
    """A missing tensor is refused before anything is written."""
    _, arrays = tiny
    less = {name: array for name, array in arrays.items() if name != FUSED}
    src = write(tmp_path / "less.safetensors", less)
    with pytest.raises(CheckpointError, match="1 tensors missing"):
        convert(src, tmp_path / "x.ckpt")
    assert not (tmp_path / "x.ckpt").exists()


def test_a_full_disk_is_known_beforehand(tiny, tmp_path, monkeypatch):
    """Without room for the result nothing is begun."""
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("sdxl.convert.shutil.disk_usage", lambda path: full)
    with pytest.raises(CheckpointError, match="1000 bytes are free"):
        convert(tiny[0], tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    ("name", "layout"),
    [("a.safetensors", "original"), ("a.ckpt", "mindspore"), ("a", "diffusers")],
)
def test_a_name_says_its_layout(name, layout):
    """The suffix names the layout, and none means a folder."""
    assert layout_of(Path(name)) == layout


@pytest.mark.parametrize(("kind", "tensors"), [("base", 2514), ("refiner", 1858)])
def test_inspection_says_what_a_checkpoint_is(kind, tensors, tmp_path):
    """Kind, preset, layout, types and numbers, from the headers alone."""
    path = write(tmp_path / "x.safetensors", numbers(NARROW[kind], "fp16"), "fp16")
    found = inspect(path)
    assert (found.kind, found.preset) == (kind, f"narrow {kind}")
    assert (found.layout, found.dtypes, found.tensors) == (
        "original",
        ("fp16",),
        tensors,
    )
    assert found.parameters == sum(s.size for s in tensor_specs(NARROW[kind]))
    assert found.nbytes == 2 * found.parameters and found.is_whole


def test_inspection_tells_an_lcm_and_what_is_wrong(tmp_path):
    """The kind is lcm by its weight; missing and extra names are listed, not raised."""
    arrays = numbers(NARROW["lcm"], "fp16")
    del arrays[FUSED]
    path = write(tmp_path / "x.safetensors", {**arrays, "odd": np.zeros(2)}, "fp16")
    found = inspect(path)
    assert found.kind == "lcm" and LCM_NAME in arrays
    assert (found.missing, found.extra, found.unfit) == ((FUSED,), ("odd",), ())
    assert not found.is_whole


@pytest.mark.parametrize("kind", ["base", "refiner", "lcm"])
@pytest.mark.filterwarnings("ignore")
def test_diffusers_loads_what_we_write(kind, tmp_path):
    """`from_pretrained` makes the pipeline of its kind with every tensor as written."""
    diffusers = pytest.importorskip("diffusers")
    name = "Img2Img" if kind == "refiner" else ""
    cls = getattr(diffusers, f"StableDiffusionXL{name}Pipeline")
    arrays = numbers(NARROW[kind])
    convert(write(tmp_path / "x.safetensors", arrays), tmp_path / "x")
    index = json.loads((tmp_path / "x" / "model_index.json").read_text())
    assert index["_class_name"] == cls.__name__
    pipeline = cls.from_pretrained(tmp_path / "x", local_files_only=True)
    assert pipeline.config.get("requires_aesthetics_score", False) is (
        kind == "refiner"
    )
    check_pipeline(pipeline, NARROW[kind], arrays)


@pytest.mark.filterwarnings("ignore")
def test_diffusers_loads_our_original_file_as_we_do(tmp_path, monkeypatch):
    """`from_single_file`, offline, gives the same tensors as our own reading."""
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arrays = numbers(NARROW["base"])
    src = write(tmp_path / "x.safetensors", arrays)
    convert(src, tmp_path / "x")
    pipeline = diffusers.StableDiffusionXLPipeline.from_single_file(
        str(src), config=str(tmp_path / "x"), local_files_only=True
    )
    check_pipeline(pipeline, NARROW["base"], arrays)


def check_pipeline(pipeline, config, arrays):
    """Hold every tensor of a diffusers pipeline to equal the original array."""
    names = {spec.component for spec in tensor_specs(config)}
    state = {
        f"{component}/{'text_model.' if component == 'text_encoder' else ''}{name}": t
        for component in names
        for name, t in getattr(pipeline, component).state_dict().items()
    }
    for spec in tensor_specs(config):
        if spec.diffusers:
            parts = [state.pop(n).float().numpy() for n in spec.names_in("diffusers")]
            array = spec.from_layout("diffusers", parts)
            expected = arrays[spec.name].astype(np.float32)
            assert np.array_equal(array, expected), spec.name
    assert not state


@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_our_tokenizer_files(tiny_folder):
    """Both tokenizers give the ids, the padding and the length of ours.

    Not of a text with `!`: as in the published folders it is the second tokenizer's
    padding, and transformers then reads every `!` as padding, id 0.
    """
    transformers = pytest.importorskip("transformers")
    from sdxl.tokenizer import END_ID, Tokenizer

    texts = ["A cat's café, 1234.", "", "<|endoftext|> twice", "word " * 100]
    for name, pad in (("tokenizer", END_ID), ("tokenizer_2", 0)):
        theirs = transformers.CLIPTokenizer.from_pretrained(tiny_folder / name)
        ids = theirs(texts, padding="max_length", truncation=True).input_ids
        assert np.array_equal(np.array(ids), Tokenizer(pad)(texts)[0])


CONVERT = """
import resource, sys, time
from pathlib import Path
from sdxl.convert import convert
start = time.monotonic()
convert(Path(sys.argv[1]), Path(sys.argv[2]))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(f"{peak:.2f} GiB, {time.monotonic() - start:.0f} s")
"""


@pytest.mark.slow
def test_a_full_size_file_converts_in_little_memory(tmp_path):
    """The 6.9 GB base in fp16 goes through all layouts, each in less than 1 GiB."""
    from sdxl.random_weights import random_tensor
    from sdxl.safetensors_file import SafetensorsWriter

    specs = tensor_specs(BASE)
    src = tmp_path / "a.safetensors"
    with SafetensorsWriter(src, {s.name: ("fp16", s.shape) for s in specs}) as writer:
        for spec in specs:
            writer.add(spec.name, random_tensor(spec.name, spec.shape))
    assert inspect(src).parameters == 3_468_837_868
    stages = [src, tmp_path / "b.ckpt", tmp_path / "c", tmp_path / "d.safetensors"]
    for start, end in pairwise(stages):
        command = [sys.executable, "-c", CONVERT, str(start), str(end)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"{start.name} -> {end.name}: {done.stdout.strip()}")
        assert float(done.stdout.split()[0]) < 1
        if start.suffix == ".ckpt":
            start.unlink()
    is_equal = equal_files(src, stages[-1])
    shutil.rmtree(tmp_path)
    assert is_equal


def equal_files(first, second):
    with first.open("rb") as a, second.open("rb") as b:
        while chunk := a.read(2**24):
            if chunk != b.read(len(chunk)):
                return False
        return not b.read(1)
