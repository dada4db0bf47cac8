"""Who imports what: planning is light, imports run one way, a library has one home."""

import ast
import re
import subprocess
import sys

import pytest
from jobs_shared import ROOT, environment

JOBS = sorted((ROOT / "jobs").glob("*.py"))
SDXL = sorted((ROOT / "sdxl").glob("*.py"))

HOMES = {
    "click": {"cli", "machine_cli", "options"},
    "yaml": {"yaml_tree"},
    "PIL": {"images", "sheet"},
    "tqdm": {"progress"},
    "psutil": {"lock"},
    "mindspore": set(),
    "safetensors": set(),
    "tokenizers": set(),
}
# Rows in Parquet are read and written in more than one place, for the same reason.
PARQUET = {"cells", "manifest", "parts", "store"}
MODEL_INSIDE_FUNCTIONS = {
    "sdxl.pipeline",
    "sdxl.weights",
    "sdxl.convert",
    "sdxl.lora",
    "sdxl.graphs",
    "sdxl.ops",
    "sdxl.microbench",
}


def imports(path, everywhere=True):
    """Give the modules that a file imports; `everywhere` includes inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if everywhere else _outside_functions(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def _outside_functions(node):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _outside_functions(child)


def roots(modules):
    return {module.partition(".")[0] for module in modules}


@pytest.mark.parametrize("path", SDXL, ids=lambda path: path.stem)
def test_the_model_knows_nothing_of_jobs(path):
    assert "jobs" not in roots(imports(path))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_the_runner_takes_no_tensors_at_import(path):
    outside = imports(path, everywhere=False)
    assert "mindspore" not in roots(imports(path))
    assert not outside & MODEL_INSIDE_FUNCTIONS, outside


@pytest.mark.parametrize("library", HOMES)
def test_a_library_has_one_home(library):
    users = {path.stem for path in JOBS if library in roots(imports(path))}
    assert users <= HOMES[library], users


def test_tables_are_made_where_rows_are_read_and_written():
    users = {path.stem for path in JOBS if "pyarrow" in roots(imports(path))}
    assert users >= PARQUET
    pure = {"records", "errors", "settings", "plan", "survey", "method", "pool", "slot"}
    pure |= {"lock", "status", "config", "resolved", "devices", "options", "bug"}
    assert not users & pure


@pytest.mark.parametrize("name", ["errors", "records", "settings"])
def test_the_nouns_import_nothing_heavier_than_they_are(name):
    outside = imports(ROOT / "jobs" / f"{name}.py", everywhere=False)
    ours = {m for m in outside if m.partition(".")[0] in ("jobs", "sdxl")}
    assert {m.split(".")[1] for m in ours if "." in m} <= {"errors"}
    assert roots(outside) <= {*sys.stdlib_module_names, "jobs"}


@pytest.mark.parametrize("name", ["schedule", "noise", "samplers", "steps", "sizes"])
def test_the_host_side_of_the_model_is_numpy_alone(name):
    outside = imports(ROOT / "sdxl" / f"{name}.py", everywhere=False)
    allowed = {*sys.stdlib_module_names, "numpy", "sdxl"}
    assert roots(outside) <= allowed, outside
    ours = {m.split(".")[1] for m in outside if m.startswith("sdxl.")}
    assert ours <= {"schedule", "noise", "samplers", "steps", "sizes"}


@pytest.mark.parametrize("path", [*JOBS, *SDXL], ids=lambda path: path.stem)
def test_the_package_needs_only_what_it_declares(path):
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = text[text.index("\ndependencies = [") : text.index("\n]\n")]
    names = set(re.findall(r'"([a-z]+)[^"]*"', listed))
    modules = {{"pyyaml": "yaml", "pillow": "PIL"}.get(name, name) for name in names}
    allowed = {*sys.stdlib_module_names, *modules, "jobs", "sdxl"}
    assert roots(imports(path)) <= allowed


def loaded_by(program, *words):
    """Run Python and give the modules it had loaded when it ended."""
    text = (
        "import sys\nsys.argv[0] = 'sdxl-jobs'\ntry:\n"
        + "".join(f"    {line}\n" for line in program.splitlines())
        + "except SystemExit: pass\n"
        "print('loaded:', *sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", text, *map(str, words)],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "loaded:" in done.stderr, done.stderr
    return set(done.stderr.rpartition("loaded:")[2].split())


HEAVY = {"mindspore", "torch", "transformers", "diffusers"}
MAIN = "from jobs.cli import main\nmain()"


def test_help_loads_neither_the_model_nor_arrow():
    found = loaded_by(MAIN, "--help")
    assert "click" in found
    assert not found & (HEAVY | {"pyarrow", "PIL", "numpy"})


def test_planning_and_status_never_load_mindspore(tmp_path, checkpoint):
    manifest = tmp_path / "m.csv"
    manifest.write_text("prompt\na\n")
    found = loaded_by(MAIN, "plan", manifest, "--checkpoint", checkpoint)
    assert "pyarrow" in found
    assert not found & HEAVY
    assert not loaded_by(MAIN, "status", tmp_path) & HEAVY
    assert not loaded_by(MAIN, "verify", tmp_path) & HEAVY


def test_importing_the_supervisor_never_loads_mindspore():
    program = "import jobs.run, jobs.process, jobs.pool, jobs.sample, jobs.model"
    assert not loaded_by(program) & HEAVY
