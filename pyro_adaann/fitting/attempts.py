"""One attempt at a posterior: a guide from a base, annealed by natural steps, and what it is worth."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import pyro
import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_adaann.diagnostics.diagnose import assess
from pyro_adaann.diagnostics.guide_draws import GuideDraws
from pyro_adaann.diagnostics.importance import WeightedDraws, weigh_draws
from pyro_adaann.diagnostics.verdict import Diagnosis
from pyro_adaann.fitting.moments import Moments, measure_moments
from pyro_adaann.fitting.pilot import Watch, pilot_base
from pyro_adaann.guides.base import AutoFlow
from pyro_adaann.guides.continuous import continuous_part
from pyro_adaann.guides.spline import AutoSpline
from pyro_adaann.natural import NUM_FINAL, natural_svi, schedule_from
from pyro_adaann.objectives.one_by_one import is_one_by_one
from pyro_adaann.objectives.rows import most_draws, numbers_per_draw
from pyro_adaann.processes.group import anywhere
from pyro_adaann.svi import AdaAnnSVI
from pyro_adaann.weights import finite_or_no_weight

__all__ = ["BATCH_SIZE", "Attempt", "End", "Plan", "attempt", "few_draws_of_step", "make_guide", "takes_long"]

#: How many draws are weighed at a time.
BATCH_SIZE = 1000
#: A model takes long for a draw if fewer than so many are made at a time. Draws of a step for each latent
#: then, and fewest.
_CHEAP_DRAWS, _DRAWS_PER_LATENT, _FEWEST_DRAWS = 500, 25, 200
#: First inverse temperature from particles of the posterior, which differ from it by nats, not millions.
_NEAR = 1e-4


class End(Enum):
    """Why an attempt has ended."""

    DONE = "done"
    INTERRUPTED = "interrupted"
    OUT_OF_TIME = "out of time"


@dataclass(frozen=True)
class Plan:
    """How to make an attempt.

    :param seed: of all random generators; None to go on as they are.
    :param widths: how many times as wide as that of the prior the base is, by site.
    :param num_particles: draws of a natural step.
    :param is_check: whether the fit only has to confirm a usable one.
    :param start: location and factor of the base, by particles; None where they were of no use.
    :param is_started: whether ``start`` is known; otherwise there will be particles.
    """

    seed: int | None
    widths: dict[str, float]
    num_particles: int
    is_check: bool = False
    start: tuple[Tensor, Tensor] | None = None
    is_started: bool = False


@dataclass(frozen=True)
class Attempt:
    """A fitted guide and what is known of it.

    :param plan: how it was made.
    :param svi: its driver.
    :param draws: weighted draws of the guide.
    :param diagnosis: what they say.
    :param moments: of them.
    :param end: why it ended.
    :param seconds: how long it took, diagnosis included.
    """

    plan: Plan
    svi: AdaAnnSVI
    draws: WeightedDraws
    diagnosis: Diagnosis
    moments: Moments
    end: End
    seconds: float


def attempt(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    plan: Plan,
    nesting: int,
    num_samples: int,
    watch: Watch,
    name: str,
    restore: Callable[[WeightedDraws], WeightedDraws] = lambda draws: draws,
) -> Attempt:
    """Fit a guide as planned and diagnose it, in a parameter store of its own.

    :param nesting: how many plates the model nests.
    :param num_samples: draws of the diagnosis.
    :param watch: progress, clock and Ctrl-C.
    :param name: what the progress calls it.
    :param restore: makes draws of the sites of the user's model of those of the fitted one.
    """
    progress, clock, interrupt = watch
    began = time.monotonic()
    if plan.seed is not None:
        pyro.set_rng_seed(plan.seed)
    with pyro.get_param_store().scope():
        progress.phase(f"{name}: base")
        guide = make_guide(model, {}, args, kwargs)
        start = plan.start
        if not plan.is_started:
            start = pilot_base(model, args, kwargs, guide.latent_dim, plan.seed, watch)
        if plan.widths or start is not None:
            guide = make_guide(model, plan.widths, args, kwargs, start)
        settings = _settings(is_check=plan.is_check, is_near=start is not None)
        svi = natural_svi(
            model, guide, num_particles=plan.num_particles, max_plate_nesting=nesting, **settings
        )
        progress.phase(f"{name}: annealing")
        end = End.DONE
        while not svi.is_done:
            svi.step(*args, **kwargs)
            progress.update(svi)
            is_interrupted = anywhere(interrupt.requested)
            if is_interrupted or not clock.has(0.0):
                end = End.INTERRUPTED if is_interrupted else End.OUT_OF_TIME
                break
        progress.phase(f"{name}: checking")
        draws = GuideDraws(svi, args, kwargs, vectorize=True)
        weighted = weigh_draws(draws, num_samples, BATCH_SIZE)
        log_weights = finite_or_no_weight(weighted.log_p - weighted.log_q)
        diagnosis = assess(svi, draws, log_weights, args, kwargs, BATCH_SIZE, vectorize=True)
        weighted = restore(weighted)
        moments = measure_moments(weighted.samples, weighted.log_weights)
    return Attempt(plan, svi, weighted, diagnosis, moments, end, time.monotonic() - began)


def _settings(*, is_check: bool, is_near: bool) -> dict[str, Any]:
    """Return what a fit sets otherwise than `natural_svi`.

    :param is_check: whether it only has to confirm another.
    :param is_near: whether the guide starts at particles of the posterior.
    """
    settings: dict[str, Any] = {}
    if is_check or is_near:
        # Others go on while the loss falls: without that sparse means (16 latents) ended UNRELIABLE.
        settings["max_num_final_steps"] = NUM_FINAL
    if is_near:
        settings["schedule"] = schedule_from(_NEAR)
    return settings


def make_guide(
    model: Callable[..., Any],
    widths: dict[str, float],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    start: tuple[Tensor, Tensor] | None = None,
) -> AutoFlow:
    """Return a guide whose base is that of the prior, wider where it says so.

    :param widths: how many times as wide, by site.
    :param start: location and factor of a normal distribution, in place of the prior's.
    """
    guide = AutoSpline(continuous_part(model), base_loc="prior", base_scale="prior").initialize(
        *args, **kwargs
    )
    if start is None and not widths:
        return guide
    normal = guide.get_base_dist().base_dist
    loc, scale = (normal.loc, normal.scale) if start is None else start
    width = _by_coordinate(guide, widths).to(scale)
    scale = width * scale if start is None else width.unsqueeze(1) * scale
    return AutoSpline(continuous_part(model), base_loc=loc, base_scale=scale).initialize(*args, **kwargs)


def takes_long(model: Callable[..., Any], trace: Trace) -> bool:
    """Whether a model takes so long for a draw that some hundred of them are dear.

    :param trace: of one run of the model.
    """
    device = trace.nodes[trace.stochastic_nodes[0]]["value"].device
    return is_one_by_one(model) or most_draws(numbers_per_draw(trace), device) < _CHEAP_DRAWS


def few_draws_of_step(num_latents: int, usual: int) -> int:
    """Return the draws of a natural step that have to do where a draw takes long."""
    return min(max(_DRAWS_PER_LATENT * num_latents, _FEWEST_DRAWS), usual)


def _by_coordinate(guide: AutoFlow, widths: dict[str, float]) -> Tensor:
    """Return the width of every coordinate, shape ``(latent_dim,)``."""
    return torch.cat(
        [
            torch.full((shape.numel(),), widths.get(name, 1.0))
            for name, shape in guide._unconstrained_shapes.items()
        ]
    )
