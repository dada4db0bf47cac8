"""What a job will cost: rows, graphs, truncated prompts, disk, time. Makes nothing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from jobs import plan
from jobs.config import JobConfig
from jobs.errors import printable
from jobs.images import BYTES_PER_PIXEL
from jobs.manifest import Manifest, open_manifest
from jobs.model import native_size
from jobs.pricing import compilation, describe_compilation
from jobs.progress import duration
from jobs.records import Rejected
from jobs.resolved import resolve
from jobs.survey import survey

CHUNK = 4_096
SHOWN = 20

# Seconds per image of SDXL-Base at 1024x1024, 40 guided Euler steps, on one Ascend 910B
# card: the reference's published table. Not measured here; scaled by steps and pixels.
REFERENCE_SECONDS = 6.78
REFERENCE_WORK = 40 * 1024 * 1024


def estimate(
    manifest_path: Path,
    config: JobConfig,
    *,
    limit: int | None = None,
    prompt_column: str = "prompt",
    id_column: str = "id",
) -> dict[str, Any]:
    """Read the manifest and say what `run` would do with it."""
    manifest = open_manifest(
        manifest_path, prompt_column=prompt_column, id_column=id_column
    )
    resolved = resolve(config, native_size=native_size(config.model))
    found = survey(manifest, resolved, limit)
    pixels = sum(w * h * n for (w, h, _), n in found.image_steps.items())
    work = sum(w * h * s * n for (w, h, s), n in found.image_steps.items())
    devices = len(resolved.devices)
    return {
        "manifest": str(manifest_path),
        "rows": found.rows,
        "requests": found.requests,
        "invalid": found.invalid,
        "invalid_rows": [_rejection(row) for row in found.rejections[:SHOWN]],
        "tasks": found.tasks,
        "batch_size": resolved.batch_size,
        "graphs": [
            {"width": w, "height": h, "guider": guider, "tasks": n}
            for (w, h, guider), n in sorted(found.graphs.items())
        ],
        "compilation": compilation(found.graphs, resolved, config.model),
        "truncated": _truncated(manifest, limit),
        "device_target": resolved.device_target,
        "workers": devices,
        "disk_bytes": round(pixels * BYTES_PER_PIXEL[resolved.output.format]),
        "ascend_seconds_per_device": _ascend_seconds(config, work),
        "passes_through": list(manifest.extras),
    }


def describe(report: dict[str, Any]) -> str:
    """Put a plan into lines for people."""
    lines = [
        f"{report['manifest']}: {report['requests']} requests in "
        f"{report['rows']} rows, {report['invalid']} invalid",
        f"tasks: {report['tasks']} images in batches of {report['batch_size']} on "
        f"{report['workers']} {report['device_target']} worker(s)",
    ]
    for graph in report["graphs"]:
        lines.append(
            f"graph: {graph['width']}x{graph['height']} {graph['guider']}, "
            f"{graph['tasks']} images"
        )
    lines.append(describe_compilation(report["compilation"]))
    cut = report["truncated"]
    lines.append(f"truncated: {cut['prompts']} prompts are over 77 tokens")
    lines += [f"  {row['location']}: {row['tokens']} tokens" for row in cut["first"]]
    lines.append(f"disk: about {_size(report['disk_bytes'])}")
    if report["ascend_seconds_per_device"] is not None:
        days = duration(report["ascend_seconds_per_device"])
        lines.append(
            f"time: about {days} on one Ascend 910B, by the reference's published "
            f"{REFERENCE_SECONDS} s per image (not measured here)"
        )
    for row in report["invalid_rows"]:
        lines.append(f"invalid: {row['location']}: {row['reason']}")
    if report["invalid"] > len(report["invalid_rows"]):
        lines.append(f"… and {report['invalid'] - len(report['invalid_rows'])} more")
    return "\n".join(lines)


def _rejection(row: Rejected) -> dict[str, Any]:
    return {"location": row.location, "reason": printable(row.reason, 300)}


def _truncated(manifest: Manifest, limit: int | None) -> dict[str, Any]:
    """Count the prompts that the 77-token window cuts, and name the first."""
    from sdxl.tokenizer import CONTEXT_LENGTH, count_tokens

    found: Counter[str] = Counter()
    first: list[dict[str, Any]] = []
    waiting: list[Any] = []

    def look() -> None:
        counts = count_tokens([row.prompt for row in waiting])
        for row, tokens in zip(waiting, counts, strict=True):
            if tokens > CONTEXT_LENGTH:
                found["prompts"] += 1
                if len(first) < SHOWN:
                    first.append({"location": row.location, "tokens": int(tokens)})
        waiting.clear()

    for row in plan.limited(manifest, limit):
        if not isinstance(row, Rejected):
            waiting.append(row)
        if len(waiting) >= CHUNK:
            look()
    look()
    return {"prompts": found["prompts"], "first": first}


def _ascend_seconds(config: JobConfig, work: int) -> float | None:
    if config.model.preset != "base":
        return None
    return REFERENCE_SECONDS * work / REFERENCE_WORK


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError
