r"""The share of the posterior beyond all draws of the guide, from draws of the same guide with wider bases.

A guide whose draws are a transformation of a standard normal :math:`\varepsilon` in d coordinates draws
nearly nothing beyond the radius R that one of n draws exceeds. With widths c of 1, 1.5, 2 and 3,

.. math:: \varepsilon \sim N(0, c^2 I), \quad z = T(\varepsilon), \quad
          \log q_c(z) = \log N(\varepsilon; 0, c^2 I) - \log|\det J_T(\varepsilon)|,

all draws together are weighted against their mixture, :math:`w = p(x, z) / \frac{1}{4} \sum_c q_c(z)`, and

.. math:: \text{share out of reach} = \frac{\sum_i w_i 1[\|\varepsilon_i\| > R]}{\sum_i w_i} .

No number computed from the guide's own draws shows this share: Pareto's k-hat extrapolates from draws, and
there are none beyond R.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_adaann.annealing.tempering import is_delta
from pyro_adaann.diagnostics.guide_draws import DrawBatch, GuideDraws
from pyro_adaann.diagnostics.numbers import percent
from pyro_adaann.objectives.traces import sites_of
from pyro_adaann.weights import (
    effective_sample_size,
    finite_or_no_weight,
    log_mean_error,
    log_mean_weight,
    pareto_smooth,
    weighted_mean,
)

__all__ = ["Reach", "measure_reach"]

_WIDTHS = (1.0, 1.5, 2.0, 3.0)
#: Rounds with a quarter of the draws of each width: one, or more if the share is not significant yet.
_MAX_ROUNDS, _ROUND = 8, 0.25
#: Smallest share that matters; standard errors by which the share must exceed it, and zero. The latter holds
#: for a share of six effective draws and more.
_MIN_SHARE, _NUM_ERRORS_ABOVE, _NUM_ERRORS = 0.005, 2.0, 2.5
#: Smallest effective sample size for a share, and largest shape of weights that have a mean.
_MIN_ESS, _MAX_SHAPE = 10.0, 1.0
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

    @property
    def is_known(self) -> bool:
        """Whether the effective sample size is large enough for the share to be known."""
        return self.ess >= _MIN_ESS and self.k_hat <= _MAX_SHAPE

    @property
    def is_short(self) -> bool:
        """Whether a share that matters is significantly out of reach."""
        least = max(_NUM_ERRORS * self.share_se, _MIN_SHARE + _NUM_ERRORS_ABOVE * self.share_se)
        return self.share > least

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
) -> Reach | None:
    """Draw from the guide at four widths and return the share beyond the guide's own draws.

    :param num_samples: number of the guide's own draws, whose radius counts. As many are drawn here, and
        again up to seven times while the share is neither negligible nor significant.
    :return: None if the guide cannot be widened: its densities must be normal or transformed from normal
        ones, as those of Pyro's autoguides and of the flow guides are.
    """
    guides = [_Wider(width)(guide) for width in _WIDTHS]
    draws = [GuideDraws((model, wider), args, kwargs, vectorize=vectorize) for wider in guides]
    if not all(_is_widened(own.guide_prototype) for own in draws):
        return None
    found: list[_Draws] = []
    num_each = math.ceil(_ROUND * num_samples)
    for _ in range(_MAX_ROUNDS):
        for index, own in enumerate(draws):
            found += [_draw(own, batch, index) for batch in own.batches(num_each, batch_size)]
        reach = _summarize(_concatenate(found), num_samples)
        if reach.is_short or reach.share <= _MIN_SHARE:
            break
    return reach


@dataclass
class _Draws:
    """Draws of a width with their log weights against the mixture of all of them.

    :param width: index of the width.
    :param log_weights: shape ``(n,)``.
    :param square: squared radius in the base, likewise.
    :param dim: number of coordinates of the base.
    :param values: values of the latent sites, each ``(n, k)``.
    """

    width: Tensor
    log_weights: Tensor
    square: Tensor
    dim: int
    values: dict[str, Tensor]


def _draw(draws: GuideDraws, batch: DrawBatch, index: int) -> _Draws:
    num = len(batch.log_p)
    square, dim = _square(batch.guide_trace, num)
    # Of the normal densities, what the widths do not share.
    terms = torch.stack([-dim * math.log(c) - square / (2 * c**2) for c in _WIDTHS])
    log_mixture = batch.log_q - terms[index] + terms.logsumexp(0) - math.log(len(_WIDTHS))
    values = {
        name: draws.values(batch.guide_trace, name, num).reshape(num, -1) for name in draws.latent_names
    }
    width = torch.full_like(square, index)
    return _Draws(width, finite_or_no_weight(batch.log_p - log_mixture), square, dim, values)


def _concatenate(parts: list[_Draws]) -> _Draws:
    values = {name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values}
    return _Draws(
        torch.cat([part.width for part in parts]),
        torch.cat([part.log_weights for part in parts]),
        torch.cat([part.square for part in parts]),
        parts[0].dim,
        values,
    )


def _summarize(draws: _Draws, num_samples: int) -> Reach:
    log_weights, square = draws.log_weights, draws.square
    is_far = square > _chi_square(1 - 1 / num_samples, draws.dim)
    share = float(weighted_mean(is_far.double(), log_weights))
    weights = log_weights.softmax(0)
    se = float((weights * (is_far.double() - share)).square().sum().sqrt())
    try:
        k_hat = pareto_smooth(log_weights)[1]
    except ValueError:  # almost no draw has a weight
        k_hat = math.inf
    ess = effective_sample_size(log_weights)
    is_own = draws.width == _WIDTHS.index(1.0)
    sites = [name for name, value in draws.values.items() if _is_outside(value, is_own, is_far, weights)]
    order = square.argsort()
    index = torch.searchsorted(weights[order].cumsum(0), weights.new_full((), _HELD))
    held = float(square[order[int(index.clamp(max=len(order) - 1))]])
    return Reach(
        share=share,
        share_se=se,
        sites=tuple(sites),
        factor=math.sqrt(held / _chi_square(_HELD, draws.dim)),
        log_evidence=log_mean_weight(log_weights),
        log_evidence_se=log_mean_error(ess, len(log_weights)),
        ess=ess,
        k_hat=k_hat,
    )


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


class _Wider(Messenger):
    """Draw the sites of a guide from a base that is wider, and note how far from its center."""

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width = width

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg) or is_delta(msg["fn"]):
            return
        wide = _widen(msg["fn"], self.width)
        if wide is not None:
            msg["infer"]["_own"] = msg["fn"]
            msg["fn"] = wide

    def _pyro_post_sample(self, msg: Any) -> None:
        # The trace has this dictionary too. Here, transforms still remember what they have mapped.
        own = msg["infer"].get("_own")
        if own is not None:
            msg["infer"]["_square"] = _standardized(own, msg["value"]).square()


def _widen(fn: Any, width: float) -> Any:
    """Return the distribution with a base that is wider, None if its base is not normal."""
    if isinstance(fn, torch.distributions.Independent):
        base = _widen(fn.base_dist, width)
        return None if base is None else base.to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, torch.distributions.TransformedDistribution):
        base = _widen(fn.base_dist, width)
        return None if base is None else dist.TransformedDistribution(base, fn.transforms)
    if isinstance(fn, torch.distributions.MultivariateNormal):
        return dist.MultivariateNormal(fn.loc, scale_tril=width * fn.scale_tril)
    if isinstance(fn, torch.distributions.Normal):
        return dist.Normal(fn.loc, width * fn.scale)
    return None


def _standardized(fn: Any, value: Tensor) -> Tensor:
    """Return the draw of a standard normal that became this value."""
    if isinstance(fn, torch.distributions.TransformedDistribution):
        for transform in reversed(fn.transforms):
            value = transform.inv(value)
        return _standardized(fn.base_dist, value)
    if isinstance(fn, torch.distributions.Independent):
        return _standardized(fn.base_dist, value)
    if isinstance(fn, torch.distributions.MultivariateNormal):
        shifted = (value - fn.loc).unsqueeze(-1)
        return torch.linalg.solve_triangular(fn.scale_tril, shifted, upper=False).squeeze(-1)
    return (value - fn.loc) / fn.scale


def _is_widened(guide_trace: Trace) -> bool:
    """Whether all sites at which the guide draws have a wider base, and there is one."""
    sites = [
        site
        for site in sites_of(guide_trace)
        if not (site["is_observed"] or site_is_subsample(site) or is_delta(site["fn"]))
    ]
    return bool(sites) and all("_own" in site["infer"] for site in sites)


def _square(guide_trace: Trace, num_samples: int) -> tuple[Tensor, int]:
    """Return the squared radius of every draw of a batch, and in how many coordinates it is."""
    squares = [site["infer"]["_square"] for site in sites_of(guide_trace) if "_square" in site["infer"]]
    columns = torch.cat([square.double().reshape(num_samples, -1) for square in squares], dim=-1)
    return columns.sum(-1), columns.shape[-1]
