"""A whole job against diffusers: the same weights, prompts, seeds and pixels.

    python -m tests.bench.job --prompts 64 --rounds 3 [--mindone FOLDER]

Each round runs our job with an empty compile cache, again with the one it left, and
diffusers' best arrangement in float32, one after the other, each timed from the start
of its processes to the end of the last. Ratios are taken within a round and their
median is told with the smallest and largest. Pictures of both sides are compared.

With mindone (see `mindone_job` for its folder), the first prompts go through it too,
and the steady states are compared: its seconds per picture after the first batch, and a
worker's by the number of workers.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from tests.bench.measure import STEADY, Run, run_all
from tests.bench.model import write_model

ROOT = Path(__file__).parents[2]
PARTI = ROOT / "tests" / "data" / "parti_prompts.tsv"
STEPS, SIZE, GUIDANCE = 8, 256, 5.0
WARM_LIMIT, COLD_LIMIT, MINDONE_LIMIT = 1.10, 1.35, 0.45
# Arrangements of diffusers on two cores: processes, threads of each, batch.
THEIRS = {"2x1": (2, 1, 4), "1x2": (1, 2, 4)}


def main() -> int:
    asked = arguments()
    with tempfile.TemporaryDirectory(prefix="sdxl-bench-") as room:
        bench = Bench(Path(room), asked)
        rounds = [bench.round(number) for number in range(asked.rounds)]
        rows = pq.read_table(bench.room / "ours" / "results.parquet").to_pylist()
        pixels = bench.compare(rows, "theirs")
        report = summarize(rounds, asked.prompts)
        report |= {"pixels": pixels, "stages": stages_of(rows, bench.started)}
        if asked.mindone:
            report["mindone"] = steady_of(bench.steady)
            report["mindone pixels"] = bench.compare(rows, "mindone")
    print(json.dumps(report, indent=2) if asked.json else describe(report))
    return 0 if pixels["largest"] <= 2 else 1


class Bench:
    """The folders of a comparison, and its runs."""

    def __init__(self, room: Path, asked: argparse.Namespace) -> None:
        self.room, self.asked = room, asked
        self.started = 0.0
        self.steady: list[tuple[float, float]] = []  # s/img, ours and mindone's
        self.model = write_model(asked.model or room / "model")
        self.rows = prompts(asked.prompts)
        (room / "prompts.json").write_text(json.dumps(self.rows))
        with (room / "prompts.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["id", "prompt", "seed"])
            writer.writeheader()
            writer.writerows(self.rows)

    def round(self, number: int) -> dict[str, Run]:
        """Run each side once."""
        shutil.rmtree(self.room / "cache", ignore_errors=True)
        found = {}
        for name in ("cold", "warm"):
            found[name] = self.ours(name)
        if self.asked.mindone:
            self.steady.append((self.our_steady(), self.mindone()))
        for name in self.asked.theirs:
            found[name] = self.theirs(name)
        for name, run in found.items():
            print(f"round {number + 1} {name}: {run}", file=sys.stderr, flush=True)
        return found

    def ours(self, name: str) -> Run:
        """Run our job on two workers; `cold` and `warm` share a compile cache."""
        out = self.room / "ours"
        shutil.rmtree(out, ignore_errors=True)
        words = [sys.executable, "-m", "jobs", "run", str(self.room / "prompts.csv")]
        words += ["--checkpoint", str(self.model), "--output", str(out)]
        words += ["--workers", str(self.asked.workers)]
        words += ["--batch-size", str(self.asked.batch_size)]
        for setting in (
            "sampling.noise=torch",
            f"sampling.steps={STEPS}",
            f"sampling.guidance_scale={GUIDANCE}",
            *self.asked.set,
        ):
            words += ["--set", setting]
        environment = os.environ | {"XDG_CACHE_HOME": str(self.room / "cache")}
        self.started = time.time()
        return run_all([words], environment)

    def theirs(self, name: str) -> Run:
        """Run diffusers in as many processes as the arrangement has."""
        processes, threads, batch = THEIRS[name]
        out = self.room / "theirs"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        commands = []
        for part in range(processes):
            words = [sys.executable, "-m", "tests.bench.diffusers_job"]
            words += [str(self.model), str(self.room / "prompts.json"), str(out)]
            words += ["--share", f"{part}/{processes}", "--threads", str(threads)]
            words += ["--batch", str(batch), "--steps", str(STEPS)]
            words += ["--size", str(SIZE), "--guidance", str(GUIDANCE)]
            commands.append(words)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        return run_all(commands, environment)

    def our_steady(self) -> float:
        """Give seconds per picture of the run that has just ended."""
        rows = pq.read_table(self.room / "ours" / "results.parquet").to_pylist()
        stages = stages_of(rows, 0)
        parts = ("text", "denoise", "decode", "write")
        return sum(stages[name] for name in parts) / self.asked.workers

    def mindone(self) -> float:
        """Run mindone on the first prompts; give its seconds per picture."""
        out = self.room / "mindone"
        out.mkdir(exist_ok=True)
        words = [sys.executable, "-m", "tests.bench.mindone_job", str(self.model)]
        words += [str(self.asked.mindone), str(self.room / "prompts.json"), str(out)]
        words += ["--batch", str(self.asked.batch_size), "--steps", str(STEPS)]
        words += ["--size", str(SIZE), "--guidance", str(GUIDANCE)]
        run_all([words], os.environ)
        return json.loads((out / STEADY).read_text())["seconds_per_image"]

    def compare(self, rows: list[dict[str, Any]], side: str) -> dict[str, Any]:
        """Compare the pictures that our last run and that of the other side left."""
        largest, equal = 0, []
        for row in rows:
            path = self.room / side / f"{row['prompt_id']}.png"
            if not path.exists():  # mindone makes the first ones only
                continue
            ours = pixels_of(self.room / "ours" / row["image_path"])
            apart = np.abs(ours - pixels_of(path))
            largest = max(largest, int(apart.max()))
            equal.append(float((apart == 0).mean()))
        return {"pictures": len(equal), "largest": largest, "equal": min(equal)}


def prompts(count: int) -> list[dict[str, Any]]:
    """Take the first distinct prompts of PartiPrompts, each with a seed."""
    with PARTI.open(encoding="utf-8", newline="") as file:
        texts = dict.fromkeys(
            row["Prompt"] for row in csv.DictReader(file, delimiter="\t")
        )
    return [
        {"id": f"p{i:03d}", "prompt": text, "seed": 1_000 + i}
        for i, text in enumerate(list(texts)[:count])
    ]


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def summarize(rounds: list[dict[str, Run]], count: int) -> dict[str, Any]:
    """Put the rounds' times and ratios into one report."""
    names = list(rounds[0])
    theirs = [name for name in names if name in THEIRS]
    best = [min(found[name].seconds for name in theirs) for found in rounds]
    report: dict[str, Any] = {"prompts": count, "runs": {}, "ratios": {}}
    for name in names:
        seconds = [found[name].seconds for found in rounds]
        peak = max(found[name].peak_bytes for found in rounds)
        report["runs"][name] = {
            "seconds": spread(seconds),
            "seconds_per_image": statistics.median(seconds) / count,
            "peak_gb": peak / 1e9,
        }
    for name, limit in (("warm", WARM_LIMIT), ("cold", COLD_LIMIT)):
        ratios = [f[name].seconds / b for f, b in zip(rounds, best, strict=True)]
        report["ratios"][name] = spread(ratios) | {"limit": limit}
    return report


