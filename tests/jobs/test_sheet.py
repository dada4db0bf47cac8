"""A contact sheet must show every picture it is asked for, and hide no failure."""

import numpy as np
import pytest
from jobs_shared import call, numbered, rows_of, run_job, write_csv
from PIL import Image

from jobs.errors import ConfigError, OutputError
from jobs.sheet import GAP, PAPER, make_sheet

SIDE = 64


@pytest.fixture
def job(tmp_path, checkpoint):
    """A finished job of five pictures, the third of which failed."""
    rows = numbered(5)
    rows[2] = ("r2", "make-nan")
    manifest = write_csv(tmp_path / "m.csv", rows)
    run_job(manifest, tmp_path / "out", checkpoint)
    return tmp_path / "out"


def sheet(job, out, **changes):
    layout = {"columns": 3, "limit": 60, "side": SIDE} | changes
    with Image.open(make_sheet(job, out=out, **layout)) as image:
        return np.asarray(image.convert("RGB"))


def corner(page, row, column):
    """Return the picture part of one tile."""
    height = (page.shape[0] - GAP) // 2
    top, left = GAP + row * height, GAP + column * (SIDE + GAP)
    return page[top : top + SIDE, left : left + SIDE]


def test_tiles_are_the_job_s_pictures_in_the_manifest_s_order(job, tmp_path):
    """Oracle: the image files, which are as large as a tile here."""
    page = sheet(job, tmp_path / "s.png")
    for i, row in enumerate(rows_of(job)):
        if row["status"] == "ok":
            with Image.open(job / row["image_path"]) as image:
                wanted = np.asarray(image)
            assert np.array_equal(corner(page, *divmod(i, 3)), wanted)


def test_a_failed_picture_has_a_gray_tile_and_an_absent_one_paper(job, tmp_path):
    page = sheet(job, tmp_path / "s.png")
    assert tuple(corner(page, 0, 2)[0, 0]) == (225, 225, 225)
    assert (corner(page, 1, 2) == PAPER).all()


def test_a_sheet_is_cut_to_its_limit_and_never_wider_than_its_pictures(job, tmp_path):
    page = sheet(job, tmp_path / "s.png", limit=2, columns=6)
    assert page.shape[1] == 2 * (SIDE + GAP) + GAP


@pytest.mark.parametrize("harm", ["cut", "link", "gone"])
def test_an_image_that_is_not_what_was_written_is_not_shown(job, tmp_path, harm):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (SIDE, SIDE), (1, 2, 3)).save(secret)
    path = job / rows_of(job)[0]["image_path"]
    data = path.read_bytes()
    path.unlink()
    if harm == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif harm == "link":
        path.symlink_to(secret)
    page = sheet(job, tmp_path / "s.png")
    assert tuple(corner(page, 0, 0)[0, 0]) == (225, 225, 225)


def test_odd_texts_and_formats_are_drawn(tmp_path, checkpoint):
    rows = [("a", "ünïcode 猫 \u202e \x07"), ("b", ""), ("c", "w" * 3_000)]
    manifest = write_csv(tmp_path / "m.csv", rows)
    run_job(manifest, tmp_path / "out", checkpoint, "output.format=jpeg")
    assert sheet(tmp_path / "out", tmp_path / "s.jpg").shape[1] == 3 * (SIDE + GAP) + 10


def test_a_folder_without_rows_and_a_name_without_a_kind_are_refused(job, tmp_path):
    with pytest.raises(ConfigError, match=r"use \.png"):
        sheet(job, tmp_path / "s.txt")
    with pytest.raises(OutputError, match="no result rows"):
        make_sheet(tmp_path, out=None, columns=1, limit=1, side=SIDE)


def test_the_command_writes_into_the_job_s_folder_and_verify_minds_it_not(job):
    done = call("sheet", job, "--side", "64", cwd=job)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("contact_sheet.png")
    assert (job / "contact_sheet.png").is_file()
    assert "contact_sheet" not in call("verify", job, cwd=job).stdout
