"""Manifests: four formats read alike; what can't be used is named by file and line."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.delimited import MAX_LINE
from jobs.errors import ManifestError
from jobs.manifest import MAX_ID, open_manifest
from jobs.records import Rejected, Request

PARTI = Path(__file__).parents[1] / "data" / "parti_prompts.tsv"


def read(path, **options):
    return list(open_manifest(path, **options).rows())


def written(tmp_path, content, name="m.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(tmp_path, content, name="m.csv", **options):
    return read(written(tmp_path, content, name), **options)


def jsonl(tmp_path, *lines):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    return rows(tmp_path, "\n".join(texts), "m.jsonl")


def one(found):
    (row,) = found
    return row


def refused(tmp_path, content, name="m.csv", **options):
    with pytest.raises(ManifestError) as caught:
        rows(tmp_path, content, name, **options)
    return f"{caught.value} {caught.value.hint}"


def test_four_formats_give_the_same_requests(tmp_path):
    # Oracle: each format's own way to say not given, empty text and typed values.
    table = [
        {"id": "a", "prompt": "a, b", "seed": 7, "guidance_scale": 7.5, "tag": "x"},
        {"id": "b", "prompt": "", "negative_prompt": "", "tag": None},
        {"id": "c", "prompt": 'ünïcode "quoted" 🦊', "steps": 8, "tag": ""},
    ]
    names = [*table[0], "negative_prompt", "steps"]

    def cell(value, delimiter):
        if value is None:
            return ""
        text = str(value)
        if text == "" or '"' in text or delimiter in text:
            return '"' + text.replace('"', '""') + '"'
        return text

    def delimited(delimiter):
        lines = [delimiter.join(names)]
        for row in table:
            cells = [cell(row.get(name), delimiter) for name in names]
            lines.append(delimiter.join(cells))
        return "\n".join(lines) + "\n"

    pq.write_table(
        pa.table({name: [row.get(name) for row in table] for name in names}),
        tmp_path / "m.parquet",
    )
    found = {
        "csv": rows(tmp_path, delimited(","), "m.csv"),
        "tsv": rows(tmp_path, delimited("\t"), "m.tsv"),
        "jsonl": rows(tmp_path, "\n".join(map(json.dumps, table)), "m.jsonl"),
        "parquet": read(tmp_path / "m.parquet"),
    }

    def plain(row):
        assert isinstance(row, Request), row
        fields = {name: getattr(row, name) for name in row.__slots__}
        del fields["location"]
        return fields

    expected = [plain(row) for row in found["csv"]]
    assert [row["prompt"] for row in expected] == [row["prompt"] for row in table]
    assert expected[1]["negative_prompt"] == ""
    assert expected[0]["negative_prompt"] is None
    assert [row["extras"] for row in expected] == [("x",), (None,), ("",)]
    for kind, parsed in found.items():
        assert [plain(row) for row in parsed] == expected, kind


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_a_bare_empty_cell_is_not_given_and_a_quoted_one_is_empty_text(tmp_path, kind):
    mark = {"csv": ",", "tsv": "\t"}[kind]
    text = 'prompt,negative_prompt,tag\na,,\nb,"",""\n5" disk,,x\n"c",,""\n'
    found = rows(tmp_path, text.replace(",", mark), f"m.{kind}")
    assert [(r.prompt, r.negative_prompt, r.extras) for r in found] == [
        ("a", None, (None,)),
        ("b", "", ("",)),
        ('5" disk', None, ("x",)),
        ("c", None, ("",)),
    ]


def test_cells_of_several_lines_keep_their_line_ends_and_the_line_numbers(tmp_path):
    found = rows(tmp_path, 'prompt,tag\n"a\r\nb\n\nc",1\nd,2\n\n"e\n",\nf,4\n')
    assert [(r.prompt, r.location) for r in found] == [
        ("a\r\nb\n\nc", "m.csv line 2"),
        ("d", "m.csv line 6"),
        ("e\n", "m.csv line 8"),
        ("f", "m.csv line 10"),
    ]


def test_a_quote_that_never_closes_spoils_its_own_line_only(tmp_path):
    lines = ["prompt,tag", 'a,"oops', "b,1", "c,2", 'd,"oops too', *["e,3"] * 3_000]
    found = rows(tmp_path, "\n".join(lines))
    assert "never closes" in found[0].reason
    assert "never closes" in found[3].reason
    assert [r.location for r in found[:4]] == [f"m.csv line {i}" for i in (2, 3, 4, 5)]
    assert sum(isinstance(r, Request) for r in found) == 3_002


def test_text_behind_a_closing_quote_is_named(tmp_path):
    found = rows(tmp_path, 'prompt\n"a" b\nc\n')
    assert "not doubled" in found[0].reason
    assert found[1].prompt == "c"


def test_tsv_takes_a_quote_that_encloses_no_whole_cell_as_a_character(tmp_path):
    text = 'prompt\ttag\n"G I" in paint\t\n"a\tb"\t1\n"say ""hi"""\t5"\n"\t\n'
    found = rows(tmp_path, text, "m.tsv")
    assert [(r.prompt, r.extras) for r in found] == [
        ('"G I" in paint', (None,)),
        ("a\tb", ("1",)),
        ('say "hi"', ('5"',)),
        ('"', (None,)),
    ]


