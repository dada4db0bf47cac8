"""The judge must be right on drawings, and must not see what is not there."""

import numpy as np
import pytest
from drawing import View, draw
from judge import OUTLINES, PALETTE, judge, relation, sharpness
from scenes import COLORS, SHAPES, Scene, draw_scene

COUNT = 400


@pytest.fixture(scope="module")
def judged():
    """Drawn scenes with the judge's verdicts on them."""
    scenes = [draw_scene(seed) for seed in range(COUNT)]
    return [(scene, judge(np.asarray(draw(scene)))) for scene in scenes]


def pairs(judged):
    """Pair every drawn thing with the nearest object found in its picture."""
    for scene, verdict in judged:
        if len(verdict.objects) != len(scene.things):
            continue
        for thing in scene.things:
            yield (
                thing,
                min(
                    verdict.objects,
                    key=lambda found, t=thing: (
                        (found.x - t.x) ** 2 + (found.y - t.y) ** 2
                    ),
                ),
            )


def share(truths):
    truths = list(truths)
    return sum(truths) / len(truths)


def test_knows_the_drawers_colors_and_shapes():
    assert PALETTE == COLORS
    assert set(OUTLINES) == set(SHAPES)


def test_background_of_every_drawing_is_right(judged):
    assert all(v.background == s.background for s, v in judged)


def test_number_of_objects_is_right_in_99_percent(judged):
    """Hearts of a count can touch: seen once in 1500 drawings."""
    assert share(len(v.objects) == len(s.things) for s, v in judged) >= 0.99


def test_color_and_shape_of_every_object_are_right(judged):
    """Seen: 2221 of 2221 colours, 2220 shapes."""
    found = list(pairs(judged))
    assert all(t.color == f.color for t, f in found)
    assert share(t.shape == f.shape for t, f in found) >= 0.99


def test_place_of_every_lone_object_is_right(judged):
    placed = [(s.place, v.objects[0].place) for s, v in judged if s.place]
    assert len(placed) > 80
    assert all(said == seen for said, seen in placed)


def test_relation_of_every_pair_is_right(judged):
    related = [(s, v) for s, v in judged if s.relation and len(v.objects) == 2]
    assert len(related) > 40
    for scene, verdict in related:
        first, second = scene.things
        objects = {found.color: found for found in verdict.objects}
        seen = relation(objects[first.color], objects[second.color])
        assert seen == scene.relation


def test_verdicts_fit_other_drawings_only_by_chance(judged):
    """Shuffled, one of 8 shapes and about one of 10 colours agree by accident."""
    lone = [(s, v) for s, v in judged if s.kind == "one" and len(v.objects) == 1]
    scenes, verdicts = zip(*lone, strict=True)
    moved = list(zip(scenes, verdicts[7:] + verdicts[:7], strict=True))
    assert share(s.background == v.background for s, v in moved) < 0.2
    assert share(s.things[0].color == v.objects[0].color for s, v in moved) < 0.2
    assert share(s.things[0].shape == v.objects[0].shape for s, v in moved) < 0.25


def test_an_empty_picture_has_a_background_and_no_object():
    verdict = judge(np.full((128, 128, 3), PALETTE["cyan"], np.uint8))
    assert verdict.background == "cyan"
    assert verdict.objects == ()


def test_noise_is_not_taken_for_an_object_of_a_known_number():
    noise = np.random.RandomState(0).randint(0, 256, (128, 128, 3), dtype=np.uint8)
    objects = judge(noise).objects
    assert len(objects) != 2


@pytest.mark.parametrize("size", [(192, 128), (128, 192), (256, 256)])
def test_other_sizes_are_judged_alike(size):
    scene = draw_scene(5, kind="one")
    width, height = size
    view = View(width=width, height=height, canvas_width=width, canvas_height=height)
    verdict = judge(np.asarray(draw(scene, view)))
    assert verdict.background == scene.background
    assert [f.color for f in verdict.objects] == [scene.things[0].color]


def test_sharpness_falls_when_a_drawing_is_blurred():
    scenes = [draw_scene(seed) for seed in range(20)]

    def mean(view: View) -> float:
        return float(np.mean([sharpness(np.asarray(draw(s, view))) for s in scenes]))

    sharp, soft = mean(View()), mean(View(resolution=0.3))
    assert sharp > 0.55
    assert soft < 0.6 * sharp


def test_held_out_combinations_are_a_tenth_and_never_drawn_for_training():
    trained = {draw_scene(seed).combination for seed in range(2000)}
    kept = [draw_scene(seed, held_out=True) for seed in range(300)]
    assert not trained & {scene.combination for scene in kept}
    assert all(isinstance(scene, Scene) and scene.held_out for scene in kept)


@pytest.mark.parametrize("ground", ["white", "cyan", "black"])
def test_a_shadow_in_a_ring_does_not_fill_it(ground):
    """A third of the way from the background's colour to the ring's."""
    picture = circle(ground, "red", 40)
    paint(picture, 64, 22, mixed(ground, "red", 0.33))
    (found,) = judge(picture).objects
    assert (found.color, found.shape) == ("red", "ring")


def test_things_joined_by_a_bridge_are_two():
    picture = circle("purple", "orange", 24, x=36)
    paint(picture, 92, 24, PALETTE["cyan"])
    picture[62:66, 56:72] = mixed("purple", "orange", 0.8)
    found = judge(picture).objects
    assert {one.color for one in found} == {"orange", "cyan"}
    assert [one.shape for one in found] == ["circle", "circle"]


def circle(ground, color, radius, x=64):
    """Paint a circle at (x, 64) on a plain picture."""
    picture = np.full((128, 128, 3), PALETTE[ground], np.uint8)
    paint(picture, x, radius, PALETTE[color])
    return picture


def paint(picture, x, radius, color):
    down, across = np.mgrid[:128, :128]
    picture[np.hypot(across - x, down - 64) < radius] = color


def mixed(one, other, share):
    ends = np.array([PALETTE[one], PALETTE[other]], np.float64)
    return np.rint((1 - share) * ends[0] + share * ends[1]).astype(np.uint8)
