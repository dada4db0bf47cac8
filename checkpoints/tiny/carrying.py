"""Carry what the base has learned since into the models that were made from it.

Design: training a calibrated base or a consistency model anew from every base would
throw away most of what it knows. The difference of the base's averaged weights, before
and after, is added to theirs instead, and they train on from there.

Source: differences of weights as what was learned (task vectors), Ilharco et al. 2023.
"""

from __future__ import annotations

from pathlib import Path

import torch
from consistency import Student
from denoising import Model, calibrated_file, load_uncalibrated
from torch import nn
from training import load_average, write_state


def carry_over(work: Path, before: Path) -> None:
    """Add what `base` learned since its state `before` to what was made from it then.

    The states of `calibrate` and `lcm`, where they exist, begin a new round: at step 0.
    """
    was = Model()
    load_average(before, was)
    then = dict(was.named_parameters())
    now = load_uncalibrated(work).named_parameters()
    learned = {name: (new - then[name]).detach() for name, new in now}
    made: tuple[tuple[Path, type[nn.Module]], ...]
    made = ((calibrated_file(work), Model), (work / "lcm.pt", Student))
    for path, kind in made:
        if path.exists():
            nets = kind()
            load_average(path, nets)
            add_to(nets, learned)
            state = torch.load(path, weights_only=True)
            average = [p.detach() for p in nets.parameters()]
            state |= {"nets": nets.state_dict(), "average": average, "step": 0}
            write_state(path, state)


@torch.no_grad()
def add_to(nets: nn.Module, learned: dict[str, torch.Tensor]) -> None:
    """Add to every parameter that was learned; others keep what they are."""
    for name, parameter in nets.named_parameters():
        if name in learned:
            parameter += learned[name]
