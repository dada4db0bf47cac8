"""verify names what is damaged; --repair and resume bring the uninterrupted result."""

import hashlib
import os
import random
import shutil
from collections import Counter

import inline_pool
import pyarrow.parquet as pq
import pytest
from jobs_shared import FAKE, order, pixels_of, rows_of, write_csv

from jobs import cli, parts, seal, store
from jobs.errors import LockedError, OutputError
from jobs.findings import as_dict, describe
from jobs.lock import FolderLock
from jobs.order import Order
from jobs.repair import repair
from jobs.run import run
from jobs.store import Store
from jobs.verify import verify

CASES = 200
KINDS = ("image", "part", "results", "job", "copy", "rows", "status")


@pytest.fixture(autouse=True)
def inline(monkeypatch):
    inline_pool.install(monkeypatch)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # nothing here cuts the power


@pytest.fixture(scope="module")
def made(tmp_path_factory, checkpoint):
    """A job of 14 rows, of which the last 6 still lie in parts beside the results."""
    with pytest.MonkeyPatch.context() as patch:
        inline_pool.install(patch)
        folder = tmp_path_factory.mktemp("verify")
        rows = [(f"r{i}", f"a picture {i}") for i in range(14)]
        rows[4] = ("r4", "make-nan")
        manifest = write_csv(folder / "m.csv", rows[:8])
        settings = ("runtime.batch_size=2", "output.commit_every=2")
        asked = order(manifest, folder / "job", checkpoint, *settings)
        run(asked, pipeline=FAKE)
        patch.setattr(store.Store, "compact", lambda *_: folder)  # as if killed before
        write_csv(folder / "m.csv", rows)
        run(asked, pipeline=FAKE)
        return folder


@pytest.fixture
def job(made, tmp_path):
    """A copy of that job, to be damaged."""
    shutil.copytree(made / "job", tmp_path / "job")
    return tmp_path / "job"


def files_of(folder):
    """Sort the files that a job consists of by kind."""
    return {
        "image": sorted(folder.glob("images/*/*.png")),
        "part": sorted(folder.glob("parts/*.parquet")),
        "results": [folder / "results.parquet"],
        "job": [folder / "job.json"],
        "copy": sorted(folder.glob("logs/job-*.json")),
        "rows": [folder / "rows.npz"],
        "status": [folder / "status.json"],
    }


def damage(path, chance):
    """Cut a file short or flip one of its bits; say which."""
    data = bytearray(path.read_bytes())
    if chance.random() < 0.4:
        length = chance.choice([0, len(data) - 1, chance.randrange(len(data))])
        path.write_bytes(data[:length])
        return f"{path.name} cut to {length} of {len(data)}"
    at = chance.randrange(len(data))
    data[at] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    return f"{path.name} flipped at {at} of {len(data)}"


def resume(folder):
    return run(Order.stored(Store(folder)), pipeline=FAKE)


def outcome(folder):
    """What a finished job must be, whatever happened to it on the way."""
    rows = rows_of(folder, "image_id", "status", "error_class", "pixel_sha256")
    images = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.glob("images/*/*.png")
    }
    return rows, images


