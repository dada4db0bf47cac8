"""Rows of a manifest: ids, settings and JSON values that are taken, and those not."""

import json

import pytest
from manifest_files import jsonl, one, written

from jobs.errors import ManifestError
from jobs.manifest import MAX_ID, open_manifest
from jobs.records import Rejected, Request


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("../../x", "reads as a path"),
        ("a/../b", "reads as a path"),
        ("/etc/passwd", "reads as a path"),
        ("..\\x", "reads as a path"),
        ("a\x1b[31m", r"a\x1b[31m` holds control characters"),
        ("a\nb", r"a\x0ab` holds control characters"),
        ("a\u202eb", "holds control characters"),
        ("x" * 600, f"600 characters, at most {MAX_ID}"),
        ("   ", "can't be an id"),
        ("", "can't be an id"),
        (True, "can't be an id"),
        (1.5, "can't be an id"),
        ("\ud800", "half a surrogate pair"),
        (["a"], "can't be an id"),
        ({"a": 1}, "can't be an id"),
    ],
    ids=repr,
)
def test_an_id_that_is_no_plain_name_rejects_its_row(tmp_path, asked, said):
    bad, good = jsonl(tmp_path, {"id": asked, "prompt": "a"}, {"id": 7, "prompt": "b"})
    assert said in bad.reason
    assert bad.reason.isprintable()
    assert good.prompt_id == "7"


@pytest.mark.parametrize("asked", ["日本語-🦊", "a b.c/d", "..a", "x" * MAX_ID, "0"])
def test_an_id_may_be_any_plain_name(tmp_path, asked):
    assert one(jsonl(tmp_path, {"id": asked, "prompt": "a"})).prompt_id == asked


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("width", 1000, "1000 is not a multiple of 64 (near: 960, 1024)"),
        ("width", "wide", "`wide` is not a whole number"),
        ("height", 0, "0 is outside 64 to 8192"),
        ("height", 99_968, "outside 64 to 8192"),
        ("steps", 0, "0 is outside 1 to 1000"),
        ("steps", 8.5, "`8.5` is not a whole number"),
        ("steps", True, "`True` is not a whole number"),
        ("steps", "1e400", "not a whole number"),
        ("steps", "8_0", "not a whole number"),
        ("steps", [8], "not a whole number"),
        ("steps", "9" * 5_000, "not a whole number"),
        ("sampler", "EulerEDMSample", "did you mean `EulerEDMSampler`?"),
        ("sampler", "eulerEDMsampler", "did you mean `EulerEDMSampler`?"),
        ("sampler", ["EulerEDMSampler"], "unknown sampler"),
        ("sampler", "\x1b[2J", r"`\x1b[2J`"),
        ("discretization", {"a": 1}, "unknown discretization"),
        ("guidance_scale", "nan", "outside 0 to 100"),
        ("guidance_scale", "inf", "outside 0 to 100"),
        ("guidance_scale", "-1", "outside 0 to 100"),
        ("guidance_scale", False, "not a number"),
        ("guidance_scale", "1e400", "outside 0 to 100"),
        ("seed", -1, "outside 0 to 4294967295"),
        ("seed", 2**32, "outside 0 to 4294967295"),
        ("seed", 2**70, "outside 0 to 4294967295"),
        ("num_images", 0, "outside 1 to 100000"),
        ("crop_top", -1, "outside 0 to 65535"),
        ("negative_prompt", 5, "expected text, found int"),
        ("negative_prompt", "\udfff", "half a surrogate pair"),
    ],
    ids=lambda value: str(value)[:20].encode("ascii", "replace").decode(),
)
def test_a_setting_that_is_impossible_rejects_its_row(tmp_path, name, value, said):
    bad, good = jsonl(tmp_path, {"prompt": "a", name: value}, {"prompt": "b"})
    assert isinstance(bad, Rejected)
    assert bad.reason.startswith(f"{name}: ")
    assert said in bad.reason
    assert len(bad.reason) < 400
    assert isinstance(good, Request)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("steps", 8.0, 8),
        ("steps", "8.0", 8),
        ("steps", " 8 ", 8),
        ("seed", 0, 0),
        ("seed", 2**32 - 1, 2**32 - 1),
        ("width", "128.0", 128),
        ("guidance_scale", "7,5".replace(",", "."), 7.5),
        ("guidance_scale", 0, 0.0),
    ],
)
def test_a_setting_may_be_written_as_pandas_writes_it(tmp_path, name, value, expected):
    assert getattr(one(jsonl(tmp_path, {"prompt": "a", name: value})), name) == expected


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a", "prompt": "b"}', "a key stands twice"),
        ('{"prompt": NaN}', "`NaN` is not JSON"),
        ('{"prompt": "a", "guidance_scale": -Infinity}', "`-Infinity` is not JSON"),
        ("{", "not a line of JSON"),
        ("[1, 2]", "expected a JSON object"),
        ('"text"', "expected a JSON object"),
        ('{"prompt": null}', "prompt: missing"),
        ("{}", "prompt: missing"),
        ('{"prompt": 5}', "prompt: expected text, found int"),
        ('{"prompt": "\\ud800"}', "half a surrogate pair at character 1"),
        ('{"prompt": "a", "x": ' + "[" * 5_000 + "]" * 5_000 + "}", "nested"),
        ('{"prompt": "a", "x": ' + "[" * 900 + "]" * 900 + "}", "nested"),
        ('{"prompt": "a", "x": ' + "9" * 5_000 + "}", "not a line of JSON"),
    ],
    ids=lambda value: value[:30],
)
def test_a_line_of_json_that_is_no_row_is_rejected(tmp_path, line, said):
    bad, good = jsonl(tmp_path, line, {"prompt": "b"})
    assert isinstance(bad, Rejected)
    assert said in bad.reason
    assert bad.location == "m.jsonl line 1"
    assert isinstance(good, Request)


def test_values_of_json_pass_through_as_text(tmp_path):
    path = written(
        tmp_path,
        '{"prompt": "a", "tags": ["x", {"y": 1}], "n": 1.5, "flag": true}\n'
        '{"prompt": "b", "late": "é", "tags": "\\ud800!"}\n',
        "m.jsonl",
    )
    manifest = open_manifest(path)
    assert list(manifest.extras) == ["tags", "n", "flag", "late"]
    assert [row.extras for row in manifest.rows()] == [
        ('["x", {"y": 1}]', "1.5", "true", None),
        ("?!", None, None, "é"),
    ]


def test_a_key_that_no_column_can_be_called_rejects_its_row(tmp_path):
    found = jsonl(tmp_path, '{"prompt": "a", "\\ud800": 1}', {"prompt": "b"})
    assert "half a surrogate pair" in found[0].reason
    assert isinstance(found[1], Request)


def test_more_names_than_a_table_can_hold_are_refused(tmp_path):
    lines = [json.dumps({"prompt": "a", f"k{i}": i}) for i in range(2_000)]
    with pytest.raises(ManifestError, match="over 1000 different keys"):
        jsonl(tmp_path, *lines)
