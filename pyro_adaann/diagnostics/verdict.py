"""The record of a diagnosis, as text and as a table."""

from __future__ import annotations

import html
import math
import textwrap
from dataclasses import dataclass

from pyro_adaann.diagnostics.measurements import Measurements
from pyro_adaann.diagnostics.numbers import nats, percent, rounded
from pyro_adaann.diagnostics.rules import Level, findings
from pyro_adaann.diagnostics.thermodynamic import ThermodynamicEstimate

__all__ = ["Diagnosis"]


@dataclass(frozen=True, repr=False)
class Diagnosis(Measurements):
    r"""A fit measured by the importance weights of guide draws; ``print`` it for a verdict.

    Everything is measured against the model at inverse temperature 1, whatever the guide was fitted to.

    :param num_samples: number of draws.
    :param num_broken: draws whose log density was not finite; they count as weight zero.
    :param k_hat: shape of the tail of the weights, by ArviZ.
    :param ess: effective sample size of the draws under their smoothed weights.
    :param log_evidence: :math:`\log p(x)` by the smoothed weights, in nats; a lower bound on average.
    :param log_evidence_se: its standard error, valid if ``k_hat`` is below the threshold.
    :param elbo: mean of :math:`\log p(x, z) - \log q(z)` over the draws that are not broken.
    :param elbo_se: its standard error.
    :param inverse_temperature: inverse temperature of the fit; below 1 the draws are of a tempered posterior.
    :param is_done: whether the fit has taken all its steps; None if the fit does not count them.
    :param thermodynamic: a second estimate of the log evidence, from the temperatures visited; None if
        the schedule needs no draws, nothing was annealed, or the data came in mini-batches.
    :param ladder: lost parts, by the rungs of the fit's ladder; None without a ladder.
    :param reach: share beyond the guide's draws, from wider bases; None if the guide has no normal base.
    :param num_untracked: stages of the present pass that ran out of steps before their stage rule was met.
    :param num_stalled: stages of the present pass below 1 in which no step was accepted.
    :param num_stages: stages of the present pass below 1.
    :param is_scaled: whether the model scales its log density, so that the verdict is about these arguments.
    :param broken_cause: which parameter or factorization has broken draws, empty if none is known.
    :param opinion: the comparison with particles of :class:`AnnealedSMC`; None if none were given.

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

    @property
    def level(self) -> Level:
        """How the draws can be used."""
        return max(finding.level for finding in findings(self))

    @property
    def is_good(self) -> bool:
        """Whether no finding is against using the draws of the guide as they are.

        Numbers computed from the guide's own draws do not show a mode without draws.
        """
        return self.level == Level.GOOD

    @property
    def asks_for_weights(self) -> bool:
        """Whether the draws represent the posterior with their weights, and not without them."""
        return self.level == Level.USABLE_WITH_WEIGHTS

    @property
    def verdict(self) -> str:
        """The verdict, one sentence or a few."""
        return f"{self.level.headline}. {' '.join(finding.sentence for finding in findings(self))}"

    def __str__(self) -> str:
        paragraphs = [f"Verdict: {self.verdict}", _BLIND_SPOT if self.ladder is None else _LADDER_SPOT]
        text = [textwrap.fill(paragraph, 88) for paragraph in paragraphs]
        return "\n".join([*(f"{name:<22} {value}" for name, value in _rows(self)), *text])

    def __repr__(self) -> str:
        numbers = "\n".join(f"  {name:<22} {value}" for name, value in _rows(self))
        return f"{textwrap.fill(f'Diagnosis: {self.verdict}', 88)}\n{numbers}"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
            for name, value in _rows(self)
        )
        headline, text = self.verdict.split(". ", 1)
        return f"<p><b>{html.escape(headline)}.</b> {html.escape(text)}</p><table>{rows}</table>"


def _rows(d: Diagnosis) -> list[tuple[str, str]]:
    rows = [
        ("inverse temperature", rounded(d.inverse_temperature)),
        ("Pareto k-hat", _shape(d)),
        ("effective sample size", f"{d.ess:.0f} ({percent(d.ess / d.num_samples)} of {d.num_samples} draws)"),
        ("broken draws", _broken(d)),
        ("log evidence", f"{nats(d.log_evidence)} +- {nats(d.log_evidence_se)}"),
        ("ELBO", f"{nats(d.elbo)} +- {nats(d.elbo_se)}, {nats(d.gap)} nats below"),
    ]
    if d.ladder is not None:
        rows.append(("ladder", f"{d.ladder.num_rungs} rungs, lost parts: {len(d.ladder.lost)}"))
    if d.reach is not None:
        rows.append(("out of reach", _out_of_reach(d)))
    if d.num_untracked:
        rows.append(("stages not tracked", f"{d.num_untracked} of {d.num_stages}"))
    if d.num_stalled:
        rows.append(("stages stalled", f"{d.num_stalled} of {d.num_stages}"))
    if d.thermodynamic is not None:
        rows.append(("log evidence, 2nd way", _second_way(d, d.thermodynamic)))
    if d.opinion is not None:
        found, error = d.opinion.log_evidence, d.opinion.log_evidence_error
        rows.append(("log evidence, SMC", f"{nats(found)} +- {nats(error)}"))
    return rows


def _broken(d: Diagnosis) -> str:
    cause = f": {d.broken_cause}" if d.num_broken and d.broken_cause else ""
    return f"{d.num_broken} ({percent(d.broken_share)}){cause}"


def _shape(d: Diagnosis) -> str:
    if d.k_hat == -math.inf:
        return "none: the weights are equal, or reach a bound"
    if d.k_hat <= d.k_threshold:
        return f"{d.k_hat:.2f} (<= {d.k_threshold:.2f})"
    excuse = ", harmless: see below" if d.is_tail_harmless else ""
    return f"{d.k_hat:.2f} (> {d.k_threshold:.2f}{excuse})"


def _out_of_reach(d: Diagnosis) -> str:
    if d.reach is None or not d.reach.is_known:
        return "not known: too few draws of wider bases count"
    return f"{percent(d.reach.share)} +- {percent(d.reach.share_se)} of the posterior"


def _second_way(d: Diagnosis, estimate: ThermodynamicEstimate) -> str:
    error = math.hypot(estimate.error, d.log_evidence_se)
    if d.has_reliable_weights and estimate.log_evidence < d.log_evidence - 3 * error:
        # The error does not include the bias of weights with few effective draws.
        return f"{nats(estimate.log_evidence)} (thermodynamic integration, too low: the guide was behind)"
    value = f"{nats(estimate.log_evidence)} +- {nats(estimate.error)}"
    return f"{value} (thermodynamic integration, rather too low)"


_BLIND_SPOT = (
    "Not seen by k-hat, nor by any number from the guide's own draws: a mode that none of them visits. "
    "Fit again from other seeds or a wider base, or keep a ladder (AdaAnnSVI(ladder=Ladder())); the fit with "
    "the higher log evidence has found more."
)

_LADDER_SPOT = (
    "Not seen by any of these numbers: a mode that the base of the guide does not reach. Fit again with a "
    "wider base; the fit with the higher log evidence has found more."
)
