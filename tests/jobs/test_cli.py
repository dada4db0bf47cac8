"""The command line: every error one line and its exit code; documented by test."""

import json
import os
import re
import shlex
import subprocess

import click
import pytest
from jobs_shared import (
    ROOT,
    call,
    command,
    environment,
    numbered,
    run_arguments,
    write_csv,
)

from jobs import cli, run, settings
from jobs.cli import main


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setitem(
        run.run.__kwdefaults__, "pipeline", "fake_pipeline:FakePipeline"
    )


@pytest.fixture
def sdxl_jobs(capsys):
    """Give a function that runs a command line in process: code, stdout, stderr."""

    def execute(*words):
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
            raise SystemExit(0)
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return execute


def commands(group=cli.cli, path=()):
    for name, found in group.commands.items():
        yield (*path, name), found


@pytest.mark.parametrize("path", [path for path, _ in commands()], ids=" ".join)
def test_every_command_has_an_example_that_parses(path, sdxl_jobs):
    code, out, _ = sdxl_jobs(*path, "--help")
    assert code == 0
    example = re.search(r"Example: sdxl-jobs (.+?)\n\n", out, re.DOTALL)
    assert example, out
    parse(" ".join(example[1].split()))


def parse(line):
    """Parse a command line without running it; click raises on anything it minds."""
    words = shlex.split(line, comments=True)
    command = cli.cli.commands[words[0]]
    command.make_context(words[0], words[1:])


def documented_lines():
    """Find every command line of ours in the README, the Makefile and the configs."""
    paths = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "configs").glob("*.yaml")]
    for path in paths:
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"\s*\\\n\s*", " ", text)
        for line in text.splitlines():
            found = re.match(r"^(?:\$ |# Command: |\t)?(?:\S*/)?sdxl-jobs (.+)$", line)
            if found:
                yield pytest.param(found[1], id=f"{path.name}: {found[1][:40]}")


@pytest.mark.parametrize("line", list(documented_lines()))
def test_every_documented_command_line_parses(line):
    usual = re.split(r"\s{3,}|\s#", line)[0]  # what follows is a comment
    usual = re.sub(r"\$\(\w+\)", "X", usual).replace("…", "")
    usual = re.sub(r"(--\w+) N\b", r"\1 1", usual)
    optional = re.findall(r"\[([^\]]*)\]", usual)
    bare = re.sub(r"\[[^\]]*\]", "", usual)
    for choice in ["", *(word for words in optional for word in words.split(" | "))]:
        parse(f"{bare} {choice}")


def test_the_readme_names_every_command_and_every_setting_of_a_row():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path, _ in commands():
        assert f"sdxl-jobs {' '.join(path)}" in text, path
    table = text[text.index("## The manifest") : text.index("## The results")]
    missing = {name for name in settings.parsers() if f"`{name}`" not in table}
    assert not missing


@pytest.mark.parametrize(
    "words",
    [
        ["frobnicate"],
        ["run"],
        ["run", "m.csv"],
        ["run", "m.csv", "--output", "o", "--workers", "0"],
        ["run", "m.csv", "--output", "o", "--batch-size", "x"],
        ["plan", "m.csv", "--limit", "0"],
        ["status"],
        ["--frobnicate"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(sdxl_jobs, words):
    code, out, err = sdxl_jobs(*words)
    assert (code, out) == (2, "")
    assert "Usage: " in err


def test_help_and_version_are_data(sdxl_jobs):
    assert sdxl_jobs("--help")[0] == 0
    assert "Exit codes: 0 all made" in sdxl_jobs("-h")[1]
    assert sdxl_jobs("--version")[1].startswith("sdxl-jobs, version ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--devices", "0", "--workers", "1"], "exclude each other"),
        (["--set", "sampling.step=3"], "did you mean `steps`?"),
        (["--config", "none.yaml"], "can't read none.yaml: No such file"),
        (["--checkpoint", "none.safetensors"], "none.safetensors"),
        (["--prompt-column", "text"], "no column `text`"),
        (["--id-column", "name"], "no column `name`"),
    ],
    ids=str,
)
def test_an_expected_error_is_one_line_a_hint_and_exit_code_1(
    sdxl_jobs, tmp_path, checkpoint, words, said, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    manifest = write_csv(tmp_path / "m.csv", numbered(1))
    usual = [] if "--checkpoint" in words else ["--checkpoint", checkpoint]
    code, out, err = sdxl_jobs("run", manifest, "--output", "out", *usual, *words)
    assert (code, out) == (1, "")
    lines = err.splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: "))
    assert said in err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "log.txt").exists()


@pytest.mark.parametrize("name", ["resume", "status", "retry", "verify", "compact"])
def test_a_folder_without_a_job_is_refused(sdxl_jobs, tmp_path, name):
    code, out, err = sdxl_jobs(name, tmp_path / "none")
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert "holds no job" in err or "no such folder" in err
    assert not (tmp_path / "none").exists()


def test_a_bug_is_exit_code_3_and_its_trace_goes_to_the_log(
    sdxl_jobs, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)

    def stumble(*_, **__):
        raise ZeroDivisionError("a \x1b[31mred\nbug")

    monkeypatch.setattr("jobs.status.read_status", stumble)
    code, out, err = sdxl_jobs("status", "out")
    assert (code, out) == (3, "")
    assert err.startswith(r"bug: ZeroDivisionError: a \x1b[31mred\x0abug")
    assert "Traceback" not in err
    log = (tmp_path / "log.txt").read_text()
    assert "Traceback" in log
    assert "'status' 'out'" in log
    # Where the job's folder is known, the trace is put beside its results.
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "job.json").write_text("{}")
    sdxl_jobs("status", "out")
    assert "Traceback" in (tmp_path / "out" / "log.txt").read_text()


