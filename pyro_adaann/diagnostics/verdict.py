"""The record of a diagnosis and how it reads."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from pyro_adaann.diagnostics.lost_parts import LadderReport
from pyro_adaann.diagnostics.thermodynamic import ThermodynamicEstimate
from pyro_adaann.weights import reliable_shape

__all__ = ["Diagnosis"]

#: From this divergence on, in nats, a guide is worth correcting: between normal distributions of equal
#: width it is a shift of the mean by sqrt(2 * 0.05) = 0.3 standard deviations.
_NOTICEABLE_GAP = 0.05
#: From this one on, in nats, it says nothing of the bulk of the draws: a few of them make it.
_FAR_GAP = 5.0
#: Two estimates of the log evidence differ if by more than this many nats, a quarter of the evidence, and
#: by 3 standard errors. A lost mode of half the mass makes log 2 = 0.69.
_NOTICEABLE_DIFFERENCE = 0.3
#: A part of the posterior that this many draws see, or fewer, has no share that can be relied on; less than
#: this share does not matter.
_FEW_DRAWS, _NEGLIGIBLE_SHARE = 10, 0.01
#: Above this share of broken draws the rest says little about the guide.
_MAX_BROKEN_SHARE = 0.1


@dataclass(frozen=True)
class Diagnosis:
    r"""What importance weights of guide draws say about a fit; ``print`` it for a verdict.

    All is measured against the model itself, at inverse temperature 1, whatever the guide was fitted to.

    :param num_samples: number of draws.
    :param num_broken: draws whose log density was not finite; they count as weight zero.
    :param k_hat: shape of the tail of the weights, by ArviZ.
    :param ess: effective sample size of the draws under their smoothed weights.
    :param log_evidence: :math:`\log p(x)` by the smoothed weights, in nats; a lower bound on average.
    :param log_evidence_se: its standard error, to be believed if ``k_hat`` is below the threshold.
    :param elbo: mean of :math:`\log p(x, z) - \log q(z)` over the draws that are not broken.
    :param elbo_se: its standard error.
    :param inverse_temperature: where the fit stands; draws are of the posterior at 1 alone.
    :param is_done: whether the fit has taken all its steps; None where the fit does not say.
    :param thermodynamic: the log evidence from the temperatures visited, a second opinion; None where
        the schedule asked for no draws, or nothing was annealed.
    :param ladder: what the rungs of the fit's ladder say of lost modes; None without a ladder.
    :param num_untracked: stages that ran out of steps before their stage rule was met.
    :param num_stages: stages below 1.

    Source: Yao et al., *Yes, but did it work? Evaluating variational inference*, ICML 2018; Vehtari et
    al., *Pareto smoothed importance sampling*, JMLR 25 (2024).

    Example::

        >>> diagnosis = Diagnosis(num_samples=10_000, num_broken=0, k_hat=0.2, ess=9_800.0, elbo=-1.52,
        ...                       elbo_se=0.01, log_evidence=-1.5, log_evidence_se=0.01)
        >>> diagnosis.is_good, round(diagnosis.gap, 2)
        (True, 0.02)
        >>> print(diagnosis.verdict)
        GOOD. The guide's draws can be used as they are, as far as they reach.
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
    num_untracked: int = 0
    num_stages: int = 0

    @property
    def broken_share(self) -> float:
        """Share of draws whose log density was not finite."""
        return self.num_broken / self.num_samples

    @property
    def gap(self) -> float:
        """Log evidence minus ELBO: the divergence KL(guide || posterior) in nats."""
        return self.log_evidence - self.elbo

    @property
    def k_threshold(self) -> float:
        """The shape up to which this number of draws makes the weights reliable, at most 0.7."""
        return reliable_shape(self.num_samples)

    @property
    def is_annealed(self) -> bool:
        """Whether the guide was fitted to the posterior, not to a tempered one."""
        return self.inverse_temperature >= 1

    @property
    def has_reliable_weights(self) -> bool:
        """Whether weighted means and the log evidence can be relied on, as far as the draws reach.

        A heavy tail of nearly equal weights is either next to nothing, or the rim of a part that the guide
        does not reach. Only a ladder tells which.
        """
        is_tail_known = self.ladder is not None and not self.ladder.lost and self.has_nearly_equal_weights
        is_shape_good = self.k_hat <= self.k_threshold or is_tail_known
        return self.broken_share <= _MAX_BROKEN_SHARE and is_shape_good

    @property
    def has_nearly_equal_weights(self) -> bool:
        r"""Whether what ten draws see, or fewer, holds less than 1 % of the weights.

        Ten draws or fewer that hold a share m add about :math:`n m^2 / 10` or more to the relative variance
        :math:`n / \mathrm{ESS} - 1`.
        """
        variance = self.num_samples / self.ess - 1
        return variance < self.num_samples * _NEGLIGIBLE_SHARE**2 / _FEW_DRAWS

    @property
    def lost_share(self) -> float | None:
        """Share of the evidence that thermodynamic integration sees and the weights do not.

        None unless it sees noticeably more, and the weights themselves are reliable. The reverse, less,
        comes from a guide that was far from the tempered densities on the way, and says nothing of
        where it is now.
        """
        if self.thermodynamic is None or not self.has_reliable_weights:
            return None
        excess = self.thermodynamic.log_evidence - self.log_evidence
        error = math.hypot(self.thermodynamic.error, self.log_evidence_se)
        return -math.expm1(-excess) if excess > max(3 * error, _NOTICEABLE_DIFFERENCE) else None

    @property
    def has_lost_part(self) -> bool:
        """Whether a rung of the ladder, or else thermodynamic integration, sees what the draws do not."""
        if self.ladder is not None:
            return bool(self.ladder.lost)
        return self.lost_share is not None

    @property
    def is_good(self) -> bool:
        """Whether nothing here speaks against using the draws of the guide as they are.

        No number computed from the guide's own draws sees a mode that none of them visits.
        """
        return (
            self.is_annealed
            and self.is_done is not False
            and self.has_reliable_weights
            and not self.has_lost_part
            and self.gap <= _NOTICEABLE_GAP
        )

    @property
    def verdict(self) -> str:
        """The verdict, one sentence or a few."""
        return " ".join(_sentences(self))

    def __str__(self) -> str:
        paragraphs = [f"Verdict: {self.verdict}", _BLIND_SPOT if self.ladder is None else _LADDER_SPOT]
        text = [textwrap.fill(paragraph, 88) for paragraph in paragraphs]
        return "\n".join([_table(self), *text])


