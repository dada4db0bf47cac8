"""One worker, driven in this process: batches split, rows kept, parts told of."""

import ast
import errno
import inspect
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_pipeline import FakePipeline

from jobs import plan, worker
from jobs.config import load
from jobs.records import Request
from jobs.resolved import resolve
from jobs.store import Store
from jobs.worker import Worker, WorkerSpec, classify, message_of

SETTINGS = ("runtime.workers=1", "sampling.width=64", "sampling.height=64")


class Told:
    """An outbox that remembers, and which part files were there when it was told."""

    def __init__(self, root):
        self.root = root
        self.messages = []

    def send(self, kind, **content):
        if kind == "part":
            assert (self.root / "parts" / f"{content['name']}.parquet").exists()
        self.messages.append((kind, content))

    def of(self, kind):
        return [content for name, content in self.messages if name == kind]


class Counting(FakePipeline):
    """Note the size of each call; raise for the first `stumbles` of them."""

    def __init__(self, stumbles=0, error=None):
        super().__init__(checkpoint="")
        self.calls = []
        self.stumbles = stumbles
        self.error = error or RuntimeError("Device error, try again")

    def encode(self, pictures, batch_size):
        self.calls.append(len(pictures))
        if len(self.calls) <= self.stumbles:
            raise self.error
        return super().encode(pictures, batch_size)


@pytest.fixture
def bench(tmp_path):
    """Give a function that runs prompts on a worker: bench(prompts) -> rows by id."""
    store = Store(tmp_path)
    store.prepare()

    def run(prompts, *settings, pipeline=None, batch_size=4, shard_batches=10, **more):
        resolved = resolve(load(None, [*SETTINGS, *settings]), native_size=64)
        spec = WorkerSpec(
            name="w0",
            root=tmp_path,
            device_target="CPU",
            device_id=0,
            threads=1,
            pipeline="",
            pipeline_options={},
            batch_size=batch_size,
            writer_threads=2,
            max_attempts=3,
            output=resolved.output,
            extras=pa.schema([]),
            provenance={"run_id": "run"},
        )
        tasks = [
            plan.task_of(
                Request(
                    source_row=i, location="", prompt_id=str(i), content=i, prompt=p
                ),
                resolved,
                0,
            )
            for i, p in enumerate(prompts)
        ]
        run.pipeline = pipeline or Counting()
        run.told = Told(tmp_path)
        one = Worker(spec, run.pipeline, run.told, {"mindspore_version": None})
        for shard in plan.shards(plan.batches(tasks, batch_size), shard_batches):
            one._inbox.put(shard)
        one._inbox.put(None)
        run.worker = one
        one.run(**more)
        rows = [
            row for path in store.sources() for row in pq.read_table(path).to_pylist()
        ]
        return {int(row["prompt_id"]): row for row in rows}

    run.root = tmp_path
    return run


def test_a_call_that_fails_is_split_until_one_task_stands_alone(bench):
    rows = bench(["a", "b", "raise=boom", "d", "e", "f", "g", "h"], batch_size=8)
    assert [rows[i]["status"] for i in range(8)].count("ok") == 7
    assert rows[2]["status"] == "failed"
    assert rows[2]["error_message"] == "RuntimeError: boom"
    # 8 -> 4+4 -> 2+2 -> 1+1: the call, and one more for each half.
    assert bench.pipeline.calls == [8, 4, 2, 2, 1, 1, 4]
    assert [rows[i]["attempts"] for i in range(8)] == [3, 3, 4, 4, 2, 2, 2, 2]
    assert [rows[i]["batch_valid"] for i in range(8) if i != 2] == [2, 2, 1, 4, 4, 4, 4]
    assert (bench.told.of("batch")[0]["made"], bench.told.of("batch")[0]["failed"]) == (
        7,
        1,
    )