def test_the_quotes_of_parti_prompts_stay(tmp_path):
    # Oracle: the file cut at its tabs, as its README says to read it.
    lines = PARTI.read_text(encoding="utf-8").splitlines()
    found = read(PARTI, prompt_column="Prompt")
    assert len(found) == 1_632
    assert found[1_560].prompt.startswith('"G I G G L E" painted in thick')
    assert [r.prompt for r in found] == [line.split("\t")[0] for line in lines[1:]]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"prompt\na\xff\nb\n", "not UTF-8 at byte 2"),
        (b"prompt\na\0b\nb\n", "NUL at byte 2"),
        (b"prompt,tag\na\nb,1\n", "1 cells where the header has 2"),
        (b"prompt,tag\na,1,2\nb,1\n", "3 cells where the header has 2"),
        (b"prompt,tag\n,1\nb,1\n", "prompt: missing"),
        (b"prompt\n" + b"x" * 100_001 + b"\nb\n", "100001 characters"),
        (b"prompt\n" + b"x" * (MAX_LINE + 9) + b"\nb\n", "a line of over 4 MB"),
        (b'prompt\n"' + b"x" * (MAX_LINE + 9) + b"\nb\n", "a line of over 4 MB"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_a_bad_line_is_rejected_with_its_reason_and_the_next_is_read(
    tmp_path, content, said
):
    bad, good = rows(tmp_path, content)
    assert isinstance(bad, Rejected)
    assert said in bad.reason
    assert bad.location == "m.csv line 2"
    assert (good.prompt, good.location) == ("b", "m.csv line 3")


def test_an_overlong_line_within_an_open_quote_loses_no_line(tmp_path):
    long = "x" * (MAX_LINE + 9)
    found = rows(tmp_path, f'prompt\n"open\n{long}\nb\nc\n')
    assert "never closes" in found[0].reason
    assert "over 4 MB" in found[1].reason
    assert [r.prompt for r in found[2:]] == ["b", "c"]


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        (b"", "m.csv", "empty file"),
        (b"\n\n", "m.csv", "empty file"),
        (b"", "m.jsonl", "empty file"),
        (b"[1]\n", "m.jsonl", "no line of it is a JSON object"),
        (b"a,b\n1,2\n", "m.csv", "no column `prompt`"),
        (b"Prompts,b\n1,2\n", "m.csv", "did you mean `Prompts`?"),
        (b'{"text": "a"}\n', "m.jsonl", "no column `prompt`"),
        (b"prompt,prompt\n", "m.csv", "repeated column name"),
        (b"prompt,\n", "m.csv", "empty or repeated"),
        (b"prompt,a\xff\n", "m.csv", "line 1: not UTF-8"),
        (b'prompt,"a\n', "m.csv", "line 1: a quote never closes"),
        ("prompt\na\n".encode("utf-16"), "m.csv", "UTF-16"),
        (b"PAR1....", "m.csv", "not text"),
        (b"\x1f\x8b....", "m.jsonl", "not text"),
        (b"prompt,status\na,b\n", "m.csv", "`status` has the name of a result column"),
        (b'{"prompt": "a", "seed_source": 1}\n', "m.jsonl", "`seed_source` has the"),
        (b"prompt\na\n", "m.parquet", "not a readable Parquet file"),
        (b"", "m.parquet", "not a readable Parquet file"),
        (b"prompt\na\n", "m.txt", "unknown kind of manifest `.txt`"),
    ],
)
def test_a_file_that_is_no_manifest_is_refused_in_one_line(
    tmp_path, content, name, said
):
    message = refused(tmp_path, content, name)
    assert said in message
    assert name in message
    assert "\n" not in message


