"""Inputs of the small SDXL must move what is drawn the way they say they do."""

import pytest
from asking import BASE, draw, picture
from judge import judge

SEEDS = range(8)


@pytest.fixture(scope="module")
def pipeline():
    from sdxl.pipeline import Pipeline

    return Pipeline.load(BASE)


def drawn(pipeline, prompt, **changes):
    """Draw a prompt with eight seeds."""
    return draw(pipeline, [picture(prompt, seed, **changes) for seed in SEEDS])


def seen(pixels):
    """Judge pictures; give the largest object of each that has one."""
    verdicts = [judge(one) for one in pixels]
    return [verdict.objects[0] for verdict in verdicts if verdict.objects]


def test_guidance_makes_pictures_do_as_they_are_told(pipeline):
    prompt = "a large yellow heart on a purple background"
    right = {}
    for scale in (0.0, 5.0):
        found = seen(drawn(pipeline, prompt, guidance_scale=scale))
        right[scale] = sum(f.color == "yellow" and f.shape == "heart" for f in found)
    assert right[0.0] <= 2
    assert right[5.0] >= 6
