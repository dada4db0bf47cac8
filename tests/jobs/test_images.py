"""Image files: settings inside, hashes of what is read, the same bytes always."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from jobs import images

KINDS = ("png", "jpeg", "webp")
SETTINGS = {"prompt": 'ünï "code" 🦊 \x1b[31m\n\0', "seed": 2**32 - 1, "eta": 0.5}


def picture(height=64, width=96):
    return np.random.RandomState(7).randint(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_gives_back_its_settings_and_its_size(kind):
    encoded = images.encode(picture(), kind, SETTINGS)
    assert images.read_settings(encoded.data) == SETTINGS
    assert images.decode(encoded.data).shape == (64, 96, 3)
    with Image.open(io.BytesIO(encoded.data)) as image:
        assert image.format == kind.upper()


@pytest.mark.parametrize("kind", KINDS)
def test_hashes_are_of_the_file_and_of_the_pixels_a_reader_gets(kind):
    # Oracle: Pillow and hashlib, called here.
    encoded = images.encode(picture(), kind, SETTINGS)
    with Image.open(io.BytesIO(encoded.data)) as image:
        seen = image.convert("RGB").tobytes()
    assert encoded.pixel_sha256 == hashlib.sha256(seen).hexdigest()
    assert encoded.image_sha256 == hashlib.sha256(encoded.data).hexdigest()


def test_png_keeps_every_pixel_at_every_level():
    for level in (0, 3, 9):
        encoded = images.encode(picture(), "png", {}, png_level=level)
        assert (images.decode(encoded.data) == picture()).all()


@pytest.mark.parametrize("kind", KINDS)
def test_equal_pixels_and_settings_give_equal_bytes(kind):
    first = images.encode(picture(), kind, SETTINGS)
    backwards = dict(reversed(SETTINGS.items()))
    assert images.encode(picture(), kind, backwards).data == first.data
    assert images.encode(picture(), kind, {}).data != first.data


@pytest.mark.parametrize("kind", KINDS)
def test_the_longest_texts_still_leave_a_file_with_readable_settings(kind):
    long = {"prompt": "🦊" * 100_000, "negative_prompt": "é" * 100_000, "seed": 5}
    found = images.read_settings(images.encode(picture(), kind, long).data)
    assert found["seed"] == 5
    if kind == "png":
        assert found == long
    else:
        assert found["cut"]
        assert long["prompt"].startswith(found["prompt"])


def test_quality_changes_the_file_of_lossy_kinds():
    for kind in ("jpeg", "webp"):
        sizes = [
            len(images.encode(picture(), kind, {}, quality=q).data) for q in (20, 95)
        ]
        assert sizes[0] < sizes[1]


@pytest.mark.parametrize(
    ("pixels", "flags"),
    [
        (np.zeros((8, 8, 3), np.uint8), ["black", "constant"]),
        (np.full((8, 8, 3), 200, np.uint8), ["constant"]),
        (np.eye(8, dtype=np.uint8)[..., None].repeat(3, 2) * 2, ["black"]),
        (np.eye(8, dtype=np.uint8)[..., None].repeat(3, 2) * 3, []),
        (np.full((8, 8, 3), [9, 8, 7], np.uint8), ["constant"]),
        (picture(), []),
    ],
)
def test_black_and_constant_pictures_are_flagged(pixels, flags):
    assert images.flags(pixels) == flags


def saved(tmp_path, image, name="i.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_an_initial_image_is_resized_as_pillow_does(tmp_path):
    path = saved(tmp_path, Image.fromarray(picture(100, 130)))
    assert images.init_size(path) == (128, 64)
    expected = np.asarray(Image.fromarray(picture(100, 130)).resize((128, 64)))
    assert (images.read_init(path, 128, 64) == expected).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_an_initial_image_of_any_mode_becomes_rgb(tmp_path, mode):
    name = "i.jpg" if mode == "CMYK" else "i.png"
    path = saved(tmp_path, Image.fromarray(picture()).convert(mode), name)
    pixels = images.read_init(path, 64, 64)
    assert pixels.shape == (64, 64, 3)
    assert pixels.dtype == np.uint8


@pytest.mark.parametrize(
    "damage", ["text", "torn", "chunk", "missing", "bomb", "folder"]
)
def test_an_initial_image_that_can_not_be_read_is_an_input_error(tmp_path, damage):
    path = saved(tmp_path, Image.fromarray(picture()))
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage == "text":
        path.write_text("no image")
    elif damage == "torn":
        path.write_bytes(data[:400])
    elif damage == "chunk":  # Pillow raises SyntaxError
        at = data.index(b"IDAT")
        path.write_bytes(data[: at - 4] + (100).to_bytes(4, "big") + data[at:])
    else:  # a header that claims 60000 x 60000
        at = data.index(b"IHDR") + 4
        size = (60_000).to_bytes(4, "big")
        path.write_bytes(data[:at] + size + size + data[at + 8 :])
    with pytest.raises(OSError, match=r"init_image i\.png: "):
        images.read_init(path, 64, 64)
    if damage in ("missing", "text", "bomb", "folder"):
        assert images.init_size(path) is None
