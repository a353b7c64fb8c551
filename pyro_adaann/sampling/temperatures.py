"""The inverse temperatures of particles, from the package's annealing schedules."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_adaann.annealing.cess_schedule import CESSSchedule
from pyro_adaann.annealing.schedules import AdaAnnSchedule, AnnealingSchedule

__all__ = ["first_inverse_temperature", "next_inverse_temperature"]

#: Logarithm of the smallest inverse temperature that is tried first.
_SMALLEST = math.log(1e-12)


def next_inverse_temperature(
    schedule: AnnealingSchedule, inverse_temperature: float, log_factor: Tensor, log_weights: Tensor
) -> float:
    """Return the inverse temperature that follows for weighted particles.

    :param log_factor: of every particle, shape ``(n,)``.
    :param log_weights: likewise.
    """
    if isinstance(schedule, AdaAnnSchedule) and not schedule.weighted:
        # The sd is that under the tempered density: particles always stand for it with their weights.
        schedule = AdaAnnSchedule(
            schedule.tolerance,
            initial_inverse_temperature=schedule.initial_inverse_temperature,
            weighted=True,
        )
    return schedule.next(inverse_temperature, log_factor, log_weights)


def first_inverse_temperature(
    schedule: AnnealingSchedule, log_weights_at: Callable[[float], Tensor], *, starts_exactly: bool
) -> float:
    """Return the first inverse temperature: the schedule's, or a smaller one that keeps the weights even.

    A schedule that is fixed is obeyed. One that looks at draws begins where the effective share of the
    initial draws, weighted to the tempered density, is what it would keep from one temperature to the next.

    :param log_weights_at: returns the log weights of the initial draws at an inverse temperature, ``(n,)``.
    :param starts_exactly: whether they are even at 0.
    """
    first = schedule.initial_inverse_temperature
    if not (schedule.needs_log_factor and starts_exactly):
        return first
    share = 0.9
    if isinstance(schedule, CESSSchedule):
        share = schedule.target
    elif isinstance(schedule, AdaAnnSchedule):
        share = math.exp(-(min(schedule.tolerance, 1.5) ** 2))

    def is_even(log_t: float) -> bool:
        log_weights = log_weights_at(first * math.exp(log_t)).double()
        kept = log_weights[log_weights < torch.inf]
        log_ess = 2 * kept.logsumexp(0) - (2 * kept).logsumexp(0)
        return float(log_ess) >= math.log(share * max(len(kept), 1))

    if is_even(0.0):
        return first
    low, high = _SMALLEST, 0.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if is_even(middle) else (low, middle)
    return first * math.exp(low)
