"""Arithmetic counted from geometry, held to published counts and to torch's counter."""

from dataclasses import replace

import pytest

from sdxl import flops
from sdxl.config import BASE, CLIP_L, REFINER, SDXL_VAE, TINY


@pytest.mark.parametrize(("side", "tera"), [(32, 0.856), (64, 3.178)])
def test_a_guided_step_of_the_full_size_base_is_as_counted_elsewhere(side, tera):
    assert 2 * flops.unet(BASE.unet, side, side) / 1e12 == pytest.approx(tera, abs=5e-4)


def test_networks_without_attention_grow_with_the_area():
    conv = flops.conv(4, 8, 100)
    assert conv == 2 * 4 * 8 * 9 * 100
    assert flops.transformer(64, 0, 100, 64) == 0
    small, large = (flops.unet(REFINER.unet, side, side) for side in (32, 64))
    assert 3.9 < large / small < 4.1


def test_a_middle_without_attention_is_one_residual_block():
    one = replace(TINY.unet, middle_depth=1)
    width, area, context = 128, 4 * 4, TINY.unet.context_dim
    attended = flops.transformer(width, 1, area, context)
    second = flops.res_block(width, width, area, TINY.unet.time_embed_dim)
    none = flops.unet(replace(TINY.unet, middle_depth=None), 16, 16)
    assert flops.unet(one, 16, 16) - none == attended + second


def test_a_picture_is_its_texts_its_steps_and_its_decoding():
    once = flops.picture(TINY, 64, 128, steps=1, guided=False)
    guided = flops.picture(TINY, 64, 128, steps=3, guided=True)
    assert guided - once == 5 * flops.unet(TINY.unet, 8, 16)
    assert flops.text_encoder(CLIP_L) == pytest.approx(2 * 77 * 85e6, rel=0.02)


def test_torch_counts_the_same():
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from torch.utils.flop_counter import FlopCounterMode

    from tests.golden.networks_oracle import build_vae

    vae, area = build_vae(SDXL_VAE).eval(), 8 * 8
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.decode(torch.zeros(1, 4, 8, 8))
    hidden = flops.attention(area, area, 512)  # the one product that torch leaves out
    assert counter.get_total_flops() + hidden == flops.decoder(SDXL_VAE, 8, 8)
