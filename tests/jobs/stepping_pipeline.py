"""The fake pipeline with steps to watch and a first generation that takes longer."""

import time

import numpy as np
from fake_pipeline import FakePipeline

COMPILE_SECONDS, STEP_SECONDS = 0.5, 0.01


class SteppingPipeline(FakePipeline):
    """Walk each picture's steps; from an image, three quarters of them."""

    def __init__(self, **options):
        super().__init__(**options)
        self.texts = []

    def encode(self, pictures, batch_size):
        assert not {p.prompt for p in pictures} & {*self.texts}  # none is known
        self.texts += [p.prompt for p in pictures]
        return super().encode(pictures, batch_size)

    def encode_images(self, pixels, pictures, batch_size):
        assert pixels.shape[1:] == (pictures[0].height, pictures[0].width, 3)
        return np.zeros(1)

    def sample(self, cond, pictures, batch_size, init=None, observe=None):
        if not self.compiles:
            time.sleep(COMPILE_SECONDS)
        steps = pictures[0].steps if init is None else int(pictures[0].steps * 0.75)
        for step in range(steps):
            time.sleep(STEP_SECONDS)
            observe(step, steps)
        return super().sample(cond, pictures, batch_size)


class DyingPipeline(FakePipeline):
    def encode(self, pictures, batch_size):
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)
