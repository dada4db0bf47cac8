"""What a user asks for, and how a run ended: the two ends of a job."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jobs.config import JobConfig, from_dict
from jobs.errors import ExitCode, OutputError
from jobs.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a user asks for: the settings, the manifest and where results go."""

    config: JobConfig
    manifest: Path
    output: Path
    limit: int | None = None
    prompt_column: str = "prompt"
    id_column: str = "id"

    @classmethod
    def stored(cls, store: Store) -> Order:
        """Read back the order that a folder was started with."""
        asked = store.read_job()["asked"]
        try:
            return cls(
                config=from_dict(asked["config"]),
                manifest=Path(asked["manifest"]),
                output=store.root,
                limit=asked["limit"],
                prompt_column=asked["prompt_column"],
                id_column=asked["id_column"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise OutputError(
                f"{store.job} does not say what was asked for: {error!r}",
                hint="start again with the same `run` command",
            ) from None

    def as_dict(self) -> dict[str, Any]:
        tree = self.config.as_dict()
        checkpoint = tree["model"]["checkpoint"]
        if checkpoint:
            tree["model"]["checkpoint"] = str(Path(checkpoint).resolve())
        if tree["refiner"]["checkpoint"]:
            tree["refiner"]["checkpoint"] = str(
                Path(tree["refiner"]["checkpoint"]).resolve()
            )
        for lora in tree["model"]["loras"]:
            lora["path"] = str(Path(lora["path"]).resolve())
        return {
            "config": tree,
            "manifest": str(self.manifest.resolve()),
            "limit": self.limit,
            "prompt_column": self.prompt_column,
            "id_column": self.id_column,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """Which failed rows to make again: all, or those of some error classes."""

    only: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """How a run ended."""

    results: Path | None
    counts: dict[str, int]
    made: int
    images_per_s: float
    interrupted: bool

    @property
    def exit_code(self) -> ExitCode:
        if self.interrupted:
            return ExitCode.INTERRUPTED
        bad = self.counts["failed"] + self.counts["invalid"]
        return ExitCode.PARTIAL if bad else ExitCode.OK


def override(config: JobConfig, **runtime: Any) -> JobConfig:
    """Replace runtime settings that were given, for a resume on other devices."""
    given = {name: value for name, value in runtime.items() if value is not None}
    if "workers" in given:
        given["devices"] = "auto"
    if "devices" in given:
        given.setdefault("workers", None)
    return replace(config, runtime=replace(config.runtime, **given))
