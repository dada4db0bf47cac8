"""Folders and names that nobody planned for: nothing of the user's is touched."""

import errno
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from jobs_shared import (
    HERE,
    ROOT,
    call,
    command,
    environment,
    numbered,
    rows_of,
    run_arguments,
    run_job,
    write_csv,
)

from jobs.errors import ManifestError, MismatchError, OutputError
from jobs.manifest import open_manifest
from jobs.status import read_status


def test_a_folder_that_holds_other_files_keeps_them(tmp_path, checkpoint):
    out = tmp_path / "out"
    (out / ".tmp-folder").mkdir(parents=True)
    kept = [out / ".tmp-notes", out / "notes.txt", out / ".tmp-folder" / "x"]
    for path in kept:
        path.write_text("mine")
    manifest = write_csv(tmp_path / "m.csv", numbered(1))
    run_job(manifest, out, checkpoint)
    assert all(path.read_text() == "mine" for path in kept)


def test_results_without_their_job_are_not_mixed_with_another(tmp_path, checkpoint):
    out = tmp_path / "out"
    manifest = write_csv(tmp_path / "m.csv", numbered(1))
    run_job(manifest, out, checkpoint)
    (out / "job.json").unlink()
    with pytest.raises(MismatchError, match="another job's rows; its job") as caught:
        run_job(manifest, out, checkpoint, "sampling.guidance_scale=9")
    assert "verify --repair" in caught.value.hint
    # The same settings are the same job.
    assert run_job(manifest, out, checkpoint).made == 0
    assert (out / "job.json").exists()


def test_a_link_in_the_place_of_a_folder_is_not_followed(tmp_path, checkpoint):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / "images").symlink_to(elsewhere)
    manifest = write_csv(tmp_path / "m.csv", numbered(1))
    with pytest.raises(OutputError, match="symbolic link"):
        run_job(manifest, out, checkpoint)
    assert list(elsewhere.iterdir()) == []


def test_an_output_folder_may_itself_be_a_link(tmp_path, checkpoint):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    manifest = write_csv(tmp_path / "m.csv", numbered(1))
    assert run_job(manifest, tmp_path / "out", checkpoint).made == 1
    assert (tmp_path / "disk" / "results.parquet").exists()


@pytest.mark.parametrize(
    "name",
    ["ünï 🦊", "a b'c\"d", "#x?*", "-rf", "100%s {0}", "line\nbreak"],
)
def test_files_and_folders_may_have_any_name(tmp_path, checkpoint, name):
    weights = tmp_path / f"{name}.safetensors"
    weights.symlink_to(checkpoint)
    manifest = write_csv(tmp_path / f"{name}.csv", [*numbered(1), ("bad", None)])
    out = tmp_path / name
    summary = run_job(manifest, out, weights)
    assert summary.counts == {"ok": 1, "failed": 0, "invalid": 1}
    assert len(rows_of(out)) == 2
    assert read_status(out)["state"] == "finished"


@pytest.mark.parametrize("odd", ["manifest", "output", "checkpoint"])
def test_a_path_that_is_not_utf8_is_refused_before_the_work(tmp_path, checkpoint, odd):
    paths = {
        "manifest": write_csv(tmp_path / "m.csv", numbered(1)),
        "output": tmp_path / "out",
        "checkpoint": checkpoint,
    }
    name = tmp_path / os.fsdecode(b"\xff\xfe" + paths[odd].suffix.encode())
    if odd != "output":
        name.symlink_to(paths[odd])
    paths[odd] = name
    done = call(*run_arguments(*paths.values()), cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_terminal_can_show_any_name(tmp_path, checkpoint, encoding):
    name = "é🦊"
    manifest = write_csv(tmp_path / "m.csv", [(f"é{i}", None) for i in range(30)])
    for words in (
        run_arguments(manifest, name, checkpoint),
        ["status", name],
        ["plan", manifest, "--checkpoint", checkpoint],
    ):
        done = subprocess.run(
            command(*words),
            cwd=tmp_path,
            env=environment(PYTHONIOENCODING=encoding),
            capture_output=True,
            timeout=60,
        )
        assert done.returncode in (0, 4), done.stderr
        assert done.stdout


def test_resume_works_from_any_folder(tmp_path, checkpoint):
    manifest = write_csv(tmp_path / "m.csv", numbered(2))
    (tmp_path / "w.safetensors").symlink_to(checkpoint)
    words = run_arguments("m.csv", "out", "w.safetensors")
    done = call(*words, "--limit", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    asked = json.loads((tmp_path / "out" / "job.json").read_text())["asked"]
    assert asked["manifest"] == str(manifest)
    (tmp_path / "elsewhere").mkdir()
    done = call("resume", "../out", cwd=tmp_path / "elsewhere")
    assert (done.returncode, done.stdout) == (0, "../out/results.parquet\n")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_strangers_among_the_images_are_left_alone(tmp_path, checkpoint):
    out = tmp_path / "out"
    manifest = write_csv(tmp_path / "m.csv", numbered(1))
    run_job(manifest, out, checkpoint)
    kept = [out / "images" / name for name in ("index.html", ".DS_Store", "thumbs")]
    for path in kept:
        path.write_text("mine")
    assert run_job(manifest, out, checkpoint).made == 0
    assert all(path.read_text() == "mine" for path in kept)


def test_a_job_whose_parts_folder_is_gone_goes_on_from_its_results(
    tmp_path, checkpoint
):
    out = tmp_path / "out"
    manifest = write_csv(tmp_path / "m.csv", numbered(2))
    run_job(manifest, out, checkpoint)
    (out / "parts").rmdir()
    (out / "status.json").unlink()
    assert read_status(out)["counts"]["ok"] == 2
    write_csv(manifest, numbered(3))
    assert run_job(manifest, out, checkpoint).made == 1
    assert len(rows_of(out)) == 3


def open_to_all(*paths):
    """Let anybody read paths, and search what lies between them and /tmp."""
    top = Path(tempfile.gettempdir())
    for path in {above for one in paths for above in (one, *one.parents)}:
        if path.is_relative_to(top) and path != top:
            path.chmod(0o755 if path.is_dir() else 0o644)


AS_NOBODY = """
import os, sys
import encodings.cp437, fake_cli
import jobs.compact, jobs.findings, jobs.repair, jobs.run, jobs.status, jobs.verify
if os.getuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
fake_cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["resume"], 1, "error: can't lock"),
        (["retry"], 1, "error: can't lock"),
        (["compact"], 1, "error: can't lock"),
        (["verify", "--repair"], 1, "error: can't lock"),
        (["verify"], 0, ""),
        (["status"], 0, ""),
    ],
)
def test_a_folder_that_one_may_only_read_can_be_looked_at(
    tmp_path, checkpoint, words, code, said
):
    manifest = write_csv(tmp_path / "m.csv", numbered(1))
    run_job(manifest, tmp_path / "out", checkpoint)
    before = sorted((tmp_path / "out").rglob("*"))
    (tmp_path / "out").chmod(0o555)
    open_to_all(*before, tmp_path, checkpoint.parent)
    (tmp_path / "out").chmod(0o555)
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, words[0], "out", *words[1:]],
        env=environment(PYTHONPATH=f"{ROOT}:{HERE}"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr
    assert sorted((tmp_path / "out").rglob("*")) == before


def test_a_manifest_that_may_not_be_looked_for_is_an_error_of_one_line(
    tmp_path, monkeypatch
):
    def shut(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "is_file", shut)
    with pytest.raises(ManifestError, match=r"m\.csv: Permission denied$"):
        open_manifest(tmp_path / "m.csv")
