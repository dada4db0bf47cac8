"""Prompts to pixels: against diffusers' pipeline, and what may not change a picture."""

from dataclasses import replace

import numpy as np
import pytest

from tests.golden.networks_cases import cases

BATCH = 3


def pixels_of(pipeline, pictures, batch_size=BATCH):
    cond = pipeline.encode(pictures, batch_size)
    return pipeline.decode(pipeline.sample(cond, pictures, batch_size), batch_size)


@pytest.mark.parametrize("geometry", ["tiny", "tall"])
def test_twenty_steps_give_the_pixels_of_diffusers(geometry, pipeline_of, golden_of):
    pixels = pixels_of(pipeline_of(geometry), cases(geometry))
    golden = golden_of(geometry)["pixels"]
    differences = np.abs(pixels.astype(int) - golden)

    assert differences.max() <= 1
    assert (differences == 0).mean() > 0.999
    assert golden.std(axis=(1, 2, 3)).min() > 50


def quick(**changes):
    """Three different pictures of two steps."""
    return [replace(case, steps=2, **changes) for case in cases("tiny")]


def test_a_picture_is_bit_equal_in_every_slot_and_beside_any_others(pipeline_of):
    pipeline, pictures = pipeline_of("tiny"), quick()
    together = pixels_of(pipeline, pictures)

    np.testing.assert_array_equal(pixels_of(pipeline, pictures[::-1]), together[::-1])
    np.testing.assert_array_equal(pixels_of(pipeline, pictures[1:2]), together[1:2])
    np.testing.assert_array_equal(
        pixels_of(pipeline, pictures + pictures[:1]), together[[0, 1, 2, 0]]
    )


def test_a_short_batch_compiles_nothing_new(pipeline_of):
    pipeline = pipeline_of("tiny")
    pixels_of(pipeline, quick())
    before = dict(pipeline.compiles)
    pixels_of(pipeline, quick()[:1])

    assert pipeline.compiles == before
    assert set(before.values()) == {1}
    assert {"text-b3-fp32-O2-cpu", "unet-b3-16x16-guided-fp32-O2-cpu"} <= before.keys()
    assert before.keys() == pipeline.compile_ms.keys()


def test_added_noise_comes_from_each_pictures_own_stream(pipeline_of):
    pipeline = pipeline_of("tiny")
    pictures = quick(sampler="EulerAncestralSampler", eta=0.7)
    together = pixels_of(pipeline, pictures)

    np.testing.assert_array_equal(pixels_of(pipeline, pictures[::-1]), together[::-1])


def test_no_negative_prompt_is_zeros_and_an_empty_one_is_text(pipeline_of):
    pipeline = pipeline_of("tiny")
    none, empty = (
        pipeline.encode([replace(cases("tiny")[0], negative_prompt=text)], BATCH)
        for text in (None, "")
    )
    pooled = pipeline.config.text_encoders[-1].width

    assert not none.uncond_context.any()
    assert not none.uncond_vector[:, :pooled].any()
    assert np.abs(empty.uncond_context).max() > 1
    np.testing.assert_array_equal(
        none.uncond_vector[:, pooled:], none.vector[:, pooled:]
    )


def test_an_empty_prompt_is_text_like_any_other(pipeline_of):
    pipeline = pipeline_of("tiny")
    case = replace(cases("tiny")[0], prompt="", negative_prompt="")
    cond = pipeline.encode([case], BATCH)

    np.testing.assert_array_equal(cond.context, cond.uncond_context)
    assert np.abs(cond.context).max() > 1


def test_every_size_reaches_the_conditioning_vector_in_its_place(pipeline_of):
    from sdxl.conditioning import sinusoid

    pipeline = pipeline_of("tiny")
    case = replace(
        cases("tiny")[0],
        original_height=1,
        original_width=2,
        crop_top=3,
        crop_left=4,
        target_height=5,
        target_width=6,
    )
    pooled = pipeline.config.text_encoders[-1].width
    expected = sinusoid(np.arange(1, 7), pipeline.config.size_embed_dim).reshape(-1)

    np.testing.assert_array_equal(
        pipeline.encode([case], BATCH).vector[0, pooled:], expected
    )


def test_texts_seen_before_are_not_encoded_again(pipeline_of, monkeypatch):
    pipeline, pictures = pipeline_of("tiny"), quick()
    first = pipeline.encode(pictures, BATCH)
    monkeypatch.setattr(pipeline.texts, "run", None)
    second = pipeline.encode(pictures, BATCH)

    np.testing.assert_array_equal(first.context, second.context)


def test_each_text_is_encoded_once_also_where_it_is_spelled_otherwise(
    pipeline_of, monkeypatch
):
    texts = pipeline_of("tiny").texts
    encoded = []
    original = texts.run

    def run(ids):
        encoded.extend({row.tobytes() for row in ids[0]})
        return original(ids)

    monkeypatch.setattr(texts, "run", run)
    first = texts.encode(["a mauve heron", "a  Mauve HERON ", "an odd newt"], BATCH)
    again = texts.encode(["An odd newt", "smudged", "a mauve heron"], BATCH)
    texts.encode(["SMUDGED", "a mauve\nheron"], BATCH)

    assert len(encoded) == len(set(encoded)) == 3
    assert first["a mauve heron"] is first["a  Mauve HERON "] is again["a mauve heron"]
    assert first["an odd newt"] is again["An odd newt"]
    assert set(first) == {"a mauve heron", "a  Mauve HERON ", "an odd newt"}


