"""The stages of a fit: when one ends, which inverse temperature follows, and where a rung is kept."""

from __future__ import annotations

import math
import warnings
from functools import partial

import torch

from pyro_adaann.annealing.history import AnnealingHistory, AnnealingStage
from pyro_adaann.annealing.schedules import AdaAnnSchedule
from pyro_adaann.guide_status import GuideStatus
from pyro_adaann.objectives.base import Objective
from pyro_adaann.objectives.memory import spread_within_steps
from pyro_adaann.processes.group import number_from_first
from pyro_adaann.state.budget import StepPlan, next_within_budget, plan_steps
from pyro_adaann.state.parameters import FitParameters
from pyro_adaann.state.recovery import SafetyNet
from pyro_adaann.state.rungs import Rungs
from pyro_adaann.state.settings import FitSettings
from pyro_adaann.state.unfinished import how_to_go_on, warn_of_short_training, warn_of_unplanned_training
from pyro_adaann.steps.base import Call
from pyro_adaann.weights import standard_deviation

__all__ = ["StageControl"]


class StageControl:
    """Starts the stages of a fit, one after the other.

    :param settings: schedule, stage rule and numbers of steps.
    :param history: the history of the fit, which gets the stages.
    :param objective: the objective, which is set to the inverse temperature.
    :param parameters: the parameters, which are copied into rungs.
    :param net: the safety net; each of its recoveries halves the increments.
    :param rungs: the rungs of the fit, or None.
    """

    def __init__(
        self,
        settings: FitSettings,
        history: AnnealingHistory,
        objective: Objective,
        parameters: FitParameters,
        net: SafetyNet,
        rungs: Rungs | None,
    ) -> None:
        self.schedule = settings.schedule
        self.stage_rule = settings.stage_rule
        self.num_variance_samples = settings.num_variance_samples
        self.own_plan = settings.plan
        #: The plan of a run with a total number of steps, in place of the own one.
        self.budget: StepPlan | None = None
        self.history = history
        self.objective = objective
        self.parameters = parameters
        self.net = net
        self.rungs = rungs
        #: Where the guide is, for draws of it outside of the fit.
        self.status = GuideStatus()

    @property
    def plan(self) -> StepPlan:
        """How many steps the stages have."""
        return self.budget or self.own_plan

    @property
    def present(self) -> AnnealingStage:
        """The present stage."""
        return self.history.stages[-1]

    @property
    def is_done(self) -> bool:
        """Whether all planned steps are taken."""
        if self.plan.num_total is not None:
            return self.history.num_steps >= self.plan.num_total
        stage = self.present
        num_draws = self.objective.num_particles / max(stage.num_steps, 1)
        return self.objective.is_final and self.plan.is_over(
            stage.num_effective_steps, stage.losses, num_draws
        )

    def start(self, inverse_temperature: float) -> None:
        """Start a stage."""
        self.history.stages.append(AnnealingStage(inverse_temperature))
        self.tell_objective()

    def tell_objective(self) -> None:
        """Set the objective to the inverse temperature of the present stage."""
        t = self.present.inverse_temperature
        self.objective.start_stage(t, is_final=t >= self.schedule.final_inverse_temperature)
        self.tell_status()

    def tell_status(self) -> None:
        """Tell draws of the guide outside of the fit where it is."""
        # Made of records alone: what outlives the driver must not keep its guide.
        records = self.history, self.schedule, self.plan, self.objective.num_latents
        is_final = self.objective.is_final
        self.status.move(self.present.inverse_temperature, partial(how_to_go_on, *records), is_final=is_final)

    def go_back(self, inverse_temperature: float) -> None:
        """Continue from an earlier state of the guide; the draws made since then are dropped."""
        self.objective.forget()
        if inverse_temperature != self.present.inverse_temperature:
            self.start(inverse_temperature)

    def begin_pass(self, inverse_temperature: float) -> None:
        """Anneal again from an inverse temperature, by the settings' own numbers of steps."""
        self.budget = None
        self.net.begin_pass()
        self.objective.forget()
        self.start(inverse_temperature)

    def advance(self, call: Call) -> None:
        """Start the next stage if the present one is over.

        Called at the start of a step, so that between two steps the inverse temperature is the one at which
        the guide has been trained. Steps that diverged are not counted.
        """
        stage, plan = self.present, self.plan
        is_first = stage.inverse_temperature == self.schedule.initial_inverse_temperature
        length = plan.num_initial if is_first else plan.num_per_stage
        if self.objective.is_final or stage.num_effective_steps < length:
            return
        if self.stage_rule is not None:
            ess = number_from_first(self.objective.ess_share())
            rule = self.stage_rule.after(self.history.num_untracked_lately)
            if not rule.is_over(stage.num_steps, ess):
                return
            stage.is_tracked = rule.is_met(ess)
        following = number_from_first(self._following(call))
        if self.rungs is not None and self.rungs.cover(stage, following):
            names = self.parameters.names_of_guide(call.args, call.kwargs)
            self.rungs.climb(stage.inverse_temperature, self.parameters.state(), names)
        self.start(following)

    def _following(self, call: Call) -> float:
        """Ask the schedule for the inverse temperature that follows."""
        stage, t = self.present, self.present.inverse_temperature
        draws = weights = None
        if self.schedule.needs_log_factor:
            steps = self.objective.draw_log_factors(
                self.num_variance_samples, call.model, call.guide, call.args, call.kwargs
            )
            # A dozen numbers are asked of them, one after the other: a graphics card is waited for once.
            sizes = [step.shape[1] for step in steps]
            steps = list(torch.cat(steps, dim=1).cpu().split(sizes, dim=1))
            stage.record(*torch.cat(steps, dim=1))
            draws = spread_within_steps([factors for factors, _ in steps])
            weights = torch.cat([weights for _, weights in steps])
            stage.log_factor_sd = standard_deviation(draws)  # what the schedule sees
        following = next_within_budget(self.schedule, self.plan, self.history, draws, weights)
        # Not for a fixed schedule: half the distance to the next grid point, at every stage, never arrives
        # there.
        if self.schedule.needs_log_factor and self.plan.num_total is None:
            factor = self.net.increment_factor
            following = max(t + factor * (following - t), math.nextafter(t, math.inf))
        return following

    def set_budget(self, num_steps: int) -> None:
        """Plan the fit for a total number of steps.

        :raises ValueError: if the schedule or a stage rule does not go with one.
        """
        if self.stage_rule is not None:
            raise ValueError(
                "Expected `num_steps` to be None with a stage rule, which decides how long a stage "
                f"is; got {num_steps}. Leave one of them out."
            )
        self.budget = plan_steps(self.schedule, self.own_plan, num_steps)
        self.tell_status()

    def plan_training(self, num_steps: int) -> None:
        """Plan the fit for a loop of ``num_steps`` steps; warn where it will not, or may not, reach 1."""
        if isinstance(self.schedule, AdaAnnSchedule) and self.stage_rule is None:
            self.set_budget(num_steps)
            return
        num_annealing = self.own_plan.num_annealing(self.schedule)
        if self.stage_rule is not None or self.schedule.needs_log_factor:
            warn_of_unplanned_training(str(self.stage_rule or self.schedule), num_steps)
        elif num_annealing is not None and num_steps <= num_annealing:
            warn_of_short_training(num_annealing, num_steps)

    def warn_if_unfinished(self) -> None:
        """Warn at the end of a run that has not come to the end of annealing, or was interrupted."""
        t, num_steps = self.present.inverse_temperature, self.history.num_steps
        if self.history.interrupted:
            warnings.warn(
                f"The run was interrupted at inverse temperature {t:.3g}, after {num_steps} steps. Call "
                f"`run` again to go on.",
                stacklevel=3,
            )
        elif not self.objective.is_final:
            warnings.warn(
                f"The run has used its steps, {self.plan.num_total} with those before it, at inverse "
                f"temperature {t:.3g}: the guide is one of a tempered posterior. Call `run` with a larger "
                f"`num_steps`, or without one.",
                stacklevel=3,
            )
