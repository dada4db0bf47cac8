"""Would a run work on this machine: look, judge, say what to do.

    settings ──> asked ─┐
    machine ────────────┴─> checks ──> verdicts ──> table or JSON, exit code
    MindSpore, in a process of its own ──┘

A setting that can't be used is a verdict like any other, so that one look shows all.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jobs import check_ascend, check_host, check_software
from jobs.errors import JobError, printable
from jobs.machine import Machine, Places, look
from jobs.model import inspect_checkpoint
from jobs.probe import Probe, probe
from jobs.resolved import resolve
from jobs.sections import JobConfig
from jobs.verdict import Asked, Verdict, failure, ok

Check = Callable[[Machine, Asked], Verdict]
SOFTWARE: tuple[Check, ...] = (
    check_software.python,
    check_software.system,
    check_software.packages,
    check_software.numpy,
    check_software.tables,
    check_software.mindspore,
    check_software.compiler,
)
BYTES = {"fp32": 4, "fp16": 2}


def examine(
    settings: Callable[[], JobConfig],
    output: Path,
    *,
    places: Places | None = None,
    probe: Callable[..., Probe] = probe,
) -> list[Verdict]:
    """Look at the machine and judge it for a job; `settings` gives the job's."""
    asked, verdicts = ask(settings)
    machine = look(places or Places(), output, asked.compile_cache)
    verdicts += [check(machine, asked) for check in checks_for(asked)]
    if machine.packages["mindspore"]:
        bound = asked.devices[0] if asked.target == "Ascend" else None
        found = probe(asked.target, machine.environ, device=bound)
        verdicts.append(check_software.judge_probe(found, asked))
    return verdicts


def checks_for(asked: Asked) -> Iterator[Check]:
    """Yield the checks that a run on this target needs."""
    yield from SOFTWARE
    if asked.target == "Ascend":
        yield from check_ascend.CHECKS
    yield from check_host.CHECKS


def ask(settings: Callable[[], JobConfig]) -> tuple[Asked, list[Verdict]]:
    """Work out what a run would use; what can't be used is told, and left out."""
    try:
        config = settings()
    except (JobError, ImportError) as error:
        return Asked(), [_as_verdict("settings", error)]
    parameters, verdicts = _checkpoint(config)
    try:
        resolved = resolve(config, native_size=1024)
    except JobError as error:
        target = "Ascend" if config.runtime.device_target == "Ascend" else "CPU"
        verdicts.append(_as_verdict("settings", error))
        return Asked(target=target, jit_level=config.runtime.jit_level), verdicts
    asked = Asked(
        target="Ascend" if resolved.device_target == "Ascend" else "CPU",
        devices=resolved.devices,
        jit_level=resolved.jit_level,
        weights=parameters and parameters * BYTES[resolved.precision],
        compile_cache=resolved.compile_cache,
    )
    return asked, verdicts


def _checkpoint(config: JobConfig) -> tuple[int | None, list[Verdict]]:
    """Judge the checkpoint by its headers; count its parameters."""
    if config.model.checkpoint is None:
        return None, []
    path = Path(config.model.checkpoint)
    try:
        found = inspect_checkpoint(path, preset=config.model.preset)
    except (JobError, ImportError) as error:
        return None, [_as_verdict("checkpoint", error)]
    return found["parameters"], [_judge_checkpoint(found)]


def _judge_checkpoint(found: dict[str, Any]) -> Verdict:
    kind = f"{found['path']}: {found['kind']}, {found['nbytes'] / 1e9:.3g} GB"
    wrong = {w: found[w] for w in ("missing", "extra", "unfit") if found[w]}
    if wrong:
        counts = ", ".join(f"{len(names)} {what}" for what, names in wrong.items())
        return failure(
            "checkpoint",
            f"{kind}; tensors: {counts}",
            f"`sdxl-jobs inspect {found['path']}` names them",
        )
    return ok("checkpoint", kind)


def _as_verdict(what: str, error: Exception) -> Verdict:
    hint = error.hint if isinstance(error, JobError) else check_software.INSTALL
    return failure(what, str(error), hint or "mend the setting")


def as_dict(verdicts: list[Verdict]) -> dict[str, Any]:
    """Give the verdicts as one JSON object."""
    return {
        "would_run": not any(v.level == "failure" for v in verdicts),
        "counts": _counts(verdicts),
        "verdicts": [dataclasses.asdict(verdict) for verdict in verdicts],
    }


def describe(verdicts: list[Verdict]) -> str:
    """Put the verdicts into a table for people, remedies below what they mend."""
    width = max(len(verdict.what) for verdict in verdicts)
    lines = []
    for v in verdicts:
        found = printable(v.found, 500)
        lines.append(f"{v.level:<8} {v.what:<{width}}  {found}".rstrip())
        if v.remedy:
            lines.append(f"{'':<8} {'':<{width}}  hint: {printable(v.remedy, 500)}")
    counts = _counts(verdicts)
    would = "would fail" if counts["failure"] else "should work"
    told = ", ".join(f"{n} {level}{'s' * (n != 1)}" for level, n in counts.items() if n)
    lines.append(f"a run {would}: {told or 'nothing found'}")
    return "\n".join(lines)


def _counts(verdicts: list[Verdict]) -> dict[str, int]:
    found = Counter(verdict.level for verdict in verdicts)
    return {level: found[level] for level in ("failure", "warning")}
