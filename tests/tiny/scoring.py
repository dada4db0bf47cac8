"""Hold a verdict against the scene that was asked for, point by point."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from judge import Found, Verdict, relation
from scenes import Scene, Thing


def score(scene: Scene, verdict: Verdict) -> dict[str, bool]:
    """Return the points that `scene` lets one ask about, and whether each is right.

    Points: `background` and `number` always; `color`, `shape` and, if asked, `place` of
    a lone object; `both colors`, `both shapes` and, if asked, `relation` of a pair;
    `color` and `shape` of the largest object of a count.
    """
    points = {
        "background": verdict.background == scene.background,
        "number": len(verdict.objects) == len(scene.things),
    }
    if scene.kind == "two":
        return points | _of_pair(scene, verdict)
    wanted, seen = scene.things[0], verdict.objects
    points["color"] = bool(seen) and seen[0].color == wanted.color
    points["shape"] = bool(seen) and seen[0].shape == wanted.shape
    if scene.place is not None:
        points["place"] = bool(seen) and seen[0].place == scene.place
    return points


def rates(scores: Iterable[dict[str, bool]]) -> dict[str, tuple[float, int]]:
    """Return for every point the share that was right and how often it was asked."""
    asked = defaultdict(list)
    for points in scores:
        for name, right in points.items():
            asked[name].append(right)
    return {name: (sum(all_) / len(all_), len(all_)) for name, all_ in asked.items()}


def _of_pair(scene: Scene, verdict: Verdict) -> dict[str, bool]:
    first, second = scene.things
    points = {"both colors": False, "both shapes": False}
    if scene.relation is not None:
        points["relation"] = False
    if len(verdict.objects) < 2:
        return points
    for one, two in (verdict.objects[:2], verdict.objects[1::-1]):
        if (one.color, two.color) == (first.color, second.color):
            points["both colors"] = True
            points["both shapes"] = _shapes(one, two) == _shapes(first, second)
            if scene.relation is not None:
                points["relation"] = relation(one, two) == scene.relation
    return points


def _shapes(one: Found | Thing, two: Found | Thing) -> tuple[str, str]:
    return one.shape, two.shape
