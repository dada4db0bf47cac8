"""Reading checkpoints: what is whole is read exactly, what is not is one clear line."""

import os
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from sdxl.ckpt_file import CkptWriter, check_crc, read_ckpt
from sdxl.config import TINY
from sdxl.layouts import LCM_NAME, UNET_PREFIX, VAE_PREFIX, tensor_specs
from sdxl.safetensors_file import SafetensorsWriter, read_safetensors
from sdxl.weights import CheckpointError, load_into, open_checkpoint
from tests.sdxl.small_models import numbers, write

FIRST = "model.diffusion_model.input_blocks.0.0.weight"
SCALE = "conditioner.embedders.1.model.logit_scale"


@pytest.fixture(scope="module")
def arrays():
    return numbers(TINY, "fp16")


@pytest.fixture(scope="module")
def original(arrays, tmp_path_factory):
    path = tmp_path_factory.mktemp("original") / "tiny.safetensors"
    return write(path, arrays, "fp16")


@pytest.fixture(scope="module")
def mindspore_file(arrays, tmp_path_factory):
    path = tmp_path_factory.mktemp("mindspore") / "tiny.ckpt"
    with CkptWriter(path) as writer:
        for spec in tensor_specs(TINY):
            writer.add(spec.mindspore, arrays[spec.name], "fp16")
    return path


def refusal(path, **options):
    """Open and check; give the one line of the refusal."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, **options).check()
    message = str(caught.value)
    assert "\n" not in message
    return message


def without(arrays, *names):
    return {name: array for name, array in arrays.items() if name not in names}


def some(arrays):
    """Thirty names, a scalar among them: MindSpore takes its time over each tensor."""
    return [*list(arrays)[:29], SCALE]


def same(found, arrays):
    return found.keys() == arrays.keys() and all(
        found[name].dtype == array.dtype and np.array_equal(found[name], array)
        for name, array in arrays.items()
    )


@pytest.mark.parametrize("fixture", ["original", "mindspore_file"])
def test_a_file_gives_back_every_array_bit_for_bit(fixture, arrays, request):
    """Both kinds of file give the arrays that were written, by their original names."""
    checkpoint = open_checkpoint(request.getfixturevalue(fixture))
    checkpoint.check()
    assert same(dict(checkpoint.tensors()), arrays)
    assert (checkpoint.preset, checkpoint.dtypes) == ("tiny", ("fp16",))
    layout = "original" if fixture == "original" else "mindspore"
    assert checkpoint.layout == layout


def test_mindspore_names_in_a_safetensors_file_are_known(arrays, tmp_path):
    """`ms.save_checkpoint(format="safetensors")` keeps MindSpore's names; so do we."""
    named = {s.mindspore: arrays[s.name] for s in tensor_specs(TINY)}
    checkpoint = open_checkpoint(write(tmp_path / "m.safetensors", named, "fp16"))
    assert checkpoint.layout == "mindspore"
    assert same(dict(checkpoint.tensors()), arrays)


def test_tensors_come_by_network(original):
    """A prefix gives one network's tensors, and all networks give all tensors."""
    checkpoint = open_checkpoint(original)
    names = [name for name, _ in checkpoint.tensors(VAE_PREFIX)]
    assert names and all(name.startswith(VAE_PREFIX) for name in names)
    assert len(names) == 244


