"""What sequential Monte Carlo returns: weighted draws, evidence with its error, history."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pyro_adaann.sampling.arviz import draws_to_arviz
from pyro_adaann.sampling.forgetting import drift
from pyro_adaann.sampling.metric import Metric
from pyro_adaann.sampling.particles import combine_evidences
from pyro_adaann.weights import (
    effective_sample_size,
    grouped_mean,
    resample,
    student_factor,
    weighted_mean,
)

__all__ = ["SMCResult", "SMCStage"]


#: Above this error of the mean evidence a few groups have nearly all the weight; at 1 it is one group alone.
_DISAGREE = 0.5
#: Relative sd of the evidences of groups above which their mean, and its error, hang on a few of them.
_DIFFER = 0.6
#: Error of a mean, in sds, above which it is said.
_MAX_MEAN_ERROR = 0.1
#: Standard errors from which on a drift is none by chance.
_MAX_DRIFT = 2.5


@dataclass(frozen=True)
class SMCStage:
    """What has happened at one inverse temperature.

    :param inverse_temperature: where it was.
    :param ess: effective number of all particles after the change of temperature, before resampling.
    :param num_resampled: number of groups that have been resampled.
    :param log_evidence: of the tempered density, so far.
    :param metric: scales of the moves.
    :param step_sizes: of every move, in units of these scales.
    :param acceptance: mean acceptance probability of the moves.
    :param guide_acceptance: of proposals from the guide, None without one.
    :param correlation: of the particles before and after the moves, the largest of the coordinates' and of
        the log factor's.
    :param num_evaluations: evaluations of the model, one for each particle and gradient.
    :param num_broken: particles so far that have lost their weight because the model broke.
    :param has_forgotten: whether the correlation fell below the limit, or fell no further because particles
        stay in modes of their own.
    :param shift: by how many sds the moves have shifted the mean log factor, and the standard error.
    """

    inverse_temperature: float
    ess: float
    num_resampled: int
    log_evidence: float
    metric: Metric
    step_sizes: tuple[float, ...]
    acceptance: float
    guide_acceptance: float | None
    correlation: float
    num_evaluations: int
    num_broken: int
    has_forgotten: bool
    shift: tuple[float, float]

    @property
    def num_moves(self) -> int:
        """Number of moves of every particle."""
        return len(self.step_sizes)

    def describe(self) -> str:
        """Return where the particles stand, in a few words."""
        return (
            f"inverse temperature {self.inverse_temperature:.3g}, log evidence {self.log_evidence:.4g}, "
            f"ess {self.ess:.0f}, {self.num_moves} moves, {self.acceptance:.0%} accepted"
        )


@dataclass(frozen=True)
class SMCResult:
    r"""Weighted draws of the posterior and the evidence, from :class:`AnnealedSMC`.

    :param samples: for every latent site its draws, shape ``(n,) + shape of the site``.
    :param log_weights: their log weights, shape ``(n,)``.
    :param log_p: their log joint density in unconstrained coordinates, shape ``(n,)``.
    :param unconstrained: the draws in unconstrained coordinates, shape ``(n, latent_dim)``.
    :param group_log_evidences: log evidence of every group of particles, shape ``(G,)``.
    :param stages: what has happened at every inverse temperature; also the ``tuning`` of other runs.
    :param seed: of the run.

    Example::

        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_adaann import AnnealedSMC
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))
        >>> result = AnnealedSMC(model, num_particles=512, seed=0).run(progress_bar=False)
        >>> 0.4 < float(result.mean("z")) < 0.6  # exactly 0.5
        True
        >>> abs(result.log_evidence - -1.5155) < 0.1
        True
    """

    samples: dict[str, Tensor]
    log_weights: Tensor
    log_p: Tensor
    unconstrained: Tensor
    group_log_evidences: Tensor
    stages: tuple[SMCStage, ...] = field(repr=False)
    seed: int

    @property
    def log_evidence(self) -> float:
        """Log evidence; the evidence itself is unbiased if nothing has been tuned in the same run."""
        return combine_evidences(self.group_log_evidences)[0]

    @property
    def log_evidence_error(self) -> float:
        """Standard error of the log evidence, from the spread of the groups; above 1/2 it means nothing.

        Twice of it covers 95 %: with few groups it is larger than their spread, by Student's t. NaN with one.
        """
        num = len(self.group_log_evidences)
        return self._evidence_spread / math.sqrt(num) * (student_factor(num) if num > 1 else 1.0)

    @property
    def _evidence_spread(self) -> float:
        """Relative standard deviation of the evidences of groups."""
        return combine_evidences(self.group_log_evidences)[1] * math.sqrt(len(self.group_log_evidences))

    @property
    def inverse_temperature(self) -> float:
        """The inverse temperature that the run has reached."""
        return self.stages[-1].inverse_temperature

    @property
    def is_done(self) -> bool:
        """Whether that is 1, so that the draws are of the posterior."""
        return self.inverse_temperature >= 1

    @property
    def num_evaluations(self) -> int:
        """Number of evaluations of the model, one for each particle and gradient."""
        return sum(stage.num_evaluations for stage in self.stages)

    @property
    def num_broken(self) -> int:
        """Number of particles that have lost their weight because the model broke: no finite log density."""
        return self.stages[-1].num_broken

    @property
    def num_unforgotten(self) -> int:
        """Number of inverse temperatures at which the moves came to their limit before the particles forgot.

        With any, the spread of the groups may understate the error: all groups may lack the same part.
        """
        return sum(not stage.has_forgotten for stage in self.stages)

    @property
    def drift(self) -> float:
        """By how many standard errors moves shifted the mean log factor in the latest stages.

        Moves leave the tempered density as it is. Where they carry all particles the same way, these are not
        yet of that density, as in a funnel, whose neck is entered slowly. 0 with fewer than eight groups.
        """
        return drift([stage.shift for stage in self.stages])

    @property
    def is_lagging(self) -> bool:
        """Whether that is none by chance: a part of the posterior is missing, and the evidence is off."""
        return abs(self.drift) > _MAX_DRIFT

    @property
    def cautions(self) -> list[str]:
        """What speaks against the draws or the stated errors, in words; empty where nothing does."""
        found = []
        if self._evidence_spread > _DISAGREE * math.sqrt(len(self.group_log_evidences)):
            found.append(
                "the groups disagree, most have missed what a few have found: the error is not known"
            )
        elif self._evidence_spread > _DIFFER:
            found.append(
                "the evidences of the groups differ much: the log evidence is rather too low, by more than "
                "its error, and shares of modes are uncertain; take more particles"
            )
        error, name = self._worst_mean()
        if error > _MAX_MEAN_ERROR:
            found.append(
                f"means are known within {error:.2g} sds at worst, that of {name}: take more particles"
            )
        if self.num_unforgotten:
            found.append(
                f"at {self.num_unforgotten} inverse temperatures the moves did not make the particles "
                f"forget: the error may be larger than stated"
            )
        if self.is_lagging:
            found.append(
                f"the moves carry all particles the same way ({abs(self.drift):.1f} standard errors): they "
                f"lag behind, a part is missing and the evidence is off by more than its error; take smaller "
                f"increments (schedule=AdaAnnSchedule(0.1)) and more moves (max_correlation=0.1, "
                f"max_moves=60), a narrower base, or a guide"
            )
        if self.num_broken:
            found.append(f"{self.num_broken} particles broke: their log density was not finite")
        return found

    @property
    def ess(self) -> float:
        """Effective number of draws behind a weighted mean."""
        return effective_sample_size(self.log_weights)

    def mean(self, name: str) -> Tensor:
        """Return the posterior mean of a site."""
        return weighted_mean(self.samples[name], self.log_weights)

    def sd(self, name: str) -> Tensor:
        """Return the posterior standard deviation of a site, element by element."""
        spread = self.samples[name] - self.mean(name)
        return weighted_mean(spread.square(), self.log_weights).sqrt()

    def mean_error(self, name: str) -> Tensor:
        r"""Return the standard error of :meth:`mean`, from what the groups of particles have for it.

        With weights :math:`W_g` and means :math:`m_g` of G groups it is
        :math:`\sqrt{\frac{G}{G - 1} \sum_g W_g^2 (m_g - m)^2}`. With a single group it is a rough guess.
        """
        num_groups = len(self.group_log_evidences)
        return grouped_mean(self.samples[name], self.log_weights.softmax(0), num_groups)[1]

    def _worst_mean(self) -> tuple[float, str]:
        """Return the largest error of a mean, in sds, and the site."""
        errors = {name: (self.mean_error(name) / self.sd(name)).nan_to_num(0.0) for name in self.samples}
        return max((float(error.max()), name) for name, error in errors.items())

    def resample(self, num_samples: int, *, replacement: bool = True) -> dict[str, Tensor]:
        """Return draws of equal weight, as :func:`resample` does."""
        index = resample(self.log_weights, num_samples, replacement=replacement)
        return {name: value[index] for name, value in self.samples.items()}

    def to_arviz(self, *, num_samples: int | None = None, **labels: Any) -> Any:
        """Return draws of equal weight as data for ArviZ, with the stages as group ``annealing``.

        :param num_samples: how many, by default as many as there are particles.
        :param labels: ``coords`` and ``dims``, as ArviZ's ``from_dict`` takes them.
        :return: ``arviz.InferenceData`` if ArviZ before version 1 is installed, else ``xarray.DataTree``.
        """
        draws = self.resample(num_samples or len(self.log_weights))
        attrs = {
            "inverse_temperature": self.inverse_temperature,
            "log_evidence": self.log_evidence,
            "log_evidence_error": self.log_evidence_error,
            "ess": self.ess,
            "num_evaluations": self.num_evaluations,
            "num_broken": self.num_broken,
            "drift": self.drift,
            "seed": self.seed,
        }
        names = ("inverse_temperature", "ess", "acceptance", "num_moves", "correlation", "num_evaluations")
        stages = {name: [getattr(stage, name) for stage in self.stages] for name in names}
        posterior = {name: value.unsqueeze(0) for name, value in draws.items()}
        return draws_to_arviz(posterior, {}, attrs, stages, **labels)

    def __repr__(self) -> str:
        done = (
            ""
            if self.is_done
            else f" of a tempered posterior (inverse temperature {self.inverse_temperature:.3g})"
        )
        last = self.stages[-1]
        lines = [
            f"SMCResult: {len(self.log_weights)} draws{done}, effectively {self.ess:.0f}",
            f"  log evidence {self.log_evidence:.3f} +- {self.log_evidence_error:.3f}, from "
            f"{len(self.group_log_evidences)} groups",
            f"  {len(self.stages)} inverse temperatures, {self.num_evaluations:,} evaluations; at the last "
            f"one {last.num_moves} moves, {last.acceptance:.0%} accepted, correlation {last.correlation:.2f}",
        ]
        lines += [f"  {caution}" for caution in self.cautions]
        if last.guide_acceptance is not None:
            lines.append(f"  {last.guide_acceptance:.0%} of the guide's proposals accepted there")
        return "\n".join(lines)
