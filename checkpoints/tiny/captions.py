"""Scenes to English, in as many ways as the small SDXL is meant to understand."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from scenes import Scene, Thing

T = TypeVar("T")
NUMBERS = {2: "two", 3: "three", 4: "four"}
PLURALS = {"cross": "crosses"}
INVERSE = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}
COLORLESS_SHARE, GROUNDLESS_SHARE = 0.08, 0.06
FRAMES = (
    "{subject}, {background} background",
    "{subject} on a {background} background",
    "{subject} on a {background} background",
    "{subject} on {background}",
    "a picture of {subject} on a {background} background",
    "a drawing of {subject}, {background} background",
    "there is {subject} on a {background} background",
    "{background} background, {subject}",
    "on a {background} background, {subject}",
    "{subject} in front of a {background} background",
)


def caption(scene: Scene, rng: random.Random) -> str:
    """Describe the scene in one of many ways; sometimes leave a colour out."""
    subject = {"one": _one, "two": _two, "count": _count}[scene.kind](scene, rng)
    text = subject
    if rng.random() >= GROUNDLESS_SHARE:
        text = rng.choice(FRAMES).format(subject=subject, background=scene.background)
    return text.replace("a orange", "an orange")


def tells_colors(text: str, scene: Scene) -> bool:
    """Tell whether a caption names the background and every thing's colour."""
    words = text.replace(",", " ").split()
    colors = {scene.background, *(thing.color for thing in scene.things)}
    return colors.issubset(words)


def plain_caption(scene: Scene) -> str:
    """Describe the scene in the one way that the evaluation uses."""
    return caption(scene, _First())


def _one(scene: Scene, rng: random.Random) -> str:
    thing = scene.things[0]
    color = "" if rng.random() < COLORLESS_SHARE else thing.color
    words = [scene.size or "", thing.texture or "", color, thing.shape]
    subject = "a " + " ".join(word for word in words if word)
    return subject + _place(scene.place, rng)


def _place(place: str | None, rng: random.Random) -> str:
    if place is None:
        return ""
    if place == "center":
        return rng.choice((" in the center", " in the middle"))
    if " " in place:
        ways = (f" in the {place}", f" at the {place}", f" in the {place} corner")
        return rng.choice(ways)
    return rng.choice((f" at the {place}", f" on the {place}"))


def _two(scene: Scene, rng: random.Random) -> str:
    first, second = (_named(thing) for thing in scene.things)
    if scene.relation is None:
        if rng.random() < 0.5:
            first, second = second, first
        return f"{first} {rng.choice(('and', 'with'))} {second}"
    relation = scene.relation
    if rng.random() < 0.3:
        first, second, relation = second, first, INVERSE[relation]
    if relation.endswith("of") and rng.random() < 0.3:
        relation = f"to the {relation}"
    return f"{first} {relation} {second}"


def _count(scene: Scene, rng: random.Random) -> str:
    thing = scene.things[0]
    plural = PLURALS.get(thing.shape, thing.shape + "s")
    return f"{NUMBERS[len(scene.things)]} {thing.color} {plural}"


def _named(thing: Thing) -> str:
    return f"a {thing.color} {thing.shape}"


class _First(random.Random):
    """A source without surprises: the first of every choice, and never the rare one."""

    def random(self) -> float:
        return 0.99

    def choice(self, seq: Sequence[T]) -> T:
        return seq[1] if len(seq) == len(FRAMES) else seq[0]
