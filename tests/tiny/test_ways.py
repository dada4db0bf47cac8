"""What models learn from must be what leads to the picture, at every place of a way.

Oracle: a denoiser that sees one known picture in whatever it is shown; every way of its
own ends at that picture, whatever the steps.
"""

import random

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import pictures  # noqa: E402
import teaching  # noqa: E402
from denoising import Model, noise_of  # noqa: E402
from latents import CHUNK, Latents  # noqa: E402
from rollouts import OTHER_GUIDANCE, Rollouts  # noqa: E402
from scenes import OBJECT_COLORS  # noqa: E402
from solving import Solving  # noqa: E402


@pytest.fixture
def data(tmp_path):
    """Latents of two sizes, each the picture that is seen at its size.

    Pictures are faint: SDXL's betas leave 0.068 of one at timestep 999, which a way
    that begins at noise alone lacks, and which is taken for noise.
    """
    folder = tmp_path / "latents"
    folder.mkdir()
    for index, (h, w) in enumerate(((16, 16), (24, 16))):
        np.savez(
            folder / f"{index:05d}.npz",
            seeds=np.arange(CHUNK),
            latents=np.full((CHUNK, 4, h, w), 8 * h / 1000, np.float16),
            time_ids=np.full((CHUNK, 6), 8 * h, np.float32),
        )
    return Latents(tmp_path)


@pytest.fixture(scope="module")
def model():
    return Model().requires_grad_(requires_grad=False)


def picture(time_ids, shape):
    """Return the picture that is seen by who is told `time_ids` (B, 6)."""
    return (time_ids[:, 0] / 1000)[:, None, None, None].expand(shape)


def test_a_rollout_ends_at_the_picture_its_model_sees_and_another_begins(data, model):
    """At its end, timestep 0, x still holds noise: 0.029 of it, by SDXL's betas."""
    rng, source = random.Random(0), torch.Generator().manual_seed(0)
    rollouts = Rollouts(data, model.language, 8)
    begun, nearly_over = 0, 0
    for _ in range(80):
        on = rollouts.next(rng, source)
        assert (on.timesteps >= 0).all()
        assert (on.timesteps <= 999).all()
        assert (on.guidance >= OTHER_GUIDANCE[0]).all()
        assert (on.guidance <= OTHER_GUIDANCE[1]).all()
        begun += int((on.timesteps == 999).sum())
        z = picture(on.time_ids, on.x.shape)
        noise = noise_of(on.x, z, on.timesteps)
        low = on.timesteps < on.strides
        nearly_over += int(low.sum())
        on.step(noise, noise, source)
        over = on.timesteps < 0
        assert (over == low).all()
        if over.any():
            assert (on.x - z)[over].std() == pytest.approx(0.029, rel=0.1)
    assert begun > 20
    assert nearly_over > 20


def test_lessons_name_the_picture_that_a_way_has_led_to(data, model):
    """Oracle: as above; float32, largest error seen 6e-7."""
    rng, source = random.Random(0), torch.Generator().manual_seed(0)

    def noise_in(x, timesteps, w, context, pooled, time_ids):
        return noise_of(x, picture(time_ids, x.shape), timesteps)

    def draws(x, timesteps, w, context, pooled, time_ids):
        return torch.full_like(x, 7.0)

    solving = Solving(data, model, noise_in, draws, 6)
    sizes, starts = set(), set()
    for _ in range(60):
        some = solving.lessons(16, rng, source)
        w, context, pooled, time_ids = some.told
        assert len(w) == len(context) == len(pooled) == len(some.x) == 16
        z = picture(time_ids, some.x.shape)
        assert torch.allclose(some.wanted, z, atol=2e-6)
        sizes.add(tuple(some.x.shape[2:]))
        starts.update(some.timesteps.tolist())
    assert sizes == {(16, 16), (24, 16)}
    assert 999 in starts
    begun = [way.seen[0] for ways in solving.whole.values() for way in ways]
    drawn_anew = [(x, t) for x, t in begun if 0 < t < 300]
    assert drawn_anew
    assert any(x.mean() > 5 for x, _ in drawn_anew)


def test_a_refiner_is_asked_what_the_base_came_through_and_told_the_right_colours(
    data, model, tmp_path, monkeypatch
):
    """Colours add ten times their number here, so that none can be taken for noise."""

    def in_color(vae, latents, scenes, near):
        numbers = [OBJECT_COLORS.index(scene.things[0].color) for scene in scenes]
        added = 10.0 * torch.tensor(numbers)[:, None, None, None] + 10
        return None, added.expand(latents.shape)

    def both_noises_in(x, timesteps, context, pooled, time_ids):
        noise = noise_of(x, picture(time_ids, x.shape), timesteps)
        return noise, noise

    monkeypatch.setattr(pictures, "in_color", in_color)
    monkeypatch.setattr(model, "both_noises_in", both_noises_in)
    painter = pictures.Painter(model, None, data)
    pictures.add_pictures(tmp_path, painter, 3)
    pictures.add_pictures(tmp_path, painter, 12)
    known = pictures.load_pictures(tmp_path)
    assert set(known) == {(16, 16), (24, 16)}
    drawn = [one for some in known.values() for one in some]
    assert len(drawn) == 12 * (pictures.DRAWN + pictures.DRAWINGS)
    assert {len(one.seen) for one in drawn} <= {0, 3, 4, 5}
    share = np.mean([one.pair for one in drawn])
    pairs = {tuple(one.pooled.tolist()) for one in drawn if one.pair}

    rng, source = random.Random(0), torch.Generator().manual_seed(0)
    lessons = teaching.Teaching(known)
    righted, paired, places, over = [], [], [], {}
    for _ in range(120):
        asked = lessons.lesson(16, rng, source)
        z = picture(asked.time_ids, asked.x.shape)
        noise = noise_of(asked.x, asked.latents, asked.timesteps)
        assert noise.mean().abs() < 0.1
        assert noise.std() == pytest.approx(1, abs=0.1)
        assert (asked.timesteps < 200).all()
        assert (asked.timesteps >= 0).all()
        new = over.get(asked.x.shape, torch.full((16,), True))
        righted += (asked.righted - z).mean((1, 2, 3))[new].tolist()
        paired += [tuple(told) in pairs for told in asked.pooled[new].tolist()]
        places += (asked.timesteps // asked.strides)[new].tolist()
        asked.step(noise_of(asked.x, asked.righted, asked.timesteps))
        over[asked.x.shape] = asked.timesteps < 0
    assert 500 < len(righted) < 1200  # the others go on
    assert {round(value) for value in righted} <= {0, *range(10, 101, 10)}
    assert 0.6 < np.mean(np.abs(righted) > 1) < 0.9  # eight ninths are the base's
    assert np.mean(paired) == pytest.approx(2 * share / (1 + share), abs=0.05)
    assert np.mean(np.array(places) == 1) > 0.5  # two steps are left
