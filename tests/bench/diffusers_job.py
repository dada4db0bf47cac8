"""diffusers' side of the job: its own pipeline over a share of the prompts, to PNG.

    python -m tests.bench.diffusers_job MODEL PROMPTS OUT --share 0/2 --batch 4

Written as a user of diffusers would: `from_pretrained`, batches, one generator a
picture, PIL's default PNG. The list of time steps is LegacyDDPMDiscretization's, so
that both sides walk the same levels.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from tests.bench.measure import add_sampling, timesteps


def main() -> None:
    asked = arguments()
    os.environ["OMP_NUM_THREADS"] = str(asked.threads)
    import torch

    torch.set_num_threads(asked.threads)
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(asked.model)
    pipeline.set_progress_bar_config(disable=True)
    rows = json.loads(asked.prompts.read_text())
    part, parts = map(int, asked.share.split("/"))
    mine = rows[part::parts]
    for start in range(0, len(mine), asked.batch):
        draw(torch, pipeline, mine[start : start + asked.batch], asked)


def draw(torch, pipeline, rows: list[dict], asked: argparse.Namespace) -> None:
    """Make one batch and write its files."""
    images = pipeline(
        prompt=[row["prompt"] for row in rows],
        timesteps=timesteps(asked.steps),
        guidance_scale=asked.guidance,
        width=asked.size,
        height=asked.size,
        generator=[torch.Generator("cpu").manual_seed(row["seed"]) for row in rows],
    ).images
    for row, image in zip(rows, images, strict=True):
        image.save(asked.out / f"{row['id']}.png")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.diffusers_job")
    parser.add_argument("model", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--share", default="0/1")
    parser.add_argument("--threads", type=int, default=1)
    add_sampling(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
