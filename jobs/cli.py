"""The commands, thin: parse, call, print. stdout is data, stderr is talk."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from jobs import __version__
from jobs.bug import report_bug
from jobs.errors import ExitCode, JobError, printable
from jobs.machine_cli import bench, doctor
from jobs.options import (
    config_from,
    config_options,
    error_classes,
    manifest_options,
    refuse_both,
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sdxl-jobs")
def cli() -> None:
    """Offline batch generation for Stable Diffusion XL on MindSpore.

    Exit codes: 0 all made; 1 an error; 2 wrong usage; 3 a bug (see log.txt);
    4 finished, but some rows failed or are invalid, or verify found damage;
    130 interrupted, resumable.
    """


@cli.command()
@click.argument("manifest", type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of this job's results.",
)
@config_options
@manifest_options
def run(manifest: Path, output: Path, **options: Any) -> None:
    """Make every picture that MANIFEST asks for.

    Rows that have a result already are skipped, so the same command goes on after an
    interruption and picks up rows that were appended.

    Example: sdxl-jobs run manifests/demo.csv --config configs/tiny.yaml --workers 2
    --output outputs/demo
    """
    from jobs.order import Order
    from jobs.run import run as run_job

    order = Order(
        config=config_from(options),
        manifest=manifest,
        output=output,
        **options,
    )
    _finish(run_job(order))


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--workers", type=click.IntRange(1), help="Worker processes on the CPU.")
@click.option("--devices", metavar="LIST", help="Ascend devices: 0-7, or auto.")
def resume(folder: Path, workers: int | None, devices: str | None) -> None:
    """Go on with the job in FOLDER, with the settings it was started with.

    Example: sdxl-jobs resume outputs/demo --workers 1
    """
    _finish(_again(folder, workers, devices))


@cli.command()
@click.argument("manifest", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@config_options
@manifest_options
def plan(manifest: Path, as_json: bool, **options: Any) -> None:
    """Say what MANIFEST asks for and what it will cost; make nothing.

    Example: sdxl-jobs plan prompts.tsv --prompt-column Prompt
    --config configs/base.yaml
    """
    from jobs.estimate import describe, estimate

    config = config_from(options)
    report = estimate(manifest, config, **options)
    _show(json.dumps(report, indent=2) if as_json else describe(report))
    if report["invalid"]:
        sys.exit(ExitCode.PARTIAL)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--only", metavar="CLASSES", help="Error classes, such as oom,nan; all by default."
)
@click.option("--workers", type=click.IntRange(1), help="Worker processes on the CPU.")
@click.option("--devices", metavar="LIST", help="Ascend devices: 0-7, or auto.")
def retry(
    folder: Path, only: str | None, workers: int | None, devices: str | None
) -> None:
    """Make the failed pictures of the job in FOLDER again, and nothing else.

    A picture that fails again keeps its row; attempts add up.

    Example: sdxl-jobs retry outputs/demo --only oom,timeout
    """
    from jobs.order import Retry

    chosen = Retry(only=error_classes(only))
    _finish(_again(folder, workers, devices, retry=chosen))


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--sample", type=click.IntRange(0), help="Hash only N images, by chance.")
@click.option("--repair", is_flag=True, help="Move what is damaged to FOLDER/damaged/.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(folder: Path, sample: int | None, repair: bool, as_json: bool) -> None:
    """Hold every file, row and image of the job in FOLDER to what was written.

    Ends with exit code 4 when anything is wrong. After `--repair`, `resume` makes again
    what was lost.

    Example: sdxl-jobs verify outputs/demo --sample 1000
    """
    from jobs.findings import as_dict, describe
    from jobs.repair import repair as repair_folder
    from jobs.verify import verify as verify_folder

    if repair and sample is not None:
        raise click.UsageError("--repair looks at every image; leave out --sample")
    report = repair_folder(folder) if repair else verify_folder(folder, sample=sample)
    _show(json.dumps(as_dict(report), indent=2) if as_json else describe(report))
    if not report.sound:
        then = f"go on with `sdxl-jobs {'resume' if repair else 'verify --repair'}`"
        if all(finding.kind == "manifest" for finding in report.findings):
            then = "put the manifest back as it was; there is nothing to repair here"
        click.echo(f"hint: {then}", err=True)
        sys.exit(ExitCode.PARTIAL)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("image_id")
@click.option("--out", type=click.Path(path_type=Path), help="Write the picture here.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def replay(folder: Path, image_id: str, out: Path | None, as_json: bool) -> None:
    """Make one picture again from its result row and compare the pixels.

    Ends with exit code 4 when they differ; FOLDER is left as it is.

    Example: sdxl-jobs replay outputs/demo 0123456789abcdef --out again.png
    """
    from jobs.replay import replay as replay_image

    found = replay_image(folder, image_id, out=out)
    if as_json:
        report = {"image_id": image_id, "same": found.same}
        report |= {"expected": found.expected, "found": found.found}
        click.echo(json.dumps(report, indent=2))
    else:
        verdict = "the same pixels" if found.same else "other pixels"
        click.echo(f"{image_id}: {verdict} ({found.found[:16]})")
    if not found.same:
        sys.exit(ExitCode.PARTIAL)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
def compact(folder: Path) -> None:
    """Merge all rows of the job in FOLDER, finished or not, into results.parquet.

    Example: sdxl-jobs compact outputs/demo
    """
    from jobs.compact import compact as compact_folder

    click.echo(compact_folder(folder))


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def status(folder: Path, as_json: bool) -> None:
    """Say how far the job in FOLDER is, while it runs and after.

    Example: sdxl-jobs status outputs/demo --json
    """
    from jobs.status import describe, read_status

    report = read_status(folder)
    _show(json.dumps(report, indent=2) if as_json else describe(report))


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="The sheet's file.")
@click.option("--columns", type=click.IntRange(1, 100), default=6, show_default=True)
@click.option(
    "--limit",
    type=click.IntRange(1, 2_000),
    default=60,
    show_default=True,
    help="How many pictures, the first of the manifest.",
)
@click.option(
    "--side",
    type=click.IntRange(32, 1_024),
    default=160,
    show_default=True,
    help="Pixels of a picture's longer side.",
)
def sheet(folder: Path, out: Path | None, **layout: int) -> None:
    """Lay the pictures of the job in FOLDER out on one, with prompts and seeds.

    Writes FOLDER/contact_sheet.png, unless --out names another file.

    Example: sdxl-jobs sheet outputs/demo --columns 8
    """
    from jobs.sheet import make_sheet

    click.echo(make_sheet(folder, out=out, **layout))


@cli.command()
@click.argument("prompt")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="The picture's file."
)
@click.option("--seed", type=int, help="The picture's seed.")
@config_options
def sample(prompt: str, out: Path, seed: int | None, **options: Any) -> None:
    """Make one picture of PROMPT, without a manifest.

    Example: sdxl-jobs sample "a red circle" --config configs/tiny.yaml --out circle.png
    """
    from jobs.sample import make_sample

    seconds = make_sample(prompt, config_from(options), out, seed)
    click.echo(out)
    click.echo(f"made in {seconds:.1f} s after loading", err=True)


@cli.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="Round to this type; each tensor keeps its own by default.",
)
@click.option("--preset", help="The geometry, where the file can't tell by itself.")
def convert(source: Path, destination: Path, **options: Any) -> None:
    """Write the checkpoint SOURCE in the layout that DESTINATION's name asks for.

    .safetensors is the original single file, .ckpt MindSpore's with the reference's
    names, a name without suffix a diffusers folder.

    Example: sdxl-jobs convert sd_xl_base_1.0.safetensors sd_xl_base.ckpt --dtype fp16
    """
    from jobs.model import convert_checkpoint

    convert_checkpoint(source, destination, **options)
    click.echo(destination)


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--preset", help="The geometry, where the file can't tell by itself.")
def inspect(path: Path, as_json: bool, preset: str | None) -> None:
    """Say what the checkpoint at PATH is: kind, layout, types, what is missing.

    Example: sdxl-jobs inspect checkpoints/tiny/base.safetensors
    """
    from jobs.model import describe_inspection, inspect_checkpoint

    report = inspect_checkpoint(path, preset=preset)
    _show(json.dumps(report, indent=2) if as_json else describe_inspection(report))
    if report["missing"] or report["extra"] or report["unfit"]:
        sys.exit(ExitCode.ERROR)


cli.add_command(bench)
cli.add_command(doctor)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: the one place where errors become lines and exit codes."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name may hold what it can't show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        cli.main(args=arguments, prog_name="sdxl-jobs", standalone_mode=False)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(ExitCode.USAGE)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(ExitCode.INTERRUPTED)
    except JobError as error:
        click.echo(f"error: {printable(str(error), 4_000)}", err=True)
        if error.hint:
            click.echo(f"hint: {printable(error.hint, 4_000)}", err=True)
        sys.exit(ExitCode.ERROR)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(ExitCode.ERROR)
    except Exception as error:
        report_bug(error, arguments)
        sys.exit(ExitCode.BUG)


def _again(
    folder: Path, workers: int | None, devices: str | None, **options: Any
) -> Any:
    """Run the job that a folder holds, with its own settings, on these devices."""
    from dataclasses import replace

    from jobs.order import Order, override
    from jobs.run import run as run_job
    from jobs.store import Store

    refuse_both(devices, workers)
    order = Order.stored(Store(folder))
    config = override(order.config, workers=workers, devices=devices)
    return run_job(replace(order, config=config), **options)


def _show(text: str) -> None:
    """Print lines that may hold names and texts from anywhere."""
    click.echo("\n".join(printable(line, len(line)) for line in text.split("\n")))


def _finish(summary: Any) -> None:
    if summary.results:
        click.echo(summary.results)
    counts = ", ".join(f"{n} {status}" for status, n in summary.counts.items())
    ended = (
        "interrupted; `sdxl-jobs resume` goes on" if summary.interrupted else "finished"
    )
    click.echo(
        f"{ended}: {counts}; {summary.made} made now "
        f"at {summary.images_per_s:.3g} img/s",
        err=True,
    )
    sys.exit(summary.exit_code)
