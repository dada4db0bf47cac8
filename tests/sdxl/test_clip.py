"""Text encoders against transformers', from golden files."""

import numpy as np
import pytest

from tests.golden.networks_cases import PROMPTS

GEOMETRIES = ("tiny", "tall")


def encode(pipeline, prompts):
    """Run the encoders' graph once, past what they remember."""
    return pipeline.texts.run(pipeline.texts.tokenize(prompts))


@pytest.fixture(scope="module", params=GEOMETRIES)
def encoded(request, pipeline_of):
    pipeline = pipeline_of(request.param)
    return request.param, pipeline, encode(pipeline, PROMPTS)


def test_both_hidden_states_equal_the_penultimate_ones_of_transformers(
    encoded, golden_of, worst
):
    geometry, pipeline, (hidden, _) = encoded
    width = pipeline.config.text_encoders[0].width
    golden = golden_of(geometry)

    assert worst(hidden[..., :width], golden["hidden"]) < 1e-5
    assert worst(hidden[..., width:], golden["hidden_2"]) < 1e-5


def test_the_pooled_vector_equals_the_projection_at_the_end_token(
    encoded, golden_of, worst
):
    geometry, _, (_, pooled) = encoded

    assert worst(pooled, golden_of(geometry)["pooled"]) < 1e-5


def test_a_text_is_encoded_alike_in_every_slot_beside_any_others(pipeline_of):
    pipeline = pipeline_of("tiny")
    forth = encode(pipeline, PROMPTS)
    back = encode(pipeline, PROMPTS[::-1])

    for ours, theirs in zip(forth, back, strict=True):
        np.testing.assert_array_equal(ours, theirs[::-1])