@pytest.mark.filterwarnings("ignore")
def test_bfloat16_is_widened_as_mindspore_does(tmp_path):
    """Rounding to bfloat16 and back equals MindSpore's, ties and specials included."""
    import mindspore as ms

    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 100_000, np.uint32)
    bits[:4] = (0x3F808000, 0x3F818000, 0x7F800000, 0xFF7FFFFF)
    values = bits.view(np.float32)
    with SafetensorsWriter(tmp_path / "b.st", {"x": ("bf16", values.shape)}) as writer:
        writer.add("x", values)
    ours = read_safetensors(tmp_path / "b.st")[0]["x"].read()
    theirs = ms.Tensor(values).astype(ms.bfloat16).astype(ms.float32).asnumpy()
    assert np.array_equal(ours, theirs, equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "crc"), [("float32", False), ("float16", True), ("bfloat16", False)]
)
@pytest.mark.filterwarnings("ignore")
def test_mindspore_files_are_read_as_mindspore_wrote_them(dtype, crc, arrays, tmp_path):
    """What `ms.save_checkpoint` writes, checksum or not, is read with equal values."""
    import mindspore as ms

    kind = getattr(ms, dtype)
    tensors = {name: ms.Tensor(arrays[name]).astype(kind) for name in some(arrays)}
    path = tmp_path / "theirs.ckpt"
    items = [{"name": name, "data": tensor} for name, tensor in tensors.items()]
    ms.save_checkpoint(items, str(path), crc_check=crc)
    check_crc(path)
    found = read_ckpt(path)
    assert found.keys() == tensors.keys()
    for name, theirs in tensors.items():
        theirs = theirs.astype(ms.float32) if dtype == "bfloat16" else theirs
        assert np.array_equal(found[name].read(), theirs.asnumpy())


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.filterwarnings("ignore")
def test_mindspore_reads_what_we_write(dtype, arrays, tmp_path):
    """`ms.load_checkpoint` gives back our arrays, names, shapes and types."""
    import mindspore as ms

    path = tmp_path / "ours.ckpt"
    with CkptWriter(path) as writer:
        for name in some(arrays):
            writer.add(name, arrays[name], dtype)
    theirs = ms.load_checkpoint(str(path))
    kinds = {"fp32": ms.float32, "fp16": ms.float16, "bf16": ms.bfloat16}
    assert [*theirs] == some(arrays)
    for name, found in theirs.items():
        expected = ms.Tensor(arrays[name]).astype(kinds[dtype])
        assert (found.dtype, found.shape) == (expected.dtype, arrays[name].shape)
        if dtype == "bf16":
            found, expected = found.astype(ms.float32), expected.astype(ms.float32)
        assert np.array_equal(found.asnumpy(), expected.asnumpy())


@pytest.mark.filterwarnings("ignore")
def test_slices_of_a_long_array_are_joined(tmp_path, monkeypatch):
    """An array longer than a slice is written in several, read whole by both."""
    import mindspore as ms

    monkeypatch.setattr("sdxl.ckpt_file._SLICE", 1000)
    array = np.arange(3000, dtype=np.float32).reshape(2, 1500)
    path = tmp_path / "sliced.ckpt"
    with CkptWriter(path) as writer:
        writer.add("a", array, "fp32")
        writer.add("b", array[:, :3], "fp32")
    table = read_ckpt(path)
    assert len(table["a"].spans) == 12
    assert np.array_equal(table["a"].read(), array)
    theirs = ms.load_checkpoint(str(path))
    assert np.array_equal(theirs["a"].asnumpy(), array)
    assert np.array_equal(theirs["b"].asnumpy(), array[:, :3])