@pytest.fixture(scope="module")
def expected(made, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        inline_pool.install(patch)
        folder = tmp_path_factory.mktemp("expected") / "job"
        shutil.copytree(made / "job", folder)
        resume(folder)
        return outcome(folder)


def test_a_sound_job_is_sound_and_its_books_balance(job):
    report = verify(job)
    assert report.findings == [] and report.strays == []
    assert report.counts == Counter(ok=13, failed=1)
    assert report.tasks == 14 and report.images == 13
    assert describe(report).endswith("sound")


@pytest.mark.parametrize("part", range(4))
def test_every_damage_is_named_and_mended(made, expected, tmp_path, part):
    # 200 cases in all: each kind of file, cut or with a bit flipped, at random.
    for case in range(part, CASES, 4):
        chance = random.Random(case)
        kind = KINDS[case % len(KINDS)]
        folder = tmp_path / f"job-{case}"
        shutil.copytree(made / "job", folder)
        path = chance.choice(files_of(folder)[kind])
        what = damage(path, chance)
        relative = path.relative_to(folder).as_posix()
        named = {finding.path for finding in verify(folder).findings}
        assert named == {relative}, (case, what, named)
        report = repair(folder)
        assert {f.path for f in report.findings} == {relative}, (what, report.findings)
        assert (folder / "damaged").is_dir(), (case, what)
        assert verify(folder).sound, (case, what)
        resume(folder)
        assert outcome(folder) == expected, (case, what)
        shutil.rmtree(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_gone_is_named_or_its_rows_are_made_again(job, expected, kind):
    path = files_of(job)[kind][0]
    path.unlink()
    report = verify(job)
    names = {finding.path for finding in report.findings}
    if kind in ("status", "copy", "rows"):  # the next run writes them anew
        assert names == set()
    elif kind in ("part", "results"):
        assert names == {"results.parquet"} and report.counts["pending"] > 0
    else:
        assert names == {path.relative_to(job).as_posix()}
    repair(job)
    resume(job)
    assert outcome(job) == expected


def test_damage_to_many_files_at_once_is_mended(job, expected):
    files = files_of(job)
    hit = [files[kind][0] for kind in ("job", "rows", "part")] + files["image"][5:9]
    chance = random.Random(5)
    for path in hit:
        damage(path, chance)
    named = {finding.path for finding in verify(job).findings}
    assert {f"{p.relative_to(job)}" for p in hit[:3]} <= named
    repair(job)
    assert verify(job).sound
    resume(job)
    assert outcome(job) == expected


def test_row_groups_that_are_whole_are_salvaged(job, monkeypatch):
    monkeypatch.setattr(parts, "GROUP_ROWS", 4)
    resume(job)
    path = job / "results.parquet"
    column = pq.read_metadata(path).row_group(2).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[start + column.total_compressed_size - 1] ^= 1
    path.write_bytes(data)
    report = repair(job)
    assert any("salvaged 10 rows" in line for line in report.repaired), report.repaired
    assert report.counts["pending"] == 4


def rewrite(path, change):
    """Change the rows of a file and seal it again, as someone who knows how could."""
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    path.write_bytes(parts.encode(rows, table.schema.remove_metadata()))
    assert seal.broken(path) is None


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("prompt", "another prompt"),
        ("seed", 7),
        ("steps", 3),
        ("guidance_scale", 5.5),
        ("width", 128),
        ("image_path", "../../etc/passwd"),
        ("image_path", "images/00/0000000000000000.png"),
        ("image_sha256", "0" * 64),
        ("pixel_sha256", "0" * 64),
        ("image_bytes", 1),
        ("image_id", "00000000000000ff"),
    ],
)
def test_a_row_that_was_changed_and_sealed_again_is_named(job, expected, column, value):
    def change(rows):
        rows[0][column] = value

    path = job / "results.parquet"
    first = rows_of(job)[0]["image_id"]
    rewrite(path, change)
    named = verify(job).findings
    assert {f.image_id for f in named} == {value if column == "image_id" else first}
    repair(job)
    assert verify(job).sound
    resume(job)
    assert outcome(job) == expected


def test_a_row_that_stands_twice_is_named(job, expected):
    rewrite(job / "results.parquet", lambda rows: rows.append(rows[0]))
    (finding,) = verify(job).findings
    assert "twice" in finding.what
    repair(job)
    resume(job)
    assert outcome(job) == expected


def test_an_image_made_twice_is_named(job):
    later = rows_of(job)[0]
    part = sorted((job / "parts").glob("*.parquet"))[0]
    later["finished_at"] = later["finished_at"].replace(year=2001)
    rewrite(part, lambda rows: rows.append(later))
    findings = verify(job).findings
    assert {f.image_id for f in findings} == {later["image_id"]}
    assert any("made twice" in f.what for f in findings)


def test_rows_lost_of_a_finished_job_are_named(job):
    resume(job)
    rewrite(job / "results.parquet", lambda rows: rows.pop())
    (finding,) = verify(job).findings
    assert finding.kind == "books" and "1 rows are lost" in finding.what