def test_a_missing_file_a_folder_and_an_unreadable_file_are_refused(
    tmp_path, monkeypatch
):
    with pytest.raises(ManifestError, match="no such file"):
        open_manifest(tmp_path / "m.csv")
    (tmp_path / "d.csv").mkdir()
    with pytest.raises(ManifestError, match="no such file"):
        open_manifest(tmp_path / "d.csv")
    path = written(tmp_path, "prompt\na\n", "locked.csv")

    def deny(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)
    with pytest.raises(ManifestError, match=r"locked\.csv: Permission denied"):
        open_manifest(path)


def test_a_header_alone_is_a_manifest_without_rows(tmp_path):
    assert rows(tmp_path, "prompt\n") == []


def test_byte_order_mark_and_windows_line_ends_are_no_content(tmp_path):
    found = rows(tmp_path, b"\xef\xbb\xbfprompt,tag\r\na,\r\nb,x\r\n")
    assert [(r.prompt, r.extras) for r in found] == [("a", (None,)), ("b", ("x",))]
    found = rows(tmp_path, b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n', "m.jsonl")
    assert [r.prompt for r in found] == ["a"]


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


def test_columns_of_other_names_hold_prompts_and_ids(tmp_path):
    text = "Prompt,name\nx,one\ny,two\n"
    found = rows(tmp_path, text, prompt_column="Prompt", id_column="name")
    assert [(r.prompt_id, r.prompt) for r in found] == [("one", "x"), ("two", "y")]
    assert "no column `nam`" in refused(
        tmp_path, text, prompt_column="Prompt", id_column="nam"
    )
    # Two columns of prompts would be a guess: the other one can't pass through.
    assert "`prompt` has the name" in refused(
        tmp_path, "Prompt,prompt\nx,y\n", prompt_column="Prompt"
    )


def test_rows_without_an_id_are_known_by_their_content(tmp_path):
    first = rows(tmp_path, "prompt,seed\na,1\nb,2\n")
    second = rows(tmp_path, "seed,prompt\n2,b\n1,a\n")
    assert {r.prompt_id for r in first} == {r.prompt_id for r in second}
    # A golden value: results of earlier versions must be found again.
    assert first[0].prompt_id == "be6a2332d61b9dc4"


def test_a_parquet_file_that_ends_too_soon_is_refused(tmp_path):
    pq.write_table(pa.table({"prompt": ["a"] * 100}), tmp_path / "whole.parquet")
    data = (tmp_path / "whole.parquet").read_bytes()
    assert "not a readable Parquet" in refused(tmp_path, data[:-20], "m.parquet")
    torn = data[:4] + b"\xff" * 40 + data[44:]
    assert "beyond row 0" in refused(tmp_path, torn, "m.parquet")


def test_a_row_of_parquet_is_named_by_its_number(tmp_path):
    pq.write_table(pa.table({"prompt": ["a", None, "c"]}), tmp_path / "m.parquet")
    found = read(tmp_path / "m.parquet")
    assert found[1].location == "m.parquet row 2"
    assert "prompt: missing" in found[1].reason
