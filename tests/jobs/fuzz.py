"""Feed damaged files to every reader: a row, a table or one expected error, no more.

    python tests/jobs/fuzz.py --cases 100000 --report docs/reliability.md

A case takes a sound file (manifests of four kinds, a config, checkpoints of three
layouts, the runner's own files), damages it, and reads it whole. Wrong is: any other
error than the reader's own, more than `SECONDS`, more memory than `MEGABYTES` beyond
what the process had, or its death. A case is decided by `--seed` and its number.
"""

import argparse
import contextlib
import csv
import io
import json
import mmap
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from report import put_into

from jobs import parts
from jobs.config import load
from jobs.errors import JobError
from jobs.manifest import open_manifest
from jobs.records import RESULT_COLUMNS
from jobs.seal import NPZ_COMMENT, ZEROS, _place, broken, seal
from jobs.store import Store
from sdxl.ckpt_file import CkptWriter, read_ckpt
from sdxl.config import PRESETS
from sdxl.convert import convert
from sdxl.random_weights import write_random
from sdxl.safetensors_file import SafetensorsWriter, read_safetensors
from sdxl.weights import CheckpointError, open_checkpoint

SECONDS = 10
MEGABYTES = 1024
BATCH = 1_000
START, END = "<!-- fuzz -->", "<!-- /fuzz -->"
NASTY = [
    b"\x00",
    b"\xff\xff\xff\xff",
    b"\xff" * 9 + b"\x7f",
    struct.pack("<q", -1),
    struct.pack("<Q", 2**62),
    b'"',
    b'""',
    b"\r\n",
    b",",
    b"{",
    b"[" * 2_000,
    b'{"a":' * 500,
    b"1e999",
    b"-9223372036854775809",
    b"NaN",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b"&a [*a,*a]",
    b"!!python/object:os.system",
    "\u202e\x1b[31m".encode(),
    b"../../etc/passwd",
]


# Sound files ----------------------------------------------------------------------


def samples():
    """Make one small sound file of each kind: its name -> its bytes."""
    rows = [
        {"id": f"r{i}", "prompt": f"a picture, {i}", "seed": i, "width": 64 * i or None}
        for i in range(6)
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    table = pa.Table.from_pylist(rows)
    found = {
        "m.csv": text.getvalue().encode(),
        "m.tsv": text.getvalue().replace(",", "\t").encode(),
        "m.jsonl": b"".join(json.dumps(row).encode() + b"\n" for row in rows),
        "m.parquet": _parquet(table, compression="snappy"),
        "m.pq": _parquet(table, compression="none", use_dictionary=False),
        "c.yaml": b"sampling:\n  steps: 8\n  sampler: EulerEDMSampler\nruntime:\n"
        b"  batch_size: 2\noutput: {format: png}\n",
    }
    return found | _checkpoints() | _own_files()


def _parquet(table, **options):
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def _checkpoints():
    arrays = {f"x.{i}.weight": np.full((2, 3, i), i, np.float32) for i in range(1, 4)}
    plan = {name: ("fp32", array.shape) for name, array in arrays.items()}
    found = {}
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "x"
        with SafetensorsWriter(path, plan) as writer:
            for key, array in arrays.items():
                writer.add(key, array)
        found["k.safetensors"] = path.read_bytes()
        with CkptWriter(path) as writer:
            for key, array in arrays.items():
                writer.add(key, array, "fp32")
        found["k.ckpt"] = path.read_bytes()
        return found | _folder(Path(name))


def _folder(place):
    """Take the configs of a diffusers folder of the tiny model, and an index."""
    write_random(place / "tiny.safetensors", PRESETS["tiny"], "fp16")
    convert(place / "tiny.safetensors", place / "tiny")
    found = {
        f"folder/{path.relative_to(place / 'tiny')}": path.read_bytes()
        for path in (place / "tiny").glob("*/config.json")
    }
    shards = {"metadata": {}, "weight_map": {"x.1.weight": "a.safetensors"}}
    index = "folder/unet/diffusion_pytorch_model.safetensors.index.json"
    return found | {index: json.dumps(shards).encode()}


def _own_files():
    row = dict.fromkeys(RESULT_COLUMNS) | {
        "image_id": "00ff",
        "status": "ok",
        "attempts": 1,
        "source_row": 0,
        "prompt": "x",
    }
    sink = io.BytesIO()
    three = np.arange(3, dtype=np.uint64)
    np.savez(sink, ids=three, contents=three)
    with zipfile.ZipFile(sink, "a") as archive:
        archive.comment = (NPZ_COMMENT + ZEROS).encode()
    keys = ("run_id", "asked", "fingerprint", "fingerprint_fields", "rows", "tasks")
    job = json.dumps(dict.fromkeys(keys) | {"sha256": ZEROS}).encode()
    return {
        "own/parts/p.parquet": parts.encode([row] * 4, parts.result_schema()),
        "own/rows.npz": seal(sink.getvalue(), ".npz"),
        "own/job.json": seal(job, ".json"),
    }


# Damage and reading ---------------------------------------------------------------


def damage(data, chance):
    """Change a file in one to six places."""
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 6))):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + chance.choice((1, 1, 2, 8, 64)))
        way = chance.randrange(6)
        if way == 0 and data:
            data[min(at, len(data) - 1)] ^= 1 << chance.randrange(8)
        elif way == 1:
            data[at:end] = chance.randbytes(end - at)
        elif way == 2:
            data[at:at] = chance.choice(NASTY)
        elif way == 3:
            del data[at:end]
        elif way == 4:
            data[at:at] = data[at:end] * chance.choice((1, 2, 50))
        else:
            data[at:end] = chance.choice(NASTY)
    if chance.random() < 0.1:
        del data[chance.randrange(len(data) + 1) :]
    return bytes(data)


