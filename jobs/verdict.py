"""What `doctor` says of one thing it looked at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Level = Literal["ok", "warning", "failure"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """`what` was looked at, what was `found` there, and the `remedy` if it's wrong.

    A failure is what a run would die of; a warning what would make it slow or spoil it.
    """

    level: Level
    what: str
    found: str
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a run would use, as far as the settings say.

    `weights` is what the parameters take in memory, in bytes, once per worker;
    `compile_cache` the folder of compiled graphs, None where they are not kept.
    """

    target: Literal["Ascend", "CPU"] = "CPU"
    devices: tuple[int, ...] = (0,)
    jit_level: str = "O2"
    weights: int | None = None
    compile_cache: Path | None = None


def ok(what: str, found: str) -> Verdict:
    return Verdict(level="ok", what=what, found=found)


def warning(what: str, found: str, remedy: str) -> Verdict:
    return Verdict(level="warning", what=what, found=found, remedy=remedy)


def failure(what: str, found: str, remedy: str) -> Verdict:
    return Verdict(level="failure", what=what, found=found, remedy=remedy)
