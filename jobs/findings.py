"""What `verify` found, as data and as lines for people."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.errors import printable

SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong.

    `kind` is `file` (one of the runner's own), `image`, `row`, `books` or `manifest`;
    `path` is relative to the folder.
    """

    kind: str
    path: str
    what: str
    image_id: str | None = None


@dataclass(slots=True, kw_only=True)
class Report:
    """What `verify` found. `strays` are files that nothing names."""

    folder: Path
    findings: list[Finding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    tasks: int | None = None
    files: int = 0
    images: int = 0
    strays: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return not self.findings


def as_dict(report: Report) -> dict[str, Any]:
    """Give a report as one JSON object."""
    return {
        "folder": str(report.folder),
        "sound": report.sound,
        "tasks": report.tasks,
        "counts": dict(report.counts),
        "files_checked": report.files,
        "images_hashed": report.images,
        "findings": [
            {
                "kind": f.kind,
                "path": f.path,
                "what": f.what,
                "image_id": f.image_id,
            }
            for f in report.findings
        ],
        "strays": len(report.strays),
        "repaired": report.repaired,
    }


def describe(report: Report) -> str:
    """Put a report into lines for people."""
    lines = []
    for finding in report.findings[:SHOWN]:
        name = f" ({finding.image_id})" if finding.image_id else ""
        lines.append(f"{finding.kind}: {finding.path}{name} {finding.what}")
    if len(report.findings) > SHOWN:
        lines.append(f"… and {len(report.findings) - SHOWN} more; --json lists all")
    counts = " + ".join(f"{n} {status}" for status, n in report.counts.items())
    if report.tasks is not None:
        total = report.tasks + report.counts["invalid"]
        lines.append(f"books: {total} asked for = {counts}")
    else:
        lines.append(f"books: not balanced; rows: {counts}")
    lines.append(f"checked: {report.files} files, {report.images} images hashed")
    if report.strays:
        lines.append(f"strays: {len(report.strays)} files that no row names; harmless")
    lines += [f"repaired: {what}" for what in report.repaired[:SHOWN]]
    lines.append("sound" if report.sound else f"{len(report.findings)} findings")
    return "\n".join(printable(line, 500) for line in lines)
