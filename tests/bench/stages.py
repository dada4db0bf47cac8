"""Where a job's time goes on each side: text, one guided step, decoding, start-up.

    python -m tests.bench.stages MODEL --batch 4 --threads 1 [--mindone FOLDER]

Each side is a process of its own, one after the other, bound to as many processors as
it has threads; the least of several calls is told, since a machine only ever adds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.measure import ROOT, bind, threads_of

STARTED = time.perf_counter()
TIMES = 3
STEPS, SIZE = 8, 256


def main() -> None:
    asked = arguments()
    if asked.side:
        print(json.dumps(SIDES[asked.side](asked)))
        return
    ours, *rest = ("ours", "diffusers", *(["mindone"] if asked.mindone else []))
    found = {side: run(side, asked) for side in (ours, *rest)}
    for times in found.values():
        times["picture"] = (STEPS * times["step"] + times["decode"]) / asked.batch
    print(
        f"batch {asked.batch}, {asked.threads} thread(s), {SIZE}x{SIZE}, seconds; a "
        f"picture is {STEPS} steps and its decoding, one process at work"
    )
    print(f"{'stage':16} {'ours':>8}" + "".join(f"{s:>11} ours / it" for s in rest))
    for stage, mine in found["ours"].items():
        cells = [found[side].get(stage) for side in rest]
        shown = [f"{t:11.3f} {mine / t:9.2f}" if t else " " * 21 for t in cells]
        print(f"{stage:16} {mine:8.3f}" + "".join(shown))


def run(side: str, asked: argparse.Namespace) -> dict[str, float]:
    """Time one side in a process of its own."""
    if side == "mindone":
        module = ["tests.bench.mindone_parts", str(asked.model), str(asked.mindone)]
    else:
        module = ["tests.bench.stages", str(asked.model), "--side", side]
    words = [sys.executable, "-m", *module]
    words += ["--batch", str(asked.batch), "--threads", str(asked.threads)]
    environment = threads_of(asked.threads) | {"PYTHONPATH": str(ROOT), "GLOG_v": "3"}
    done = subprocess.run(
        words, env=environment, cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4_000:])
    return json.loads(done.stdout.splitlines()[-1])


def least(call: Callable[[], Any]) -> float:
    """Time the least of several calls, after one that isn't counted."""
    call()
    times = []
    for _ in range(TIMES):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def ours(asked: argparse.Namespace) -> dict[str, float]:
    import numpy as np

    from sdxl.pipeline import Pipeline
    from tests.golden.networks_cases import Case

    bind(asked.threads)
    imported = time.perf_counter() - STARTED
    start = time.perf_counter()
    pipeline = Pipeline.load(asked.model, threads=asked.threads)
    loaded = time.perf_counter() - start
    n, steps = asked.batch, 2
    cases = [
        Case(prompt=f"a fox {i}", seed=i, width=SIZE, height=SIZE, steps=steps)
        for i in range(n)
    ]
    latents = np.zeros((n, 4, SIZE // 8, SIZE // 8), np.float32)

    def encode() -> Any:
        pipeline.texts._known.clear()
        return pipeline.encode(cases, n)

    text = least(encode)
    cond = pipeline.encode(cases, n)
    step = least(lambda: pipeline.sample(cond, cases, n)) / steps
    decode = least(lambda: pipeline.decode(latents, n))
    compiled = {key.partition("-")[0]: ms for key, ms in pipeline.compile_ms.items()}
    return {
        "import": imported,
        "load": loaded,
        "text": text,
        "step": step,
        "decode": decode,
        **{f"compile {name}": ms / 1e3 for name, ms in compiled.items()},
    }


def diffusers(asked: argparse.Namespace) -> dict[str, float]:
    import torch

    torch.set_num_threads(asked.threads)
    from diffusers import StableDiffusionXLPipeline

    bind(asked.threads)
    imported = time.perf_counter() - STARTED
    start = time.perf_counter()
    pipeline = StableDiffusionXLPipeline.from_pretrained(asked.model)
    loaded = time.perf_counter() - start
    n = asked.batch
    prompts = [f"a fox {i}" for i in range(n)]
    with torch.no_grad():
        x = torch.zeros(2 * n, 4, SIZE // 8, SIZE // 8)
        states, _, pooled, _ = pipeline.encode_prompt(prompts)
        context = torch.cat((states, states))
        known = {
            "text_embeds": torch.cat((pooled, pooled)),
            "time_ids": torch.zeros(2 * n, 6),
        }
        time_step = torch.tensor(500)
        return {
            "import": imported,
            "load": loaded,
            "text": least(lambda: pipeline.encode_prompt(prompts)),
            "step": least(
                lambda: pipeline.unet(x, time_step, context, added_cond_kwargs=known)
            ),
            "decode": least(lambda: pipeline.vae.decode(x[:n])),
        }


SIDES: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "ours": ours,
    "diffusers": diffusers,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.stages")
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--mindone", type=Path, help="folder, see mindone_parts")
    parser.add_argument("--side", choices=SIDES)
    return parser.parse_args()


if __name__ == "__main__":
    main()