def stages_of(rows: list[dict[str, Any]], started: float) -> dict[str, float]:
    """Say where our last run's time went: to the first picture's start, from the last
    picture's end, and in a worker's seconds per picture between.
    """
    names = ("text_encode", "denoise", "decode", "write", "compile")
    found = {
        name.partition("_")[0]: statistics.fmean(row[f"{name}_ms"] for row in rows)
        / 1e3
        for name in names
    }
    first = min(row["started_at"] for row in rows).timestamp()
    return found | {"before the first": first - started}


def steady_of(found: list[tuple[float, float]]) -> dict[str, Any]:
    """Put the rounds' steady states, ours and mindone's, into one report."""
    ours, mindone = (spread(list(side)) for side in zip(*found, strict=True))
    ratio = spread([a / b for a, b in found]) | {"limit": MINDONE_LIMIT}
    return {"ours": ours, "mindone": mindone, "ratio": ratio}


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": statistics.median(values),
        "least": min(values),
        "most": max(values),
    }


def describe(report: dict[str, Any]) -> str:
    """Put a report into lines for people."""
    lines = [f"{report['prompts']} prompts, {SIZE}x{SIZE}, {STEPS} Euler steps, fp32"]
    for name, run in report["runs"].items():
        side = "diffusers" if name in THEIRS else "ours"
        lines.append(
            f"{side:9} {name:5} {_range(run['seconds'], '.1f')} s, "
            f"{run['seconds_per_image']:.3f} s/img, peak {run['peak_gb']:.2f} GB"
        )
    for name, ratio in report["ratios"].items():
        met = "met" if ratio["median"] <= ratio["limit"] else "missed"
        lines.append(
            f"ours {name} / diffusers: {_range(ratio, '.3f')}, "
            f"at most {ratio['limit']:.2f} is wanted: {met}"
        )
    if "mindone" in report:
        steady, pixels = report["mindone"], report["mindone pixels"]
        met = "met" if steady["ratio"]["median"] <= MINDONE_LIMIT else "missed"
        lines.append(
            f"steady s/img: ours {_range(steady['ours'], '.2f')}, mindone "
            f"{_range(steady['mindone'], '.2f')}, {pixels['pictures']} pictures at "
            f"most {pixels['largest']} levels apart; ours / mindone: "
            f"{_range(steady['ratio'], '.3f')}, "
            f"at most {MINDONE_LIMIT:.2f} is wanted: {met}"
        )
    spent = ", ".join(f"{name} {s:.3f}" for name, s in report["stages"].items())
    lines.append(f"a worker's seconds per picture, warm: {spent}")
    pixels = report["pixels"]
    lines.append(
        f"pixels of {pixels['pictures']} pictures: at most {pixels['largest']} levels "
        f"apart, at least {100 * pixels['equal']:.3f} % of values equal"
    )
    return "\n".join(lines)


def _range(values: dict[str, float], form: str) -> str:
    middle, least, most = (f"{values[n]:{form}}" for n in ("median", "least", "most"))
    return f"{middle} ({least} to {most})"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.job")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--model", type=Path, help="keep the model in this folder")
    parser.add_argument("--mindone", type=Path, help="its folder: run it as well")
    parser.add_argument("--theirs", nargs="+", choices=THEIRS, default=["2x1"])
    parser.add_argument("--set", action="append", default=[], help="for our job")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