def _table(d: Diagnosis) -> str:
    sign = "<=" if d.k_hat <= d.k_threshold else ">"
    rows = [
        ("inverse temperature", f"{d.inverse_temperature:.3g}"),
        ("Pareto k-hat", f"{d.k_hat:.2f} ({sign} {d.k_threshold:.2f})"),
        ("effective sample size", f"{d.ess:.0f} ({d.ess / d.num_samples:.0%} of {d.num_samples} draws)"),
        ("broken draws", f"{d.num_broken} ({d.broken_share:.1%})"),
        ("log evidence", f"{d.log_evidence:.3f} +- {d.log_evidence_se:.3f}"),
        ("ELBO", f"{d.elbo:.3f} +- {d.elbo_se:.3f}, {d.gap:.3f} nats below"),
    ]
    if d.ladder is not None:
        rows.append(("ladder", f"{d.ladder.num_rungs} rungs, lost parts: {len(d.ladder.lost)}"))
    if d.num_untracked:
        rows.append(("stages not tracked", f"{d.num_untracked} of {d.num_stages}"))
    if d.thermodynamic is not None:
        rows.append(("log evidence, 2nd way", _second_way(d, d.thermodynamic)))
    return "\n".join(f"{name:<22} {value}" for name, value in rows)


def _second_way(d: Diagnosis, estimate: ThermodynamicEstimate) -> str:
    error = math.hypot(estimate.error, d.log_evidence_se)
    if d.has_reliable_weights and estimate.log_evidence < d.log_evidence - 3 * error:
        # The error does not know the bias of weights with few effective draws.
        return f"{estimate.log_evidence:.3f} (thermodynamic integration, too low: the guide was behind)"
    value = f"{estimate.log_evidence:.3f} +- {estimate.error:.3f}"
    return f"{value} (thermodynamic integration, rather too low)"


