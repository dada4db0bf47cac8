"""The golden files are what diffusers computes today, where it is installed."""

import warnings

import numpy as np
import pytest

from tests.golden.networks_cases import GEOMETRIES


@pytest.fixture(scope="module")
def oracle():
    for module in ("torch", "diffusers", "transformers"):
        pytest.importorskip(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tests.golden import networks_oracle
    return networks_oracle


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_diffusers_computes_what_the_golden_file_says(
    geometry, oracle, golden_of, worst
):
    live, golden = oracle.outputs(geometry, GEOMETRIES[geometry]), golden_of(geometry)

    assert live.keys() == golden.keys()
    pixels = live.pop("pixels").astype(int)
    assert np.abs(pixels - golden["pixels"]).max() <= 1
    # Sines of angles in the thousands, in float32: torch's own differ by processor.
    assert worst(live.pop("vector"), golden["vector"]) < 1e-4
    assert max(worst(live[key], golden[key]) for key in live) < 1e-5
