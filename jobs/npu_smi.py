"""What `npu-smi info` prints, as data.

    | npu-smi 25.2.0           Version: 25.2.0                   |
    | 2     910B3  | OK           | 92.3   36     0    / 0       |  a chip,
    | 0            | 0000:81:00.0 | 0      0   / 0   41052/ 65536 |  its memory
    | 2       0    | 1333928      | python         | 37709       |  a process

CANN counts the chips that are listed from 0, whatever numbers a container keeps of its
host's NPUs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PAIR = re.compile(r"(\d+)\s*/\s*(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """One device; memory is in MB."""

    npu: int
    chip: int
    name: str
    health: str
    used_mb: int
    total_mb: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A process that holds memory of a chip."""

    npu: int
    chip: int
    pid: int
    name: str
    memory_mb: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """What the tool said; `driver` is the version it speaks for."""

    driver: str
    chips: tuple[Chip, ...]
    processes: tuple[Process, ...]

    def of(self, device: int) -> Chip | None:
        """Find the chip with this id of CANN's: its place in the list."""
        return self.chips[device] if device < len(self.chips) else None

    def on(self, chip: Chip) -> list[Process]:
        """List the processes on a chip."""
        place = (chip.npu, chip.chip)
        return [p for p in self.processes if (p.npu, p.chip) == place]


def parse(text: str) -> Table:
    """Read the table; lines of an unknown form are passed over."""
    version = re.search(r"npu-smi\s+\S+\s+Version:\s*(\S+)", text)
    chips: list[Chip] = []
    processes: list[Process] = []
    first: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 4 and (found := _process(cells)):
            processes.append(found)
        elif len(cells) == 3 and ":" in cells[1]:
            chips += _chip(first, cells)
            first = []
        elif len(cells) == 3:
            first = cells
    return Table(
        driver=version[1] if version else "",
        chips=tuple(chips),
        processes=tuple(processes),
    )


def _chip(first: list[str], second: list[str]) -> list[Chip]:
    """Join a chip's two lines: name and health, then numbers and memory."""
    named = re.fullmatch(r"(\d+)\s+(\S+)", first[0]) if first else None
    numbers = [int(word) for word in second[0].split() if word.isdigit()]
    if named is None or not numbers:
        return []
    pairs = [(int(a), int(b)) for a, b in PAIR.findall(second[2]) if int(b)]
    used, total = pairs[-1] if pairs else (0, 0)
    return [
        Chip(
            npu=int(named[1]),
            chip=numbers[0],
            name=named[2],
            health=first[1],
            used_mb=used,
            total_mb=total,
        )
    ]


def _process(cells: list[str]) -> Process | None:
    place = re.fullmatch(r"(\d+)\s+(\d+)", cells[0])
    if place is None or not cells[1].isdigit() or not cells[3].isdigit():
        return None
    return Process(
        npu=int(place[1]),
        chip=int(place[2]),
        pid=int(cells[1]),
        name=cells[2],
        memory_mb=int(cells[3]),
    )
