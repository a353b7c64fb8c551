"""What a diagnosis has measured, and what follows from the numbers alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pyro_adaann.diagnostics.lost_parts import LadderReport
from pyro_adaann.diagnostics.opinion import SecondOpinion
from pyro_adaann.diagnostics.reach import Reach
from pyro_adaann.diagnostics.thermodynamic import ThermodynamicEstimate
from pyro_adaann.weights import reliable_shape

__all__ = ["Measurements"]

#: Two estimates of the log evidence differ if by more than this many nats, a quarter of the evidence, and
#: by 3 standard errors. A lost mode of half the mass makes log 2 = 0.69.
_NOTICEABLE_DIFFERENCE, _NUM_ERRORS = 0.3, 3.0
#: The share of a part with this many draws or fewer is not reliable; a share below the second number does
#: not matter.
_FEW_DRAWS, _NEGLIGIBLE_SHARE = 10, 0.01
#: Above this share of broken draws the other numbers say little about the guide.
_MAX_BROKEN_SHARE = 0.1
#: Above this share of untracked stages the ladder is not reliable; the weights are then called reliable only
#: up to this shape, at which they have a variance.
_MAX_UNTRACKED_SHARE, _FINITE_VARIANCE = 0.1, 0.5


@dataclass(frozen=True)
class Measurements:
    r"""The numbers of a diagnosis; see :class:`~pyro_adaann.Diagnosis`.

    :param num_samples: number of draws.
    :param num_broken: draws whose log density was not finite.
    :param k_hat: shape of the tail of the weights.
    :param ess: effective sample size.
    :param log_evidence: log evidence by the weights.
    :param log_evidence_se: its standard error.
    :param elbo: mean log weight.
    :param elbo_se: its standard error.
    :param inverse_temperature: inverse temperature of the fit.
    :param is_done: whether it has taken all its steps.
    :param thermodynamic: the log evidence from the temperatures visited.
    :param ladder: the comparison of the rungs.
    :param reach: the share found from wider bases.
    :param num_untracked: stages whose stage rule was not met.
    :param num_stalled: stages in which no step was accepted.
    :param num_stages: stages below 1.
    :param is_scaled: whether the model scales its log density.
    :param broken_cause: which parameter or factorization has broken draws, empty if none is known.
    :param opinion: the comparison with particles.
    """

    num_samples: int
    num_broken: int
    k_hat: float
    ess: float
    log_evidence: float
    log_evidence_se: float
    elbo: float
    elbo_se: float
    inverse_temperature: float = 1.0
    is_done: bool | None = None
    thermodynamic: ThermodynamicEstimate | None = None
    ladder: LadderReport | None = None
    reach: Reach | None = None
    num_untracked: int = 0
    num_stalled: int = 0
    num_stages: int = 0
    is_scaled: bool = False
    broken_cause: str = ""
    opinion: SecondOpinion | None = None

    @property
    def broken_share(self) -> float:
        """Share of draws whose log density was not finite."""
        return self.num_broken / self.num_samples

    @property
    def gap(self) -> float:
        """Log evidence minus ELBO: the divergence KL(guide || posterior) in nats."""
        return self.log_evidence - self.elbo

    @property
    def gap_se(self) -> float:
        """Standard error of the gap. A few outliers can dominate the ELBO and its error."""
        return math.hypot(self.log_evidence_se, self.elbo_se)

    @property
    def largest_shift(self) -> float:
        r"""Bound on the difference of mean and weighted mean of the draws, in standard deviations of the
        draws.

        :math:`|E_q[f] - E_p[f]| = |\mathrm{Cov}_q(w, f)| \le \mathrm{sd}_q(w) \, \mathrm{sd}_q(f)`, and the
        relative variance of the weights is :math:`n / \mathrm{ESS} - 1`.
        """
        return math.sqrt(max(self.num_samples / self.ess - 1, 0.0)) if self.ess > 0 else math.inf

    @property
    def is_annealed(self) -> bool:
        """Whether the guide was fitted to the posterior and not to a tempered one."""
        return self.inverse_temperature >= 1

    @property
    def was_untracked(self) -> bool:
        """Whether the guide was behind the tempered posterior in more than a tenth of the stages.

        A stage that stalled, all its steps rejected, was not tracked either.
        """
        return max(self.num_untracked, self.num_stalled) > _MAX_UNTRACKED_SHARE * self.num_stages

    @property
    def has_many_broken(self) -> bool:
        """Whether more than a tenth of the draws have no finite log density."""
        return self.broken_share > _MAX_BROKEN_SHARE

    @property
    def k_threshold(self) -> float:
        """The shape up to which the weights are reliable: at most 0.7 for this number of draws.

        At most 0.5 if the guide was behind in many stages.
        """
        shape = reliable_shape(self.num_samples)
        return min(shape, _FINITE_VARIANCE) if self.was_untracked else shape

    @property
    def has_nearly_equal_weights(self) -> bool:
        r"""Whether any ten draws hold less than 1 % of the weights.

        Ten draws or fewer that hold a share m add about :math:`n m^2 / 10` or more to the relative variance
        :math:`n / \mathrm{ESS} - 1`.
        """
        return self.largest_shift**2 < self.num_samples * _NEGLIGIBLE_SHARE**2 / _FEW_DRAWS

    @property
    def is_tail_harmless(self) -> bool:
        """Whether a tail that is too heavy is known to hold a negligible share.

        Nearly equal weights have such a tail at the edge of a part that the guide does not reach, or of no
        part. In the second case draws from wider bases find less than 1 % more evidence.
        """
        if self.reach is None or not self.reach.is_known or self.reach.is_short or self.has_lost_part:
            return False
        error = math.hypot(self.reach.log_evidence_se, self.log_evidence_se)
        excess = self.reach.log_evidence - self.log_evidence
        is_level = excess <= _NEGLIGIBLE_SHARE + _NUM_ERRORS * error
        return is_level and self.has_nearly_equal_weights

    @property
    def has_reliable_weights(self) -> bool:
        """Whether weighted means and the log evidence are reliable, for the region that the draws cover."""
        is_shape_good = self.k_hat <= self.k_threshold or self.is_tail_harmless
        return is_shape_good and not self.has_many_broken

    @property
    def lost_share(self) -> float | None:
        """Share of the evidence that thermodynamic integration finds and the weights do not.

        None unless it finds noticeably more. It finds less if the guide was far from the tempered densities
        while annealing, which does not bear on the present guide.
        """
        if self.thermodynamic is None:
            return None
        excess = self.thermodynamic.log_evidence - self.log_evidence
        error = math.hypot(self.thermodynamic.error, self.log_evidence_se)
        is_noticeable = excess > max(_NUM_ERRORS * error, _NOTICEABLE_DIFFERENCE)
        return -math.expm1(-excess) if is_noticeable else None

    @property
    def has_lost_part(self) -> bool:
        """Whether the ladder or thermodynamic integration finds a part without draws of the guide."""
        return self.lost_share is not None or (self.ladder is not None and bool(self.ladder.lost))
