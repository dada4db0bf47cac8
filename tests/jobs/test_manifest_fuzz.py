"""What a writer writes reads back the same; any bytes end in rows or in one line."""

import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jobs.errors import ManifestError
from jobs.manifest import open_manifest
from jobs.records import Rejected, Request

FAST = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

plain = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
prompts = st.text(plain, max_size=20)
one_line = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\n"), max_size=20
)
# Where writers and readers go wrong: quotes, delimiters and line ends side by side.
tricky = st.text(st.sampled_from('",\t\r\n a;'), max_size=12)


def tables(cells):
    return st.lists(st.tuples(cells, cells), min_size=1, max_size=6)


def seen(path):
    found = list(open_manifest(path).rows())
    assert all(isinstance(row, Request) for row in found), found
    return [(row.prompt, row.extras[0]) for row in found]


@FAST
@given(tables(prompts | tricky))
@example([('a""', '"'), ("\r", "\n"), ('",', ',"\n')])
def test_what_the_csv_writer_writes_reads_back_the_same(tmp_path, table):
    file = io.StringIO(newline="")
    writer = csv.writer(file, quoting=csv.QUOTE_ALL)
    writer.writerow(("prompt", "tag"))
    writer.writerows(table)
    path = tmp_path / "m.csv"
    path.write_bytes(file.getvalue().encode())
    assert seen(path) == table


@FAST
@given(tables(prompts | tricky))
def test_cells_that_the_csv_writer_leaves_bare_differ_in_nothing_but_none(
    tmp_path, table
):
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(("prompt", "tag"))
    writer.writerows(table)
    path = tmp_path / "m.csv"
    path.write_bytes(file.getvalue().encode())
    found = list(open_manifest(path).rows())
    assert len(found) == len(table)
    for row, (prompt, tag) in zip(found, table, strict=True):
        assert isinstance(row, Request) == bool(prompt)
        assert row.extras == (tag or None,)


@FAST
@given(tables(one_line | tricky.map(lambda text: text.translate({10: 95, 13: 95}))))
def test_what_the_csv_writer_writes_with_tabs_reads_back_the_same(tmp_path, table):
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL)
    writer.writerow(("prompt", "tag"))
    writer.writerows(table)
    path = tmp_path / "m.tsv"
    path.write_bytes(file.getvalue().encode())
    assert seen(path) == table


@FAST
@given(tables(st.text(st.characters(exclude_categories=["Cs"]), max_size=20)))
def test_what_json_writes_reads_back_the_same(tmp_path, table):
    path = tmp_path / "m.jsonl"
    lines = [json.dumps({"prompt": p, "tag": t}) for p, t in table]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert seen(path) == table


@FAST
@given(
    tables(st.text(st.characters(exclude_categories=["Cs"]), max_size=20)),
    st.lists(st.none() | st.integers(0, 2**32 - 1), min_size=6, max_size=6),
)
def test_what_arrow_writes_reads_back_the_same(tmp_path, table, seeds):
    path = tmp_path / "m.parquet"
    names = ("prompt", "tag")
    columns = dict(zip(names, map(list, zip(*table, strict=True)), strict=True))
    columns["seed"] = pa.array(seeds[: len(table)], pa.int64())
    pq.write_table(pa.table(columns), path)
    assert seen(path) == table
    assert [row.seed for row in open_manifest(path).rows()] == seeds[: len(table)]


HEADS = [b"", b"prompt,id,steps\n", b"prompt\tid\n", b'{"prompt": "a"}\n', b"PAR1"]
WORDS = (
    b'" "" , \t \n \r\n \0 \xff a 8 { } {"prompt": "id" : [ ] null 1e999 '
    b"\\ud800 - ../ true"
)
pieces = st.sampled_from([*WORDS.split(b" "), b" ", b"\x1b[31m", "🦊".encode()])


@settings(parent=FAST, max_examples=150)
@given(
    st.sampled_from(HEADS),
    st.lists(pieces | st.binary(max_size=8), max_size=40).map(b"".join),
    st.sampled_from(["csv", "tsv", "jsonl", "parquet"]),
)
def test_any_bytes_end_in_rows_or_one_error_line(tmp_path, head, body, suffix):
    path = tmp_path / f"m.{suffix}"
    path.write_bytes(head + body)
    try:
        found = list(open_manifest(path).rows())
    except ManifestError as error:
        assert path.name in str(error)
        return
    assert all(isinstance(row, Request | Rejected) for row in found)
    assert [row.source_row for row in found] == list(range(len(found)))
    numbers = [int(row.location.rsplit(" ", 1)[1]) for row in found]
    assert numbers == sorted(set(numbers))
    for row in found:
        row.prompt_id.encode()
        (row.prompt or "").encode()
        if isinstance(row, Rejected):
            assert row.reason.isprintable(), row.reason


@pytest.mark.parametrize(
    "line",
    [b'a,"b\n', b'"a""\n', b'""\n', b'"\n', b'a"b\n', b'"a"b\n'],
    ids=repr,
)
def test_reading_takes_time_in_proportion_to_the_file(tmp_path, line, monkeypatch):
    # Counts the lines taken, not seconds: each may be looked at again only by a quote
    # that opens before it, and at most MAX_RECORD_LINES of those lines further on.
    from jobs import delimited

    monkeypatch.setattr(delimited, "MAX_RECORD_LINES", 10)
    count = 0
    real = delimited.Lines._next

    def counted(self):
        nonlocal count
        count += 1
        return real(self)

    monkeypatch.setattr(delimited.Lines, "_next", counted)
    path = tmp_path / "m.csv"
    path.write_bytes(b"prompt,tag\n" + line * 500)
    list(open_manifest(path).rows())
    assert count <= 12 * 500