def test_an_unconditional_half_of_zeros_costs_no_text_encoder(pipeline_of, monkeypatch):
    pipeline, texts = pipeline_of("tiny"), []
    encode = pipeline.texts.encode
    monkeypatch.setattr(
        pipeline.texts,
        "encode",
        lambda asked, n: texts.extend(asked) or encode(asked, n),
    )
    pictures = quick(negative_prompt=None)
    pipeline.encode(pictures, BATCH)

    assert texts == [picture.prompt for picture in pictures]


def test_an_encoded_picture_has_latents_of_the_networks_scale(pipeline_of):
    pipeline = pipeline_of("tiny")
    pixels = pixels_of(pipeline, quick())
    mean, deviation = pipeline.autoencoder.posterior(pixels, BATCH)

    assert mean.shape == deviation.shape == (3, 4, 16, 16)
    assert (deviation > 0).all()
    assert mean.std() < 10 * pipeline.config.vae.scale_factor


def test_an_unknown_guider_is_refused_by_name(pipeline_of):
    pictures = quick(guider="VanillaCGF")
    pipeline = pipeline_of("tiny")

    with pytest.raises(ValueError, match="VanillaCFG or"):
        pipeline.sample(pipeline.encode(pictures, BATCH), pictures, BATCH)


def test_half_precision_stays_near_full_precision(pipeline_of):
    full, half = pipeline_of("tiny"), pipeline_of("tiny", "fp16")
    pictures = quick()
    latents = full.sample(full.encode(pictures, BATCH), pictures, BATCH)
    coarse = half.sample(half.encode(pictures, BATCH), pictures, BATCH)

    assert coarse.dtype == np.float32
    assert 1e-5 < np.abs(coarse - latents).max() / latents.std() < 0.05


def test_an_image_encodes_to_its_posterior_with_each_pictures_own_noise(pipeline_of):
    from sdxl.noise import NoiseStream

    pipeline, pictures = pipeline_of("tiny"), quick()
    pixels = pixels_of(pipeline, pictures)
    latents = pipeline.encode_images(pixels, pictures, BATCH)
    mean, deviation = pipeline.autoencoder.posterior(pixels, BATCH)
    noise = [NoiseStream("torch", p.seed).draw(mean[0].shape) for p in pictures]

    np.testing.assert_array_equal(latents, mean + deviation * np.stack(noise))
    np.testing.assert_array_equal(
        pipeline.encode_images(pixels[1:2], pictures[1:2], BATCH), latents[1:2]
    )


def test_no_strength_leaves_an_images_latents_as_they_are(pipeline_of):
    pipeline, pictures = pipeline_of("tiny"), quick(strength=0.0)
    init = np.ones((3, 4, 16, 16), np.float32)
    cond = pipeline.encode(pictures, BATCH)

    np.testing.assert_array_equal(
        pipeline.sample(cond, pictures, BATCH, init=init), init
    )
    with pytest.raises(ValueError, match="no strength"):
        pipeline.sample(cond, quick(), BATCH, init=init)


def test_scores_reach_a_refiners_vector_and_are_6_and_2_and_a_half_by_default(
    pipeline_of,
):
    from sdxl.conditioning import sinusoid

    pipeline = pipeline_of("tiny-refiner")
    width = pipeline.config.size_embed_dim
    pictures = [
        cases("tiny")[0],
        replace(cases("tiny")[0], aesthetic_score=9.0, negative_aesthetic_score=0.0),
    ]
    cond = pipeline.encode(pictures, 2)
    scores = [cond.vector[:, -width:], cond.uncond_vector[:, -width:]]

    np.testing.assert_array_equal(scores[0], sinusoid(np.array([6.0, 9.0]), width))
    np.testing.assert_array_equal(scores[1], sinusoid(np.array([2.5, 0.0]), width))


def test_a_refiner_encodes_an_empty_text_where_no_negative_prompt_is_given(pipeline_of):
    pipeline = pipeline_of("tiny-refiner")
    none, empty = (
        pipeline.encode([replace(cases("tiny")[0], negative_prompt=text)], 2)
        for text in (None, "")
    )

    assert np.abs(none.uncond_context).max() > 1
    np.testing.assert_array_equal(none.uncond_context, empty.uncond_context)
    np.testing.assert_array_equal(none.uncond_vector, empty.uncond_vector)


def test_loras_are_merged_while_the_checkpoint_is_read(tmp_path, pipeline_of):
    from sdxl.lora import Lora, LoraSet
    from sdxl.pipeline import Pipeline
    from sdxl.random_weights import random_tensor
    from tests.golden.lora_cases import write_lora

    path = write_lora(tmp_path / "style.safetensors", "kohya")
    pipeline = Pipeline.load(None, preset="tiny", loras=[(path, 0.7), (path, 0.0)])
    loras = LoraSet([Lora(path=path, scale=0.7)], pipeline.config)
    plain = pipeline_of("tiny").model.parameters_dict()
    changed = 0
    for name, parameter in pipeline.model.parameters_dict().items():
        if not np.array_equal(parameter.asnumpy(), plain[name].asnumpy()):
            expected = loras.apply(name, random_tensor(name, parameter.shape))
            np.testing.assert_array_equal(parameter.asnumpy(), expected)
            changed += 1

    assert changed > 200
