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
from dataclasses import dataclass

from torch import Tensor

from pyro_adaann.annealing.history import AnnealingHistory
from pyro_adaann.annealing.schedules import AdaAnnSchedule, AnnealingSchedule
from pyro_adaann.checks import check_count

__all__ = ["StepPlan", "next_within_budget", "plan_steps", "projected_num_steps"]

#: Stages behind an estimate of c. One sd is of a few hundred draws, with heavy tails.
_NUM_STAGES = 21
#: Fewest stages for which the user's numbers of steps at the ends are kept.
_MIN_STAGES = 50


@dataclass(frozen=True)
class StepPlan:
    """Optimizer steps at the first inverse temperature, at each one up to 1, at 1, and in all.

    ``num_total`` is None without a budget.
    """

    num_initial: int
    num_per_stage: int
    num_final: int
    num_total: int | None = None

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
        return history.num_steps - stages[-1].num_steps + plan.num_final
    if len(stages) < 3:
        return None
    times = [stage.inverse_temperature for stage in stages[-_NUM_STAGES:]]
    if any(a >= b for a, b in itertools.pairwise(times)):  # it has gone back
        return None
    if schedule.needs_log_factor:  # equal steps in log t, see above
        num_stages = math.log(end / t) * (len(times) - 1) / math.log(times[-1] / times[0])
    else:
        num_stages = (end - t) * (len(times) - 1) / (times[-1] - times[0])
    # With a stage rule a stage may be longer than planned.
    recent = [stage.num_steps for stage in stages[1:][-_NUM_STAGES:-1]]
    num_per_stage = max(statistics.mean(recent or [0]), plan.num_per_stage)
    return history.num_steps + int(num_stages * num_per_stage + plan.num_final)
