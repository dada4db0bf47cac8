"""What every stage of the training shares: the steps, their average, the saved state.

Design: a stage's state is one file, replaced whole every few minutes: networks,
averages, optimizer, step. A stage that finds its file goes on from there; the data of
step n are drawn from n alone, so a resumed run sees what an unbroken one would (but
pictures that a model was drawing itself are begun anew). A step can be split among
threads that run their parts of the batch on one core each: on a busy machine that is
several times faster than splitting every kernel.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

LossOf = Callable[[int, int], dict[str, torch.Tensor]]
SAVE_SECONDS = 120
REPORT_EVERY = 50


class Average:
    """An exponential moving average of parameters, with a warm-up."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.shadow = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shadow, [p.data for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Give the parameters their averages."""
        for shadow, parameter in zip(self.shadow, self.parameters, strict=True):
            parameter.copy_(shadow)


class Stage:
    """One stage of the training, resumed from `state_file` when that exists.

    `loss_of(step, part)` returns the named losses of one of `threads` parts of the
    batch, of which `loss` is minimized. `groups` are the optimizer's, if several.
    """

    def __init__(
        self,
        nets: nn.Module,
        loss_of: LossOf,
        *,
        steps: int,
        rate: float,
        state_file: Path,
        groups: list[dict] | None = None,
        threads: int = 1,
        decay: float = 0.998,
    ) -> None:
        torch.set_num_threads(1)
        self.nets, self.loss_of, self.steps = nets, loss_of, steps
        self.state_file, self.threads = state_file, threads
        self.optimizer = torch.optim.AdamW(
            groups or nets.parameters(),
            lr=rate,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            fused=True,
        )
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.average = Average(nets.parameters(), decay)
        self.done = 0
        self.pool = ThreadPoolExecutor(threads, "part", torch.set_num_threads, (1,))
        if state_file.exists():
            self._load()

    def run(self) -> Iterator[dict[str, float]]:
        """Make the steps that are left; yield the losses of each, parts averaged."""
        saved = time.time()
        while self.done < self.steps:
            losses = self._step()
            self.average.update(self.done)
            self.done += 1
            if time.time() - saved > SAVE_SECONDS:
                self.save()
                saved = time.time()
            yield losses

    def save(self) -> None:
        state = {
            "nets": self.nets.state_dict(),
            "average": self.average.shadow,
            "optimizer": self.optimizer.state_dict(),
            "step": self.done,
        }
        write_state(self.state_file, state)

    def _step(self) -> dict[str, float]:
        factor = rate_factor(self.done, self.steps)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        self.optimizer.zero_grad(set_to_none=True)
        parts = list(self.pool.map(self._backward, range(self.threads)))
        nn.utils.clip_grad_norm_(self.nets.parameters(), 1.0)
        self.optimizer.step()
        return {name: sum(p[name] for p in parts) / len(parts) for name in parts[0]}

    def _backward(self, part: int) -> dict[str, float]:
        losses = self.loss_of(self.done, part)
        (losses["loss"] / self.threads).backward()
        return {name: loss.item() for name, loss in losses.items()}

    def _load(self) -> None:
        state = torch.load(self.state_file, weights_only=True)
        self.nets.load_state_dict(state["nets"])
        for shadow, value in zip(self.average.shadow, state["average"], strict=True):
            shadow.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = state["step"]


def run_stage(
    stage: Stage,
    *,
    stop_at: float | None = None,
    after: Callable[[], None] | None = None,
    say: Callable[[str], None] = print,
) -> list[float]:
    """Run a stage, save it and leave its averaged weights in its networks.

    `stop_at` (Unix time) ends it early; the rate has then not fallen to its end.
    `after` is called after every step. Returns the losses of the steps made now.
    """
    history: list[float] = []
    said = time.time()
    for losses in stage.run():
        history.append(losses["loss"])
        if after is not None:
            after()
        if stage.done % REPORT_EVERY == 0:
            pace, said = (time.time() - said) / REPORT_EVERY, time.time()
            mean = sum(history[-REPORT_EVERY:]) / len(history[-REPORT_EVERY:])
            rest = " ".join(f"{name} {value:.4f}" for name, value in losses.items())
            progress = f"{stage.state_file.stem} {stage.done}/{stage.steps}"
            say(f"{progress} mean {mean:.4f} {rest} {pace:.2f} s")
        if stop_at is not None and time.time() > stop_at:
            break
    if history:
        stage.save()
    stage.average.apply()
    return history


def rate_factor(step: int, steps: int, warmup: int = 100) -> float:
    """Rise linearly, then fall along a half cosine to 3 % of the rate."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def write_state(path: Path, state: dict[str, object]) -> None:
    """Replace a stage's file whole."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def load_average(path: Path, nets: nn.Module) -> int:
    """Give `nets` the averaged weights of a stage's file; return its step."""
    state = torch.load(path, weights_only=True)
    nets.load_state_dict(state["nets"])
    with torch.no_grad():
        for parameter, value in zip(nets.parameters(), state["average"], strict=True):
            parameter.copy_(value)
    return state["step"]
