"""Pipelines that the tests share, so that each graph is compiled once a session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.golden.networks_cases import GEOMETRIES
from tests.golden.pipelines_cases import MODELS

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def pipeline_of() -> Callable:
    """Give the pipeline of a geometry with the seeded weights of the golden files."""
    from sdxl.graphs import Graphs, set_up
    from sdxl.model import SDXL
    from sdxl.pipeline import Pipeline
    from sdxl.random_weights import RandomCheckpoint
    from sdxl.weights import load_into

    @cache
    def build(geometry: str, precision: str = "fp32") -> Pipeline:
        set_up("CPU")
        config = (GEOMETRIES | MODELS)[geometry]
        model = SDXL(config, precision)
        load_into(model, RandomCheckpoint(config), "")
        graphs = Graphs(precision=precision, jit_level="O2", device_target="CPU")
        return Pipeline(model, config, graphs, noise="torch")

    return build


@pytest.fixture(scope="session")
def golden_of() -> Callable:
    """Give what diffusers made of a geometry."""
    return cache(lambda geometry: dict(np.load(GOLDEN / f"networks_{geometry}.npz")))


@pytest.fixture(scope="session")
def worst() -> Callable:
    """Measure the largest error of an array in units of the reference's RMS."""

    def measure(ours: np.ndarray, reference: np.ndarray) -> float:
        assert ours.shape == reference.shape
        return float(np.abs(ours - reference).max() / np.sqrt(np.mean(reference**2)))

    return measure
