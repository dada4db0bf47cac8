"""Settings: every name and type is checked; a refusal is one line with a way out."""

import json
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs_shared import ROOT

from jobs import settings as row_settings
from jobs.binding import fingerprint
from jobs.config import from_dict, load
from jobs.errors import ConfigError
from jobs.resolved import resolve

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def refused(tmp_path, text, *overrides):
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    message = f"{caught.value} {caught.value.hint or ''}"
    assert "\n" not in message
    assert len(message) < 800
    return message


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_opens_with_purpose_cost_and_command(path):
    load(path)
    head = path.read_text(encoding="utf-8").splitlines()[:12]
    for word in ("# Purpose:", "# Cost:", "# Command: sdxl-jobs run "):
        assert any(line.startswith(word) for line in head), word


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sampeling:\n  steps: 8\n", "did you mean `sampling`?"),
        ("sampling:\n  step: 8\n", "did you mean `steps`?"),
        ("sampling:\n  frobnicate: 8\n", "known: `aesthetic_score`"),
        ("sampling:\n  steps: many\n", "sampling.steps is `many`; expected a whole"),
        ("sampling:\n  steps: 8.5\n", "expected a whole number"),
        ("sampling:\n  steps: true\n", "expected a whole number"),
        ("sampling:\n  steps: [8]\n", "expected a whole number"),
        ("sampling:\n  steps: 0\n", "sampling.steps: 0 is outside 1 to 1000"),
        ("sampling:\n  steps: 0x" + "f" * 6_000, "a huge number"),
        ("sampling:\n  steps: " + "9" * 6_000, "not readable as YAML"),
        ("sampling:\n  guidance_scale: .nan\n", "expected a number"),
        ("sampling:\n  guidance_scale: -.inf\n", "expected a number"),
        ("sampling:\n  width: 1000\n", "not a multiple of 64"),
        ("sampling:\n  sampler: EulerEDM\n", "did you mean `EulerEDMSampler`?"),
        ("sampling:\n  noise: gauss\n", "sampling.noise is `gauss`"),
        ("sampling:\n  negative_prompt: no\n", "quote them"),
        ("sampling:\n  negative_prompt: [a]\n", "expected text"),
        ("sampling: 8\n", "section `sampling` must hold"),
        ("- sampling\n", "expected sections"),
        ("model:\n  checkpoint: [a]\n", "expected text"),
        ("model:\n  loras: [a]\n", "every entry needs a `path`"),
        ("model:\n  loras: 5\n", "expected a list"),
        ("output:\n  quality: 101\n", "it must be 0 to 100"),
        ("output:\n  commit_every: 0\n", "it must be at least 1"),
        ("model:\n  vae_tile: 100\n", "a multiple of 64 from 256 to 8192"),
        ("runtime:\n  workers: -1\n", "it must be at least 1"),
        ("runtime:\n  jit_level: O3\n", "did you mean"),
        ("sampling:\n  steps: 8\n  steps: 9\n", "line 2: a key stands twice"),
        ("sampling:\n  steps: 8\nsampling:\n  seed: 9\n", "a key stands twice"),
        ("a: &a [x]\nsampling: *a\n", "line 2: aliases are not taken"),
        ("sampling: !!python/object/apply:os.system [ls]\n", "line 1: could not"),
        ("sampling:\n  seed: 2024-13-45\n", "not readable as YAML"),
        ("sampling:\n  seed: !!bool maybe\n", "not readable as YAML"),
        ("[" * 5_000, "nested too deeply"),
        ("sampling: {\n", "not readable as YAML at line"),
        ("? [a]\n: 1\n", "unhashable key"),
        (b"\xff\xfe", "not UTF-8 text"),
        ("\x1b[31m: 1\n", "not readable as YAML"),
        ('"\\e[31m": 1\n', r"`\x1b[31m`"),
        ("#" * ((1 << 20) + 1), "over 1 MB of settings"),
    ],
    ids=lambda value: str(value)[:30].encode("unicode_escape").decode(),
)
def test_what_can_not_be_meant_is_refused_in_one_line(tmp_path, text, said):
    assert said in refused(tmp_path, text)


def test_a_few_lines_of_yaml_can_not_stand_for_a_billion_values(tmp_path):
    bomb = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    bomb += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    bomb += ["sampling:", "  steps: *a11"]
    assert "aliases" in refused(tmp_path, "\n".join(bomb))
    merges = ["m0: &m0 {x: 1}"]
    merges += [f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}" for i in (1, 2)]
    assert "aliases" in refused(tmp_path, "\n".join(merges))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sampling.step=8", "did you mean `steps`?"),
        ("sampeling.steps=8", "did you mean `sampling`?"),
        ("steps=8", "expected section.key=value"),
        ("sampling.steps", "expected section.key=value"),
        ("=", "expected section.key=value"),
        ("sampling.steps=many", "expected a whole number"),
        ("sampling.steps={a: 1}", "expected a whole number"),
        ("sampling.seed=2024-13-45", "expected a whole number"),
        ("sampling.seed=-1", "outside 0 to"),
    ],
)
def test_an_override_is_held_to_the_same_rules(override, said):
    with pytest.raises(ConfigError) as caught:
        load(None, [override])
    assert said in f"{caught.value} {caught.value.hint}"


