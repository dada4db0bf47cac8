"""The compile cache: what one process compiled, others load; nothing wrong is loaded.

Every use is a process of its own, since MindSpore takes its settings once a process.
`cached_graphs.py` compiles three small graphs in a given order and prints, for each,
whether it was loaded and what it computes.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sdxl.cache_key import default_root, graphs_folder, software
from sdxl.compile_cache import CompileCache, sweep
from sdxl.config import PRESETS

HERE = Path(__file__).parent
# Of a row of eight ones and weights of one: 8 + 1, tanh 8, 8 x 3.
RIGHT = {"add": 9.0, "tanh": 1.0, "times": 24.0}


def compiled(folder, *names, **settings):
    """Compile graphs by name in a process of its own: {name: (loaded, value)}."""
    done = subprocess.run(
        [sys.executable, HERE / "cached_graphs.py", folder, *names],
        env=os.environ | {"PYTHONPATH": str(HERE.parents[1])} | settings,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    compiled.log = done.stderr
    return {name: tuple(found) for name, found in json.loads(done.stdout).items()}


def entry(folder, name):
    (found,) = folder.glob(f"*/{name}-*/entry.json")
    return found.parent


def test_a_second_process_loads_each_graph_in_whatever_order(tmp_path):
    first = compiled(tmp_path, "add", "tanh", "times")
    assert first == {name: (0, value) for name, value in RIGHT.items()}
    second = compiled(tmp_path, "times", "add", "tanh")
    assert second == {name: (1, value) for name, value in RIGHT.items()}


def test_what_was_loaded_and_what_was_compiled_mix_in_one_process(tmp_path):
    compiled(tmp_path, "tanh")
    mixed = compiled(tmp_path, "add", "tanh", "times")
    assert mixed == {"add": (0, 9.0), "tanh": (1, 1.0), "times": (0, 24.0)}
    assert all(loaded for loaded, _ in compiled(tmp_path, *RIGHT).values())


def test_mindspores_own_cache_is_kept_out(tmp_path):
    """It hands out graphs by their number: asked for in another order, wrong ones."""
    own = {"MS_COMPILER_CACHE_ENABLE": "1", "MS_COMPILER_CACHE_PATH": str(tmp_path)}
    for order in (["add", "tanh"], ["tanh", "add"]):
        found = compiled("off", *order, **own)
        assert {name: value for name, (_, value) in found.items()} == {
            name: RIGHT[name] for name in order
        }
    assert not list(tmp_path.rglob("*.mindir"))


def _cut(entry):
    (graph,) = entry.rglob("*.mindir")
    graph.write_bytes(graph.read_bytes()[:1000])


def _flip(entry):
    (graph,) = entry.rglob("*.mindir")
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)


def _lose(entry):
    (graph,) = entry.rglob("*.mindir")
    graph.unlink()


def _garble(entry):
    (entry / "entry.json").write_text("{")


def _other_shapes(entry):
    about = json.loads((entry / "entry.json").read_text())
    (entry / "entry.json").write_text(json.dumps(about | {"shapes": "others"}))


@pytest.mark.parametrize("damage", [_cut, _flip, _lose, _garble, _other_shapes])
def test_a_damaged_entry_is_thrown_away_with_a_line(tmp_path, damage, caplog):
    cache = CompileCache(tmp_path)
    files = {"rank_0/graph_cache/compile_cache_N.mindir": bytes(3_000)}
    cache._publish("key", "shapes", files, 1.0)
    assert cache._read("key", "shapes") == files
    damage(tmp_path / "key")
    assert cache._read("key", "shapes") is None
    assert "is thrown away" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == []


def test_a_damaged_entry_is_made_anew_and_so_is_one_that_mindspore_refuses(tmp_path):
    compiled(tmp_path, "add")
    here = entry(tmp_path, "add")
    _flip(here)
    assert compiled(tmp_path, "add") == {"add": (0, 9.0)}
    assert "is thrown away" in compiled.log
    (graph,) = here.rglob("*.mindir")
    graph.write_bytes(b"nonsense")
    about = json.loads((here / "entry.json").read_text())
    (name,) = about["files"]
    about["files"][name] = hashlib.sha256(b"nonsense").hexdigest()
    (here / "entry.json").write_text(json.dumps(about))
    assert compiled(tmp_path, "add") == {"add": (0, 9.0)}
    assert "refused" in compiled.log
    assert compiled(tmp_path, "add") == {"add": (1, 9.0)}


def test_of_processes_that_start_together_one_compiles(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: compiled(tmp_path, "add", "tanh"), range(4)))
    for name in ("add", "tanh"):
        assert sorted(process[name][0] for process in found) == [0, 1, 1, 1]
        assert {process[name][1] for process in found} == {RIGHT[name]}


HOLDER = """
import sys, time
from pathlib import Path
from sdxl.compile_cache import CompileCache
with CompileCache(Path(sys.argv[1]))._lock("key"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("fate", ["killed", "hangs"])
def test_no_process_waits_for_ever_for_one_that_died_or_hangs(tmp_path, fate, caplog):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(HERE.parents[1])},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    if fate == "killed":
        holder.kill()
        holder.wait()
    started = time.monotonic()
    with CompileCache(tmp_path, wait_seconds=0.5)._lock("key"):
        waited = time.monotonic() - started
    holder.kill()
    holder.communicate()
    assert (waited < 0.4) == (fate == "killed")
    assert ("waited too long" in caplog.text) == (fate == "hangs")


