r"""Was a mode lost on the way? Every rung of a ladder is weighed against the rungs above it.

No number from the draws of the final guide sees a mode that none of them visits; the guide at a lower
inverse temperature visits it. With draws :math:`z_i \sim q_r` of a rung, weighted to the tempered density
:math:`p_{t_s}` of a rung s above it, a part of that density is lost where the guide has next to none of it:

.. math:: \text{lost share} = \sum_i W_i\, 1\Bigl[c_s(z_i) < \tfrac{1}{20} \min(1, c(z_i))\Bigr], \qquad
          W_i \propto \frac{p_{t_s}(z_i)}{q_r(z_i)}, \qquad c_s(z) = \frac{q_s(z)}{p_{t_s}(z)}

The coverage :math:`c_s` of a rung is compared with c, the best one of the rung r and of some below it. A
guide that is too wide covers everything badly, from the beginning on; one that loses a mode little by
little covers it well at first. Neighbors overlap in any dimension; the posterior itself, at t = 1, is in
reach of a wide rung in few.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_adaann.draws import DrawBatch, GuideDraws
from pyro_adaann.importance import WeightedDraws, effective_sample_size, pareto_smooth
from pyro_adaann.ladder import Rung, guide_at
from pyro_adaann.particles import log_factors
from pyro_adaann.svi import AdaAnnSVI
from pyro_adaann.tempering import Tempering

__all__ = ["LadderReport", "LostMode", "find_lost_modes", "mixture_draws"]

#: A guide has next to nothing of a density where it has less than this share of it, or of what it had.
_MIN_COVER = 1 / 20
#: How many rungs below the one whose draws are looked at: what the guide had before.
_LOOKBACK = (2, 4)
#: A smaller share is a tail, not a mode: of the posterior, and of a tempered density, where a guide that
#: is still on its way lacks more.
_MIN_SHARE, _MIN_TEMPERED_SHARE = 0.05, 0.15
#: Standard errors that a share has to be above zero.
_NUM_ERRORS = 3.0
#: Fewest effective draws behind a share, and the heaviest tail of their weights: from a shape of 1 on they
#: have no mean, and the error of the share means nothing.
_MIN_ESS, _MAX_SHAPE = 10.0, 1.0


@dataclass(frozen=True)
class LostMode:
    """A part of the posterior that the guide lost between two rungs.

    :param rung: the last rung that has it.
    :param lower: its inverse temperature.
    :param upper: that of the first rung that has it not, 1 for the final guide.
    :param share: share of the tempered density at ``upper`` that is lost.
    :param share_se: its standard error.

    Example::

        >>> from pyro_adaann import Rung
        >>> lost = LostMode(Rung(0.1, {}, {}), lower=0.1, upper=0.2, share=0.3, share_se=0.02)
        >>> print(LadderReport(num_rungs=5, lost=[lost], min_ess=0.3))
        30% +- 2% of the tempered posterior lost between inverse temperatures 0.1 and 0.2.
    """

    rung: Rung
    lower: float
    upper: float
    share: float
    share_se: float


@dataclass(frozen=True)
class LadderReport:
    """What the rungs of a ladder say of each other.

    :param num_rungs: how many there are, the final guide not counted.
    :param lost: what was lost and not found again, from the lowest inverse temperature to the highest.
    :param min_ess: effective sample size, as a share, between the two neighbors that overlap least: below
        a few percent there, a loss may stay unseen.

    Example::

        >>> print(LadderReport(num_rungs=5, lost=[], min_ess=0.3))
        No mode lost between 5 rungs and the guide (least overlap 30%).
    """

    num_rungs: int
    lost: list[LostMode]
    min_ess: float

    @property
    def lost_share(self) -> float:
        """Share of the posterior that is lost in all, as far as the rungs see it."""
        return 1 - math.prod(1 - loss.share for loss in self.lost)

    def __str__(self) -> str:
        if not self.lost:
            overlap = f"least overlap {self.min_ess:.0%}"
            return f"No mode lost between {self.num_rungs} rungs and the guide ({overlap})."
        return " ".join(
            f"{loss.share:.0%} +- {loss.share_se:.0%} of the tempered posterior lost between inverse "
            f"temperatures {loss.lower:.3g} and {loss.upper:.3g}."
            for loss in self.lost
        )


def find_lost_modes(
    svi: AdaAnnSVI, *args: Any, num_samples: int = 5000, vectorize: bool = True, **kwargs: Any
) -> LadderReport:
    """Compare every rung of the ladder of a fit with the next two and with the guide.

    A part that a rung lacks and the next one has again was not lost. One that both lack is reported,
    with the inverse temperatures between which it went; likewise a part of the posterior itself that
    the draws of a rung, weighted all the way, see and the guide lacks.

    :param svi: a fit with a ladder.
    :param args: arguments of model and guide as in ``svi.step``, with ``kwargs``.
    :param num_samples: draws of every rung.
    :param vectorize: whether model and guide run for all draws at once.
    :raises ValueError: if the fit has no ladder or has taken no step, and as :func:`diagnose` does.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import Trace_ELBO
        >>> from pyro_adaann import AutoPlanar, AdaAnnSchedule, Ladder
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> pyro.clear_param_store()  # a new fit
        >>> svi = AdaAnnSVI(model, AutoPlanar(model, 4), pyro.optim.Adam({"lr": 0.01}),
        ...                 Trace_ELBO(num_particles=20, vectorize_particles=True), ladder=Ladder(),
        ...                 schedule=AdaAnnSchedule(0.5), num_initial_steps=20, num_final_steps=20)
        >>> history = svi.run(progress_bar=False)
        >>> find_lost_modes(svi).lost
        []
    """
    rungs = _rungs(svi)
    below = svi.ladder.rungs if svi.ladder is not None else []
    drawn = [_draw(svi, rung, args, kwargs, num_samples, vectorize) for rung in below]
    coverage = [_best_coverage(svi, below, drawn, r) for r in range(len(below))]

    def loss(r: int, share: float, se: float) -> LostMode:
        lower, upper = (_inverse_temperature(svi, rungs[k]) for k in (r, r + 1))
        return LostMode(below[r], lower, upper, share, se)

    lost: list[LostMode] = []
    min_ess = 1.0
    for r, batch in enumerate(drawn):
        # What a rung lacks and the next one has again was not lost.
        above = [_compare(svi, batch, coverage[r], rung) for rung in rungs[r + 1 : r + 3]]
        min_ess = min(min_ess, above[0].ess / num_samples)
        if all(_is_lost(found, _MIN_TEMPERED_SHARE) for found in above):
            lost.append(loss(r, above[0].share, above[0].se))
    # A mode may be next to nothing of the tempered densities at first and much of the posterior: seen from
    # afar, as far as the draws reach.
    seen = [
        (r, found)
        for r, batch in enumerate(drawn)
        if _is_lost(found := _compare(svi, batch, coverage[r], None), _MIN_SHARE)
    ]
    if seen:
        highest = seen[-1][0]
        surest = min((found for _, found in seen), key=lambda found: found.se)
        lost = [part for part in lost if part.rung is not below[highest]]
        lost.append(loss(highest, surest.share, surest.se))
    lost.sort(key=lambda part: part.lower)
    return LadderReport(len(below), lost, min_ess)


def mixture_draws(
    svi: AdaAnnSVI, *args: Any, num_samples: int = 10_000, vectorize: bool = True, **kwargs: Any
) -> WeightedDraws:
    r"""Draw from the rungs of a ladder and the guide together, and weigh the draws against the posterior.

    .. math:: w_i = \frac{p(x, z_i)}{\tfrac{1}{R} \sum_r q_r(z_i)}, \qquad z_i \sim q_1, \dots, q_R

    Where a rung still has a mode that the guide lost, the weighted draws have it too: a repaired
    posterior, as good as its Pareto k-hat and effective sample size say. Where they say too little, anneal
    again from the rung that :func:`find_lost_modes` names, ``svi.restart(rung)``, more slowly.

    :param svi: a fit with a ladder.
    :param args: arguments of model and guide as in ``svi.step``, with ``kwargs``.
    :param num_samples: draws in all, the same number of every rung.
    :param vectorize: whether model and guide run for all draws of a rung at once.
    :raises ValueError: if the fit has no ladder or has taken no step, and as :func:`diagnose` does.

    Source: Veach and Guibas, *Optimally combining sampling techniques*, SIGGRAPH 1995 (the balance
    heuristic).

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import Trace_ELBO
        >>> from pyro_adaann import AutoPlanar, AdaAnnSchedule, Ladder
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> pyro.clear_param_store()  # a new fit
        >>> svi = AdaAnnSVI(model, AutoPlanar(model, 4), pyro.optim.Adam({"lr": 0.01}),
        ...                 Trace_ELBO(num_particles=20, vectorize_particles=True), ladder=Ladder(),
        ...                 schedule=AdaAnnSchedule(0.5), num_initial_steps=20, num_final_steps=20)
        >>> history = svi.run(progress_bar=False)
        >>> abs(float(mixture_draws(svi).mean("z"))) < 0.1  # exactly 0
        True
    """
    rungs = _rungs(svi)
    num_each = -(-num_samples // len(rungs))
    draws = GuideDraws(svi, args, kwargs, vectorize=vectorize)
    samples: dict[str, list[Tensor]] = {name: [] for name in draws.latent_names}
    parts = []
    for own in rungs:
        with guide_at(own, svi._parameters.tensors):
            batches = list(draws.batches(num_each, num_each))
        for batch in batches:
            log_q = draws.guide_density(batch.guide_trace, len(batch.log_p))
            mixture = []
            for rung in rungs:
                with guide_at(rung, svi._parameters.tensors):
                    mixture.append(draws.score_guide(batch))
            # A draw out of reach of a rung's inverse has no density there.
            log_mixture = torch.stack(mixture).nan_to_num(-torch.inf).logsumexp(0) - math.log(len(rungs))
            # The rest of the guide's density, that of its Delta sites, does not depend on the rung.
            parts.append((batch.log_p, batch.log_q - log_q + log_mixture))
            for name, values in samples.items():
                values.append(draws.values(batch.guide_trace, name, len(batch.log_p)))
    log_p, log_q = map(torch.cat, zip(*parts, strict=True))
    log_weights = torch.where(torch.isfinite(log_p - log_q), log_p - log_q, -torch.inf)
    smoothed, k_hat = pareto_smooth(log_weights)
    cat = {name: torch.cat(values) for name, values in samples.items()}
    return WeightedDraws(cat, log_p, log_q, smoothed, k_hat)


@dataclass(frozen=True)
class _RungDraws:
    """Draws of a rung: log q of them, and their log weight at t as ``offset + t * factor``."""

    draws: GuideDraws
    batches: list[DrawBatch]
    log_q: Tensor
    offset: Tensor
    factor: Tensor

    def log_weights(self, inverse_temperature: float) -> Tensor:
        result = self.offset + inverse_temperature * self.factor
        return torch.where(torch.isfinite(result), result, -torch.inf)


def _rungs(svi: AdaAnnSVI) -> list[Rung | None]:
    """Return the rungs of a fit and, as None, the guide as it is."""
    if svi.ladder is None or not svi.ladder.rungs:
        raise ValueError(
            "Expected a fit that has kept a ladder; got none. Give AdaAnnSVI `ladder=Ladder()`, and train "
            "before you ask."
        )
    return [*svi.ladder.rungs, None]


def _inverse_temperature(svi: AdaAnnSVI, rung: Rung | None) -> float:
    return svi.inverse_temperature if rung is None else rung.inverse_temperature


def _draw(
    svi: AdaAnnSVI, rung: Rung | None, args: Any, kwargs: Any, num_samples: int, vectorize: bool
) -> _RungDraws:
    # The log weight is linear in t, and with t = 1/2 scaling is free of rounding.
    t = 0.5
    tempering = Tempering(svi.model, svi.guide, svi.path, t)
    with guide_at(rung, svi._parameters.tensors):
        draws = GuideDraws((tempering.model, tempering.guide), args, kwargs, vectorize=vectorize)
        batches, columns = [], []
        for batch in draws.batches(num_samples, num_samples):
            factor = log_factors(tempering, batch.model_trace, batch.guide_trace)
            if factor is None:
                raise ValueError(
                    "Expected a guide without enumerated sites; got one with, whose draws have no weights of "
                    "their own. Enumerate in the model."
                )
            log_q = draws.guide_density(batch.guide_trace, len(batch.log_p))
            log_weights = batch.log_weights
            columns.append(torch.stack([log_q, log_weights - t * factor, factor.double()]))
            batches.append(batch)
    return _RungDraws(draws, batches, *torch.cat(columns, dim=1))


def _log_coverage(svi: AdaAnnSVI, drawn: _RungDraws, rung: Rung | None, log_normalizer: float) -> Tensor:
    """Return the log of what a rung has of its tempered density, at draws of another one."""
    with guide_at(rung, svi._parameters.tensors):
        log_q = torch.cat([drawn.draws.score_guide(batch) for batch in drawn.batches])
    log_p = drawn.log_q + drawn.log_weights(_inverse_temperature(svi, rung)) - log_normalizer
    return (log_q - log_p).nan_to_num(-torch.inf)


def _best_coverage(svi: AdaAnnSVI, rungs: list[Rung], drawn: list[_RungDraws], r: int) -> Tensor:
    """Return the best log coverage at the draws of rung r, of itself and of some below."""
    best = torch.full_like(drawn[r].log_q, -torch.inf)
    for k in (r, *(r - back for back in _LOOKBACK if back <= r)):
        log_normalizer = _log_mean(drawn[k].log_weights(rungs[k].inverse_temperature))
        best = torch.maximum(best, _log_coverage(svi, drawn[r], rungs[k], log_normalizer))
    return best


def _log_mean(log_weights: Tensor) -> float:
    return float(log_weights.logsumexp(0)) - math.log(len(log_weights))


class _Comparison(NamedTuple):
    """What share of the density at a rung it lacks, its error, and the weights behind it."""

    share: float
    se: float
    ess: float
    k_hat: float


def _compare(svi: AdaAnnSVI, drawn: _RungDraws, best: Tensor, rung: Rung | None) -> _Comparison:
    log_weights = drawn.log_weights(_inverse_temperature(svi, rung))
    try:
        k_hat = pareto_smooth(log_weights)[1]
    except ValueError:  # next to no draw has a weight
        return _Comparison(0.0, 0.0, 0.0, math.inf)
    coverage = _log_coverage(svi, drawn, rung, _log_mean(log_weights))
    is_lost = coverage < best.clamp(max=0.0) + math.log(_MIN_COVER)
    weights = log_weights.softmax(0)
    share = float(weights[is_lost].sum())
    se = float((weights * (is_lost.double() - share)).square().sum().sqrt())
    return _Comparison(share, se, effective_sample_size(log_weights), k_hat)


def _is_lost(found: _Comparison, min_share: float) -> bool:
    is_sure = found.ess >= _MIN_ESS and found.k_hat <= _MAX_SHAPE
    return is_sure and found.share > max(min_share, _NUM_ERRORS * found.se)