def test_a_damaged_byte_is_found_by_the_checksum(mindspore_file, tmp_path):
    """One flipped bit in the data of a file with a checksum is refused."""
    import zlib

    data = mindspore_file.read_bytes()
    tail = b"crc_num" + zlib.crc32(data).to_bytes(10, "big")
    path = tmp_path / "crc.ckpt"
    path.write_bytes(data + tail)
    open_checkpoint(path).check()
    broken = bytearray(data + tail)
    broken[len(data) // 2] ^= 1
    path.write_bytes(broken)
    assert "checksum is wrong" in refusal(path)


def test_a_missing_tensor_is_named(arrays, tmp_path):
    """Without one tensor nothing is read, and the tensor is named."""
    path = write(tmp_path / "m.safetensors", without(arrays, FIRST), "fp16")
    assert f"1 tensors missing (`{FIRST}`)" in refusal(path)
    with pytest.raises(CheckpointError, match="missing"):
        next(open_checkpoint(path).tensors())


def test_many_missing_tensors_are_counted(arrays, tmp_path):
    """Of many missing tensors the first three are named and all are counted."""
    gone = [name for name in arrays if name.startswith(VAE_PREFIX)]
    path = write(tmp_path / "m.safetensors", without(arrays, *gone), "fp16")
    message = refusal(path)
    assert "244 tensors missing" in message
    assert all(name in message for name in gone[:3]) and gone[3] not in message


def test_an_extra_tensor_is_named(arrays, tmp_path):
    """A tensor that the model does not have is refused, not dropped."""
    extra = {**arrays, "model.diffusion_model.extra.weight": np.zeros(3)}
    path = write(tmp_path / "e.safetensors", extra, "fp16")
    assert "1 tensors not known (`model.diffusion_model.extra.weight`)" in refusal(path)


def test_a_wrong_shape_is_named_with_both_shapes(arrays, tmp_path):
    """A tensor of another shape is refused with its shape and the expected one."""
    other = {**arrays, FIRST: np.zeros((32, 4, 1, 1))}
    message = refusal(write(tmp_path / "s.safetensors", other, "fp16"))
    assert f"`{FIRST}` is [32, 4, 1, 1] fp16, expected [32, 4, 3, 3]" in message


def test_a_type_we_do_not_read_is_named(arrays, tmp_path):
    """Weights of another element type are refused by name and type."""
    path = write(tmp_path / "t.safetensors", arrays, "fp16")
    data = path.read_bytes().replace(b'"dtype":"F16"', b'"dtype":"I16"', 1)
    path.write_bytes(data)
    assert " I16, expected" in refusal(path)


def test_known_extras_are_passed_over(arrays, tmp_path):
    """Position ids and the table of sigmas, in some published files, do no harm."""
    ids = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"
    extra = {**arrays, ids: np.zeros((1, 77)), "denoiser.sigmas": np.zeros(1000)}
    checkpoint = open_checkpoint(write(tmp_path / "k.safetensors", extra, "fp16"))
    checkpoint.check()
    assert same(dict(checkpoint.tensors()), arrays)


def test_the_unused_logit_scale_may_be_absent(arrays, tmp_path):
    """Files that passed through Hugging Face's encoder lost it: OpenCLIP's is given."""
    path = write(tmp_path / "l.safetensors", without(arrays, SCALE), "fp16")
    found = dict(open_checkpoint(path).tensors())
    assert found.keys() == arrays.keys()
    assert found[SCALE] == np.float16(2.6592)
    assert found[SCALE].dtype == np.float16


@pytest.mark.parametrize("fixture", ["original", "mindspore_file"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999999])
def test_a_truncated_file_is_refused(fixture, share, request, tmp_path):
    """A file cut anywhere is refused when it is opened, before a number is read."""
    data = request.getfixturevalue(fixture).read_bytes()
    path = tmp_path / f"cut{request.getfixturevalue(fixture).suffix}"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError):
        open_checkpoint(path)


def test_a_file_cut_while_it_is_read_is_refused(original, tmp_path):
    """Even after its header was checked, a short read is an error and not garbage."""
    path = tmp_path / "shrinking.safetensors"
    path.write_bytes(original.read_bytes())
    checkpoint = open_checkpoint(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="file ends at byte"):
        list(checkpoint.tensors())


