r"""Where a guide of many latents starts: at the moments of annealed particles.

A few hundred draws of a natural step teach a guide little of the correlations of many coordinates: from the
prior to a narrow posterior it takes hundreds of steps. Particles of :class:`~pyro_adaann.AnnealedSMC` find
mean and covariance of the posterior in seconds. The guide then starts at

.. math:: N(m, w^2 S), \qquad m = \sum_i W_i z_i, \quad S = \sum_i W_i (z_i - m)(z_i - m)^\top

and is annealed from there. With w above 1 that covers the modes between which S lies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pyro_adaann.annealing.schedules import AdaAnnSchedule
from pyro_adaann.fitting.clock import Clock
from pyro_adaann.fitting.progress import FitProgress
from pyro_adaann.objectives.one_by_one import is_one_by_one
from pyro_adaann.processes.group import process_count
from pyro_adaann.sampling.result import SMCResult
from pyro_adaann.sampling.smc import AnnealedSMC
from pyro_adaann.state.interrupt import InterruptGuard

__all__ = ["Watch", "base_at", "has_pilot", "pilot_base", "run_particles"]

#: Progress, clock and Ctrl-C of a fit.
Watch: TypeAlias = tuple[FitProgress, Clock, InterruptGuard]

#: Latents from which on a pilot is worth its time, and up to which it has enough particles.
_LEAST_LATENTS, _MOST_LATENTS = 16, 200
#: Particles at least, and for each latent.
_NUM_PARTICLES, _PARTICLES_PER_LATENT = 1024, 32
#: How many times as wide as the particles the guide starts.
_WIDTH = 1.5
#: Moves at every inverse temperature: particles that have not forgotten all know mean and width well enough.
_MAX_MOVES = 6
#: Tolerance of its temperatures: half as many as by default, and mean and width as good.
_TOLERANCE = 0.6
#: Seconds after which the pilot is given up, and share of what is left of a budget.
_MAX_SECONDS, _MAX_SHARE = 120.0, 0.25
#: By how many sds moves may carry the log factor of all particles over so many of the latest temperatures.
#: Kinetics (36 latents) .03 to .21, and means within .15 sds; sparse means .65 to 2.4, and .3 to 2.5 sds off.
_MAX_LAG, _NUM_LATEST = 0.4, 5
#: Of every variance, added to it: no factor is singular.
_JITTER = 1e-4


def has_pilot(num_latents: int) -> bool:
    """Whether a guide of so many unconstrained numbers starts at particles."""
    return _LEAST_LATENTS <= num_latents <= _MOST_LATENTS


def run_particles(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_latents: int,
    seed: int | None,
    watch: Watch,
) -> SMCResult | None:
    """Return particles of the posterior that cost seconds.

    None for very many latents, with several processes, for models that run for one draw after the other, or
    if they do not arrive in two minutes or a quarter of the budget, or lose their weights.

    :param num_latents: unconstrained numbers of the model.
    :param seed: of the particles.
    :param watch: progress, clock and Ctrl-C.
    """
    if num_latents > _MOST_LATENTS or process_count() > 1 or is_one_by_one(model):
        return None
    progress, clock, interrupt = watch
    num = max(_NUM_PARTICLES, 16 * round(_PARTICLES_PER_LATENT * num_latents / 16))
    own = clock.part(_MAX_SHARE, _MAX_SECONDS)
    try:
        schedule = AdaAnnSchedule(_TOLERANCE)
        smc = AnnealedSMC(model, schedule=schedule, num_particles=num, max_moves=_MAX_MOVES, seed=seed)
        sampler = smc._make_sampler(args, kwargs)
        while not sampler.is_done:
            progress.particles(sampler.step())
            if interrupt.requested or not own.has(0.0):
                return None
    except (ValueError, RuntimeError):  # no density, gradient or memory for so many particles
        return None
    return sampler.result()


def pilot_base(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_latents: int,
    seed: int | None,
    watch: Watch,
) -> tuple[Tensor, Tensor] | None:
    """Return location m and factor L of the normal distribution at which a guide is to start.

    None where the prior will do or particles will not: for few latents, without particles
    (:func:`run_particles`), or if they lag (:func:`base_at`).

    :param num_latents: unconstrained numbers of the model.
    :param seed: of the particles.
    :param watch: progress, clock and Ctrl-C.
    """
    if not has_pilot(num_latents):
        return None
    result = run_particles(model, args, kwargs, num_latents, seed, watch)
    return None if result is None else base_at(result)


def base_at(result: SMCResult) -> tuple[Tensor, Tensor] | None:
    """Return location and factor by particles.

    None if the moves of the latest temperatures still carry all of them the same way.
    """
    lag = sum(shift for shift, _ in (stage.shift for stage in result.stages[-_NUM_LATEST:]))
    if not abs(lag) <= _MAX_LAG:
        return None
    weights = result.log_weights.double().exp()
    z = torch.where((weights > 0).unsqueeze(1), result.unconstrained.double(), 0.0)
    loc = weights @ z
    centered = z - loc
    covariance = (weights * centered.T) @ centered
    covariance.diagonal().mul_(1 + _JITTER)
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed or not factor.isfinite().all():
        return None
    return loc, _WIDTH * factor
