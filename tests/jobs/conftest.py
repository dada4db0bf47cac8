"""What the runner's tests share: their helpers on the path, and a checkpoint."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # workers are spawned with it: they find fake_pipeline


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A file that the strict reader takes: the tiny geometry, random weights."""
    from sdxl.config import PRESETS
    from sdxl.random_weights import write_random

    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    write_random(path, PRESETS["tiny"], "fp16")
    return path
