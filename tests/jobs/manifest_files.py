"""Write a manifest in one line, read it back in another."""

import json

import pytest

from jobs.errors import ManifestError
from jobs.manifest import open_manifest


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
