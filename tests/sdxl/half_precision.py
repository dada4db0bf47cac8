"""What half precision changes: each network and the finished pixels against float32.

    python tests/sdxl/half_precision.py --report docs/ascend.md

Both run here on the CPU, on the same weights: those of the trained small model, rounded
to float16 first, and random ones. Half precision is as on a card: weights and
activations in float16, and in float32 the norms, softmax, sinusoids, preconditioning,
guidance and the autoencoder. A card's kernels add in an order of their own.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.golden.networks_cases import Case  # noqa: E402
from tests.jobs.report import put_into  # noqa: E402

TRAINED = ROOT / "checkpoints/tiny/base.safetensors"
START, END = "<!-- half -->", "<!-- /half -->"
PROMPTS = ("a red circle on a blue background", "two green stars", "a yellow heart")
SIGMAS = (14.6, 5.0, 1.0, 0.1)


@dataclass(frozen=True, kw_only=True)
class Error:
    """Of half precision, in units of the RMS of what float32 gives."""

    name: str
    largest: float
    rms: float


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """Levels of 0 to 255 between two sets of pictures."""

    largest: int
    mean: float
    equal: float
    within_2: float
    psnr: float


def pair(checkpoint: Path | None) -> tuple:
    """Load the same weights in float32 and in half precision."""
    from sdxl.pipeline import Pipeline

    return tuple(
        Pipeline.load(checkpoint, precision=precision) for precision in ("fp32", "fp16")
    )


def pictures(steps: int) -> list[Case]:
    size = {"width": 128, "height": 128, "steps": steps}
    return [Case(prompt=text, seed=i, **size) for i, text in enumerate(PROMPTS)]


def network_errors(full, half) -> list[Error]:
    """Compare text encoders and step graphs, given the same inputs."""
    cases = pictures(1)
    cond, other = full.encode(cases, 3), half.encode(cases, 3)
    found = [
        error("text encoders, hidden states", other.context, cond.context),
        error("text encoders, pooled and sizes", other.vector, cond.vector),
    ]
    guidance = np.full(3, 5.0, np.float32)
    denoise = [
        pipeline.denoiser.bind(cond, guidance, (16, 16), "guided")
        for pipeline in (full, half)
    ]
    noise = np.random.RandomState(0).randn(3, 4, 16, 16).astype(np.float32)
    for sigma in SIGMAS:
        x = noise * np.float32(sigma)
        # What the guided network adds to x, which the step graph returns with it.
        exact, rounded = (f(x, sigma) - x for f in denoise)
        found.append(error(f"guided UNet at sigma {sigma}", rounded, exact))
    return found


def error(name: str, found: np.ndarray, expected: np.ndarray) -> Error:
    rms = float(np.sqrt(np.mean(expected.astype(np.float64) ** 2)))
    difference = np.abs(found.astype(np.float64) - expected)
    return Error(
        name=name,
        largest=float(difference.max()) / rms,
        rms=float(np.sqrt(np.mean(difference**2))) / rms,
    )


def pixel_error(full, half, steps: int) -> Pixels:
    """Make the same pictures in both, from noise to pixels, and compare them."""
    cases = pictures(steps)
    made = []
    for pipeline in (full, half):
        latents = pipeline.sample(pipeline.encode(cases, 3), cases, 3)
        made.append(pipeline.decode(latents, 3).astype(int))
    difference = np.abs(made[0] - made[1])
    return Pixels(
        largest=int(difference.max()),
        mean=float(difference.mean()),
        equal=float((difference == 0).mean()),
        within_2=float((difference <= 2).mean()),
        psnr=float(20 * np.log10(255 / np.sqrt(np.mean(difference**2.0) + 1e-12))),
    )


def report(steps: int) -> str:
    lines = ["| weights | what | largest error / RMS | RMS error / RMS |"]
    lines.append("|---|---|---|---|")
    pixels = []
    for name, path in (("trained", TRAINED), ("random", None)):
        full, half = pair(path)
        for e in network_errors(full, half):
            lines.append(f"| {name} | {e.name} | {e.largest:.1e} | {e.rms:.1e} |")
        p = pixel_error(full, half, steps)
        pixels.append(
            f"{len(PROMPTS)} pictures of {steps} guided steps, {name} weights: at most "
            f"{p.largest} levels, on average {p.mean:.3f}, {p.equal:.1%} of values "
            f"equal, {p.within_2:.2%} within 2, PSNR {p.psnr:.1f} dB."
        )
    return "\n".join((*lines, "", *pixels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--report", type=Path, help="document to put the table into")
    asked = parser.parse_args()
    text = report(asked.steps)
    print(text)
    if asked.report:
        put_into(asked.report, text, START, END)


if __name__ == "__main__":
    main()
