"""The first run on a card: kernels, networks and pixels against what is known of them.

    make test-ascend

Nothing else in the tests needs a card. Tolerances are wide: kernels that are wrong are
off by far more. `SDXL_TEST_DEVICE=CPU` runs the same on the CPU.
"""

import os

import numpy as np
import pytest

from tests.golden.networks_cases import cases, normals, unet_inputs

pytestmark = pytest.mark.ascend
DEVICE = os.environ.get("SDXL_TEST_DEVICE", "Ascend")


@pytest.fixture(scope="module")
def pipeline_in():
    """Give the pipeline of golden weights in a precision, on the device."""
    from functools import cache

    from sdxl.pipeline import Pipeline

    return cache(
        lambda precision: Pipeline.load(
            None,
            preset="tiny",
            precision=precision,
            device_target=DEVICE,
            noise="torch",
        )
    )


def run(cell, *arrays):
    from sdxl.graphs import Graphs, set_up

    set_up(DEVICE)
    graphs = Graphs(precision="fp16", jit_level="O2", device_target=DEVICE)
    return graphs.run("test", cell, *arrays)


@pytest.mark.parametrize("keys", [1024, 77], ids=["self", "cross"])
def test_attention_in_half_precision_is_the_softmax_it_stands_for(keys, worst):
    from sdxl import ops

    q = normals("q", (2, 1024, 640))
    k, v = (normals(name, (2, keys, 640)) for name in "kv")
    half = [x.astype(np.float16) for x in (q, k, v)]
    found = run(lambda: ops.Attention(10, 64, fused=True), *half)

    q, k, v = (
        x.astype(np.float64).reshape(2, -1, 10, 64).transpose(0, 2, 1, 3) for x in half
    )
    scores = np.exp(q @ k.swapaxes(2, 3) / 8)
    expected = scores / scores.sum(-1, keepdims=True) @ v
    expected = expected.transpose(0, 2, 1, 3).reshape(2, 1024, 640)
    assert worst(found.astype(np.float64), expected) < 1e-2


def test_group_norm_is_computed_in_float32(worst):
    from sdxl import ops

    x = 3 * normals("x", (2, 320, 32, 32)) + 200
    gamma, beta = normals("gamma", (320,)), normals("beta", (320,))
    found = run(lambda: ops.GroupNormalize(32, 1e-5), x, gamma, beta)
    parts = x.astype(np.float64).reshape(2, 32, -1)
    parts = parts - parts.mean(-1, keepdims=True)
    parts /= np.sqrt((parts**2).mean(-1, keepdims=True) + 1e-5)
    expected = parts.reshape(x.shape) * gamma[:, None, None] + beta[:, None, None]

    assert worst(found, expected) < 1e-3


@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-3), ("fp16", 0.1)])
def test_the_networks_equal_those_of_diffusers(
    precision, most, pipeline_in, golden_of, worst
):
    from sdxl.conditioning import Conditioning

    pipeline, golden = pipeline_in(precision), golden_of("tiny")
    inputs = unet_inputs(pipeline.config, (16, 16))
    cond = Conditioning(
        context=inputs["context"],
        vector=golden["vector"],
        uncond_context=inputs["context"],
        uncond_vector=golden["vector"],
    )
    texts = pipeline.encode(cases("tiny"), 3)
    hidden = np.concatenate((golden["hidden"], golden["hidden_2"]), -1)
    decoded = pipeline.autoencoder._decode(normals("z", (1, 4, 16, 16)))
    denoise = pipeline.denoiser.bind(cond, np.ones(4, np.float32), (16, 16), "plain")

    assert worst(texts.context[:1], hidden[:1]) < most
    assert worst(decoded, golden["decoded"]) < 1e-3  # float32 in both
    assert np.isfinite(denoise(inputs["x"], 1.0)).all()


@pytest.mark.parametrize(("precision", "most"), [("fp32", 1.0), ("fp16", 4.0)])
def test_pictures_are_those_of_diffusers_and_come_out_twice(
    precision, most, pipeline_in, golden_of
):
    """Mean difference in levels of 255; a second time, not one bit is another."""
    pipeline, pictures = pipeline_in(precision), cases("tiny")
    first, again = (
        pipeline.decode(
            pipeline.sample(pipeline.encode(pictures, 3), pictures, 3), 3
        ).astype(int)
        for _ in range(2)
    )
    difference = np.abs(first - golden_of("tiny")["pixels"])
    print(f"\n{precision}: mean {difference.mean():.3f}, max {difference.max()} levels")

    np.testing.assert_array_equal(first, again)
    assert difference.mean() < most
    assert set(pipeline.compiles.values()) == {1}
