"""A sealed file is itself or is broken: no byte of it can change unseen."""

import io
import json
import zipfile

import numpy as np
import pytest

from jobs import parts, seal
from jobs.records import RESULT_COLUMNS
from jobs.store import Store


def sealed(folder, suffix):
    if suffix == ".json":
        Store(folder).write_json(folder / "x.json", {"a": "é", "n": 1}, "job")
    elif suffix == ".npz":
        Store(folder).remember_rows(*(np.arange(4, dtype=np.uint64),) * 2)
        (folder / "rows.npz").rename(folder / "x.npz")
    else:
        row = dict.fromkeys(RESULT_COLUMNS) | {"image_id": "0a", "status": "ok"}
        (folder / "x.parquet").write_bytes(parts.encode([row], parts.result_schema()))
    return folder / f"x{suffix}"


@pytest.mark.parametrize("suffix", [".json", ".npz"])
def test_every_single_bit_counts(tmp_path, suffix):
    path = sealed(tmp_path, suffix)
    whole = path.read_bytes()
    assert seal.broken(path) is None
    for at in range(len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 1 << (at % 8)
        path.write_bytes(changed)
        assert seal.broken(path), at


def test_every_byte_of_a_part_counts(tmp_path):
    path = sealed(tmp_path, ".parquet")
    whole = path.read_bytes()
    assert seal.broken(path) is None
    for at in range(0, len(whole), 23):
        changed = bytearray(whole)
        changed[at] ^= 1 << (at % 8)
        path.write_bytes(changed)
        assert seal.broken(path), at


@pytest.mark.parametrize("suffix", [".json", ".npz", ".parquet"])
def test_every_cut_counts(tmp_path, suffix):
    path = sealed(tmp_path, suffix)
    whole = path.read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 200)):
        path.write_bytes(whole[:length])
        assert seal.broken(path), length
    path.write_bytes(whole + b"x")
    assert seal.broken(path)


def test_sealed_files_are_plain_files_of_their_kind(tmp_path):
    text = sealed(tmp_path, ".json").read_text(encoding="utf-8")
    assert json.loads(text)["a"] == "é"
    data = sealed(tmp_path, ".npz").read_bytes()
    assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None
    assert len(parts.read(sealed(tmp_path, ".parquet"))) == 1


def test_words_of_a_user_can_not_pose_as_the_seal(tmp_path):
    row = dict.fromkeys(RESULT_COLUMNS) | {"image_id": "0a", "status": "ok"}
    for prompt in (seal.PARQUET_KEY + "\x18\x40" + "0" * 64, "zz" * 100):
        rows = [row | {"prompt": prompt, "negative_prompt": prompt}] * 3
        path = tmp_path / "x.parquet"
        path.write_bytes(parts.encode(rows, parts.result_schema()))
        assert seal.broken(path) is None
    Store(tmp_path).write_json(tmp_path / "x.json", {"a": '"sha256": "' * 9}, "job")
    assert seal.broken(tmp_path / "x.json") is None