def test_pictures_without_a_row_and_half_written_files_are_strays(job):
    stray = job / "images" / "00"
    stray.mkdir(exist_ok=True)
    (stray / "00ffffffffffffff.png").write_bytes(b"x")
    (job / "parts" / ".tmp-1").write_bytes(b"x")
    report = verify(job)
    assert report.sound
    assert sorted(report.strays) == ["images/00/00ffffffffffffff.png", "parts/.tmp-1"]


def test_rows_are_held_to_the_manifest_where_the_job_s_own_memory_of_it_is_gone(
    made, job, tmp_path, monkeypatch
):
    other = write_csv(tmp_path / "m.csv", [("r0", "changed"), ("r1", "a picture 1")])
    asked = Order.stored(Store(job))
    moved = Order(
        config=asked.config, manifest=other, output=job, prompt_column="prompt"
    )
    monkeypatch.setattr(Order, "stored", classmethod(lambda *_: moved))
    assert [f.kind for f in verify(job).findings] == ["manifest"]
    (job / "rows.npz").unlink()
    named = {f.image_id for f in verify(job).findings}
    ok = [r["image_id"] for r in rows_of(job)]
    assert len(named) == 13 and ok[1] not in named


def test_a_missing_manifest_leaves_the_books_open_and_says_so(job, monkeypatch):
    asked = Order.stored(Store(job))
    gone = Order(config=asked.config, manifest=job / "gone.csv", output=job)
    monkeypatch.setattr(Order, "stored", classmethod(lambda *_: gone))
    report = verify(job)
    assert [f.kind for f in report.findings] == ["manifest"]
    assert "not balanced" in describe(report)


def test_a_sample_hashes_only_so_many_images(job):
    report = verify(job, sample=3)
    assert report.images == 3 and report.sound


def test_a_cut_image_is_found_without_hashing(job):
    path = files_of(job)["image"][0]
    path.write_bytes(path.read_bytes()[:-1])
    (finding,) = verify(job, sample=0).findings
    assert finding.kind == "image" and "bytes where its row has" in finding.what


def test_a_folder_in_use_is_not_verified(job):
    with FolderLock(job), pytest.raises(LockedError, match="in use by pid"):
        verify(job)


def test_a_folder_that_holds_no_job_is_refused(tmp_path):
    with pytest.raises(OutputError, match="holds no job"):
        verify(tmp_path)


def test_nothing_is_deleted_by_repair(job):
    hurt = [files_of(job)[kind][0] for kind in ("image", "part", "rows")]
    chance = random.Random(3)
    for path in hurt:
        damage(path, chance)
    before = Counter(path.read_bytes() for path in hurt)
    repair(job)
    kept = Counter(p.read_bytes() for p in (job / "damaged").rglob("*") if p.is_file())
    assert before <= kept


def test_the_command_ends_with_4_for_damage_and_0_without(job, capsys):
    def code(*words):
        with pytest.raises(SystemExit) as ended:
            cli.main(["verify", str(job), *words])
        return ended.value.code

    cli.main(["verify", str(job)])
    damage(files_of(job)["image"][0], random.Random(1))
    assert code("--json") == 4
    assert code("--repair") == 4
    cli.main(["verify", str(job)])
    assert "sound" in capsys.readouterr().out


def test_reports_are_plain_data(job):
    os.truncate(job / "rows.npz", 10)
    report = as_dict(verify(job))
    assert report["sound"] is False
    assert report["findings"][0]["path"] == "rows.npz"


def test_an_interrupted_compaction_is_no_damage(job):
    # results.parquet is published, and the parts that went into it are still there.
    kept = {p.name: p.read_bytes() for p in (job / "parts").glob("*.parquet")}
    resume(job)
    for name, data in kept.items():
        (job / "parts" / name).write_bytes(data)
    report = verify(job)
    assert report.sound and report.counts["ok"] == 13
    assert len(pixels_of(job)) == 14
