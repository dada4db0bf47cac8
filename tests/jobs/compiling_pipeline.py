"""The fake pipeline, to which a graph costs something."""

import time

from fake_pipeline import FakePipeline

SECONDS = 0.3


class Compiling(FakePipeline):
    def sample(self, cond, pictures, batch_size):
        before = len(self.compiles)
        made = super().sample(cond, pictures, batch_size)
        if len(self.compiles) > before:
            time.sleep(SECONDS)
            self.compile_ms[list(self.compiles)[-1]] = SECONDS * 1e3
        return made
