"""Files made to do harm: each is one error line, at no cost in memory or time."""

import json
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdxl.ckpt_file import CkptWriter, read_ckpt
from sdxl.safetensors_file import MAX_HEADER, SafetensorsWriter, read_safetensors
from sdxl.stored import CheckpointError, Stored

FUZZ = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def safetensors(path, header, data=b"\0" * 8, length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", length or len(raw)) + raw + data)
    return path


def entry(begin=0, end=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


HEADERS = {
    "no object": [1, 2],
    "no JSON": b"{not json",
    "no UTF-8": b'{"\xff": 1}',
    "deep nesting": b'{"a":' * 100_000,
    "the same name twice": b'{"a": %b, "a": %b}'
    % ((json.dumps(entry()).encode(),) * 2),
    "no entry": {"a": 7},
    "no offsets": {"a": {"dtype": "F32", "shape": [2]}},
    "three offsets": {"a": {**entry(), "data_offsets": [0, 8, 9]}},
    "a bool for a number": {"a": entry(shape=(True, 2))},
    "a negative size": {"a": entry(shape=(-1, -2))},
    "a negative offset": {"a": entry(begin=-8, end=0)},
    "more bytes than the shape": {"a": entry(shape=(1,))},
    "fewer bytes than the shape": {"a": entry(shape=(2**40,))},
    "a shape beyond numbers": {"a": entry(shape=(2**47,) * 8)},
    "too many axes": {"a": entry(shape=(1,) * 100 + (2,))},
    "an offset beyond numbers": {"a": entry(end=2**60, shape=(2**58,))},
    "overlap": {"a": entry(), "b": entry(4, 8, (1,))},
    "a gap": {"a": entry(0, 4, (1,)), "b": entry(8, 12, (1,))},
    "data after the last tensor": {"a": entry(0, 4, (1,))},
    "data that is not there": {"a": entry(0, 16, (4,))},
    "metadata that is no object": {"__metadata__": 3, "a": entry()},
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_false_header_is_refused(header, tmp_path):
    """Whatever is wrong with a header, it is refused before any data is read."""
    with pytest.raises(CheckpointError) as caught:
        read_safetensors(safetensors(tmp_path / "x.safetensors", header))
    message = str(caught.value)
    assert "x.safetensors: " in message
    assert message.isprintable() and len(message) <= 2000


@pytest.mark.parametrize("length", [2**63, 2**40, MAX_HEADER + 1, 1])
def test_a_header_of_false_length_is_refused(length, tmp_path):
    """A length beyond the file or beyond reason is not allocated."""
    path = safetensors(tmp_path / "x.safetensors", {"a": entry()}, length=length)
    with pytest.raises(CheckpointError, match="a header of"):
        read_safetensors(path)


def test_a_true_header_is_read(tmp_path):
    """The same entries without a lie are read: the tests above can fail."""
    path = safetensors(tmp_path / "x.safetensors", {"a": entry()})
    table, _ = read_safetensors(path)
    assert np.array_equal(table["a"].read(), np.zeros(2, np.float32))


def field(number, content):
    """Encode one length-delimited field of a protocol buffer."""
    assert len(content) < 128
    return bytes([number << 3 | 2, len(content)]) + content


def value(tag=b"a", dims=b"\x08\x02", kind=b"Float32", content=b"\0" * 8):
    tensor = dims + field(2, kind) + field(3, content)
    return field(1, field(1, tag) + field(2, tensor))


CKPTS = {
    "empty": b"",
    "another field": field(2, b"abc"),
    "a group": b"\x0b" + value(),
    "no tensor": field(1, field(1, b"a")),
    "no name": field(1, field(2, field(2, b"Float32") + field(3, b"\0" * 8))),
    "a map parameter": field(1, field(1, b"a") + field(3, b"")),
    "a name that is no text": value(tag=b"\xff\xfe"),
    "a length beyond the file": b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
    "a number without end": b"\x0a" + b"\xff" * 20,
    "dims beyond numbers": value(dims=b"\x08" + b"\xff" * 9 + b"\x01"),
    "too many dims": value(dims=b"\x08\x01" * 9),
    "more bytes than dims": value(dims=b"\x08\x01"),
    "fewer bytes than dims": value(dims=b"\x08\x03"),
    "the same name apart": value() + value(tag=b"b") + value(),
}


@pytest.mark.parametrize("content", CKPTS.values(), ids=CKPTS)
def test_a_false_ckpt_is_refused(content, tmp_path):
    """Whatever is wrong with the frame of a MindSpore file, it is refused."""
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_ckpt(path)
    assert "x.ckpt: " in str(caught.value) and "\n" not in str(caught.value)


def test_a_true_ckpt_is_read(tmp_path):
    """The same message without a lie is read, packed dims and scalars as [0] too."""
    path = tmp_path / "x.ckpt"
    path.write_bytes(
        value()
        + value(tag=b"packed", dims=field(1, b"\x02"))
        + value(tag=b"scalar", dims=b"\x08\x00", content=b"\0" * 4)
    )
    shapes = {name: stored.shape for name, stored in read_ckpt(path).items()}
    assert shapes == {"a": (2,), "packed": (2,), "scalar": ()}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """One small file of each format."""
    folder = tmp_path_factory.mktemp("sound")
    arrays = {f"x.{i}.weight": np.full((2, 3, i), i, np.float32) for i in range(1, 4)}
    plan = {name: ("fp32", array.shape) for name, array in arrays.items()}
    with SafetensorsWriter(folder / "x.safetensors", plan) as writer:
        for name, array in arrays.items():
            writer.add(name, array)
    with CkptWriter(folder / "x.ckpt") as writer:
        for name, array in arrays.items():
            writer.add(name, array, "fp32")
    return {path.suffix: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@FUZZ
@given(data=st.data())
def test_damage_is_refused_or_harmless(suffix, data, sound, tmp_path):
    """Any bytes changed, the file is refused, or read within its own bounds."""
    content = bytearray(sound[suffix])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    try:
        table = read_ckpt(path) if suffix == ".ckpt" else read_safetensors(path)[0]
    except CheckpointError:
        return
    for stored in table.values():
        assert all(0 <= a <= b <= len(content) for a, b in stored.spans)
        if stored.dtype in ("fp32", "fp16", "bf16"):
            assert stored.read().shape == stored.shape


def test_a_span_beyond_the_file_is_refused(tmp_path):
    """A short read is an error even when the table said otherwise."""
    path = tmp_path / "short"
    path.write_bytes(b"\0" * 6)
    stored = Stored(path=path, dtype="fp32", shape=(2,), spans=((0, 8),))
    with pytest.raises(CheckpointError, match="file ends at byte 6"):
        stored.read()