def _sentences(d: Diagnosis) -> Iterator[str]:
    if not d.is_annealed:
        yield (
            f"NOT ANNEALED. The fit stands at inverse temperature {d.inverse_temperature:.3g}: the guide "
            f"is of a tempered posterior, wider than the posterior, and its draws are no posterior "
            f"draws. Go on to inverse temperature 1, for example with svi.run()."
        )
        return
    if d.ladder is not None and d.ladder.lost:
        yield (
            f"LOST PART. {d.ladder} The guide's draws, and weights of them, do not stand for the posterior. "
            f"Draws of all rungs together may (mixture_draws); or anneal again from the rung below the loss "
            f"(svi.restart), with smaller steps."
        )
    elif d.ladder is None and d.lost_share is not None:
        yield (
            f"WARNING: thermodynamic integration finds more evidence than the guide's draws; "
            f"{d.lost_share:.0%} of the posterior may be in a part that the guide lost while annealing, "
            f"such as a mode. Anneal more slowly (smaller tolerance, more steps per stage)."
        )
    if d.broken_share > _MAX_BROKEN_SHARE:
        yield (
            f"UNRELIABLE. The model has no finite log density at {d.broken_share:.0%} of the draws. Look "
            f"for the cause there first: overflow, or a guide wider than the support."
        )
    elif not d.has_reliable_weights:
        yield (
            f"UNRELIABLE. With k-hat {d.k_hat:.2f} the guide misses part of what the draws show of the "
            f"posterior, often because it is too narrow, and importance weights cannot make up for it: "
            f"do not use its intervals or the log evidence. A more flexible guide, more final steps or a "
            f"smaller learning rate at the end may help."
        )
        if d.ladder is None and d.has_nearly_equal_weights:
            yield (
                "Its weights are nearly equal: what it misses is either next to nothing or a mode of its "
                "own. A ladder tells which (AdaAnnSVI(ladder=Ladder()))."
            )
    elif d.gap > _FAR_GAP:
        yield (
            f"USABLE WITH WEIGHTS. Some draws of the guide are absurd to the model: the mean log weight is "
            f"{d.gap:.3g} nats below the log evidence. The weights are reliable: use weighted means or "
            f"resampled draws (importance_draws)."
        )
    elif d.gap > _NOTICEABLE_GAP:
        yield (
            f"USABLE WITH WEIGHTS. The guide is {d.gap:.2f} nats from the posterior, enough to move a "
            f"mean by up to {math.sqrt(2 * d.gap):.1f} posterior standard deviations, and its weights are "
            f"reliable: use weighted means or resampled draws (importance_draws)."
        )
    elif not d.has_lost_part and d.is_done is not False:
        yield "GOOD. The guide's draws can be used as they are, as far as they reach."
    if d.num_untracked > 0.1 * d.num_stages:
        yield (
            f"In {d.num_untracked} of {d.num_stages} stages the guide did not keep up with the tempered "
            f"posterior, which is where modes get lost: more steps for a stage (max_num_steps), more "
            f"transforms, or smaller steps of the schedule may help."
        )
    if d.is_done is False:
        yield "The fit has not taken all its final steps: go on with svi.run()."


_BLIND_SPOT = (
    "Not seen by k-hat, nor by any number from the guide's own draws: a mode that none of them visits. "
    "Fit again from other seeds or a wider base, or keep a ladder (AdaAnnSVI(ladder=Ladder())); the fit with "
    "the higher log evidence has found more."
)

_LADDER_SPOT = (
    "Not seen by any of these numbers: a mode that the base of the guide does not reach. Fit again with a "
    "wider base; the fit with the higher log evidence has found more."
)
