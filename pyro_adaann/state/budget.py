r"""How the steps of a fit are divided among its stages, and how many a schedule will need.

For a posterior that is normal up to its tempering, :math:`\mathrm{sd}_{p_t}[\log p] = c / t`, so a schedule
with increments :math:`\tau / \mathrm{sd}` takes equal steps in :math:`\log t`, and from t to 1 there are

.. math:: R = \int_t^1 \frac{\mathrm{sd}(s)}{\tau} ds = \frac{c}{\tau} \log\frac{1}{t}

of them. With R given, that is the tolerance. Other posteriors have another c at every t: it is
estimated anew at every stage and the tolerance follows.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pyro_adaann.annealing.history import AnnealingHistory
from pyro_adaann.annealing.schedules import AdaAnnSchedule, AnnealingSchedule
from pyro_adaann.checks import check_count

__all__ = [
    "Arrival",
    "StepPlan",
    "next_within_budget",
    "plan_steps",
    "projected_arrival",
    "projected_num_steps",
]

#: Stages behind an estimate of c. One sd is of a few hundred draws, with heavy tails.
_NUM_STAGES = 21
#: Fewest stages for which the user's numbers of steps at the ends are kept.
_MIN_STAGES = 50
#: Times the c of a normal posterior from which on a measured c says that the guide is far from its target.
_FAR = 10.0
#: Standard errors by which the loss has to fall for steps at 1 to go on: one time in 44 it seems to.
_NUM_ERRORS = 2.0
#: Standard deviation of log weights below which more steps at 1 have nothing to gain. With .1 a funnel ended
#: early, whose rare large weights the losses of a few steps did not show: an effective sample size of 91 %
#: in place of 98.
_NEARLY_EQUAL = 0.05


@dataclass(frozen=True)
class StepPlan:
    """Optimizer steps at the first inverse temperature, at each one up to 1, at 1, and in all.

    :param max_num_final: steps at 1 while the loss falls, None for ``num_final``. With it they may also be
        fewer: a third of ``num_final`` where the losses are as equal as those of draws of equal weight.
    :param num_total: None without a budget.
    """

    num_initial: int
    num_per_stage: int
    num_final: int
    num_total: int | None = None
    max_num_final: int | None = None

    def is_over(self, num_steps: int, losses: Sequence[float], num_draws: float) -> bool:
        """Whether the steps at 1 are taken: ``num_steps`` of them count so far, with these losses.

        :param num_draws: of which each loss is a mean.
        """
        if self.max_num_final is None or num_steps >= self.max_num_final:
            return num_steps >= self.num_final
        finite = [loss for loss in losses if math.isfinite(loss)]
        if num_steps < self.num_final:
            is_due = num_steps >= self.num_final / 3
            return is_due and are_nearly_equal(finite[-max(self.num_final // 6, 5) :], num_draws)
        return not is_falling(finite, self.num_final // 2)

    def num_annealing(self, schedule: AnnealingSchedule) -> int | None:
        """Return the number of steps before the first one at 1; None if it depends on draws."""
        num_stages = schedule.num_stages
        if num_stages is None:
            return None
        return self.num_initial + (num_stages - 2) * self.num_per_stage if num_stages > 1 else 0

    def num_increments_left(self, num_steps: int) -> int:
        """Return how many increments fit after ``num_steps`` steps, the one to 1 included."""
        if self.num_total is None:
            raise ValueError("Expected a plan with a total number of steps; got one without.")
        return max(self.num_total - self.num_final - num_steps, 0) // self.num_per_stage + 1


def are_nearly_equal(losses: Sequence[float], num_draws: float) -> bool:
    r"""Whether losses differ as little as those of a guide whose log weights have an sd below .05.

    The loss is minus the mean of n log weights, so its sd is theirs over :math:`\sqrt n`. An sd of .05 is an
    effective sample size of 99.8 %.
    """
    return len(losses) >= 5 and statistics.stdev(losses) * math.sqrt(num_draws) < _NEARLY_EQUAL


def is_falling(losses: Sequence[float], num: int) -> bool:
    r"""Whether the latest ``num`` losses are lower than as many before, by ranks.

    Of the pairs of one of each, the share in which the later is lower is above one half by two standard
    errors, each :math:`\sqrt{(2m + 1) / (12 m^2)}` for m losses (Mann and Whitney). Losses have heavy
    tails: a single draw may move a mean more than all that is gained.
    """
    before, latest = losses[-2 * num : -num], losses[-num:]
    if num < 2 or len(before) < num:
        return False
    lower = sum((a > b) + (a == b) / 2 for a in before for b in latest) / num**2
    return lower > 0.5 + _NUM_ERRORS * math.sqrt((2 * num + 1) / 12) / num


def plan_steps(schedule: AnnealingSchedule, plan: StepPlan, num_steps: int) -> StepPlan:
    """Return ``plan`` with a total of ``num_steps``.

    The steps at both ends are kept if they leave room for 50 stages, else shortened in proportion
    until half of all steps are left to the stages.

    :raises ValueError: if ``num_steps`` is not an integer >= 1, too few for a schedule that does not
        adapt, or the schedule is an adaptive one of the user's.
    """
    check_count("num_steps", num_steps, 1)
    initial, per_stage, final = plan.num_initial, plan.num_per_stage, plan.num_final
    if schedule.initial_inverse_temperature >= schedule.final_inverse_temperature:
        return StepPlan(initial, per_stage, num_steps, num_steps)
    if not schedule.needs_log_factor:
        num_annealing = plan.num_annealing(schedule)
        if num_annealing is None:
            raise ValueError(
                f"Expected a schedule of at most a million stages with `num_steps`; got {schedule}. Use "
                f"larger increments."
            )
        needed = num_annealing + 1
        if needed > num_steps:
            raise ValueError(
                f"Expected `num_steps` >= {needed}, which {type(schedule).__name__} takes to arrive at 1; "
                f"got {num_steps}. Use a schedule with fewer inverse temperatures, or AdaAnnSchedule, "
                f"which adapts."
            )
        return StepPlan(initial, per_stage, num_steps - num_annealing, num_steps)
    if not isinstance(schedule, AdaAnnSchedule):
        raise ValueError(
            f"Expected an AdaAnnSchedule, whose tolerance `num_steps` replaces; got a "
            f"{type(schedule).__name__}. Leave `num_steps` out."
        )
    if initial + final + _MIN_STAGES * per_stage > num_steps:
        share = min(1.0, num_steps / 2 / max(initial + final, 1))
        initial, final = int(initial * share), max(int(final * share), 1)
    return StepPlan(initial, per_stage, final, num_steps)


def next_within_budget(
    schedule: AnnealingSchedule,
    plan: StepPlan,
    history: AnnealingHistory,
    draws: Tensor | None,
    log_weights: Tensor | None = None,
) -> float:
    """Return the inverse temperature with which annealing arrives at 1 as planned.

    Without a plan, or with a fixed schedule, the schedule's own answer.
    """
    t = history.stages[-1].inverse_temperature
    if plan.num_total is None or not isinstance(schedule, AdaAnnSchedule):
        return schedule.next(t, draws, log_weights)
    num_left = plan.num_increments_left(history.num_steps)
    if num_left == 1:
        return schedule.final_inverse_temperature
    recent = [s for s in history.stages[-_NUM_STAGES:] if s.log_factor_sd is not None]
    # If no stage has an sd, the c that the schedule itself assumes.
    c = statistics.median([s.inverse_temperature * s.log_factor_sd for s in recent] or [1.0])  # type: ignore[operator]
    tolerance = c * math.expm1(-math.log(t) / num_left)
    return AdaAnnSchedule(tolerance, initial_inverse_temperature=t, weighted=schedule.weighted).next(
        t, draws, log_weights
    )


def projected_num_steps(history: AnnealingHistory, schedule: AnnealingSchedule, plan: StepPlan) -> int | None:
    """Return the number of steps that the whole fit will take; None where too little is known."""
    if plan.num_total is not None:
        return plan.num_total
    stages = history.stages
    t, end = stages[-1].inverse_temperature, schedule.final_inverse_temperature
    if t >= end:
        return max(history.num_steps - stages[-1].num_steps + plan.num_final, history.num_steps)
    if len(stages) < 3:
        return None
    rate = _stages_per_log(history)
    if rate is None:
        return None
    if schedule.needs_log_factor:  # equal steps in log t, see above
        num_stages = math.log(end / t) * rate
    else:
        times = history.inverse_temperatures[-_NUM_STAGES:]
        num_stages = (end - t) * (len(times) - 1) / (times[-1] - times[0])
    return history.num_steps + int(num_stages * _steps_per_stage(history, plan) + plan.num_final)


@dataclass(frozen=True)
class Arrival:
    """After how many steps a fit is expected at inverse temperature 1.

    :param num_steps: from the beginning of the fit, rounded to two digits where it is an estimate.
    :param is_least: whether it will be more than that, how much more cannot be told yet.
    """

    num_steps: int
    is_least: bool = False

    def __str__(self) -> str:
        return f"{'at least ' if self.is_least else ''}about {self.num_steps:,}"


def projected_arrival(
    history: AnnealingHistory,
    schedule: AnnealingSchedule,
    plan: StepPlan,
    num_latents: int | None,
    log_factor_sd: float | None = None,
) -> Arrival | None:
    """Return when the fit arrives at 1, also before its first stage is over; None where too little is known.

    For AdaAnn's schedule, c is that of a normal posterior in as many dimensions, :math:`\\sqrt{d / 2}`, or
    that of the latest stages if it is larger: a guide that is still narrow underrates it. A measured c more
    than ten times as large is that of a guide that has not found its target, and says nothing about later.
    There are no more stages than with the present sd of the log factor, which falls as t rises.

    :param num_latents: d; None if it is not known.
    :param log_factor_sd: the present sd; None for that of the latest stage.
    """
    t, end = history.stages[-1].inverse_temperature, schedule.final_inverse_temperature
    if plan.num_total is not None:
        return Arrival(max(plan.num_total - plan.num_final, 0))
    num_annealing = plan.num_annealing(schedule)
    if num_annealing is not None:
        return Arrival(num_annealing)
    # Another schedule's stages are many times as long in log t far from 1 as they are near it.
    rates, most, is_least = [_stages_per_log(history)], math.inf, not isinstance(schedule, AdaAnnSchedule)
    if isinstance(schedule, AdaAnnSchedule) and num_latents:
        normal = math.sqrt(num_latents / 2) / schedule.tolerance
        is_least = (rates[0] or 0.0) > _FAR * normal
        rates = [normal] if is_least else [normal, *rates]
        sd = log_factor_sd or next((s.log_factor_sd for s in history.stages[-2:-1]), None)
        most = math.inf if sd is None else sd * (end - t) / schedule.tolerance
    known = [rate for rate in rates if rate is not None]
    if not known:
        return None
    left = plan.num_initial - history.num_steps if len(history.stages) == 1 else 0
    num_stages = min(max(known) * math.log(end / t), most)
    num_steps = history.num_steps + max(left, 0) + num_stages * _steps_per_stage(history, plan)
    return Arrival(int(float(f"{num_steps:.1e}")), is_least)


def _steps_per_stage(history: AnnealingHistory, plan: StepPlan) -> float:
    """Return how long a stage is, with a stage rule possibly longer than planned."""
    recent = [stage.num_steps for stage in history.stages[1:][-_NUM_STAGES:-1]]
    return max(statistics.mean(recent or [0]), plan.num_per_stage)


def _stages_per_log(history: AnnealingHistory) -> float | None:
    """Return the number of stages per unit of log t in the latest stages; None if too few have risen."""
    times = history.inverse_temperatures[-_NUM_STAGES:]
    if len(times) < 3 or any(a >= b for a, b in itertools.pairwise(times)):  # it has gone back
        return None
    return (len(times) - 1) / math.log(times[-1] / times[0])
