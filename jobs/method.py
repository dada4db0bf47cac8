"""How a request is sampled: sampler, schedule, steps and their options, resolved."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from typing import Any

from jobs.config import SamplingSection
from jobs.records import (
    Request,
)

SIGMA_OPTIONS = ("sigma_min", "sigma_max", "rho")
OPTIONS = (*SIGMA_OPTIONS, "eta", "s_churn", "s_tmin", "s_tmax", "s_noise")
_asked_options = attrgetter(*OPTIONS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How a request is sampled: names, steps, and every option's effective value.

    An option is None where it does not apply. `problem` says what can't be done about
    the combination, each part of which is fine by itself.
    """

    sampler: str
    discretization: str
    steps: int
    options: dict[str, float | None]
    problem: str | None
    warning: str | None


def method_of(request: Request, job: SamplingSection) -> Method:
    return _resolved_method(
        request.sampler or job.sampler,
        request.discretization or job.discretization,
        request.steps or job.steps,
        _asked_options(request),
        _asked_options(job),
    )


@lru_cache(maxsize=65_536)
def _resolved_method(
    sampler: str,
    discretization: str,
    steps: int,
    asked: tuple[float | None, ...],
    usual: tuple[float | None, ...],
) -> Method:
    """Resolve a combination once: a manifest repeats few of them many times."""
    from sdxl.samplers import SAMPLERS
    from sdxl.schedule import DISCRETIZATIONS, outside_trained_range, sigmas

    spacing = DISCRETIZATIONS[discretization]
    defaults = {**SAMPLERS[sampler].options, **spacing.defaults}
    options: dict[str, float | None] = dict.fromkeys(OPTIONS)
    problem = None
    for name, by_row, by_job in zip(OPTIONS, asked, usual, strict=True):
        if name in defaults:
            options[name] = given(by_row, given(by_job, defaults[name]))
        elif by_row is not None:
            owner = discretization if name in SIGMA_OPTIONS else sampler
            problem = f"{name}: does not apply to {owner}"
    if steps > spacing.max_steps:
        problem = f"steps: {steps} is above the {spacing.max_steps} of {discretization}"
    low, high = options["sigma_min"], options["sigma_max"]
    if low is not None and high is not None and low >= high:
        problem = f"sigma_min: {low:g} is not below sigma_max, {high:g}"
    warning = None
    if not problem:
        asked_sigmas = dict(zip(OPTIONS[:3], (low, high, options["rho"]), strict=True))
        warning = outside_trained_range(sigmas(discretization, steps, **asked_sigmas))
    return Method(
        sampler=sampler,
        discretization=discretization,
        steps=steps,
        options=options,
        problem=problem,
        warning=warning,
    )


def given(value: Any, default: Any) -> Any:
    return default if value is None else value
