"""What the base is taught to see must be its own picture in the colours asked for."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from autoencoder import load_vae  # noqa: E402
from captions import plain_caption, tells_colors  # noqa: E402
from drawing import pixels  # noqa: E402
from latents import sharpened  # noqa: E402
from mending import SHAPED, in_color, original_edges, shaped  # noqa: E402
from networks import start_folder  # noqa: E402
from refining import edges_kept  # noqa: E402
from rollouts import GUIDANCE  # noqa: E402
from scenes import draw_scene  # noqa: E402
from test_recoloring import other_colors  # noqa: E402

from sdxl.convert import convert  # noqa: E402

BASE = Path(__file__).parents[2] / "checkpoints" / "tiny" / "base.safetensors"


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    torch.set_num_threads(1)
    work = tmp_path_factory.mktemp("work")
    folder = start_folder(work, "base")
    folder.parent.mkdir()
    convert(BASE, folder, layout="diffusers")
    return load_vae(work).eval().requires_grad_(requires_grad=False)


def encoded(vae, scenes):
    with torch.no_grad():
        means = vae.encode(
            torch.from_numpy(np.stack([pixels(scene) for scene in scenes]))
        ).latent_dist.mean
    return means * vae.config.scaling_factor


def test_pictures_get_their_colours(vae):
    """Oracle: drawings in the right colours, through the same autoencoder.

    Shades vary, and a drawing decodes to colours that are off a little. Of 24, with
    mean square errors of latents of 0.015 to 1.7 for the wrong colours, 0.14 at most is
    left and never more than 0.57 of what there was.
    """
    scenes = [draw_scene(seed, kind="count") for seed in range(2000, 2004)]
    wrong, right = encoded(vae, map(other_colors, scenes)), encoded(vae, scenes)
    pictures, added = in_color(vae, wrong, scenes)
    left, had = (wrong + added - right).square(), (wrong - right).square()
    assert (left.mean((1, 2, 3)) < 0.6 * had.mean((1, 2, 3))).all()
    drawn = torch.from_numpy(np.stack([pixels(scene) for scene in scenes]))
    assert (pictures - drawn).square().mean() < 0.02


def test_what_is_right_stays(vae):
    """Up to the shades, which vary by 5 of 255."""
    scenes = [draw_scene(seed, kind="two") for seed in range(2000, 2008)]
    _, added = in_color(vae, encoded(vae, scenes), scenes)
    assert added.square().mean() < 0.02


def test_what_has_no_shape_or_no_colours_to_have_is_left_alone(vae):
    asked = np.empty(5, object)
    asked[1:] = draw_scene(2000)
    timesteps = torch.tensor([0, 0, SHAPED - 1, SHAPED, 999])
    where = shaped(SimpleNamespace(asked=asked, timesteps=timesteps))
    assert where.tolist() == [1, 2]
    pictures, added = in_color(vae, torch.zeros(0, 4, 16, 16), [])
    assert len(pictures) == len(added) == 0


def test_small_originals_lose_edges_and_others_none():
    ids = [[0, 24, 128], [24, 24, 128], [76, 76, 128], [77, 77, 128], [500, 500, 128]]
    told = torch.tensor([[h, w, 0, 0, target, target] for h, w, target in ids])
    kept = original_edges(told.float())
    assert kept.tolist() == pytest.approx([0.4, 0.5875, 0.99375, 1, 1])


def test_a_sharpened_picture_has_steeper_edges_and_no_new_colours():
    ramp = torch.tensor([0.1, 0.1, 0.1, 0.2, 0.5, 0.8, 0.9, 0.9, 0.9])
    pictures = torch.stack((ramp, -ramp, ramp / 2)).expand(2, 9, 3, 9).transpose(1, 2)
    sharp = sharpened(pictures, 1.0)
    assert sharp.min() == pictures.min()
    assert sharp.max() == pictures.max()
    row = sharp[0, 0, 0]
    assert row.tolist() == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.5, 0.9, 0.9, 0.9, 0.9])
    assert torch.equal(sharp[1, 2, 5], row / 2)
    flat = torch.full((1, 3, 8, 8), 0.3)
    assert torch.equal(sharpened(flat, 1.0), flat)


def test_scores_ask_for_fewer_edges():
    """At 2.5, guidance has nothing to add; at 6, it leaves more than all of them.

    Edges that 1, 2.5 keep, guided: 0.9918 + 5 (0.9 - 0.9918), 0.9918; 1 - 0.1 * 0.7**7.
    """
    kept, least = edges_kept(torch.tensor([1, 2.5, 6])), edges_kept(torch.tensor(2.5))
    share = least + GUIDANCE * (kept - least)
    assert share.tolist() == pytest.approx([0.53294, 0.991765, 1.03294], abs=1e-5)


def test_a_caption_tells_colours_or_does_not():
    scene = draw_scene(2000, kind="two")
    text = plain_caption(scene)
    assert tells_colors(text, scene)
    for color in (scene.background, *(thing.color for thing in scene.things)):
        assert not tells_colors(text.replace(f"{color} ", ""), scene)
