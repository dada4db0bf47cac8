"""The commands about a machine rather than a job, thin as those of `cli`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from jobs.errors import ExitCode
from jobs.options import config_from, config_options


@click.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("outputs"),
    show_default=True,
    help="Folder that results would go to.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@config_options
def doctor(output: Path, as_json: bool, **options: Any) -> None:
    """Say whether a run would work on this machine, and what to do where not.

    Looks at versions, devices, drivers, memory, disks and the settings, and tries
    MindSpore in a process of its own. Ends with exit code 1 when a run would fail.

    Example: sdxl-jobs doctor --config configs/tiny.yaml --workers 2
    """
    from jobs.doctor import as_dict, describe, examine

    verdicts = examine(lambda: config_from(options), output)
    report = as_dict(verdicts)
    click.echo(json.dumps(report, indent=2) if as_json else describe(verdicts))
    if not report["would_run"]:
        sys.exit(ExitCode.ERROR)
