"""The full-size SDXL-Base with random weights, through the commands: `make test-full`.

It writes a real 2,514-tensor fp16 file of 6.9 GB into a temporary folder, and reads it.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

MEMORY_GB = 24


@pytest.mark.full
def test_the_full_size_base_makes_a_picture_within_24_gb(tmp_path):
    """A 256x256 picture of 2 guided steps comes out, from a file of the real layout."""
    weights, picture = tmp_path / "base.safetensors", tmp_path / "picture.png"
    _run("-m", "sdxl.random_weights", "--preset", "base", "--dtype", "fp16", weights)

    found = json.loads(_run("-m", "jobs", "inspect", weights, "--json"))
    assert (found["kind"], found["preset"]) == ("base", "base")
    assert (found["tensors"], found["parameters"]) == (2_514, 3_468_837_868)

    started = time.monotonic()
    _run(
        *("-m", "jobs", "sample", "a photo of a lighthouse", "--checkpoint", weights),
        *("--set", "sampling.width=256", "--set", "sampling.height=256"),
        *("--set", "sampling.steps=2", "--out", picture),
    )
    seconds = time.monotonic() - started
    weights.unlink()

    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    print(f"\nfull-size base, 256x256, 2 steps: {seconds:.0f} s, peak {peak:.1f} GB")
    pixels = np.asarray(Image.open(picture))
    assert pixels.shape == (256, 256, 3)
    assert pixels.std() > 1
    assert peak < MEMORY_GB


def _run(*arguments) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
