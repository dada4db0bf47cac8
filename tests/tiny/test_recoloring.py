"""Recolouring must give things their colours, and leave everything else.

Oracle: a drawing of the same scene with the right colours.
"""

from dataclasses import replace

import numpy as np
import pytest
from drawing import mark_color, pixels
from judge import judge
from recoloring import recolored
from scenes import COLORS, OBJECT_COLORS, draw_scene
from scoring import score

DRAWINGS = range(1000, 1120)


def picture(scene):
    """Return the drawing of a scene, (H, W, 3) in -1..1."""
    return pixels(scene).transpose(1, 2, 0)


def told(scene, picture):
    return score(scene, judge(np.uint8(np.rint(127.5 * (picture + 1)))))


def distance(one, other):
    return np.linalg.norm(np.subtract(COLORS[one], COLORS[other]))


def light(color):
    """Tell whether marks on a colour are darker than it."""
    return mark_color(COLORS[color]) < COLORS[color]


def other_colors(scene):
    """Return the scene with each colour taken for the nearest that is nowhere in it."""
    new = {}
    for color in dict.fromkeys(thing.color for thing in scene.things):
        used = {scene.background, color, *new, *new.values()}
        used |= {thing.color for thing in scene.things}
        free = [name for name in OBJECT_COLORS if name not in used]
        free = [name for name in free if light(name) == light(color)] or free
        new[color] = min(free, key=lambda name: distance(name, color))
    things = tuple(replace(t, color=new[t.color]) for t in scene.things)
    return replace(scene, things=things)


@pytest.mark.parametrize("kind", ["one", "two", "count"])
def test_things_get_their_colours_back(kind):
    """Shades vary by 5 of 255; the largest mean error seen is 0.013 of -1..1."""
    for seed in DRAWINGS:
        scene = draw_scene(seed, kind=kind)
        wrong = other_colors(scene)
        if scene.things[0].texture or (kind == "two" and scene.relation is None):
            continue
        found = recolored(picture(wrong), scene)
        assert np.abs(found - picture(scene)).mean() < 0.03, scene
        judged = told(scene, found)
        assert judged.get("color", True), scene
        assert judged.get("both colors", True), scene


def test_marks_of_a_pattern_get_theirs():
    """A mark that looks like the background cannot be seen, and is left."""
    seen = []
    for seed in range(1000, 3000):
        scene = draw_scene(seed, kind="one")
        if scene.things[0].texture:
            found = recolored(picture(other_colors(scene)), scene)
            seen.append(np.abs(found - picture(scene)).mean())
    assert len(seen) > 100
    assert np.mean(np.array(seen) < 0.05) > 0.85


def test_a_pair_without_a_relation_is_not_turned():
    scenes = [draw_scene(seed, kind="two") for seed in DRAWINGS]
    scenes = [scene for scene in scenes if scene.relation is None]
    assert len(scenes) > 20
    for scene in scenes:
        found = recolored(picture(scene), scene)
        assert np.abs(found - picture(scene)).mean() < 0.03, scene


def test_what_cannot_be_seen_stays():
    scene = draw_scene(1000, kind="two")
    blank = np.full((128, 192, 3), 0.25, np.float32)
    blank[40:80, 40:80] += 0.05
    assert np.array_equal(recolored(blank, scene), blank)


def test_what_is_nearer_to_its_colour_than_to_any_other_may_stay():
    """No drawing of 120 is changed; with other colours, each is as if none may stay."""
    changed = {0.0: 0, 0.6: 0}
    for seed in DRAWINGS:
        scene = draw_scene(seed, kind="one")
        if scene.things[0].texture:
            continue
        for near in changed:
            found = recolored(picture(scene), scene, near)
            changed[near] += not np.array_equal(found, picture(scene))
        wrong = picture(other_colors(scene))
        assert np.array_equal(recolored(wrong, scene, 0.6), recolored(wrong, scene))
    assert changed[0.0] > 50
    assert changed[0.6] == 0
