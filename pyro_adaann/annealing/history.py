"""Records of what an annealed fit did."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from pyro_adaann.weights import effective_sample_size, weighted_mean_and_sd

__all__ = ["AnnealingHistory", "AnnealingStage", "Outcome", "Recovery", "StepResult"]


class Outcome(Enum):
    """The outcome of a step.

    Example::

        >>> Outcome.ACCEPTED.value
        'accepted'
    """

    #: The parameters have changed.
    ACCEPTED = "accepted"
    #: Every trial would have made the guide worse; no parameter has changed.
    REJECTED = "rejected"
    #: The loss or its gradient was not finite; no parameter has changed.
    DIVERGED = "diverged"


@dataclass(frozen=True)
class StepResult:
    """The record of a step.

    :param outcome: the outcome.
    :param loss: the loss before the step, a float, or a tuple of floats for losses that return one.
    :param num_trials: directions tried.
    :param damping: damping after the step, None for a step without damping.
    :param kl: divergence between the guides before and after the step in nats, to second order; None where
        the step does not know it.

    Example::

        >>> StepResult(Outcome.ACCEPTED, loss=1.5, num_trials=2, damping=0.1, kl=0.02).num_trials
        2
    """

    outcome: Outcome
    loss: Any
    num_trials: int = 1
    damping: float | None = None
    kl: float | None = None


@dataclass
class AnnealingStage:
    """A block of steps at one inverse temperature.

    ``losses`` holds the loss of every step *of the tempered objective*: losses of different stages
    are not comparable. The fields about the log factor are set when the
    stage ends.

    :param inverse_temperature: the inverse temperature of the stage, in (0, 1].
    :param losses: the loss of every step.

    Example::

        >>> stage = AnnealingStage(0.1, losses=[5.0, 4.0], num_broken=1, num_particles=20)
        >>> stage.num_steps, stage.broken_share
        (2, 0.05)
    """

    inverse_temperature: float
    losses: list[float] = field(default_factory=list)
    #: Steps that changed no parameter: the loss or its gradient was not finite, or no trial was accepted.
    num_rejected: int = 0
    #: Steps among these at which the loss or its gradient was not finite.
    num_diverged: int = 0
    #: Directions tried in all steps; one each for an optimizer.
    num_trials: int = 0
    #: Damping after the latest step, of a step that has one.
    damping: float | None = None
    #: Divergence between the guides before and after each step, summed over the accepted steps, in nats, to
    #: second order; of a step that knows it.
    kl: float | None = None
    #: Particles left out of an update because their log density was not finite.
    num_broken: int = 0
    #: Particles of all steps.
    num_particles: int = 0
    #: Mean and standard deviation of the log factor under the guide; None if the schedule needs no draws
    #: or fewer than two were finite.
    log_factor_mean: float | None = None
    log_factor_sd: float | None = None
    #: The same under the tempered density: the draws weighted by p_t / q.
    weighted_log_factor_mean: float | None = None
    weighted_log_factor_sd: float | None = None
    #: Log of the normalizing constant of the tempered density, and effective number of draws, by the
    #: same weights.
    log_normalizer: float | None = None
    ess: float | None = None
    #: Whether the stage rule was met when the stage ended; None without a rule, and at 1.
    is_tracked: bool | None = None
    #: Number of these draws, and how many of them were left out as not finite.
    num_draws: int = 0
    num_nonfinite_draws: int = 0
    #: Whether a plate was sub-sampled: the draws of a step then are weighted against a part of the data.
    is_subsampled: bool = False

    def count(self, result: StepResult) -> None:
        """Add one step.

        :param result: what the step did.
        """
        loss = result.loss
        self.losses.append(loss[0] if isinstance(loss, tuple) else loss)
        self.num_rejected += result.outcome is not Outcome.ACCEPTED
        self.num_diverged += result.outcome is Outcome.DIVERGED
        self.num_trials += result.num_trials
        self.damping = result.damping
        if result.kl is not None:
            self.kl = (self.kl or 0.0) + result.kl

    def record(self, log_factors: Tensor, log_weights: Tensor) -> None:
        """Record statistics of draws of the log factor, and of their weights against the tempered density.

        :param log_factors: draws of d/dt log p_t, shape ``(n,)``.
        :param log_weights: their log weights log p_t - log q, shape ``(n,)``.
        """
        self.num_draws = log_factors.numel()
        is_finite = torch.isfinite(log_factors + log_weights)
        self.num_nonfinite_draws = self.num_draws - int(is_finite.sum())
        factors, logs = log_factors[is_finite].double(), log_weights[is_finite].double()
        if factors.numel() < 2:
            return
        self.log_factor_mean, self.log_factor_sd = float(factors.mean()), float(factors.std())
        self.weighted_log_factor_mean, self.weighted_log_factor_sd = weighted_mean_and_sd(factors, logs)
        self.log_normalizer = float(logs.logsumexp(0)) - math.log(self.num_draws)
        self.ess = effective_sample_size(logs)

    @property
    def num_steps(self) -> int:
        """Number of steps, rejected ones included."""
        return len(self.losses)

    @property
    def num_effective_steps(self) -> int:
        """Number of steps that count toward the length of the stage: those that did not diverge."""
        return len(self.losses) - self.num_diverged

    @property
    def is_stalled(self) -> bool:
        """Whether the stage has steps, none of them was accepted, and its rule was not met either."""
        return 0 < self.num_steps == self.num_rejected and not self.is_tracked

    @property
    def broken_share(self) -> float:
        """Share of the particles that were broken."""
        return self.num_broken / self.num_particles if self.num_particles else 0.0


@dataclass(frozen=True)
class Recovery:
    """A return of the fit to its last good state.

    Example::

        >>> recovery = Recovery(num_steps=120, inverse_temperature=0.2, back_to=0.18, cause="the loss")
        >>> recovery.back_to < recovery.inverse_temperature
        True
    """

    #: Steps taken before it.
    num_steps: int
    #: The inverse temperature at which it happened.
    inverse_temperature: float
    #: The inverse temperature of the last good state.
    back_to: float
    #: What was not finite.
    cause: str


@dataclass
class AnnealingHistory:
    """The stages of a fit, from the first inverse temperature to the last.

    After a recovery the inverse temperature of a stage may be below that of the one before.

    :param stages: one :class:`~pyro_adaann.AnnealingStage` for every stage that has begun.
    :param recoveries: one :class:`~pyro_adaann.Recovery` for every return to an earlier state.

    Example::

        >>> history = AnnealingHistory([AnnealingStage(0.1, [5.0, 4.0]), AnnealingStage(1.0, [7.0])])
        >>> history
        AnnealingHistory(2 stages, 3 steps, inverse temperature 0.1 to 1)
        >>> history.losses
        [5.0, 4.0, 7.0]
    """

    stages: list[AnnealingStage] = field(default_factory=list)
    recoveries: list[Recovery] = field(default_factory=list)
    #: Whether the latest `run` was ended by Ctrl-C.
    interrupted: bool = False

    def __post_init__(self) -> None:
        self._num_steps_before: tuple[int, int] = 0, 0

    @property
    def inverse_temperatures(self) -> list[float]:
        """Inverse temperature of every stage."""
        return [stage.inverse_temperature for stage in self.stages]

    @property
    def losses(self) -> list[float]:
        """Loss of every step, through all stages."""
        return [loss for stage in self.stages for loss in stage.losses]

    @property
    def present_pass(self) -> list[AnnealingStage]:
        """The stages that led to the present guide, with rising inverse temperatures.

        Stages that a recovery or a restart has undone are left out.
        """
        stages: list[AnnealingStage] = []
        for stage in self.stages:
            while stages and stages[-1].inverse_temperature >= stage.inverse_temperature:
                stages.pop()
            stages.append(stage)
        return stages

    @property
    def untracked(self) -> list[AnnealingStage]:
        """The stages of the present pass that ran out of steps before their stage rule was met."""
        return [stage for stage in self.present_pass if stage.is_tracked is False]

    @property
    def num_untracked_lately(self) -> int:
        """How many stages in a row, up to the one before the present, ran out of steps."""
        before = reversed(self.present_pass[:-1])
        return sum(1 for _ in itertools.takewhile(lambda stage: stage.is_tracked is False, before))

    @property
    def stalled(self) -> list[AnnealingStage]:
        """The stages below 1 of the present pass that are stalled."""
        return [s for s in self.present_pass if s.inverse_temperature < 1 and s.is_stalled]

    @property
    def num_steps(self) -> int:
        """Number of steps so far."""
        num_stages = len(self.stages)
        if not num_stages:
            return 0
        # Cached: stages that are over do not change, every step asks, and a fit may have thousands of stages.
        if self._num_steps_before[0] != num_stages:
            self._num_steps_before = num_stages, sum(stage.num_steps for stage in self.stages[:-1])
        return self._num_steps_before[1] + self.stages[-1].num_steps

    def __repr__(self) -> str:
        first, last = self.stages[0], self.stages[-1]
        return (
            f"AnnealingHistory({len(self.stages)} stages, {self.num_steps} steps, inverse "
            f"temperature {first.inverse_temperature:.3g} to {last.inverse_temperature:.3g})"
        )