def test_a_folder_that_others_may_write_to_is_not_used(tmp_path):
    compiled(tmp_path, "add")
    entry(tmp_path, "add").parent.chmod(0o777)
    assert compiled(tmp_path, "add") == {"add": (0, 9.0)}
    assert "others may write to it" in compiled.log


def test_a_cache_that_can_not_be_made_costs_a_line_and_no_picture(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert compiled(tmp_path / "file", "add") == {"add": (0, 9.0)}
    assert "is not used" in compiled.log


def test_the_folder_is_of_the_software_and_of_the_geometry(tmp_path, monkeypatch):
    tiny = graphs_folder(tmp_path, PRESETS["tiny"])
    assert graphs_folder(tmp_path, PRESETS["tiny"]) == tiny
    assert graphs_folder(tmp_path, PRESETS["base"]) != tiny
    monkeypatch.setenv("MS_COMPILER_CACHE_ENABLE", "1")
    assert graphs_folder(tmp_path, PRESETS["tiny"]) == tiny
    monkeypatch.setenv("MS_DEV_JIT_SYNTAX_LEVEL", "0")
    assert graphs_folder(tmp_path, PRESETS["tiny"]) != tiny
    monkeypatch.undo()
    for name in software():
        changed = software() | {name: "other"}
        monkeypatch.setattr("sdxl.cache_key.software", lambda changed=changed: changed)
        assert graphs_folder(tmp_path, PRESETS["tiny"]) != tiny, name


def test_cann_is_part_of_the_software(tmp_path, monkeypatch):
    home = tmp_path / "toolkit"
    (home / "aarch64-linux").mkdir(parents=True)
    monkeypatch.setenv("ASCEND_HOME_PATH", str(home))
    before = software()["cann"]
    (home / "aarch64-linux/ascend_toolkit_install.info").write_text("version=8.0\n")
    assert software()["cann"] != before


def test_the_cache_is_where_the_user_keeps_such_things(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_root() == tmp_path / "sdxl-jobs" / "graphs"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_root() == tmp_path / ".cache" / "sdxl-jobs" / "graphs"


def test_sweeping_takes_old_graphs_and_leavings_and_nothing_else(tmp_path):
    old = graphs_folder(tmp_path, PRESETS["tiny"])
    used = graphs_folder(tmp_path, PRESETS["base"])
    kept = [used, used / ".new-young", tmp_path / "letters", tmp_path / "a.txt"]
    gone = [old, used / ".new-old", used / ".old-old"]
    for path in (*kept, *gone):
        path.mkdir(parents=True)
    os.utime(tmp_path / "letters", (0, 0))
    for path in gone:
        os.utime(path, (0, 0))
    sweep(tmp_path)
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in gone)
