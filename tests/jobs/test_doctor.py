"""What `doctor` says of machines: sound ones pass, every trouble has its remedy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jobs_shared import ROOT, call
from machines import GB, HEALTHY, but, chip, fake_places

from jobs import check_ascend, check_host, check_software, devices, npu_smi
from jobs.config import load
from jobs.doctor import as_dict, checks_for, describe, examine
from jobs.errors import ConfigError
from jobs.probe import Probe
from jobs.verdict import Asked, Verdict

CARDS = Asked(target="Ascend", devices=(0, 1), weights=7 * GB)
CPU = Asked(target="CPU", devices=(0, 1), weights=14 * GB)


@pytest.mark.parametrize("asked", [CARDS, CPU], ids=["cards", "cpu"])
def test_a_sound_machine_passes_every_check(asked):
    checks = list(checks_for(asked))
    verdicts = [check(HEALTHY, asked) for check in checks]
    assert [v for v in verdicts if v.level != "ok" or v.remedy] == []
    assert len({check.__name__ for check in checks}) == len(checks)


software, ascend, host = check_software, check_ascend, check_host
BUSY = npu_smi.Process(npu=0, chip=0, pid=77, name="python", memory_mb=30_000)
TROUBLES = [
    (software.python, CPU, "failure", {"python": (3, 12, 1)}, "3.12.1"),
    (software.python, CPU, "failure", {"python": (3, 9, 2)}, "3.10 or 3.11"),
    (software.system, CPU, "warning", {"system": "Darwin"}, "Darwin"),
    (software.system, CPU, "warning", {"arch": "riscv64"}, "riscv64"),
    (software.system, CPU, "warning", {"glibc": (2, 17)}, "glibc 2.17"),
    (software.packages, CPU, "failure", {"packages": {"pyarrow": None}}, "pyarrow"),
    (software.numpy, CPU, "failure", {"packages": {"numpy": "2.1.0"}}, "numpy<2"),
    (software.tables, CPU, "warning", {"packages": {"pandas": "3.0.1"}}, "pandas<3"),
    (software.tables, CPU, "warning", {"packages": {"pyarrow": "26.0"}}, "pyarrow<26"),
    (software.mindspore, CPU, "warning", {"packages": {"mindspore": "2.6"}}, "2.7"),
    (software.mindspore, CARDS, "warning", {"packages": {"mindspore": "2.9.0"}}, "O2"),
    (
        software.mindspore,
        CPU,
        "warning",
        {"packages": {"mindspore": "2.10.0"}},
        "slower",
    ),
    (software.compiler, CPU, "warning", {"compiler": None}, "gcc or clang"),
    (ascend.devices, CARDS, "failure", {"nodes": ()}, "no /dev/davinci"),
    (
        ascend.nodes,
        CARDS,
        "failure",
        {"unusable_nodes": ("/dev/hisi_hdc",)},
        "hisi_hdc",
    ),
    (
        ascend.smi,
        CARDS,
        "warning",
        {"smi": None, "smi_trouble": "not installed"},
        "not installed",
    ),
    (ascend.smi, CARDS, "failure", {"smi": chip(health="Alarm")}, "is Alarm"),
    (
        ascend.device_memory,
        CARDS,
        "failure",
        {"smi": chip(used_mb=65000)},
        "the weights take",
    ),
    (ascend.device_memory, CARDS, "warning", {"smi": chip(used_mb=30000)}, "35536 of"),
    (ascend.cann, CARDS, "failure", {"environ": {"ASCEND_HOME_PATH": ""}}, "set_env"),
    (ascend.cann, CARDS, "failure", {"cann": None}, "no version file"),
    (ascend.cann, CARDS, "warning", {"cann": "7.0.1"}, "8.2, 8.3, 8.5"),
    (
        ascend.libraries,
        CARDS,
        "warning",
        {"environ": {"ASCEND_OPP_PATH": ""}},
        "ASCEND_OPP_PATH",
    ),
    (ascend.driver, CARDS, "warning", {"driver": None, "smi": None}, "version.info"),
    (
        ascend.slow_settings,
        CARDS,
        "warning",
        {"environ": {"ASCEND_LAUNCH_BLOCKING": "1"}},
        "unset ASCEND_LAUNCH_BLOCKING",
    ),
    (host.processors, CPU, "warning", {"cores": 1}, "1 for 2 workers"),
    (host.threads, CPU, "warning", {"environ": {"OMP_NUM_THREADS": "64"}}, "is 64"),
    (
        host.blas,
        CPU,
        "warning",
        {"environ": {"OPENBLAS_CORETYPE": "Haswell"}},
        "Haswell",
    ),
    (host.memory, CPU, "failure", {"memory_total": 20 * GB}, "of 20 GB"),
    (host.memory, CPU, "warning", {"memory_free": 20 * GB}, "18.9 GB in each of 2"),
    (host.output, CPU, "failure", {"output": {"writable": False}}, "can't be written"),
    (host.output, CPU, "failure", {"output": {"free": 10**6}}, "0.001 GB free"),
    (host.output, CPU, "warning", {"output": {"free": 2 * GB}}, "2 GB free"),
    (host.output, CPU, "warning", {"output": {"kind": "nfs4"}}, "(nfs4)"),
    (host.output, CPU, "warning", {"output": {"kind": "tmpfs"}}, "next boot"),
    (host.compile_cache, CPU, "warning", {"cache": {"writable": False}}, "can't be"),
    (host.compile_cache, CPU, "warning", {"cache": {"free": 10**6}}, "make room"),
    (host.temporary, CPU, "failure", {"temporary": {"writable": False}}, "TMPDIR"),
    (host.temporary, CPU, "warning", {"temporary": {"free": 10**8}}, "0.1 GB"),
    (host.current, CARDS, "failure", {"current": {"writable": False}}, "kernels"),
    (host.current, CPU, "warning", {"current": {"writable": False}}, "/data/jobs"),
    (host.open_files, CPU, "warning", {"open_files": 256}, "ulimit -n 1024"),
]


@pytest.mark.parametrize(
    ("check", "asked", "level", "changes", "said"),
    TROUBLES,
    ids=[f"{row[0].__name__}-{row[4]}" for row in TROUBLES],
)
def test_every_trouble_is_seen_and_has_a_remedy(check, asked, level, changes, said):
    found = check(but(**changes), asked)
    assert found.level == level
    assert said in found.found + found.remedy
    assert found.remedy


def test_every_check_that_can_complain_is_tried_here():
    tried = {row[0] for row in TROUBLES}
    assert {*checks_for(CARDS), *checks_for(CPU)} == tried


def test_a_device_that_others_use_is_named_with_its_process():
    table = chip(used_mb=5000)
    table = npu_smi.Table(driver="", chips=table.chips, processes=(BUSY,))
    found = ascend.device_memory(but(smi=table), CARDS)
    assert (found.level, "process 77 python" in found.found) == ("warning", True)
    alone = Asked(target="Ascend", devices=(1,))
    assert ascend.device_memory(but(smi=table), alone).level == "ok"


@pytest.mark.parametrize(
    ("trouble", "remedy"),
    [
        ("libge_runner.so: cannot open shared object file", "set_env.sh"),
        ("libascend_hal.so: cannot open shared object file", "driver/lib64"),
        ("libgomp.so.1: cannot allocate memory in static TLS block", "LD_PRELOAD"),
        ("version `GLIBCXX_3.4.29' not found", "libstdcxx"),
        ("version `GLIBC_2.34' not found", "newer system"),
        ("ModuleNotFoundError: No module named 'te'", "set_env.sh"),
        ("ModuleNotFoundError: No module named 'mindspore'", "make"),
        ("A module compiled using NumPy 1.x cannot be run in NumPy 2.1.0", "numpy<2"),
        ("killed by SIGILL", "AVX"),
        ("ValueError: Ascend backend is not available", "npu-smi"),
        ("no answer in 300 s", "hangs"),
        ("something never heard of", "import mindspore"),
    ],
)
def test_a_failed_import_has_a_remedy(trouble, remedy):
    found = software.judge_probe(Probe(trouble=trouble), CARDS)
    assert (found.level, found.found) == ("failure", trouble)
    assert remedy in found.remedy


def test_a_probe_that_computes_wrongly_or_sees_other_devices_is_a_failure():
    assert software.judge_probe(Probe(version="2.8.0"), CARDS).level == "ok"
    assert software.judge_probe(Probe(right=False), CPU).level == "failure"
    assert "8 devices" in software.judge_probe(Probe(seen=8), CARDS).found


@pytest.fixture
def cards(tmp_path, monkeypatch):
    """A machine with two cards, one of which is in use and ill."""
    places = fake_places(tmp_path)
    monkeypatch.setattr(devices, "NODES", places.dev)
    monkeypatch.delenv(devices.VARIABLE, raising=False)
    return places


def works(target, environ, *, device):
    assert (target, device) == ("Ascend", 0)
    return Probe(version="2.8.0")


def level_of(verdicts, what):
    return {verdict.what: verdict.level for verdict in verdicts}[what]


def test_cards_are_judged_by_what_the_machine_shows(cards, tmp_path):
    verdicts = examine(lambda: load(None), tmp_path, places=cards, probe=works)
    assert level_of(verdicts, "devices") == "ok"
    assert level_of(verdicts, "device files") == "ok"
    assert level_of(verdicts, "CANN") == "ok"
    assert level_of(verdicts, "driver") == "ok"
    ill = next(v for v in verdicts if v.what == "npu-smi")
    assert (ill.level, "device 1 (910B3) is Warning" in ill.found) == ("failure", True)
    assert as_dict(verdicts)["would_run"] is False
    first = load(None, ["runtime.devices='0'"])
    assert (
        level_of(examine(lambda: first, tmp_path, places=cards, probe=works), "npu-smi")
        == "ok"
    )


def test_a_setting_that_can_not_be_used_is_one_verdict_among_others(cards, tmp_path):
    asked = load(None, ["runtime.devices='0-7'", "runtime.device_target=Ascend"])
    verdicts = examine(lambda: asked, tmp_path, places=cards, probe=works)
    assert verdicts[0].what == "settings"
    assert verdicts[0].level == "failure"
    assert "2, 3, 4, 5, 6, 7 not there" in verdicts[0].found
    assert level_of(verdicts, "CANN") == "ok"

    def broken():
        raise ConfigError("unknown key", hint="did you mean `steps`?")

    found = examine(
        broken, tmp_path, places=cards, probe=lambda *_, **__: Probe(version="2.8.0")
    )
    assert (found[0].found, found[0].remedy) == ("unknown key", "did you mean `steps`?")

    def bare():
        raise ModuleNotFoundError("No module named 'numpy'")

    found = examine(bare, tmp_path, places=cards, probe=lambda *_, **__: Probe())
    assert (found[0].level, "make" in found[0].remedy) == ("failure", True)


def test_the_checkpoint_is_judged_by_its_headers(cards, tmp_path, checkpoint):
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(checkpoint.read_bytes()[:1000])
    for path, level in ((checkpoint, "ok"), (torn, "failure"), ("none", "failure")):
        config = load(None, [f"model.checkpoint={json.dumps(str(path))}"])
        verdicts = examine(lambda c=config: c, tmp_path, places=cards, probe=works)
        assert level_of(verdicts, "checkpoint") == level, path


def test_the_table_shows_level_thing_finding_and_hint():
    verdicts = [
        Verdict(level="ok", what="Python", found="3.11"),
        Verdict(level="failure", what="NumPy", found="2.0\x1b[31m", remedy="`pip`"),
    ]
    assert describe(verdicts).splitlines() == [
        "ok       Python  3.11",
        r"failure  NumPy   2.0\x1b[31m",
        "                 hint: `pip`",
        "a run would fail: 1 failure",
    ]
    report = as_dict(verdicts)
    assert report["counts"] == {"failure": 1, "warning": 0}
    assert report["verdicts"][1]["remedy"] == "`pip`"
    assert describe(verdicts[:1]).endswith("a run should work: nothing found")


def test_the_command_works_here_and_its_exit_code_says_so(tmp_path, checkpoint):
    words = ["doctor", "--workers", "1", "--checkpoint", checkpoint, "--json"]
    done = call(*words, cwd=tmp_path)
    report = json.loads(done.stdout)
    assert report["would_run"] is (done.returncode == 0)
    levels = {v["what"]: v["level"] for v in report["verdicts"]}
    assert levels["MindSpore on CPU"] == levels["checkpoint"] == "ok"
    done = call("doctor", "--devices", "0", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stdout.startswith("failure  settings")


@pytest.mark.parametrize("absent", ["mindspore", "numpy", "pyarrow"])
def test_a_package_that_is_missing_is_said_without_a_trace(tmp_path, absent):
    """A package that raises on import stands for one that isn't there or is broken."""
    (tmp_path / absent).mkdir()
    (tmp_path / absent / "__init__.py").write_text("raise ImportError('no such thing')")
    path = f"{tmp_path}:{ROOT}:{Path(__file__).parent}"
    done = subprocess.run(
        [sys.executable, "-m", "jobs", "doctor", "--workers", "1"],
        env=os.environ | {"PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "no such thing" in done.stdout
