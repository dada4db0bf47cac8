"""Which Ascend devices there are, which of them a job gets, and how a worker has one.

Design: three numbers name a card. Its id is what `ASCEND_RT_VISIBLE_DEVICES` takes: 0
to n - 1 of the n cards that this machine or this container has, however a container's
/dev/davinci nodes are numbered. Where that variable is set, by a user or a scheduler
(Slurm, ModelArts, Volcano), the cards that it lists are all there are, and a card's
index in it is what everybody else counts by: so does `--devices`. A worker sees its one
card alone, at index 0. A job's rows name the id.

Sources: CANN, Environment Variables, ASCEND_RT_VISIBLE_DEVICES; CANN, Runtime API,
aclrtGetUserDevIdByLogicDevId.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jobs.errors import ConfigError

VARIABLE = "ASCEND_RT_VISIBLE_DEVICES"
NODES = Path("/dev")
DAVINCI = re.compile(r"davinci\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """The cards a process may use: `ids[index]` is the id of each.

    `present` counts those of the machine, `bound` says whether the environment chose.
    """

    ids: tuple[int, ...]
    present: int
    bound: bool = False


def find_devices(
    environment: Mapping[str, str] | None = None, nodes: Path | None = None
) -> Devices:
    """Find the cards that this process may use; none of them is opened.

    Raises:
        ConfigError: the environment names cards that are not there, or unreadably.
    """
    environment = os.environ if environment is None else environment
    names = (path.name for path in (nodes or NODES).glob("davinci*"))
    present = sum(DAVINCI.fullmatch(name) is not None for name in names)
    listed = environment.get(VARIABLE, "")
    if not listed or not present:
        return Devices(ids=tuple(range(present)), present=present)
    return Devices(ids=_listed(listed, present), present=present, bound=True)


def choose_devices(asked: str, devices: Devices) -> tuple[int, ...]:
    """Give the ids of the cards that `auto`, or a list such as `0-7`, asks for.

    Raises:
        ConfigError: unreadable, a card twice, one that is not there, or none at all.
    """
    if not devices.present:
        raise ConfigError(
            "no Ascend device is visible (/dev/davinci0 and so on)",
            hint="check `npu-smi info`, or run on the CPU with `--workers 2`",
        )
    if asked == "auto":
        return devices.ids
    indices = parse_devices(asked)
    absent = [index for index in indices if index >= len(devices.ids)]
    if absent:
        raise _absent(absent, devices)
    return tuple(devices.ids[index] for index in indices)


def binding(device: int) -> dict[str, str]:
    """Give the environment of a process that is to see this card alone, at index 0."""
    return {VARIABLE: str(device)}


def parse_devices(text: str) -> tuple[int, ...]:
    """Read a device list such as `0-7` or `0,2,5-6`."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part)
        if not match:
            raise ConfigError(
                f"devices: can't read `{text}`",
                hint="write a list of numbers and ranges, such as `0-7` or `0,2`",
            )
        first, last = int(match[1]), int(match[2] or match[1])
        found.extend(range(first, last + 1))
    if not found or len(set(found)) != len(found):
        raise ConfigError(f"devices: `{text}` names a device twice or none at all")
    return tuple(found)


def cores() -> int:
    """Count the processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _listed(text: str, present: int) -> tuple[int, ...]:
    """Read what the environment lists, as strictly as CANN does.

    CANN takes no notice of what follows a space, a range or a card that is not there,
    and would run on fewer cards without a word.
    """
    if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", text):
        raise ConfigError(
            f"{VARIABLE} is `{text}`, of which CANN reads only a part",
            hint="list numbers between commas, without spaces or ranges: 0,1,2,3",
        )
    ids = tuple(int(number) for number in text.split(","))
    if len(set(ids)) != len(ids) or max(ids) >= present:
        raise ConfigError(
            f"{VARIABLE} is `{text}`, which names a device twice or one that is not "
            f"there: this machine has {present}",
            hint="in a container devices count from 0, whatever the host calls them",
        )
    return ids


def _absent(indices: list[int], devices: Devices) -> ConfigError:
    last = len(devices.ids) - 1
    there = f"0-{last} are" if last else "0 is"
    numbers = ", ".join(map(str, indices[:8]))
    if not devices.bound:
        return ConfigError(f"devices: {numbers} not there: only {there}")
    listed = ",".join(map(str, devices.ids))
    return ConfigError(
        f"devices: {numbers} not there: {VARIABLE} is `{listed}`, so {there}",
        hint=f"count from 0 within {VARIABLE}",
    )
