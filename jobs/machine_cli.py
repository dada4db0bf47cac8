"""The commands about a machine rather than a job, thin as those of `cli`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from jobs.errors import ConfigError, ExitCode
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


@click.command()
@click.option("--preset", help="Random weights of this geometry: base, tiny, …")
@click.option("--size", metavar="WxH", help="Size of the pictures.")
@click.option("--steps", type=click.IntRange(1, 1000), help="Steps of every row.")
@click.option(
    "--runs",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Generations timed after the first.",
)
@click.option(
    "--table",
    type=click.Choice(["reference"]),
    help="Run the four rows of the reference's table.",
)
@click.option("--ops", is_flag=True, help="Time single kernels too.")
@click.option("--warm", is_flag=True, help="Use the compile cache.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@config_options
def bench(
    preset: str | None,
    size: str | None,
    steps: int | None,
    runs: int,
    table: str | None,
    ops: bool,
    warm: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Time this machine: seconds per picture, graph compilation, single kernels.

    Without a checkpoint the weights are random, which costs the same time. A full-size
    network needs 16 GB of memory on the CPU, and hours; an estimate comes first.

    Example: sdxl-jobs bench --preset tiny --table reference --size 128x128
    """
    from jobs.bench import Wanted
    from jobs.bench import bench as run_bench
    from jobs.bench_table import describe

    wanted = Wanted(
        config=config_from(options),
        preset=preset,
        size=_size(size),
        steps=steps,
        runs=runs,
        reference=table == "reference",
        kernels=ops,
        warm=warm,
    )
    report = run_bench(wanted)
    click.echo(json.dumps(report, indent=2) if as_json else describe(report))


def _size(text: str | None) -> tuple[int, int] | None:
    """Read `1024x768` as width and height."""
    from jobs.settings import side

    if text is None:
        return None
    try:
        width, height = map(side, text.lower().split("x"))
    except ValueError as error:
        raise ConfigError(
            f"--size `{text}`: {error}", hint="such as 1024x768"
        ) from None
    return width, height
