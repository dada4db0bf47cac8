"""Whole jobs, fake pipeline: what is made, what fails alone, what is refused."""

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jobs_shared import numbered, pixels_of, rows_of, run_job, write_csv

from jobs import images
from jobs.errors import ExitCode, ManifestError, ModelError, WorkerError
from jobs.records import RESULT_COLUMNS
from jobs.status import describe, read_status


def by_id(folder, *columns):
    return {row["prompt_id"]: row for row in rows_of(folder, *columns)}


def test_any_number_of_workers_gives_the_same_pixels_and_one_compilation_each(
    run_rows, tmp_path
):
    rows = [
        (f"r{i}", f"p{i}", 3 if i == 4 else None, 128 if i % 5 == 0 else None)
        for i in range(22)
    ]
    columns = ("id", "prompt", "num_images", "width")
    for workers in (1, 3):
        summary = run_rows(
            rows,
            "runtime.batch_size=4",
            columns=columns,
            workers=workers,
            name=f"w{workers}",
        )
        assert summary.counts == {"ok": 24, "failed": 0, "invalid": 0}
        assert (summary.made, summary.exit_code) == (24, ExitCode.OK)
        for worker in read_status(tmp_path / f"w{workers}")["workers"]:
            assert set(worker["compiles"].values()) <= {1}
    assert pixels_of(tmp_path / "w1") == pixels_of(tmp_path / "w3")
    assert len(pixels_of(tmp_path / "w1")) == 24


def test_a_result_row_tells_all_that_the_contract_names(run_rows, tmp_path):
    rows = [("a", "one two", "ugly", 5, "x"), ("b", "three", None, None, None)]
    columns = ("id", "prompt", "negative_prompt", "seed", "note")
    run_rows(rows, "runtime.batch_size=4", "output.format=webp", columns=columns)
    out = tmp_path / "out"
    first, second = rows_of(out)
    assert [*first] == [*RESULT_COLUMNS, "note"]
    data = (out / first["image_path"]).read_bytes()
    # Oracle: the file itself, read by Pillow.
    encoded = images.decode(data)
    assert first["image_bytes"] == len(data)
    assert first["pixel_sha256"] == images.pixel_sha256(encoded)
    assert images.read_settings(data)["prompt"] == "one two"
    assert images.read_settings(data)["image_id"] == first["image_id"]
    assert encoded.shape == (64, 64, 3)
    expected = {
        "prompt_id": "a",
        "image_index": 0,
        "source_row": 0,
        "prompt": "one two",
        "negative_prompt": "ugly",
        "prompt_tokens": 4,
        "prompt_truncated": False,
        "seed": 5,
        "seed_source": "manifest",
        "sampler": "EulerEDMSampler",
        "steps": 2,
        "guidance_scale": 5.0,
        "sigma_min": None,
        "width": 64,
        "target_height": 64,
        "status": "ok",
        "error_class": None,
        "attempts": 1,
        "image_format": "webp",
        "qc_flags": [],
        "batch_size": 4,
        "batch_slot": 0,
        "batch_valid": 2,
        "includes_compile": True,
        "precision": "fp32",
        "device_target": "CPU",
        "device_id": 0,
        "note": "x",
    }
    assert {name: first[name] for name in expected} == expected
    assert first["started_at"] <= first["finished_at"]
    assert (second["batch_slot"], second["seed_source"]) == (1, "derived")
    for name in ("text_encode_ms", "denoise_ms", "decode_ms", "write_ms", "compile_ms"):
        assert first[name] >= 0
    job_file = json.loads((out / "job.json").read_text())
    assert first["run_id"] == job_file["run_id"]
    assert first["job_fingerprint"] == job_file["fingerprint"]
    assert first["model_sha256"] == job_file["model"]["sha256"]


