"""Inputs of the small SDXL must move what is drawn the way they say they do."""

from collections import Counter

import numpy as np
import pytest
from asking import BASE, drawn, seen
from judge import judge, sharpness
from scenes import OBJECT_COLORS


@pytest.fixture(scope="module")
def pipeline():
    from sdxl.pipeline import Pipeline

    return Pipeline.load(BASE)


def test_the_prompt_decides_color_and_background(pipeline):
    for color, ground in (("red", "white"), ("blue", "yellow")):
        pixels = drawn(pipeline, f"a {color} circle on a {ground} background")
        verdicts = [judge(one) for one in pixels]
        assert sum(v.background == ground for v in verdicts) >= 7
        assert sum(found.color == color for found in seen(pixels)) >= 7


def test_a_negative_color_becomes_rarer(pipeline):
    """Of circles that may have any colour, those of the negative prompt's go."""
    prompt = "a circle on a white background"
    free = Counter(found.color for found in seen(drawn(pipeline, prompt)))
    without, with_ = 0, 0
    for color in OBJECT_COLORS:
        found = seen(drawn(pipeline, prompt, negative_prompt=f"a {color} circle"))
        without += free[color]
        with_ += sum(one.color == color for one in found)
    assert without >= 4
    assert with_ <= without // 2


def test_guidance_makes_pictures_do_as_they_are_told(pipeline):
    prompt = "a large yellow heart on a purple background"
    right = {}
    for scale in (0.0, 5.0):
        found = seen(drawn(pipeline, prompt, guidance_scale=scale))
        right[scale] = sum(f.color == "yellow" and f.shape == "heart" for f in found)
    assert right[0.0] <= 2
    assert right[5.0] >= 6


def test_a_crop_moves_the_object_by_as_much(pipeline):
    """The object's centre goes left by the pixels that were cut from the left."""
    prompt = "a black square on an orange background"
    places = []
    for left in (0, 32):
        found = seen(drawn(pipeline, prompt, crop_left=left))
        places.append(128 * np.mean([one.x for one in found]))
    assert 16 < places[0] - places[1] < 48


def test_a_small_original_makes_a_soft_picture(pipeline):
    """Enlarged originals are blurred, and edges are what shows it."""
    prompt = "a red square on a white background"
    sharp = {}
    for side in (24, 128):
        pixels = drawn(pipeline, prompt, original_width=side, original_height=side)
        sharp[side] = np.mean([sharpness(one) for one in pixels])
    print(f"sharpness at 24 over that at 128: {sharp[24] / sharp[128]:.3f}")
    assert sharp[24] < 0.8 * sharp[128]
