"""Teach the two text encoders what captions say, before a picture is ever denoised.

Design: a few learned queries read the context through one cross attention, as the UNet
will, and say what is in the scene; a linear layer says it from the pooled vector. The
readers are thrown away. It takes minutes where learning words from noise takes hours.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from captions import NUMBERS, caption
from networks import TEXT_WIDTH, encode_text, make_text_encoders
from scenes import (
    BACKGROUNDS,
    OBJECT_COLORS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    draw_scene,
)
from torch import nn
from torch.nn import functional as F
from training import LossOf, Stage, load_average, run_stage

from sdxl.tokenizer import Tokenizer

SEEDS_FROM = 20_000_000
FIRST, SECOND = Tokenizer(49_407), Tokenizer(0)
QUESTIONS: dict[str, tuple] = {
    "background": BACKGROUNDS,
    "color": OBJECT_COLORS,
    "shape": SHAPES,
    "second color": (None, *OBJECT_COLORS),
    "second shape": (None, *SHAPES),
    "number": (1, *NUMBERS),
    "relation": (None, *RELATIONS),
    "place": (None, *PLACES),
    "size": tuple(SIZES),
    "texture": (None, *TEXTURES),
}


class Language(nn.Module):
    """Both text encoders; the one module that later stages go on training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = make_text_encoders()
        with torch.no_grad():
            self.second.text_projection.weight.normal_(std=TEXT_WIDTH**-0.5)

    def forward(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return context (B, 77, 64) and pooled (B, 32)."""
        ids = (torch.from_numpy(tokens(texts)[0]).long() for tokens in (FIRST, SECOND))
        return encode_text(self.first, self.second, *ids)


class Reader(nn.Module):
    """Answer every question about a scene from its encoded caption."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        count = len(QUESTIONS)
        self.queries = nn.Parameter(torch.randn(count, width) * 0.5)
        self.attention = nn.MultiheadAttention(
            width, 4, kdim=2 * TEXT_WIDTH, vdim=2 * TEXT_WIDTH, batch_first=True
        )
        sizes = [len(answers) for answers in QUESTIONS.values()]
        self.from_context = nn.ModuleList(nn.Linear(width, n) for n in sizes)
        self.from_pooled = nn.ModuleList(nn.Linear(TEXT_WIDTH, n) for n in sizes)

    def forward(
        self, context: torch.Tensor, pooled: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        queries = self.queries.expand(len(context), -1, -1)
        read = self.attention(queries, context, context, need_weights=False)[0]
        heads = zip(self.from_context, self.from_pooled, read.unbind(1), strict=True)
        return [(one(answer), two(pooled)) for one, two, answer in heads]


def answers(scene: Scene) -> list[int]:
    """Return the right answers; of a pair the first thing is the left or upper one."""
    things, relation = scene.things, scene.relation
    if relation in ("right of", "below"):
        things, relation = (
            things[::-1],
            {"right of": "left of", "below": "above"}[relation],
        )
    pair = scene.kind == "two"
    said = {
        "background": scene.background,
        "color": things[0].color,
        "shape": things[0].shape,
        "second color": things[1].color if pair else None,
        "second shape": things[1].shape if pair else None,
        "number": len(things) if scene.kind == "count" else 1,
        "relation": relation,
        "place": scene.place,
        "size": scene.size,
        "texture": things[0].texture,
    }
    return [QUESTIONS[name].index(said[name]) for name in QUESTIONS]


def train_language(
    work: Path, *, steps: int, rate: float = 2e-3, **running: object
) -> Language:
    """Train (or resume) the stage `language` and return the encoders."""
    torch.manual_seed(2)
    nets = nn.ModuleDict({"language": Language(), "reader": Reader()})
    state_file = work / "language.pt"
    loss_of = language_loss(nets)
    stage = Stage(nets, loss_of, steps=steps, rate=rate, state_file=state_file)
    run_stage(stage, **running)
    return nets["language"]


def load_language(work: Path) -> Language:
    """Return the encoders that the stage `language` left in `work`."""
    nets = nn.ModuleDict({"language": Language(), "reader": Reader()})
    load_average(work / "language.pt", nets)
    return nets["language"]


def language_loss(nets: nn.ModuleDict) -> LossOf:
    def loss_of(step: int, part: int) -> dict[str, torch.Tensor]:
        rng = random.Random(SEEDS_FROM + step)
        scenes = [_told(rng) for _ in range(48)]
        right = torch.from_numpy(np.array([answers(scene) for scene in scenes])).T
        guesses = nets["reader"](
            *nets["language"]([caption(scene, rng) for scene in scenes])
        )
        one = sum(
            F.cross_entropy(g, r) for (g, _), r in zip(guesses, right, strict=True)
        )
        two = sum(
            F.cross_entropy(g, r) for (_, g), r in zip(guesses, right, strict=True)
        )
        hits = torch.stack(
            [(g.argmax(1) == r) for (g, _), r in zip(guesses, right, strict=True)]
        )
        whole = hits.all(0).float().mean()
        return {"loss": one + two, "context": one, "pooled": two, "whole": whole}

    return loss_of


def _told(rng: random.Random) -> Scene:
    """Draw a scene whose caption tells which thing is where."""
    while True:
        scene = draw_scene(rng.getrandbits(40))
        if scene.kind != "two" or scene.relation is not None:
            return scene