def test_control_characters_do_not_reach_the_terminal(
    sdxl_jobs, tmp_path, checkpoint, monkeypatch
):
    # As on a terminal: elsewhere click takes some of them out by itself.
    monkeypatch.setattr("click.utils.should_strip_ansi", lambda *_: False)
    manifest = write_csv(
        tmp_path / "m.csv", [("a\x1b[31m", "p"), ("b", "p")], ("id", "prompt")
    )
    words = ["plan", manifest, "--checkpoint", checkpoint]
    code, out, err = sdxl_jobs(*words)
    assert code == 4
    assert "\x1b" not in out + err
    assert r"a\x1b[31m" in out
    colourful = write_csv(tmp_path / "m\x1b[31m.csv", [("a", None)])
    code, out, err = sdxl_jobs("plan", colourful, "--checkpoint", checkpoint)
    assert "\x1b" not in out + err
    _, out, err = sdxl_jobs("status", tmp_path / "\x1b[31m")
    assert "\x1b" not in out + err


def test_plan_says_what_a_manifest_asks_for(sdxl_jobs, tmp_path, checkpoint):
    rows = [
        ("a", "p", 3, 128),
        ("b", "word " * 80, None, None),
        ("c", None, None, None),
        ("d", "p", None, 1000),
    ]
    manifest = write_csv(
        tmp_path / "m.csv", rows, ("id", "prompt", "num_images", "width")
    )
    words = ["plan", manifest, "--checkpoint", checkpoint, "--workers", 2]
    words += ["--batch-size", 4, "--set", "sampling.width=64"]
    code, out, err = sdxl_jobs(*words, "--json")
    report = json.loads(out)
    assert (code, err) == (4, "")
    assert (report["rows"], report["requests"], report["invalid"]) == (4, 2, 2)
    assert report["tasks"] == 4
    assert report["graphs"] == [
        {"width": 64, "height": 128, "guider": "VanillaCFG", "tasks": 1},
        {"width": 128, "height": 128, "guider": "VanillaCFG", "tasks": 3},
    ]
    assert report["truncated"]["prompts"] == 1
    assert report["truncated"]["first"] == [{"location": "m.csv line 3", "tokens": 82}]
    assert [row["location"] for row in report["invalid_rows"]] == [
        "m.csv line 4",
        "m.csv line 5",
    ]
    assert report["disk_bytes"] > 0
    code, out, _ = sdxl_jobs(*words)
    assert "2 requests in 4 rows, 2 invalid" in out
    assert "m.csv line 5: width: 1000 is not a multiple of 64" in out
    assert not list(tmp_path.glob("out*"))


def test_a_real_manifest_is_planned_without_its_checkpoint(sdxl_jobs):
    words = ["plan", ROOT / "tests" / "data" / "parti_prompts.tsv"]
    words += ["--prompt-column", "Prompt", "--config", ROOT / "configs" / "base.yaml"]
    code, out, err = sdxl_jobs(*words, "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert report["requests"] == report["tasks"] == 1_632
    assert report["graphs"] == [
        {"width": 1024, "height": 1024, "guider": "VanillaCFG", "tasks": 1_632}
    ]
    assert report["passes_through"] == ["Category", "Challenge", "Note"]


def test_a_run_prints_the_results_path_on_stdout_and_talks_on_stderr(
    sdxl_jobs, tmp_path, checkpoint
):
    manifest = write_csv(tmp_path / "m.csv", [*numbered(3), ("bad", None)])
    out_folder = tmp_path / "out"
    code, out, err = sdxl_jobs(*run_arguments(manifest, out_folder, checkpoint))
    assert code == 4
    assert out == f"{out_folder / 'results.parquet'}\n"
    lines = err.splitlines()
    assert lines[0].startswith("3 images to make (0 done, 1 rows invalid) on 1 CPU")
    assert "3/3 images (100.0 %)" in err
    assert lines[-1].startswith("finished: 3 ok, 0 failed, 1 invalid; 3 made now at")
    assert "\r" not in err
    code, out, err = sdxl_jobs("status", out_folder, "--json")
    report = json.loads(out)
    assert (code, report["state"]) == (0, "finished")
    assert report["counts"] == {"ok": 3, "failed": 0, "invalid": 1, "pending": 0}
    code, _, err = sdxl_jobs("resume", out_folder, "--workers", 2, "--devices", 0)
    assert (code, "exclude each other" in err) == (1, True)
    code, out, err = sdxl_jobs("resume", out_folder)
    assert (code, out) == (4, f"{out_folder / 'results.parquet'}\n")
    assert "0 made now" in err


def test_a_checkpoint_may_have_any_name(sdxl_jobs, tmp_path, checkpoint):
    manifest = write_csv(tmp_path / "m.csv", numbered(1))
    for name in ("a 🦊: 'b'.safetensors", '# "é" {x}.safetensors', "null.safetensors"):
        (tmp_path / name).symlink_to(checkpoint)
        code, _, err = sdxl_jobs("plan", manifest, "--checkpoint", tmp_path / name)
        assert code == 0, err


def test_a_closed_pipe_is_no_bug(tmp_path, checkpoint):
    rows = [(f"r{i}", None) for i in range(50)]
    manifest = write_csv(tmp_path / "m.csv", rows)
    words = command("plan", manifest, "--checkpoint", checkpoint, "--json")
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        words,
        cwd=tmp_path,
        env=environment(),
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode in (1, 4)
    assert not (tmp_path / "log.txt").exists()


def test_the_module_is_the_command(tmp_path):
    done = call("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (
        0,
        f"sdxl-jobs, version {cli.__version__}\n",
    )
    assert isinstance(cli.cli, click.Group)
