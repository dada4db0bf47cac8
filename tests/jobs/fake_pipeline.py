"""A pipeline without a network: pixels are a hash of what a task asks for.

It obeys the contract of `sdxl.pipeline.Pipeline` (a picture depends on its own task
alone), and does on demand what a device can do wrong: words in the prompt ask for it.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from pathlib import Path

import numpy as np


class FakePipeline:
    """Make noise from (prompt, negative prompt, seed, guidance scale, steps)."""

    def __init__(self, **options):
        if "refuse-to-load" in str(options["checkpoint"]):
            raise RuntimeError("this device can't start")
        if "slow-to-load" in str(options["checkpoint"]):
            time.sleep(600)
        self.compiles: dict[str, int] = {}
        self.compile_ms: dict[str, float] = {}

    def encode(self, pictures, batch_size):
        for picture in pictures:
            _misbehave(picture.prompt)
        return [picture.prompt for picture in pictures]

    def sample(self, cond, pictures, batch_size):
        first = pictures[0]
        key = f"fake-b{batch_size}-{first.height // 8}x{first.width // 8}"
        self.compiles.setdefault(key, 1)
        self.compile_ms.setdefault(key, 1.0)
        assert len({p.schedule for p in pictures}) == 1
        assert len(pictures) <= batch_size
        return np.stack([_latent(picture) for picture in pictures])

    def decode(self, latents, batch_size):
        rough = (np.nan_to_num(latents)[:, :3] * 40 + 128).clip(0, 255).astype(np.uint8)
        return rough.repeat(8, axis=2).repeat(8, axis=3).transpose(0, 2, 3, 1).copy()


def _latent(picture):
    if "make-nan" in picture.prompt:
        return np.full((4, picture.height // 8, picture.width // 8), np.nan, np.float32)
    if "make-black" in picture.prompt:
        return np.full((4, picture.height // 8, picture.width // 8), -9, np.float32)
    asked = (picture.prompt, picture.negative_prompt, picture.seed, picture.steps)
    asked += (picture.guidance_scale, picture.sampler, picture.crop_left)
    digest = hashlib.sha256(repr(asked).encode()).digest()
    generator = np.random.RandomState(int.from_bytes(digest[:4], "big"))
    shape = (4, picture.height // 8, picture.width // 8)
    return generator.randn(*shape).astype(np.float32)


def _misbehave(prompt):
    for word in prompt.split():
        action, _, value = word.partition("=")
        if action == "sleep":
            time.sleep(float(value))
        elif action == "wait-for":
            while not Path(value).exists():
                time.sleep(0.01)
        elif action == "tell-device":
            Path(value).write_text(os.environ["ASCEND_RT_VISIBLE_DEVICES"])
        elif action == "raise":
            raise RuntimeError(value)
        elif action == "kill-worker":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "kill-once" and not Path(value).exists():
            Path(value).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "stop-once" and not Path(value).exists():
            Path(value).touch()
            os.kill(os.getpid(), signal.SIGSTOP)
