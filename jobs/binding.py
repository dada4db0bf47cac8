"""What binds an output folder to its job: all that its pixels depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from jobs.errors import MismatchError
from jobs.model import Model
from jobs.resolved import Resolved
from jobs.store import Store


def fields_of(
    resolved: Resolved, model: Model, refiner: Model | None
) -> dict[str, Any]:
    """List what pixels depend on: settings, and the hashes of the checkpoints."""
    fields = resolved.pixels_depend_on() | {"checkpoint": model.sha256}
    if refiner:
        fields["refiner.checkpoint"] = refiner.sha256
    return fields


def fingerprint(fields: Mapping[str, Any]) -> str:
    """Hash the fields that pixels depend on to 16 hex digits."""
    text = json.dumps(fields, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def refuse_other_job(store: Store, fields: dict[str, Any]) -> None:
    """Refuse a folder that belongs to a job with other pixels, field by field.

    Raises:
        MismatchError: it does.
    """
    if not store.job.exists():
        if store.fingerprints() - {fingerprint(fields)}:
            raise MismatchError(
                f"{store.root} holds another job's rows; its job.json is gone",
                hint="`sdxl-jobs verify --repair` restores it from its copy",
            )
        return
    held = store.read_job()["fingerprint_fields"]
    different = [k for k in fields | held if fields.get(k) != held.get(k)]
    if different:
        shown = "; ".join(
            f"{k}: `{_brief(held.get(k))}` there, `{_brief(fields.get(k))}` asked"
            for k in sorted(different)
        )
        raise MismatchError(
            f"{store.root} belongs to another job: {shown}",
            hint="use a new output folder, or the settings it was started with",
        )


def _brief(value: Any) -> str:
    return json.dumps(value, default=str)[:60].strip('"')
