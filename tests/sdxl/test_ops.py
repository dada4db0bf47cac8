"""The forms that differ by device: exact where they run, present where they cannot."""

import numpy as np
import pytest

from tests.golden.networks_cases import normals
from tests.sdxl.definitions import group_norm


def run(function, *arrays):
    """Run a function of tensors as a compiled graph."""
    from mindspore import nn

    from sdxl.graphs import Graphs, set_up

    set_up("CPU")

    class Cell(nn.Cell):
        def __init__(self):
            super().__init__()
            self.function = function

        def construct(self, *tensors):
            return self.function(*tensors)

    graphs = Graphs(precision="fp32", jit_level="O2", device_target="CPU")
    return graphs.run("test", Cell, *arrays)


def test_gelu_is_exact_not_its_tanh_approximation():
    from math import erf, sqrt

    from sdxl import ops

    x = np.linspace(-6, 6, 4001, dtype=np.float32)
    exact = np.array([v * (1 + erf(v / sqrt(2))) / 2 for v in x.astype(float)])

    assert np.abs(run(ops.gelu, x) - exact).max() < 5e-7


@pytest.fixture(params=["plain", "own kernels"])
def form(request):
    """Give both forms that a CPU can have: without a C compiler, and with one."""
    from sdxl import ops

    if request.param == "plain":
        return ops.CPU
    if not ops.form_of_cpu().kernels:
        pytest.skip("needs a C compiler")
    return ops.form_of_cpu()


@pytest.mark.parametrize("groups", [1, 8, 32])
def test_group_norm_equals_its_definition_in_every_image(groups, form):
    from sdxl import ops

    x = 3 * normals("x", (3, 64, 5, 7)) + 20
    gamma, beta = normals("gamma", (64,)), normals("beta", (64,))
    expected = group_norm(x, groups, gamma, beta)

    with ops.built_in(form):
        norm = ops.GroupNormalize(groups, 1e-5)
    first = run(norm, x, gamma, beta)
    again = run(norm, x, gamma, beta)

    assert np.abs(first - expected).max() < 5e-5
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("held", [8, 3, 1, 1 / 4])
def test_attention_in_parts_equals_attention_at_once(held, form):
    """Parts of 6, 3 and 1 heads of 64 queries, then a quarter of one head's."""
    from dataclasses import replace

    from sdxl import ops

    q, k, v = (normals(name, (2, 64, 48)) for name in "qkv")
    with ops.built_in(replace(form, max_scores=int(held * 64 * 64))):
        found = run(ops.Attention(3, 16), q, k, v)

    def heads(x):
        return x.reshape(2, 64, 3, 16).transpose(0, 2, 1, 3).astype(np.float64)

    scores = np.exp(heads(q) @ heads(k).swapaxes(2, 3) / 4)
    expected = scores / scores.sum(-1, keepdims=True) @ heads(v)
    expected = expected.transpose(0, 2, 1, 3).reshape(2, 64, 48)
    assert np.abs(found - expected).max() < 2e-6


@pytest.mark.parametrize(
    ("scores", "whole", "most", "parts"),
    [(6, 6, 8, 1), (8, 6, 3, 3), (6, 6, 1, 6), (600, 6, 1, 6), (7, 7, 6, 7)],
)
def test_parts_are_equal_and_as_few_as_the_bound_allows(scores, whole, most, parts):
    from sdxl import ops

    assert ops.parts_of(scores, whole, most) == parts


def test_upsampling_repeats_rows_and_columns():
    from sdxl import ops

    x = normals("x", (2, 3, 4, 5))

    np.testing.assert_array_equal(
        run(ops.upsample_nearest, x), x.repeat(2, axis=2).repeat(2, axis=3)
    )