def test_results_are_in_the_manifests_order_with_its_metadata(run_rows, tmp_path):
    rows = [(f"r{i}", f"p{i}", 2, 64 + 64 * (i % 2)) for i in range(9)]
    columns = ("id", "prompt", "num_images", "width")
    run_rows(rows, "output.commit_every=1", columns=columns, workers=2)
    places = [
        (row["source_row"], row["image_index"]) for row in rows_of(tmp_path / "out")
    ]
    assert places == [(i, n) for i in range(9) for n in (0, 1)]
    metadata = pq.read_schema(tmp_path / "out" / "results.parquet").metadata
    assert metadata[b"sdxl_jobs.schema_version"] == b"1"
    stored = json.loads(metadata[b"sdxl_jobs.job"])
    assert stored["asked"]["config"]["sampling"]["steps"] == 2
    assert len(metadata[b"sdxl_jobs.manifest_sha256"]) == 64
    assert not list((tmp_path / "out" / "parts").iterdir())
    assert not list((tmp_path / "out").rglob(".tmp-*"))
    assert not (tmp_path / "out" / "lock").exists()


def test_a_task_that_fails_fails_alone(run_rows, tmp_path):
    rows = [
        ("a", "fine"),
        ("b", "raise=boom"),
        ("c", "make-nan"),
        ("d", "make-black"),
        ("e", "fine too"),
        ("f", "raise=out-of-memory"),
        ("g", None),
    ]
    summary = run_rows(rows, "runtime.batch_size=4", workers=1)
    assert summary.counts == {"ok": 2, "failed": 4, "invalid": 1}
    assert summary.exit_code == ExitCode.PARTIAL
    found = by_id(tmp_path / "out")
    classes = {row["error_class"] for row in found.values()}
    assert classes == {None, "bug", "nan", "invalid_row"}
    assert found["b"]["error_message"] == "RuntimeError: boom"
    assert found["c"]["error_message"] == "the model's output is not a number"
    assert found["d"]["error_message"] == "the model's output is black"
    for name in "bcdf":
        assert found[name]["status"] == "failed"
        assert found[name]["image_path"] is None
    (invalid,) = [row for row in found.values() if row["status"] == "invalid"]
    assert invalid["error_message"].startswith("m.csv line 8: prompt: missing")
    assert invalid["image_path"] is None
    files = [p for p in (tmp_path / "out" / "images").rglob("*") if p.is_file()]
    assert len(files) == 2
    # Made with their batch or alone after a split, the neighbours are the same.
    run_rows([rows[0], rows[4]], name="clean")
    clean = by_id(tmp_path / "clean")
    for name in "ae":
        assert found[name]["pixel_sha256"] == clean[name]["pixel_sha256"]


def test_a_task_that_kills_its_worker_is_found_and_its_neighbours_are_made(
    run_rows, tmp_path
):
    rows = [*numbered(3), ("bad", "kill-worker"), *[(f"s{i}", "x") for i in range(4)]]
    summary = run_rows(rows, "runtime.batch_size=4", workers=1)
    assert summary.counts == {"ok": 7, "failed": 1, "invalid": 0}
    assert summary.made == 7
    found = by_id(tmp_path / "out")["bad"]
    assert found["error_class"] == "worker_lost"
    assert "killed by signal 9" in found["error_message"]
    assert found["attempts"] >= 3
    assert found["run_id"]


def test_a_worker_that_dies_once_costs_no_task(run_rows, tmp_path):
    marker = tmp_path / "died"
    rows = [*numbered(6), ("k", f"kill-once={marker}"), ("z", "last")]
    summary = run_rows(rows, "output.commit_every=1", workers=2)
    assert marker.exists()
    assert summary.counts == {"ok": 8, "failed": 0, "invalid": 0}
    assert summary.made == 8


def test_workers_that_can_not_start_end_the_run_with_their_reason(tmp_path, checkpoint):
    renamed = tmp_path / "refuse-to-load.safetensors"
    renamed.symlink_to(checkpoint)
    manifest = write_csv(tmp_path / "m.csv", numbered(3))
    with pytest.raises(WorkerError, match="this device can't start"):
        run_job(manifest, tmp_path / "out", renamed, workers=2)
    assert not (tmp_path / "out" / "lock").exists()
    # Nothing was spoilt: with a device that works the same folder goes on.
    assert run_job(manifest, tmp_path / "out", checkpoint).made == 3


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        ("text\nx\n", ManifestError, "no column `prompt`"),
        ("", ManifestError, "empty file"),
        ("prompt,status\na,b\n", ManifestError, "result column"),
    ],
)
def test_a_manifest_that_is_none_leaves_no_folder(
    tmp_path, checkpoint, content, error, said
):
    (tmp_path / "m.csv").write_text(content)
    with pytest.raises(error, match=said):
        run_job(tmp_path / "m.csv", tmp_path / "out", checkpoint)
    assert not (tmp_path / "out").exists()


