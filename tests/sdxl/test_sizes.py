"""The 28 ratio names and their sizes."""

import pytest

from sdxl.sizes import RATIOS, size_of


def test_there_are_28_ratios_in_multiples_of_64():
    assert len(RATIOS) == 28
    assert all(side % 64 == 0 for size in RATIOS.values() for side in size)


def test_a_name_is_the_ratio_of_its_size_to_two_places():
    for name, (width, height) in RATIOS.items():
        # The table cuts digits where it does not round them: 0.578 became 0.57.
        assert abs(width / height - float(name.partition("_")[0])) < 0.01


def test_every_size_holds_about_a_megapixel_but_the_two_small_squares():
    for name, (width, height) in RATIOS.items():
        if "_" not in name:
            assert 0.9 <= width * height / 1024**2 <= 1.02, name


@pytest.mark.parametrize(
    "name, size",
    [
        ("1.0", (1024, 1024)),
        ("1.0_768", (768, 768)),
        ("0.78", (896, 1152)),
        ("3.0", (1728, 576)),
        ("1", (1024, 1024)),
        ("1.00", (1024, 1024)),
        (".5", (704, 1408)),
    ],
)
def test_a_ratio_is_found_however_the_number_is_written(name, size):
    assert size_of(name) == size


@pytest.mark.parametrize(
    "name, nearest",
    [("0.79", "0.78"), ("1.5", "1.46"), ("9", "3.0"), ("1.0_1024", "1.0")],
)
def test_an_unknown_ratio_names_the_nearest(name, nearest):
    with pytest.raises(
        ValueError, match=f"ratio `{name}` is unknown, hint: {nearest}$"
    ):
        size_of(name)


@pytest.mark.parametrize("name", ["", "square", "nan", "16:9", "1.0_"])
def test_a_ratio_that_is_no_number_is_refused(name):
    with pytest.raises(ValueError, match="is unknown, hint: "):
        size_of(name)
