"""Ask the small SDXL for pictures, one input varied, and look at what comes of it.

    python tests/tiny/asking.py checkpoints/tiny/figures

draws the model card's figures: for each input a grid, a prompt a row, a value a column.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from judge import Found, judge

ROOT = Path(__file__).parents[2]
TINY = ROOT / "checkpoints" / "tiny"
BASE = TINY / "base.safetensors"
REFINER, LCM = TINY / "refiner.safetensors", TINY / "lcm.safetensors"
REFINED = 0.2  # of the schedule, by the refiner: all that it is trained for
SIDE, BATCH = 128, 8
SEEDS = range(8)


@dataclass(frozen=True, kw_only=True)
class Variation:
    """An input, the prompts it is shown on, its values; `change` makes a case.

    `refined` pictures are the base's and the refiner's.
    """

    name: str
    prompts: tuple[str, ...]
    values: tuple[Any, ...]
    label: str
    change: Callable[[Any], dict[str, Any]]
    refined: bool = False


VARIATIONS = (
    Variation(
        name="negative_prompt",
        prompts=("a circle on a white background", "a star on a black background"),
        values=(None, "red", "blue", "yellow", "green"),
        label="negative: {}",
        change=lambda text: {"negative_prompt": text},
    ),
    Variation(
        name="guidance_scale",
        prompts=("a red circle on a white background", "a large cyan heart on black"),
        values=(0.0, 1.0, 2.5, 5.0, 7.5),
        label="guidance {}",
        change=lambda scale: {"guidance_scale": scale},
    ),
    Variation(
        name="crop_left",
        prompts=("a black square on an orange background", "a red ring on white"),
        values=(0, 10, 20, 30, 40),
        label="crop left {}",
        change=lambda left: {"crop_left": left},
    ),
    Variation(
        name="original_size",
        prompts=("a large green cross on a white background", "a blue star on yellow"),
        values=(128, 96, 64, 40, 24),
        label="original {0}x{0}",
        change=lambda side: {"original_width": side, "original_height": side},
    ),
    Variation(
        name="aesthetic_score",
        prompts=("a large red star on a white background", "a yellow cross on blue"),
        values=(1.0, 2.5, 4.0, 6.0),
        label="score {}",
        change=lambda score: {"aesthetic_score": score},
        refined=True,
    ),
)


def picture(prompt: str, seed: int = 0, **changes: Any) -> Any:
    """Return what `Pipeline` takes for one 128x128 picture of 20 Euler steps."""
    from tests.golden.networks_cases import Case

    sizes = dict.fromkeys(("width", "height"), SIDE)
    for kind in ("original", "target"):
        sizes |= {f"{kind}_width": SIDE, f"{kind}_height": SIDE}
    return replace(Case(prompt=prompt, seed=seed, crop_top=0, **sizes), **changes)


def load_refined() -> Any:
    """Load base and refiner, the seam where the refiner's training begins."""
    from sdxl.two_stage import TwoStage

    return TwoStage.load(BASE, refiner_checkpoint=REFINER, stage2strength=REFINED)


def draw(pipeline: Any, pictures: Sequence[Any]) -> list[np.ndarray]:
    """Return (H, W, 3) uint8 pixels of pictures that share size and schedule."""
    pixels: list[np.ndarray] = []
    for first in range(0, len(pictures), BATCH):
        some = pictures[first : first + BATCH]
        cond = pipeline.encode(some, BATCH)
        pixels += list(pipeline.decode(pipeline.sample(cond, some, BATCH), BATCH))
    return pixels


def drawn(pipeline: Any, prompt: str, **changes: Any) -> list[np.ndarray]:
    """Draw a prompt with eight seeds."""
    return draw(pipeline, [picture(prompt, seed, **changes) for seed in SEEDS])


def seen(pixels: Sequence[np.ndarray]) -> list[Found]:
    """Judge pictures; give the largest object of each that has one."""
    verdicts = [judge(one) for one in pixels]
    return [verdict.objects[0] for verdict in verdicts if verdict.objects]


def figure(pipeline: Any, variation: Variation) -> Any:
    """Draw one grid, as a Pillow image."""
    from jobs.sheet import drawn_under, laid_out

    tiles = []
    for seed, prompt in enumerate(variation.prompts):
        asked = [
            picture(prompt, seed + 1, **variation.change(v)) for v in variation.values
        ]
        for value, pixels in zip(variation.values, draw(pipeline, asked), strict=True):
            said = "none" if value is None else value
            lines = [prompt, variation.label.format(said)]
            tiles.append(drawn_under(pixels, lines, SIDE))
    return laid_out(tiles, len(variation.values))


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from sdxl.pipeline import Pipeline

    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    pipelines = {False: Pipeline.load(BASE), True: load_refined()}
    for variation in VARIATIONS:
        path = folder / f"{variation.name}.png"
        figure(pipelines[variation.refined], variation).quantize(256).save(
            path, optimize=True
        )
        print(path)


if __name__ == "__main__":
    main()
