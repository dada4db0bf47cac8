"""How far a job is: counted from its rows, with what the runner last said of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jobs import seal
from jobs.lock import is_alive, read_holder
from jobs.progress import duration
from jobs.store import Store


def read_status(folder: Path) -> dict[str, Any]:
    """Count the rows of a job's folder and add the runner's own words.

    The counts come from the published rows, which are the truth whatever became of the
    runner. `state` is `running`, `finished`, `interrupted` or `dead` (killed).
    """
    store = Store(folder)
    job = store.read_job()
    said = _said(folder)
    counts = store.index().counts()
    running = _is_running(folder)
    state = "running" if running else said.get("state", "dead")
    if state == "running" and not running:
        state = "dead"
    return {
        "folder": str(folder),
        "state": state,
        "tasks": job["tasks"],
        "rows": job["rows"],
        "counts": counts
        | {"pending": max(0, job["tasks"] - counts["ok"] - counts["failed"])},
        "images_per_s": said.get("images_per_s"),
        "eta_seconds": said.get("eta_seconds") if running else None,
        "workers": said.get("workers", []),
        "updated_at": said.get("updated_at"),
        "run_id": job["run_id"],
        "fingerprint": job["fingerprint"],
    }


def describe(report: dict[str, Any]) -> str:
    """Put a status into a few lines for people."""
    counts = ", ".join(f"{n} {status}" for status, n in report["counts"].items())
    lines = [f"{report['folder']}: {report['state']}", f"  {counts}"]
    if report["images_per_s"]:
        eta = report["eta_seconds"]
        left = f", ETA {duration(eta)}" if eta else ""
        lines.append(f"  {report['images_per_s']:.3g} img/s{left}")
    for worker in report["workers"]:
        rate = worker["images_per_s"]
        loaded = sum(worker.get("loads", {}).values())
        graphs = sum(worker["compiles"].values()) - loaded
        memory = worker.get("peak_memory_mb")
        lines.append(
            f"  {worker['worker']} on {worker['device']}: "
            f"{worker['state']}, {worker['made']} made, {worker['failed']} failed, "
            f"{graphs} graphs compiled, {loaded} loaded"
            + (f", {rate:.3g} img/s" if rate else "")
            + (f", peak {memory / 1024:.3g} GB" if memory else "")
        )
    return "\n".join(lines)


def _said(folder: Path) -> dict[str, Any]:
    """Read what the runner said of itself, where it is what the runner wrote."""
    path = folder / "status.json"
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        whole = seal.broken(path) is None
    except (OSError, ValueError, RecursionError):
        return {}
    return said if whole and isinstance(said, dict) else {}


def _is_running(folder: Path) -> bool:
    holder = read_holder(folder / "lock")
    return bool(holder) and is_alive(folder / "lock", holder or {})
