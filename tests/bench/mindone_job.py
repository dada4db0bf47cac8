"""mindone's side of the job: its own pipeline on the CPU, its network jitted, to PNG.

    python -m tests.bench.mindone_job MODEL MINDONE PROMPTS OUT --batch 4

Operators that the CPU lacks are replaced (`mindone_parts`, which also tells how to
make the folder MINDONE). The rest is as its user has it: one process, the network one
graph, the text encoders and the decoder operator by operator.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from sdxl.noise import NoiseStream
from tests.bench.measure import STEADY, add_sampling, bind, timesteps
from tests.bench.mindone_parts import gated, replace_operators


class Step(nn.Cell):
    """The network as one graph, called as the pipeline calls it."""

    def __init__(self, unet) -> None:
        super().__init__()
        self.unet = unet

    @ms.jit
    def construct(self, x, timestep, context, pooled, time_ids):
        added = {"text_embeds": pooled, "time_ids": time_ids}
        found = self.unet(
            x, timestep, context, added_cond_kwargs=added, return_dict=False
        )
        return found[0]


class Jitted:
    """What the pipeline takes for its network: to be called, it is one graph."""

    def __init__(self, unet) -> None:
        self.unet, self.step = unet, Step(unet)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unet, name)

    def __call__(
        self, x, timestep, encoder_hidden_states, *, added_cond_kwargs, **_
    ) -> tuple:
        added = added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"]
        timestep = Tensor(timestep).astype(ms.float32)
        return (self.step(x, timestep, encoder_hidden_states, *added),)


def main() -> None:
    asked = arguments()
    bind(asked.threads)
    sys.path.insert(0, str(asked.mindone))
    ms.set_context(mode=ms.PYNATIVE_MODE)
    ms.set_device("CPU")
    replace_operators()
    from mindone.diffusers import StableDiffusionXLPipeline
    from mindone.diffusers.models import activations

    activations.GEGLU.construct = gated
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        str(asked.model), mindspore_dtype=ms.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    object.__setattr__(pipeline, "unet", Jitted(pipeline.unet))
    rows, took = json.loads(asked.prompts.read_text())[: asked.count], []
    for first in range(0, len(rows), asked.batch):
        started = time.perf_counter()
        draw(pipeline, rows[first : first + asked.batch], asked)
        took.append((time.perf_counter() - started) / asked.batch)
    found = {"seconds_per_image": statistics.median(took[1:]), "batches": took}
    (asked.out / STEADY).write_text(json.dumps(found))


def draw(pipeline, rows: list[dict], asked: argparse.Namespace) -> None:
    """Make one batch and write its files."""
    side = asked.size // 8
    shape = (1, 4, side, side)
    noise = [NoiseStream("torch", row["seed"]).draw(shape) for row in rows]
    images = pipeline(
        prompt=[row["prompt"] for row in rows],
        timesteps=timesteps(asked.steps),
        guidance_scale=asked.guidance,
        width=asked.size,
        height=asked.size,
        latents=Tensor(np.concatenate(noise)),
    )[0]
    for row, image in zip(rows, images, strict=True):
        image.save(asked.out / f"{row['id']}.png")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.mindone_job")
    for name in ("model", "mindone", "prompts", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    add_sampling(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
