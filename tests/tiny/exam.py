"""Examine the small SDXL: held-out prompts through the runner, judged by their pixels.

    python tests/tiny/exam.py --work FOLDER --report checkpoints/tiny/README.md

Every picture is made by `sdxl-jobs run` on the CPU: one job for the base with each of
its samplers, one for base and refiner, one for the consistency model. Prompts are of
combinations that training never saw; seeds are their numbers. The shuffled column holds
every picture against the next prompt of its kind: what the judge gives for nothing.
"""

import argparse
import csv
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TINY = ROOT / "checkpoints" / "tiny"
sys.path[:0] = [str(HERE), str(TINY), str(ROOT / "tests" / "jobs")]

import numpy as np  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from captions import plain_caption  # noqa: E402
from judge import judge, sharpness  # noqa: E402
from PIL import Image  # noqa: E402
from report import put_into  # noqa: E402
from scenes import Scene, draw_scene  # noqa: E402
from scoring import rates, score  # noqa: E402

HELD_OUT_FROM = 90_000_000
START, END = "<!-- exam -->", "<!-- /exam -->"
EULER = "EulerEDMSampler"
OTHERS = (
    ("HeunEDMSampler", 20),
    ("EulerAncestralSampler", 20),
    ("DPMPP2SAncestralSampler", 20),
    ("DPMPP2MSampler", 20),
    ("LinearMultistepSampler", 20),
    ("LinearMultistepSampler", 40),
)
POINTS = ("background", "number", "color", "shape", "place")
POINTS += ("both colors", "both shapes", "relation")


@dataclass(frozen=True)
class System:
    """One column of the table: how its pictures are asked for."""

    name: str
    prompts: int
    sampler: str = EULER
    steps: int = 20
    settings: tuple[str, ...] = ()


def held_out(count: int) -> list[Scene]:
    """Return scenes of combinations that training never saw."""
    return [draw_scene(HELD_OUT_FROM + i, held_out=True) for i in range(count)]


def systems(prompts: int, others: int) -> list[System]:
    guided = ("sampling.guidance_scale=5.0",)
    refined = (*guided, f"refiner.checkpoint={TINY / 'refiner.safetensors'}")
    consistent = (
        "sampling.guider=IdentityGuider",
        "sampling.guidance_scale=5.0",
        f"model.checkpoint={TINY / 'lcm.safetensors'}",
    )
    found = [System("EulerEDM 20", prompts, settings=guided)]
    if (TINY / "refiner.safetensors").exists():
        found.append(System("with refiner 18+2", prompts, settings=refined))
    if (TINY / "lcm.safetensors").exists():
        found.append(System("LCM 4", prompts, "LCMSampler", 4, consistent))
    for name, steps in OTHERS if others else ():
        short = name.removesuffix("Sampler")
        found.append(System(f"{short} {steps}", others, name, steps, guided))
    return found


def draw_all(work: Path, chosen: list[System], workers: int) -> dict[str, list]:
    """Run one job per set of settings; return each system's pictures in order."""
    jobs: dict[tuple[str, ...], list[System]] = {}
    for system in chosen:
        jobs.setdefault(system.settings, []).append(system)
    pictures: dict[str, list] = {}
    for number, (settings, members) in enumerate(jobs.items()):
        folder = work / f"job-{number}"
        manifest = work / f"job-{number}.csv"
        write_manifest(manifest, members)
        run(manifest, folder, settings, workers)
        for name, found in read(folder).items():
            pictures[name] = found
    return pictures


def write_manifest(path: Path, members: list[System]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "system", "prompt", "seed", "sampler", "steps"))
        for system in members:
            for i, scene in enumerate(held_out(system.prompts)):
                asked = (plain_caption(scene), i, system.sampler, system.steps)
                writer.writerow((f"{system.name}/{i:04d}", system.name, *asked))


def run(manifest: Path, folder: Path, settings: tuple[str, ...], workers: int) -> None:
    words = [sys.executable, "-m", "jobs", "run", manifest, "--output", folder]
    words += ["--config", ROOT / "configs" / "tiny.yaml", "--workers", workers]
    for setting in settings:
        words += ["--set", setting]
    subprocess.run([str(word) for word in words], cwd=ROOT, check=True)


def read(folder: Path) -> dict[str, list]:
    columns = ["system", "source_row", "status", "image_path"]
    rows = pq.read_table(folder / "results.parquet", columns=columns).to_pylist()
    found: dict[str, list] = {}
    for row in sorted(rows, key=lambda row: row["source_row"]):
        if row["status"] != "ok":
            raise RuntimeError(f"a picture failed: {row}")
        with Image.open(folder / row["image_path"]) as image:
            found.setdefault(row["system"], []).append(np.asarray(image))
    return found


def shuffled(scenes: list[Scene]) -> list[Scene]:
    """Give every scene's place to the next one of its kind."""
    by_kind: dict[str, list[int]] = {}
    for i, scene in enumerate(scenes):
        by_kind.setdefault(scene.kind, []).append(i)
    moved = list(scenes)
    for places in by_kind.values():
        for here, there in zip(places, places[1:] + places[:1], strict=True):
            moved[here] = scenes[there]
    return moved


def table(chosen: list[System], pictures: dict[str, list]) -> str:
    """Write the figures as Markdown."""
    columns, scores, sharp = {}, {}, {}
    for system in chosen:
        scenes, found = held_out(system.prompts), pictures[system.name]
        verdicts = [judge(picture) for picture in found]
        scores[system.name] = list(map(score, scenes, verdicts))
        columns[system.name] = rates(scores[system.name])
        sharp[system.name] = np.mean([sharpness(picture) for picture in found])
        if system is chosen[0]:
            columns["shuffled"] = rates(map(score, shuffled(scenes), verdicts))
    few, first = min(system.prompts for system in chosen), chosen[0]
    if few < first.prompts:
        columns[f"{first.name}, first {few}"] = rates(scores[first.name][:few])
    names = list(columns)
    asked = columns[names[0]]
    lines = ["| right, in % | asked | " + " | ".join(names) + " |"]
    lines.append("|---" * (len(names) + 2) + "|")
    for point in POINTS:
        if point in asked:
            cells = [f"{100 * columns[name][point][0]:.1f}" for name in names]
            cells.insert(0, str(asked[point][1]))
            lines.append(f"| {point} | " + " | ".join(cells) + " |")
    cells = [f"{sharp[name]:.3f}" if name in sharp else "" for name in names]
    lines.append("| sharpness of edges | | " + " | ".join(cells) + " |")
    if few < first.prompts:
        pairs = columns[names[-1]]["both colors"][1]
        note = (
            f"Other samplers were asked the first {few} prompts, {pairs} of them pairs;"
        )
        lines += ["", note + " the last column holds EulerEDM to the same."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--others", type=int, default=150, help="for other samplers")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--report", type=Path)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    chosen = systems(asked.prompts, asked.others)
    text = table(chosen, draw_all(asked.work, chosen, asked.workers))
    print(text)
    if asked.report:
        put_into(asked.report, text, START, END)


if __name__ == "__main__":
    main()
