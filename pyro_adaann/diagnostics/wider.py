r"""Draws of a guide from a base that is wider, in all of its coordinates or in a few of them.

A guide whose draws are a transformation of a standard normal :math:`\varepsilon` in d coordinates has a wider
copy: every coordinate is c times as wide with probability p, independently of the others,

.. math:: \varepsilon_j \sim (1 - p) N(0, 1) + p N(0, c^2), \qquad z = T(\varepsilon) .

With p = 1 it comes farther in all directions at once, which in many dimensions is away from nearly all mass;
with p = 1/d it leaves most coordinates as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import LowerCholeskyAffine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_adaann.annealing.tempering import is_delta
from pyro_adaann.objectives.traces import sites_of

__all__ = ["OWN", "Widening", "Wider", "is_widened", "squares"]


@dataclass(frozen=True)
class Widening:
    """How a base is wider.

    :param width: how many times as wide a coordinate is.
    :param probability: with what probability it is, 1 for all of them.
    """

    width: float
    probability: float = 1.0

    def log_density(self, square: Tensor) -> Tensor:
        """Return the log density of standardized draws but for the factor that all widenings share.

        :param square: squares of their coordinates, shape ``(n, d)``.
        :return: shape ``(n,)``.
        """
        wide = -math.log(self.width) - square / (2 * self.width**2)
        if self.probability == 1:
            return wide.sum(-1)
        wide = wide + math.log(self.probability)
        return torch.logaddexp(wide, math.log1p(-self.probability) - square / 2).sum(-1)


#: The base as it is.
OWN = Widening(1.0)


class Wider(Messenger):
    """Draw the sites of a guide from a base that is wider, and note how far from its center.

    :param widening: how wide.
    """

    def __init__(self, widening: Widening) -> None:
        super().__init__()
        self.widening = widening

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg) or is_delta(msg["fn"]):
            return
        wide = _widen(msg["fn"], self.widening)
        if wide is not None:
            msg["infer"]["_own"] = msg["fn"]
            msg["fn"] = wide

    def _pyro_post_sample(self, msg: Any) -> None:
        # The trace has this dictionary too. Here, transforms still remember what they have mapped.
        own = msg["infer"].get("_own")
        if own is not None:
            msg["infer"]["_square"] = _standardized(own, msg["value"]).square()


def is_widened(guide_trace: Trace) -> bool:
    """Whether all sites at which the guide draws have a wider base, and there is one."""
    sites = [
        site
        for site in sites_of(guide_trace)
        if not (site["is_observed"] or site_is_subsample(site) or is_delta(site["fn"]))
    ]
    return bool(sites) and all("_own" in site["infer"] for site in sites)


def squares(guide_trace: Trace, num_samples: int) -> Tensor:
    """Return the squares of the standardized coordinates of a batch of draws, ``(num_samples, d)``."""
    found = [site["infer"]["_square"] for site in sites_of(guide_trace) if "_square" in site["infer"]]
    return torch.cat([square.double().reshape(num_samples, -1) for square in found], dim=-1)


def _widen(fn: Any, widening: Widening) -> Any:
    """Return the distribution with a base that is wider, None if its base is not normal."""
    if isinstance(fn, torch.distributions.Independent):
        base = _widen(fn.base_dist, widening)
        return None if base is None else base.to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, torch.distributions.TransformedDistribution):
        base = _widen(fn.base_dist, widening)
        return None if base is None else dist.TransformedDistribution(base, fn.transforms)
    if isinstance(fn, torch.distributions.MultivariateNormal):
        standard = _wide_normal(torch.zeros_like(fn.loc), torch.ones_like(fn.loc), widening)
        affine = LowerCholeskyAffine(fn.loc, fn.scale_tril, cache_size=1)
        return dist.TransformedDistribution(standard.to_event(1), [affine])
    if isinstance(fn, torch.distributions.Normal):
        return _wide_normal(fn.loc, fn.scale, widening)
    return None


def _wide_normal(loc: Tensor, scale: Tensor, widening: Widening) -> Any:
    if widening.probability == 1:
        return dist.Normal(loc, widening.width * scale)
    widths = scale.new_tensor([1.0, widening.width])
    chances = scale.new_tensor([1 - widening.probability, widening.probability])
    which = dist.Categorical(chances.expand(*loc.shape, 2))
    return dist.MixtureSameFamily(which, dist.Normal(loc.unsqueeze(-1), scale.unsqueeze(-1) * widths))


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
