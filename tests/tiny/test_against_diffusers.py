"""The trained small SDXL draws in diffusers what it draws here.

The whole way of a user, where diffusers is installed: our `convert` writes a folder of
the shipped file, `from_pretrained` loads it, and both are given the same seeds.
"""

import warnings
from pathlib import Path

import numpy as np
import pytest
from asking import BASE, SIDE, draw, picture

PROMPTS = (
    "a red circle on a white background",
    "a yellow ring above a green cross on a black background",
    "four yellow circles on a purple background",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from sdxl.convert import convert

    for module in ("torch", "diffusers", "transformers"):
        pytest.importorskip(module)
    to = tmp_path_factory.mktemp("diffusers") / "base"
    convert(BASE, to, layout="diffusers", dtype="fp32")
    return to


def by_diffusers(folder: Path, cases) -> list[np.ndarray]:
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    torch.set_num_threads(1)
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        folder, dtype=torch.float32, add_watermarker=False
    )
    # "leading" starts at noise * sqrt(1 + sigma^2), as the reference does.
    pipeline.scheduler = EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="leading"
    )
    pipeline.set_progress_bar_config(disable=True)
    return [
        np.asarray(
            pipeline(
                prompt=case.prompt,
                timesteps=[999 - 50 * i for i in range(20)],
                guidance_scale=case.guidance_scale,
                height=SIDE,
                width=SIDE,
                original_size=(SIDE, SIDE),
                target_size=(SIDE, SIDE),
                generator=torch.Generator("cpu").manual_seed(case.seed),
            ).images[0]
        )
        for case in cases
    ]


@pytest.mark.filterwarnings("ignore")
def test_twenty_steps_give_the_pixels_of_diffusers(folder):
    """Oracle: diffusers on the converted folder; `noise: torch`, guidance 5."""
    from sdxl.pipeline import Pipeline

    cases = [picture(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    ours = draw(Pipeline.load(BASE, noise="torch"), cases)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = by_diffusers(folder, cases)
    differences = np.abs(np.stack(ours).astype(int) - np.stack(theirs))
    print(f"largest {differences.max()}, equal {(differences == 0).mean():.5%}")
    assert differences.max() <= 1
    assert (differences == 0).mean() > 0.999
