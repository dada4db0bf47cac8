"""Options that more than one command takes, and the settings that come of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from jobs.config import JobConfig, load
from jobs.errors import ConfigError, nearest
from jobs.records import ERROR_CLASSES

Command = Callable[..., Any]


def config_options(command: Command) -> Command:
    """Add the options that choose the settings."""
    for option in (
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="SECTION.KEY=VALUE",
            help="Override a setting of the config; may be given several times.",
        ),
        click.option(
            "--batch-size", type=click.IntRange(1), help="Images per graph call."
        ),
        click.option(
            "--workers", type=click.IntRange(1), help="Worker processes on the CPU."
        ),
        click.option("--devices", metavar="LIST", help="Ascend devices: 0-7, or auto."),
        click.option(
            "--checkpoint",
            type=click.Path(path_type=Path),
            help="Weights: .safetensors, MindSpore .ckpt or a diffusers folder.",
        ),
        click.option(
            "--config",
            "config_path",
            type=click.Path(path_type=Path),
            help="YAML settings; see configs/.",
        ),
    ):
        command = option(command)
    return command


def manifest_options(command: Command) -> Command:
    """Add the options that say how to read the manifest."""
    for option in (
        click.option("--limit", type=click.IntRange(1), help="Only the first N rows."),
        click.option(
            "--id-column", default="id", show_default=True, help="Column of row ids."
        ),
        click.option(
            "--prompt-column",
            default="prompt",
            show_default=True,
            help="Column of prompts.",
        ),
    ):
        command = option(command)
    return command


def config_from(options: dict[str, Any]) -> JobConfig:
    """Take the settings' options out of a command's, and load what they ask for."""
    config_path: Path | None = options.pop("config_path")
    checkpoint: Path | None = options.pop("checkpoint")
    devices: str | None = options.pop("devices")
    workers: int | None = options.pop("workers")
    batch_size: int | None = options.pop("batch_size")
    overrides: tuple[str, ...] = options.pop("overrides")
    refuse_both(devices, workers)
    flags = []
    if checkpoint:  # a checkpoint says itself what it is
        flags += [
            "model.preset=null",
            f"model.checkpoint={json.dumps(str(checkpoint), ensure_ascii=False)}",
        ]
    if devices:
        flags += [f"runtime.devices={json.dumps(devices)}", "runtime.workers=null"]
    if workers:
        flags += [f"runtime.workers={workers}", "runtime.devices=auto"]
    if batch_size:
        flags.append(f"runtime.batch_size={batch_size}")
    return load(config_path, (*flags, *overrides))


def refuse_both(devices: str | None, workers: int | None) -> None:
    """Refuse a device list beside a number of CPU workers."""
    if devices and workers:
        raise ConfigError(
            "--devices and --workers exclude each other",
            hint="--devices is for Ascend, --workers for the CPU",
        )


def error_classes(text: str | None) -> tuple[str, ...] | None:
    """Read `--only`: names of error classes, parted by commas."""
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in ERROR_CLASSES:
            raise ConfigError(
                f"--only: unknown error class `{name}`",
                hint=nearest(name, ERROR_CLASSES),
            )
    return names