def seal_anew(path):
    """Have the damage pass the checksum, so that what is behind it is tried too."""
    data = path.read_bytes()
    with contextlib.suppress(ValueError):
        at = _place(data, path.suffix)
        zeroed = data[:at] + ZEROS.encode() + data[at + 64 :]
        path.write_bytes(seal(zeroed, path.suffix))
        assert broken(path) is None


def read(name, path):
    """Read a damaged file as the product would; tell how it ended."""
    try:
        if name.startswith("m."):
            return _read_manifest(path)
        if name == "c.yaml":
            load(path)
        elif name.startswith("k."):
            _read_checkpoint(path)
        elif name.startswith("folder/"):
            _read_folder(path.parents[1])
        elif name == "own/parts/p.parquet":
            Store(path.parents[1]).index()
        elif name == "own/rows.npz":
            Store(path.parent)._known_rows()
        else:
            Store(path.parent).read_job()
    except (JobError, CheckpointError) as error:
        assert str(error) and "\n" not in str(error), repr(str(error))
        return "refused"
    return "read"


def _read_manifest(path):
    manifest = open_manifest(path)
    return "read" if sum(1 for _ in manifest.rows()) else "empty"


def _read_checkpoint(path):
    table = read_ckpt(path) if path.suffix == ".ckpt" else read_safetensors(path)[0]
    for stored in table.values():
        if stored.dtype in ("fp32", "fp16", "bf16"):
            stored.read()
    try:
        open_checkpoint(path).check()
    except CheckpointError as error:
        assert "\n" not in str(error)  # three tensors are no model: it says so


def _read_folder(folder):
    """Read the configs; the weights are not there, and that is said last."""
    try:
        open_checkpoint(folder).check()
    except CheckpointError as error:
        if "safetensors" not in str(error) or "index" in str(error):
            raise


def settle(folder, name, kinds):
    """Lay out what a kind of file needs around it."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.startswith("folder/"):
        for other, data in kinds.items():
            if other.startswith("folder/") and "index" not in other:
                (folder / other).parent.mkdir(parents=True, exist_ok=True)
                (folder / other).write_bytes(data)
    return path


# The loop -------------------------------------------------------------------------


def case(number, seed, kinds, folder):
    chance = random.Random(f"{seed}-{number}")
    name = sorted(kinds)[number % len(kinds)]
    path = settle(folder, name, kinds)
    path.write_bytes(damage(kinds[name], chance))
    if name.startswith("own/") and chance.random() < 0.5:
        seal_anew(path)
    try:
        return name, read(name, path)
    finally:
        path.unlink()


def batch(first, count, seed, kinds, folder, place):
    """Run some cases in a forked process, which a reader may take down with it."""
    receiver, sender = os.pipe()
    pid = os.fork()
    if pid:
        os.close(sender)
        with os.fdopen(receiver) as file:
            text = file.read()
        _, status = os.waitpid(pid, 0)
        return json.loads(text) if text else None, os.waitstatus_to_exitcode(status)
    code = 1
    try:
        os.close(receiver)
        base = _rss()
        signal.signal(signal.SIGALRM, _too_long)
        found, bad = Counter(), []
        for number in range(first, first + count):
            place[:8] = struct.pack("<q", number)
            signal.alarm(SECONDS)
            try:
                name, ended = case(number, seed, kinds, folder)
                found[f"{name} {ended}"] += 1
            except BaseException:
                bad.append((number, traceback.format_exc(limit=-3)))
            signal.alarm(0)
        grown = _rss() - base
        if grown > MEGABYTES:
            bad.append((first, f"{grown} MB more than at the start"))
        with os.fdopen(sender, "w") as file:
            json.dump({"found": found, "bad": bad, "grown": grown}, file)
        code = 0
    finally:
        os._exit(code)


def _rss():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _too_long(number, frame):
    raise TimeoutError(f"over {SECONDS} s")


def run(cases, seed):
    kinds = samples()
    place = mmap.mmap(-1, 8)
    found, bad, grown = Counter(), [], 0
    with tempfile.TemporaryDirectory() as name:
        for first in range(0, cases, BATCH):
            count = min(BATCH, cases - first)
            result, code = batch(first, count, seed, kinds, Path(name), place)
            if result is None:
                (number,) = struct.unpack("<q", place[:8])
                bad.append((number, f"the process ended with {code}"))
                continue
            found.update(result["found"])
            bad += result["bad"]
            grown = max(grown, result["grown"])
    return found, bad, grown


def summary(cases, seed, seconds, found, bad, grown):
    lines = [
        f"{cases:,} cases (seed {seed}, {seconds:.0f} s): {len(bad)} wrong; at most "
        f"{grown} MB more memory than at the start (bound: {MEGABYTES} MB).",
        "",
        "| file | refused in one line | read (rows that can't be used are `invalid`) |",
        "|---|---|---|",
    ]
    for name in sorted({key.split()[0] for key in found}):
        whole = found[f"{name} read"] + found[f"{name} empty"]
        lines.append(f"| `{name}` | {found[f'{name} refused']:,} | {whole:,} |")
    lines += [f"\ncase {number}:\n{text}" for number, text in bad[:20]]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path, help="document to put the report into")
    asked = parser.parse_args()
    started = time.monotonic()
    found, bad, grown = run(asked.cases, asked.seed)
    seconds = time.monotonic() - started
    text = summary(asked.cases, asked.seed, seconds, found, bad, grown)
    print(text)
    if asked.report:
        put_into(asked.report, text, START, END)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
