"""What is found on a machine: shown folders, tools and tables, it reads them right."""

import os
import sys
from dataclasses import replace

import pytest
from machines import TWO_CARDS, fake_places

from jobs import npu_smi
from jobs.machine import folder, look, numbers
from jobs.probe import probe

TWO_CHIPS = """\
| npu-smi 25.0.rc1                 Version: 25.0.rc1                               |
| 0     Ascend910           | OK            | 178.5     36       0    / 0          |
| 0     0                   | 0000:9D:00.0  | 0         0    / 0      3416 / 65536 |
| 0     Ascend910           | OK            | -         36       0    / 0          |
| 1     1                   | 0000:9F:00.0  | 0         0    / 0      3195 / 65536 |
| 0       1                 | 3328827       |                 | 50119              |
"""


def test_cards_their_memory_and_who_is_on_them_are_read():
    table = npu_smi.parse(TWO_CARDS)
    assert table.driver == "25.2.0"
    assert [chip.npu for chip in table.chips] == [4, 5]
    assert [chip.used_mb for chip in table.chips] == [3408, 41052]
    assert {chip.total_mb for chip in table.chips} == {65536}
    assert [chip.health for chip in table.chips] == ["OK", "Warning"]
    assert table.on(table.of(0)) == []
    assert [p.pid for p in table.on(table.of(1))] == [1333928]
    assert table.of(2) is None


def test_an_npu_may_have_two_chips():
    table = npu_smi.parse(TWO_CHIPS)
    assert [(chip.npu, chip.chip) for chip in table.chips] == [(0, 0), (0, 1)]
    assert [p.memory_mb for p in table.on(table.of(1))] == [50119]
    assert table.on(table.of(0)) == []


@pytest.mark.parametrize("text", ["", "no table", "| a | b | c |\n| 0 | :: | 1/2 |\n"])
def test_what_is_no_table_has_no_cards(text):
    assert npu_smi.parse(text).chips == ()


def test_a_machine_is_read_from_its_folders(tmp_path):
    places = fake_places(tmp_path)
    found = look(places, tmp_path / "shared" / "out")
    assert found.nodes == ("davinci4", "davinci5")
    assert found.unusable_nodes == ()
    assert found.smi.driver == found.driver == "25.2.0"
    assert found.cann == "8.3.0.1.200"
    assert (found.memory_total, found.memory_free) == (
        64_000_000 << 10,
        60_000_000 << 10,
    )
    assert found.packages["numpy"].startswith("1.")
    assert found.python == sys.version_info[:3]
    assert found.output.path == tmp_path


def test_a_folder_lies_in_the_file_system_mounted_nearest(tmp_path):
    places = fake_places(tmp_path)
    (tmp_path / "shared" / "deep").mkdir(parents=True)
    assert folder(places, tmp_path / "shared" / "deep" / "none").kind == "nfs4"
    assert folder(places, tmp_path / "none").kind == "ext4"


def test_a_container_s_memory_is_its_limit(tmp_path):
    places = fake_places(tmp_path)
    (places.cgroup / "memory.max").write_text("8000000000\n")
    (places.cgroup / "memory.current").write_text("3000000000\n")
    found = look(places, tmp_path)
    assert (found.memory_total, found.memory_free) == (8_000_000_000, 5_000_000_000)
    (places.cgroup / "memory.max").write_text("max\n")
    assert look(places, tmp_path).memory_total == 64_000_000 << 10


def test_device_files_that_are_missing_are_named(tmp_path):
    places = fake_places(tmp_path)
    (places.dev / "hisi_hdc").unlink()
    assert look(places, tmp_path).unusable_nodes == (str(places.dev / "hisi_hdc"),)


@pytest.mark.parametrize(
    ("file", "text", "version"),
    [
        (
            "compiler/version.info",
            "Version=8.3.0.1.200\nversion_dir=8.3.RC1\n",
            "8.3.0.1.200",
        ),
        (
            "version.cfg",
            "# version\nruntime_running_version=[8.2.0:8.2.RC1]\n",
            "8.2.RC1",
        ),
        (
            "aarch64-linux/ascend_toolkit_install.info",
            "package_name=x\nversion=8.5.0\n",
            "8.5.0",
        ),
        ("compiler/version.info", "nothing", None),
    ],
)
def test_cann_s_version_is_read_wherever_it_stands(tmp_path, file, text, version):
    places = fake_places(tmp_path)
    (tmp_path / "cann/compiler/version.info").unlink()
    (tmp_path / "cann" / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "cann" / file).write_text(text)
    assert look(places, tmp_path).cann == version


def test_an_npu_smi_that_is_missing_fails_or_hangs_is_said(tmp_path, monkeypatch):
    places = fake_places(tmp_path)
    none = replace(places, npu_smi=str(tmp_path / "none"))
    assert look(none, tmp_path).smi_trouble == "not installed"
    tool = tmp_path / "npu-smi"
    tool.write_text("#!/bin/sh\necho dcmi model initialized failed >&2\nexit 3\n")
    found = look(places, tmp_path)
    assert found.smi is None
    assert found.smi_trouble == "ended with code 3: dcmi model initialized failed"
    monkeypatch.setattr("jobs.machine.SMI_SECONDS", 0.2)
    tool.write_text("#!/bin/sh\nexec sleep 5\n")
    assert look(places, tmp_path).smi_trouble == "no answer in 0.2 s"


def test_a_bare_machine_is_looked_at_without_complaint(tmp_path):
    places = fake_places(tmp_path, cards=0)
    (tmp_path / "proc/meminfo").unlink()
    (tmp_path / "proc/self/mounts").unlink()
    (tmp_path / "ascend/driver/version.info").unlink()
    found = look(places, tmp_path)
    assert (found.nodes, found.unusable_nodes, found.driver) == ((), (), None)
    assert (found.memory_total, found.output.kind) == (None, "")


def test_versions_are_compared_as_numbers():
    assert numbers("2.10.0rc1") == (2, 10, 0)
    assert numbers("2.9") < numbers("2.10")
    assert numbers("none") == ()


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (
            "raise ImportError('libge_runner.so: cannot open shared object file')",
            "libge",
        ),
        ("import os; os.abort()", "importing mindspore: killed by SIGABRT"),
        ("import sys; sys.exit(7)", "code 7"),
        ("import time; time.sleep(60)", "importing mindspore: no answer in 5 s"),
        ("raise RuntimeError('a\\n- frame\\nb')", "RuntimeError: a"),
    ],
)
def test_a_mindspore_that_fails_says_why_in_one_line(tmp_path, program, said):
    (tmp_path / "mindspore.py").write_text(program)
    found = probe(
        "CPU", os.environ | {"PYTHONPATH": str(tmp_path)}, seconds=5, device=3
    )
    assert said in found.trouble
    assert "\n" not in found.trouble


def test_the_probe_binds_one_device_and_reports_what_it_computed(tmp_path):
    (tmp_path / "mindspore.py").write_text(
        "import os\n__version__ = os.environ['ASCEND_RT_VISIBLE_DEVICES']\n"
        "Tensor = lambda x: type('T', (), {'asnumpy': lambda self: x})()\n"
        "set_device = lambda target, index: None\n"
        "class ops:\n    matmul = staticmethod(lambda a, b: a)\n"
        "class hal:\n    device_count = staticmethod(lambda target: 2)\n"
    )
    found = probe("Ascend", os.environ | {"PYTHONPATH": str(tmp_path)}, device=5)
    assert (found.trouble, found.version, found.right, found.seen) == ("", "5", True, 2)
