r"""The share of the posterior beyond all draws of the guide, from draws of the same guide with wider bases.

A guide whose draws are a transformation of a standard normal :math:`\varepsilon` in d coordinates draws
nearly nothing beyond the radius R, nor with a coordinate beyond M, that one of n draws exceeds. With bases of
1, 1.5, 2 and 3 times its width, and two of which a coordinate is 2.5 or 4 times as wide with probability 1/d,

.. math:: \varepsilon \sim b_c, \quad z = T(\varepsilon), \quad
          \log q_c(z) = \log b_c(\varepsilon) - \log|\det J_T(\varepsilon)|,

all draws together are weighted against their mixture, :math:`w = p(x, z) / \frac{1}{C} \sum_c q_c(z)`, and

.. math:: \text{share out of reach} = \frac{\sum_i w_i 1[\|\varepsilon_i\| > R
          \text{ or } \max_j |\varepsilon_{ij}| > M]}{\sum_i w_i} .

No number computed from the guide's own draws shows this share: Pareto's k-hat extrapolates from draws, and
there are none beyond R.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from pyro_adaann.diagnostics.guide_draws import DrawBatch, GuideDraws
from pyro_adaann.diagnostics.numbers import percent
from pyro_adaann.diagnostics.wider import OWN, Widening, Wider, is_widened, squares
from pyro_adaann.weights import (
    effective_sample_size,
    finite_or_no_weight,
    log_mean_error,
    log_mean_weight,
    pareto_smooth,
    weighted_mean,
)

__all__ = ["Reach", "measure_reach"]

#: Bases that are wider in all coordinates, and how much wider those are of which few coordinates are.
_ALL_WIDER, _FEW_WIDER = (OWN, Widening(1.5), Widening(2.0), Widening(3.0)), (2.5, 4.0)
#: Rounds with a quarter of the draws of each base: one, or more if the share is not significant yet.
_MAX_ROUNDS, _ROUND = 8, 0.25
#: Smallest share that matters; standard errors by which the share must exceed it, and zero. The latter holds
#: for a share of six effective draws and more.
_MIN_SHARE, _NUM_ERRORS_ABOVE, _NUM_ERRORS = 0.005, 2.0, 2.5
#: A share up to the first number matters only if it changes a mean by more than the second number of sds, or
#: an sd by more than this part of it: half of what is called right.
_SMALL_SHARE, _MIN_EFFECT = 0.02, 0.05
#: Smallest effective sample size for a share, and largest shape of weights that have a mean. A shape says
#: nothing where the heaviest ten draws together hold a negligible share: the tail is that of equal weights.
_MIN_ESS, _MAX_SHAPE, _NUM_HEAVIEST, _NEGLIGIBLE_SHARE = 10.0, 1.0, 10, 0.01
#: Other draws reach what has at least this part of their density, by that of the posterior.
_MIN_COVER = 1 / 20
#: A site is named if this part of the share lies outside the range of the guide's draws of the site.
_NAMED_PART = 0.2
#: Share of the posterior that a wider base should hold.
_HELD = 0.999


@dataclass(frozen=True)
class Reach:
    """The share of the posterior beyond the guide's own draws, from draws with wider bases.

    :param share: share of the posterior out of reach.
    :param share_se: its standard error.
    :param sites: names of the sites whose values there are outside the range of the guide's draws.
    :param factor: factor on the width of the base that would hold 99.9 % of the posterior found.
    :param log_evidence: log evidence from all these draws together.
    :param log_evidence_se: its standard error.
    :param ess: effective sample size of these draws.
    :param k_hat: shape of the tail of their weights.
    :param heaviest: share of the ten draws with the largest weights.
    :param effect: largest change of a mean, in sds, or of the logarithm of an sd, that the share makes.

    Example::

        >>> reach = Reach(share=0.09, share_se=0.01, sites=("x",), factor=1.8, log_evidence=-0.01,
        ...               log_evidence_se=0.01, ess=3000.0, k_hat=0.4)
        >>> reach.is_short
        True
    """

    share: float
    share_se: float
    sites: tuple[str, ...]
    factor: float
    log_evidence: float
    log_evidence_se: float
    ess: float
    k_hat: float
    heaviest: float = 1.0
    effect: float = math.inf

    @property
    def is_known(self) -> bool:
        """Whether the share is known: not a few draws have the weight of all, nor of those not drawn yet."""
        return self.ess >= _MIN_ESS and (self.k_hat <= _MAX_SHAPE or self.heaviest <= _NEGLIGIBLE_SHARE)

    @property
    def is_significant(self) -> bool:
        """Whether a share that is not negligible is surely out of reach."""
        least = max(_NUM_ERRORS * self.share_se, _MIN_SHARE + _NUM_ERRORS_ABOVE * self.share_se)
        return self.share > least

    @property
    def is_short(self) -> bool:
        """Whether a share that matters, to the evidence or to a mean or an sd, is surely out of reach."""
        return self.is_significant and (self.share > _SMALL_SHARE or self.effect > _MIN_EFFECT)

    def __str__(self) -> str:
        names = f", in {', '.join(self.sites)}" if self.sites else ""
        return f"{percent(self.share)} +- {percent(self.share_se)} of the posterior is out of reach{names}"


def measure_reach(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_samples: int,
    batch_size: int,
    vectorize: bool,
    also: Callable[[dict[str, Tensor]], Tensor] | None = None,
) -> Reach | None:
    """Draw from the guide at several widths and return the share beyond the guide's own draws.

    :param num_samples: number of the guide's own draws, whose radius counts. A quarter as many are drawn
        from every base, and again up to seven times while the share is neither negligible nor significant.
    :param also: log density, at values of all sites, of other draws that the guide's are mixed with: what
        these reach is not far.
    :return: None if the guide cannot be widened: its densities must be normal or transformed from normal
        ones, as those of Pyro's autoguides and of the flow guides are.
    """

    def drawn_with(widening: Widening) -> GuideDraws:
        return GuideDraws((model, Wider(widening)(guide)), args, kwargs, vectorize=vectorize)

    own = drawn_with(OWN)
    if not is_widened(own.guide_prototype):
        return None
    dim = squares(own.guide_prototype, 1).shape[-1]
    # In one dimension few coordinates are all.
    widenings = [*_ALL_WIDER, *(Widening(width, 1 / dim) for width in _FEW_WIDER if dim > 1)]
    draws = [own, *map(drawn_with, widenings[1:])]
    found: list[_Draws] = []
    num_each = math.ceil(_ROUND * num_samples)
    for _ in range(_MAX_ROUNDS):
        for index, wider in enumerate(draws):
            batches = wider.batches(num_each, batch_size)
            found += [_draw(wider, batch, index, widenings, also) for batch in batches]
        reach = _summarize(_concatenate(found), num_samples)
        if reach.is_significant or reach.share <= _MIN_SHARE:
            break
    return reach


@dataclass
class _Draws:
    """Draws of a width with their log weights against the mixture of all of them.

    :param is_own: whether the base is the guide's own.
    :param log_weights: shape ``(n,)``.
    :param square: squared radius in the base, likewise.
    :param largest: square of the coordinate that is farthest out, likewise.
    :param log_cover: log density of other draws over that of the model, likewise.
    :param dim: number of coordinates of the base.
    :param values: values of the latent sites, each ``(n, k)``.
    """

    is_own: Tensor
    log_weights: Tensor
    square: Tensor
    largest: Tensor
    log_cover: Tensor
    dim: int
    values: dict[str, Tensor]


def _draw(
    draws: GuideDraws,
    batch: DrawBatch,
    index: int,
    widenings: list[Widening],
    also: Callable[[dict[str, Tensor]], Tensor] | None,
) -> _Draws:
    num = len(batch.log_p)
    square = squares(batch.guide_trace, num)
    terms = torch.stack([widening.log_density(square) for widening in widenings])
    log_mixture = batch.log_q - terms[index] + terms.logsumexp(0) - math.log(len(widenings))
    values = {name: draws.values(batch.guide_trace, name, num) for name in draws.latent_names}
    total = square.sum(-1)
    log_other = torch.full_like(total, -torch.inf) if also is None else also(values).to(total)
    return _Draws(
        torch.full_like(total, index == 0, dtype=torch.bool),
        finite_or_no_weight(batch.log_p - log_mixture),
        total,
        square.amax(-1),
        (log_other - batch.log_p).nan_to_num(-torch.inf),
        square.shape[-1],
        {name: value.reshape(num, -1) for name, value in values.items()},
    )


def _concatenate(parts: list[_Draws]) -> _Draws:
    values = {name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values}
    return _Draws(
        torch.cat([part.is_own for part in parts]),
        torch.cat([part.log_weights for part in parts]),
        torch.cat([part.square for part in parts]),
        torch.cat([part.largest for part in parts]),
        torch.cat([part.log_cover for part in parts]),
        parts[0].dim,
        values,
    )


def _summarize(draws: _Draws, num_samples: int) -> Reach:
    log_weights, dim = draws.log_weights, draws.dim
    level = 1 - 1 / num_samples
    is_far = (draws.square > _chi_square(level, dim)) | (draws.largest > _largest_square(level, dim))
    is_far &= draws.log_cover + log_mean_weight(log_weights) < math.log(_MIN_COVER)
    share = float(weighted_mean(is_far.double(), log_weights))
    weights = log_weights.softmax(0)
    se = float((weights * (is_far.double() - share)).square().sum().sqrt())
    try:
        k_hat = pareto_smooth(log_weights)[1]
    except ValueError:  # almost no draw has a weight
        k_hat = math.inf
    ess = effective_sample_size(log_weights)
    sites = [
        name for name, value in draws.values.items() if _is_outside(value, draws.is_own, is_far, weights)
    ]
    factors = (
        _quantile(draws.square, weights) / _chi_square(_HELD, dim),
        _quantile(draws.largest, weights) / _largest_square(_HELD, dim),
    )
    return Reach(
        share=share,
        share_se=se,
        sites=tuple(sites),
        factor=math.sqrt(max(factors)),
        log_evidence=log_mean_weight(log_weights),
        log_evidence_se=log_mean_error(ess, len(log_weights)),
        ess=ess,
        k_hat=k_hat,
        heaviest=float(weights.topk(min(_NUM_HEAVIEST, len(weights))).values.sum()),
        effect=max(_effect(value, weights, is_far) for value in draws.values.values()),
    )


def _effect(value: Tensor, weights: Tensor, is_far: Tensor) -> float:
    """Return by how much far draws change a mean, in sds, or the logarithm of an sd, at most."""
    if not weights[~is_far].any():
        return math.inf
    kept = weights > 0  # other draws may have values that are not finite
    numbers = value[kept].double()
    (mean, sd), (near_mean, near_sd) = (
        _mean_and_sd(numbers, own[kept] / own.sum()) for own in (weights, torch.where(is_far, 0.0, weights))
    )
    changes = torch.cat([(mean - near_mean).abs() / sd, (sd / near_sd).log()])
    return float(changes.nan_to_num(0.0).amax())  # constants do not change


def _mean_and_sd(numbers: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    mean = weights @ numbers
    return mean, (weights @ (numbers - mean).square()).sqrt()


def _quantile(values: Tensor, weights: Tensor) -> float:
    """Return the value below which the share of the weights is that which a wider base should hold."""
    order = values.argsort()
    index = torch.searchsorted(weights[order].cumsum(0), weights.new_full((), _HELD))
    return float(values[order[int(index.clamp(max=len(order) - 1))]])


def _is_outside(value: Tensor, is_own: Tensor, is_far: Tensor, weights: Tensor) -> bool:
    """Whether the far draws of a site, by weight, are largely outside the range of the guide's own."""
    own = value[is_own]
    is_outside = (value < own.amin(0)) | (value > own.amax(0))
    far = weights * is_far
    parts = (far.unsqueeze(-1) * is_outside).sum(0)
    return bool((parts > _NAMED_PART * far.sum()).any() and far.sum() > 0)


def _chi_square(level: float, dim: int) -> float:
    """Return a quantile of the squared radius of a standard normal draw (Wilson and Hilferty, 1931)."""
    variance = 2 / (9 * dim)
    return float(dim * (1 - variance + NormalDist().inv_cdf(level) * math.sqrt(variance)) ** 3)


def _largest_square(level: float, dim: int) -> float:
    """Return a quantile of the largest square among the coordinates of a standard normal draw."""
    tail = -math.expm1(math.log(level) / dim) / 2
    return NormalDist().inv_cdf(tail) ** 2