def test_a_missing_checkpoint_leaves_no_folder(tmp_path):
    manifest = write_csv(tmp_path / "m.csv", numbered(1))
    with pytest.raises(ModelError, match=r"nothing\.safetensors"):
        run_job(manifest, tmp_path / "out", tmp_path / "nothing.safetensors")
    assert not (tmp_path / "out").exists()


def test_a_manifest_of_invalid_rows_alone_gives_their_rows(run_rows, tmp_path):
    summary = run_rows([("a", None), ("a", None), ("../x", "p")])
    assert summary.counts == {"ok": 0, "failed": 0, "invalid": 3}
    assert [row["status"] for row in rows_of(tmp_path / "out")] == ["invalid"] * 3


def test_a_manifest_without_rows_gives_an_empty_table(run_rows, tmp_path):
    assert run_rows([]).exit_code == ExitCode.OK
    assert rows_of(tmp_path / "out") == []


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_every_image_format_is_named_by_its_rows(run_rows, tmp_path, kind):
    run_rows(numbered(1), f"output.format={kind}")
    (row,) = rows_of(tmp_path / "out")
    assert row["image_format"] == kind
    data = (tmp_path / "out" / row["image_path"]).read_bytes()
    assert images.pixel_sha256(images.decode(data)) == row["pixel_sha256"]


def test_columns_of_parquet_pass_through_with_their_types(tmp_path, checkpoint):
    # Oracle: the columns of the manifest, by arrow's own comparison.
    from datetime import datetime
    from decimal import Decimal

    columns = {
        "d": pa.array([Decimal("1.20"), None]),
        "t": pa.array([1_234_567_890_123_456_789, None], pa.timestamp("ns", "UTC")),
        "n": pa.array([{"a": [1, 2], "b": {"c": "x"}}, None]),
        "m": pa.array([[("k", 1.5)], None], pa.map_(pa.string(), pa.float64())),
        "u": pa.array([2**64 - 1, None], pa.uint64()),
        "b": pa.array([b"\xff\0", None]),
        "when": pa.array([datetime(2020, 1, 2), None]),
        "h": pa.array([0.5, None], pa.float16()),
        "list": pa.array([["x", None], []]),
    }
    table = pa.table({"id": ["a", "b"], "prompt": ["p", "q"], **columns}).append_column(
        "cat", pa.array(["x", None]).dictionary_encode()
    )
    pq.write_table(table, tmp_path / "m.parquet")
    run_job(tmp_path / "m.parquet", tmp_path / "out", checkpoint)
    found = pq.read_table(tmp_path / "out" / "results.parquet")
    expected = pq.read_table(tmp_path / "m.parquet")
    for name in columns:
        assert found.schema.field(name).type == expected.schema.field(name).type
        assert found[name].combine_chunks() == expected[name].combine_chunks(), name
    assert found["cat"].to_pylist() == ["x", None]


def test_status_counts_what_the_rows_say(run_rows, tmp_path):
    rows = [*numbered(3), ("bad", "raise=x"), ("none", None)]
    run_rows(rows, workers=2)
    report = read_status(tmp_path / "out")
    # Oracle: results.parquet, counted here.
    counted = Counter(row["status"] for row in rows_of(tmp_path / "out"))
    assert report["counts"] == {**counted, "pending": 0}
    assert (report["state"], report["tasks"], report["rows"]) == ("finished", 4, 5)
    assert sum(worker["made"] for worker in report["workers"]) == 3
    assert "3 ok, 1 failed, 1 invalid, 0 pending" in describe(report)