def test_pickles_are_never_loaded(tmp_path):
    """PyTorch's pickled files are refused by their first bytes, whatever their name."""
    for name in ("a.ckpt", "a.pt", "a.bin", "a.safetensors"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("data.pkl", b"\x80\x02.")
        assert "pickled" in refusal(tmp_path / name)
    (tmp_path / "old.ckpt").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80")
    assert "pickled" in refusal(tmp_path / "old.ckpt")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (b"<html>404 Not Found</html>", "not a sound safetensors file"),
        (b"", "not a sound safetensors file"),
    ],
)
def test_other_files_are_refused_by_what_they_are(content, words, tmp_path):
    """What a failed download leaves is named."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert words in refusal(path)


def test_a_path_that_is_not_there_is_refused(tmp_path):
    """A missing file and an unknown kind of file are errors of one line."""
    assert "No such file" in refusal(tmp_path / "none.safetensors")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(30))
    assert "neither safetensors nor MindSpore ckpt" in refusal(tmp_path / "x.gguf")


def test_another_model_is_refused(tmp_path):
    """A file whose tensors are of another model is told apart from a damaged SDXL."""
    path = write(tmp_path / "sd1.safetensors", {"cond_stage_model.x": np.zeros(3)})
    assert "not an SDXL checkpoint" in refusal(path)


def test_a_preset_is_what_the_file_must_be(original):
    """Asked to be the base, the tiny file is refused with the shapes that differ."""
    message = refusal(original, preset="base")
    assert "is a `tiny`" in message and "expected [1280, 320]" in message
    assert "hint: one of base" in refusal(original, preset="huge")
    open_checkpoint(original, preset="tiny").check()


def test_lcm_is_recognised_by_its_weight(tmp_path):
    """The guidance embedding's weight makes a geometry an LCM of that width."""
    config = replace(TINY, unet=replace(TINY.unet, time_cond_proj_dim=24))
    arrays = numbers(config)
    checkpoint = open_checkpoint(write(tmp_path / "lcm.safetensors", arrays))
    checkpoint.check()
    assert checkpoint.is_lcm and checkpoint.preset == "tiny"
    assert checkpoint.config == config
    assert LCM_NAME in dict(checkpoint.tensors(UNET_PREFIX))


def test_files_are_what_is_to_be_hashed(original):
    """A single file consists of itself."""
    assert open_checkpoint(original).files() == [original]


def test_opening_does_not_import_mindspore(original):
    """Headers, arrays and conversion need numpy alone."""
    code = (
        "import sys; from pathlib import Path; import sdxl.weights, sdxl.convert\n"
        "c = sdxl.weights.open_checkpoint(Path(sys.argv[1])); c.check()\n"
        "next(c.tensors()); print('mindspore' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(original)], capture_output=True, text=True
    )
    assert done.stdout == "False\n", done.stderr


@pytest.fixture(scope="module")
def autoencoder():
    from sdxl.vae import VAE

    return VAE(TINY.vae)


@pytest.mark.filterwarnings("ignore")
def test_a_network_is_filled_with_the_files_numbers(original, arrays, autoencoder):
    """Every parameter of a Cell becomes the file's array, in the Cell's own type."""
    checkpoint = open_checkpoint(original)
    load_into(autoencoder, checkpoint, VAE_PREFIX)
    specs = {s.mindspore.removeprefix(VAE_PREFIX): s for s in checkpoint.specs}
    for name, parameter in autoencoder.parameters_and_names():
        expected = arrays[specs[name].name].astype(np.float32)
        assert np.array_equal(parameter.asnumpy(), expected)


@pytest.mark.filterwarnings("ignore")
def test_a_patch_changes_what_is_loaded(original, arrays, autoencoder):
    """A patch sees each original name and array, and its result is loaded."""
    seen = []

    def double(name, array):
        seen.append(name)
        return array * 2

    load_into(autoencoder, open_checkpoint(original), VAE_PREFIX, patch=double)
    assert seen == [name for name in arrays if name.startswith(VAE_PREFIX)]
    found = autoencoder.decoder.conv_in.weight.asnumpy()
    expected = arrays["first_stage_model.decoder.conv_in.weight"] * 2
    assert np.array_equal(found, expected.astype(np.float32))


@pytest.mark.filterwarnings("ignore")
def test_a_network_of_other_names_or_shapes_is_refused(original, autoencoder):
    """The wrong prefix or another geometry is an error that names both sides."""
    checkpoint = open_checkpoint(original)
    with pytest.raises(CheckpointError, match=r"not in the network.*not in the file"):
        load_into(autoencoder, checkpoint, UNET_PREFIX)
    from sdxl.vae import VAE

    wider = VAE(replace(TINY.vae, ch=64))
    with pytest.raises(CheckpointError, match=r"is \[64, 3, 3, 3\], expected \[32, 3"):
        load_into(wider, checkpoint, VAE_PREFIX)
