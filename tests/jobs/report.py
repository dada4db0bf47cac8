"""A measured report's place in a document: between two markers, replaced whole."""


def put_into(path, text, start, end):
    """Replace what stands between the markers of a document."""
    document = path.read_text(encoding="utf-8")
    before, found, rest = document.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{path} has no {start} … {end}")
    path.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")
