"""The small SDXL's refiner and consistency model must draw what its base draws."""

import numpy as np
import pytest
from asking import LCM, drawn, load_refined, seen
from drawing import draw
from judge import judge, sharpness
from scenes import draw_scene


@pytest.fixture(scope="module")
def refined():
    return load_refined()


def test_the_refiner_draws_what_the_base_began(refined):
    pixels = drawn(refined, "a blue heart on a yellow background")
    right = [(f.color, f.shape) == ("blue", "heart") for f in seen(pixels)]
    assert sum(right) >= 6


def test_the_refiners_decoder_draws_the_bases_latents_with_steeper_edges(refined):
    """Of the same drawings, both encoders' latents are equal. Measured: 1.068."""
    scenes = [draw_scene(seed, kind="one") for seed in range(2000, 2016)]
    drawings = np.stack([np.asarray(draw(scene)) for scene in scenes])
    latents, deviations = refined.base.autoencoder.posterior(drawings, 8)
    others = refined.refiner.autoencoder.posterior(drawings, 8)
    assert np.array_equal(latents, others[0])
    assert np.array_equal(deviations, others[1])
    soft, sharp = (
        np.mean([sharpness(picture) for picture in model.decode(latents, 8)])
        for model in (refined.base, refined.refiner)
    )
    assert sharp > 1.05 * soft


def test_a_high_aesthetic_score_makes_sharp_edges(refined):
    """The score stands against the negative one, 2.5: below it, guidance softens."""
    prompt = "a large blue square on a white background"
    sharp = {}
    for high in (1.0, 6.0):
        pixels = drawn(refined, prompt, aesthetic_score=high)
        sharp[high] = np.mean([sharpness(one) for one in pixels])
    assert sharp[6.0] > 1.1 * sharp[1.0]


def test_four_steps_of_the_consistency_model_draw_what_is_asked():
    from sdxl.pipeline import Pipeline

    wanted = {"sampler": "LCMSampler", "guider": "IdentityGuider", "steps": 4}
    model = Pipeline.load(LCM)
    for color, ground in (("red", "white"), ("yellow", "blue")):
        pixels = drawn(model, f"a {color} circle on a {ground} background", **wanted)
        verdicts = [judge(one) for one in pixels]
        assert sum(v.background == ground for v in verdicts) >= 7
        assert sum(found.color == color for found in seen(pixels)) >= 6