class Alternating(Counting):
    """A pipeline of which one stage fits at a time; note each change."""

    whole_leases = True

    def __init__(self):
        super().__init__()
        self.stages = []

    def _enter(self, stage):
        if self.stages[-1:] != [stage]:
            self.stages.append(stage)

    def encode(self, pictures, batch_size):
        self._enter("base")
        return super().encode(pictures, batch_size)

    def sample(self, cond, pictures, batch_size):
        return self.sample_all([(cond, pictures, None)], batch_size)[0]

    def sample_all(self, parts, batch_size):
        self._enter("base")
        made = [FakePipeline.sample(self, *part[:2], batch_size) for part in parts]
        self._enter("refiner")
        return made

    def decode(self, latents, batch_size):
        self._enter("refiner")
        return super().decode(latents, batch_size)


def test_where_one_model_fits_at_a_time_they_change_once_a_lease(bench):
    usual = bench(list("abcdef"), batch_size=2)
    rows = bench(list("abcdef"), batch_size=2, pipeline=Alternating())
    assert bench.pipeline.stages == ["base", "refiner"]
    for i, row in rows.items():
        assert (row["status"], row["attempts"]) == ("ok", 1)
        assert row["pixel_sha256"] == usual[i]["pixel_sha256"]
        assert (row["batch_valid"], row["batch_slot"]) == (2, i % 2)


def test_a_lease_that_fails_as_a_whole_is_made_batch_by_batch(bench):
    prompts = ["a", "b", "raise=boom", "d"]
    rows = bench(prompts, batch_size=2, pipeline=Alternating())
    assert [rows[i]["status"] for i in range(4)] == ["ok", "ok", "failed", "ok"]
    assert [rows[i]["attempts"] for i in range(4)] == [1, 1, 3, 2]
    assert bench.told.of("batch")[0]["made"] == 2


def test_a_failure_that_passes_costs_an_attempt_and_no_picture(bench):
    rows = bench(["a"], pipeline=Counting(stumbles=2))
    assert (rows[0]["status"], rows[0]["attempts"]) == ("ok", 3)


def test_a_task_is_tried_as_often_as_asked_and_no_more(bench):
    rows = bench(["a"], pipeline=Counting(stumbles=99))
    assert bench.pipeline.calls == [1, 1, 1]
    assert (rows[0]["status"], rows[0]["attempts"]) == ("failed", 3)
    assert rows[0]["error_class"] == "device"


@pytest.mark.parametrize("word", ["make-nan", "make-black"])
def test_output_that_is_no_picture_is_a_failure_without_a_file(bench, word):
    rows = bench(["a", word])
    assert (rows[1]["status"], rows[1]["error_class"]) == ("failed", "nan")
    assert rows[1]["image_path"] is None
    assert len(list((bench.root / "images").rglob("*.png"))) == 1


def test_a_constant_picture_is_made_and_flagged(bench):
    class Grey(Counting):
        def decode(self, latents, batch_size):
            return np.full((len(latents), 64, 64, 3), 128, np.uint8)

    rows = bench(["a"], pipeline=Grey())
    assert (rows[0]["status"], rows[0]["qc_flags"]) == ("ok", ["constant"])
    assert (rows[0]["pixel_mean"], rows[0]["pixel_std"]) == (128.0, 0.0)


def test_pictures_do_not_depend_on_the_batch(bench):
    alone = bench(["a", "b", "c"], batch_size=1)
    together = bench(["a", "b", "c"], batch_size=4)
    for i in range(3):
        assert alone[i]["pixel_sha256"] == together[i]["pixel_sha256"]


def test_rows_are_told_of_once_they_are_published_and_as_often_as_asked(bench):
    bench(list("abcdefghij"), "output.commit_every=4", batch_size=2)
    told = bench.told.of("part")
    assert [len(part["done"]) for part in told] == [4, 4, 2]
    assert [part["name"] for part in told] == [f"w0-{i:06d}" for i in (1, 2, 3)]
    assert [kind for kind, _ in bench.told.messages][-2:] == ["lease_done", "bye"]


def test_parts_do_not_wait_for_a_long_lease(bench, monkeypatch):
    monkeypatch.setattr(worker, "COMMIT_SECONDS", 0.0)
    bench(list("abc"), batch_size=1)
    assert [len(part["done"]) for part in bench.told.of("part")] == [1, 1, 1]


