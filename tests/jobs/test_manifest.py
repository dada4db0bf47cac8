"""Manifests: four formats read alike; what can't be used is named by file and line."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from manifest_files import read, refused, rows, written

from jobs.delimited import MAX_LINE
from jobs.errors import ManifestError
from jobs.manifest import open_manifest
from jobs.records import Rejected, Request

PARTI = Path(__file__).parents[1] / "data" / "parti_prompts.tsv"


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
    with pytest.raises(ManifestError, match="no such file") as caught:
        open_manifest(tmp_path / "m.csv")
    assert "give the path" in caught.value.hint
    (tmp_path / "d.csv").mkdir()
    with pytest.raises(ManifestError, match="is a folder"):
        open_manifest(tmp_path / "d.csv")
    with pytest.raises(ManifestError, match="is a folder"):
        open_manifest(tmp_path)
    written(tmp_path, "prompt\na\n", "prompts.csv")
    with pytest.raises(ManifestError, match="no such file") as caught:
        open_manifest(tmp_path / "prompt.csv")
    assert caught.value.hint == "did you mean `prompts.csv`?"
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