def test_overrides_win_over_the_file_and_the_last_one_wins(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("sampling:\n  steps: 8\n  guidance_scale: 1e-3\n")
    config = load(path, ["sampling.steps=9", "sampling.steps=10.0"])
    assert config.sampling.steps == 10
    assert config.sampling.guidance_scale == 1e-3
    assert load(path, ["sampling.negative_prompt='no'"]).sampling.negative_prompt == (
        "no"
    )
    assert load(None, ["runtime.devices=0"]).runtime.devices == "0"
    assert load(None, ["runtime.device_target=Ascend"]).runtime.workers is None


def test_a_checkpoint_in_a_file_is_taken_from_its_folder_and_an_override_is_not(
    tmp_path,
):
    path = tmp_path / "c.yaml"
    path.write_text("model:\n  checkpoint: ../w/x.safetensors\n")
    assert load(path).model.checkpoint == str(tmp_path / "../w/x.safetensors")
    path.write_text(f"model:\n  checkpoint: {tmp_path}/x.safetensors\n")
    assert load(path).model.checkpoint == str(tmp_path / "x.safetensors")
    config = load(path, ["model.checkpoint=y.safetensors"])
    assert config.model.checkpoint == "y.safetensors"


def test_a_missing_or_unreadable_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file") as caught:
        load(tmp_path / "none.yaml")
    assert caught.value.hint == "configs/ holds ready ones"
    (tmp_path / "tiny.yaml").touch()
    with pytest.raises(ConfigError, match="No such file") as caught:
        load(tmp_path / "tinny.yaml")
    assert caught.value.hint == "did you mean `tiny.yaml`?"
    with pytest.raises(ConfigError, match="Is a directory"):
        load(tmp_path)


def test_a_config_survives_its_own_json():
    # Oracle: equality. `resume` reads back what `run` wrote into job.json.
    config = load(
        CONFIGS[0],
        ["model.loras=[{path: a, scale: 0.5}]", "refiner.checkpoint=b"],
    )
    assert from_dict(json.loads(json.dumps(config.as_dict()))) == config


def test_defaults_are_filled_in_from_the_model_and_the_machine():
    resolved = resolve(load(None, ["runtime.workers=3"]), native_size=128)
    assert (resolved.width, resolved.height) == (128, 128)
    assert (resolved.device_target, resolved.devices) == ("CPU", (0, 1, 2))
    assert resolved.precision == "fp32"
    assert resolved.guider == "VanillaCFG"
    assert resolved.batch_size == 1
    wide = load(None, ["sampling.width=192", "runtime.workers=1"])
    resolved = resolve(wide, native_size=128, kind="lcm")
    assert (resolved.width, resolved.height) == (192, 128)
    assert resolved.guider == "IdentityGuider"


def test_the_fingerprint_knows_what_changes_pixels_and_nothing_else():
    def fields(*overrides):
        config = load(None, ["runtime.workers=1", *overrides])
        return resolve(config, native_size=128).pixels_depend_on()

    plain = fields()
    same = fields("runtime.workers=2", "runtime.batch_size=4", "output.commit_every=1")
    assert fingerprint(same) == fingerprint(plain)
    assert fingerprint(fields("sampling.width=128")) == fingerprint(plain)
    for change in (
        "sampling.guidance_scale=6",
        "sampling.seed=43",
        "sampling.noise=torch",
        "sampling.negative_prompt=x",
        "sampling.negative_prompt=''",
        "model.precision=fp16",
        "model.vae_tile=1024",
        "output.format=jpeg",
    ):
        assert fingerprint(fields(change)) != fingerprint(plain), change


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("steps", Decimal("8"), 8),
        ("steps", Decimal("8.5"), None),
        ("steps", Decimal("NaN"), None),
        ("steps", Decimal("Infinity"), None),
        ("steps", b"8", None),
        ("guidance_scale", Decimal("7.5"), 7.5),
        ("guidance_scale", b"7.5", None),
        ("guidance_scale", 10**400, None),
    ],
)
def test_a_parquet_value_counts_as_a_number_only_where_it_is_one(name, value, expected):
    if expected is None:
        with pytest.raises(ValueError, match=r"not a (whole )?number|outside"):
            row_settings.parse(name, value)
    else:
        assert row_settings.parse(name, value) == expected


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**4_400, 10**4_401)
    | st.floats()
    | st.text(max_size=8)
    | st.dates()
    | st.binary(max_size=4)
)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(scalars, v, max_size=3)
)
SECTIONS = ("model", "sampling", "refiner", "runtime", "output")
KEYS = ("steps", "checkpoint", "loras", "precision", "sampler", "batch_size", "quality")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.dictionaries(
        st.sampled_from(SECTIONS),
        st.dictionaries(st.sampled_from(KEYS) | scalars, values, max_size=3),
        max_size=3,
    )
)
def test_any_tree_of_values_is_a_config_or_an_error(tree):
    try:
        from_dict(tree)
    except ConfigError as error:
        assert str(error).isprintable(), str(error)


WORDS = """sampling: steps : 8 - [ ] { } &a *a !!int ? <<: ' " # | 2024-02-31 0x_ 1e9 ~
% --- \x07 é .nan = 1:99"""
pieces = st.sampled_from([*WORDS.split(), "\n", "  ", "\t", ": ", "- ", "&a "])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(pieces, max_size=20).map("".join))
def test_any_text_is_a_config_or_an_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        load(Path(path))
    except ConfigError as error:
        assert "\n" not in str(error)


def test_compiled_graphs_are_kept_where_asked_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def folder(*overrides):
        config = load(None, ["runtime.workers=1", *overrides])
        return resolve(config, native_size=128).compile_cache

    assert folder() == tmp_path / "sdxl-jobs" / "graphs"
    assert folder("runtime.compile_cache=auto") == folder()
    assert folder("runtime.compile_cache=here") == tmp_path / "here"
    assert folder("runtime.compile_cache=off") is None  # a truth value to YAML
    assert folder('runtime.compile_cache="off"') is None
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", homeless)
    assert folder() is None