def test_a_stop_ends_the_lease_after_the_batch_in_flight(bench):
    class Stopping(Counting):
        def decode(self, latents, batch_size):
            bench.worker._stop.set()
            return super().decode(latents, batch_size)

    pipeline = Stopping()
    rows = bench(list("abcdef"), batch_size=2, pipeline=pipeline)
    assert sorted(rows) == [0, 1]
    assert pipeline.calls == [2]
    assert bench.told.messages[-1][0] == "bye"


def test_a_disk_that_is_full_stops_the_worker_and_tells_of_no_row(bench, monkeypatch):
    def full(path, data, kind="file"):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(worker, "publish", full)
    with pytest.raises(OSError, match="No space left"):
        bench(["a", "b"])
    assert bench.told.of("part") == []
    assert list((bench.root / "parts").iterdir()) == []


def test_only_the_call_that_compiles_says_so(bench):
    rows = bench(list("abcd"), batch_size=2)
    assert [rows[i]["includes_compile"] for i in range(4)] == [True, True, False, False]
    assert [rows[i]["compile_ms"] for i in range(4)] == [0.5, 0.5, 0.0, 0.0]
    state = bench.told.of("batch")[-1]["state"]
    assert state["compiles"] == {"fake-b2-8x8": 1}
    assert 1 < rows[0]["peak_memory_mb"] <= rows[3]["peak_memory_mb"]
    assert rows[3]["peak_memory_mb"] <= state["peak_memory_mb"] + 1
    assert rows[3]["peak_device_memory_mb"] is None


def test_a_prompt_that_the_window_cuts_is_said_to_be(bench):
    rows = bench(["word " * 75, "word " * 76])
    assert [rows[i]["prompt_tokens"] for i in (0, 1)] == [77, 78]
    assert [rows[i]["prompt_truncated"] for i in (0, 1)] == [False, True]


NASTY = ["\0", "\ud7ff", "\u202e", "<|endoftext|>" * 9, "&amp;" * 99, "e\u0301" * 500]


@pytest.mark.parametrize("prompt", [*NASTY, "", " ", "x" * 100_000], ids=ascii)
def test_any_prompt_is_written_down(bench, prompt):
    rows = bench([prompt])
    assert (rows[0]["status"], rows[0]["prompt"]) == ("ok", prompt)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "oom"),
        (RuntimeError("Ascend: Out of Memory on device"), "oom"),
        (RuntimeError("OOM while allocating"), "oom"),
        (OSError(errno.EIO, "Input/output error"), "io"),
        (FileNotFoundError("init_image x.png"), "io"),
        (RuntimeError("Ascend kernel launch failed"), "device"),
        (RuntimeError("ACL error 507011"), "device"),
        (ValueError("shapes differ"), "bug"),
        (RuntimeError("boom in the bedroom"), "bug"),
        (ValueError("oracle"), "bug"),
    ],
)
def test_failures_have_the_contracts_classes(error, kind):
    assert classify(error) == kind


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("\n\n---- first\nsecond"), "RuntimeError: first"),
        (RuntimeError(), "RuntimeError: "),
        (ValueError("x" * 5_000), "ValueError: " + "x" * 988),
    ],
)
def test_a_message_is_one_line_of_bounded_length(error, message):
    assert message_of(error) == message


def test_the_fake_pipeline_keeps_the_contract_of_the_real_one():
    # Oracle: the source of `sdxl.pipeline`, read without importing MindSpore.
    source = Path(__file__).parents[2] / "sdxl" / "pipeline.py"
    (real,) = (
        node
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == "Pipeline"
    )
    methods = {n.name: n for n in real.body if isinstance(n, ast.FunctionDef)}
    for name in ("encode", "sample", "decode"):
        arguments = methods[name].args
        required = len(arguments.args) - len(arguments.defaults)
        expected = [argument.arg for argument in arguments.args[:required]]
        fake = inspect.signature(getattr(FakePipeline, name))
        assert list(fake.parameters) == expected
