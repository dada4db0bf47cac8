"""What every stage of the training shares: the folder of its state, averages, rates.

Design: a stage's state is one file, replaced whole every few minutes: networks,
averages, optimizer, step. A stage that finds its file goes on from there; the data of
step n are drawn from n alone, so a resumed run sees what an unbroken one would.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

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
    def swap(self) -> None:
        """Exchange parameters and averages; call again to undo."""
        for shadow, parameter in zip(self.shadow, self.parameters, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(shadow)
            shadow.copy_(kept)


def run_stage(
    nets: nn.Module,
    loss_of: Callable[[int], dict[str, torch.Tensor]],
    *,
    steps: int,
    rate: float,
    state_file: Path,
    decay: float = 0.999,
    groups: list[dict] | None = None,
    stop_at: float | None = None,
    say: Callable[[str], None] = print,
) -> list[float]:
    """Train `nets` until `steps` and leave their averaged weights in them.

    `loss_of(step)` returns named losses, of which `loss` is minimized. Resumes from
    `state_file` and saves to it. `stop_at` (Unix time) ends the stage early; the rate
    then has not fallen to its end. Returns the losses of the steps made now.
    """
    optimizer = torch.optim.AdamW(
        groups or nets.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01
    )
    bases = [group["lr"] for group in optimizer.param_groups]
    average = Average(nets.parameters(), decay)
    start = _load(state_file, nets, average, optimizer)
    losses: list[float] = []
    saved = said = time.time()
    for step in range(start, steps):
        for group, base in zip(optimizer.param_groups, bases, strict=True):
            group["lr"] = base * rate_factor(step, steps)
        parts = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        parts["loss"].backward()
        nn.utils.clip_grad_norm_(nets.parameters(), 1.0)
        optimizer.step()
        average.update(step)
        losses.append(parts["loss"].item())
        if step % REPORT_EVERY == REPORT_EVERY - 1:
            pace, said = (time.time() - said) / REPORT_EVERY, time.time()
            mean = sum(losses[-REPORT_EVERY:]) / len(losses[-REPORT_EVERY:])
            text = " ".join(f"{name} {part.item():.4f}" for name, part in parts.items())
            say(f"{state_file.stem} {step + 1}/{steps} {mean=:.4f} {text} {pace:.2f} s")
        if time.time() - saved > SAVE_SECONDS:
            _save(state_file, nets, average, optimizer, step + 1)
            saved = time.time()
        if stop_at is not None and time.time() > stop_at:
            break
    if losses:
        _save(state_file, nets, average, optimizer, start + len(losses))
    average.swap()
    return losses


def rate_factor(step: int, steps: int, warmup: int = 100) -> float:
    """Rise linearly, then fall along a half cosine to 3 % of the rate."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def _save(
    path: Path,
    nets: nn.Module,
    average: Average,
    optimizer: torch.optim.Optimizer,
    step: int,
) -> None:
    state = {
        "nets": nets.state_dict(),
        "average": average.shadow,
        "optimizer": optimizer.state_dict(),
        "step": step,
    }
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def _load(
    path: Path, nets: nn.Module, average: Average, optimizer: torch.optim.Optimizer
) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    nets.load_state_dict(state["nets"])
    for shadow, value in zip(average.shadow, state["average"], strict=True):
        shadow.copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def load_average(path: Path, nets: nn.Module) -> int:
    """Give `nets` the averaged weights of a stage's file; return its step."""
    state = torch.load(path, weights_only=True)
    nets.load_state_dict(state["nets"])
    with torch.no_grad():
        for parameter, value in zip(nets.parameters(), state["average"], strict=True):
            parameter.copy_(value)
    return state["step"]
