r"""Means and standard deviations of several fits: do they agree?

A tail that holds a percent of the posterior, and none of the evidence to speak of, may hold a third of a
variance. So fits have to agree on the moments of every number, too.

.. math:: m = \sum_i W_i f_i, \quad v = \sum_i W_i (f_i - m)^2, \quad
          \mathrm{se}(m)^2 \approx \sum_i W_i^2 (f_i - m)^2, \quad
          \mathrm{se}(\log \sqrt v) \approx \frac{1}{2 v} \sqrt{\textstyle\sum_i W_i^2 ((f_i - m)^2 - v)^2}

The terms of a variance have a tail of their own, :math:`W_i (f_i - m)^2`: if its shape is too large, the
draws do not determine the variance, which may be infinite.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_adaann.diagnostics.numbers import labels
from pyro_adaann.weights import pareto_smooth, reliable_shape

__all__ = ["Moments", "measure_moments"]

#: Differences of means in sds, and of logs of sds, that matter.
_NOTICEABLE = 0.1
#: How often fits that agree are to be taken for such that do not, if nothing but noise distinguishes them.
_FALSE_ALARMS = 0.01
#: A number whose sd is a smaller part of its mean is a constant, and its sd is rounding.
_CONSTANT = 1e-6


class Moments(NamedTuple):
    """Means and sds of all numbers of all sites, each of shape ``(k,)``, with their errors.

    :param names: of the numbers.
    :param mean: means.
    :param sd: standard deviations.
    :param mean_se: standard errors of the means.
    :param log_sd_se: standard errors of the logarithms of the standard deviations.
    :param is_determined: whether the draws determine the standard deviations.
    """

    names: tuple[str, ...]
    mean: Tensor
    sd: Tensor
    mean_se: Tensor
    log_sd_se: Tensor
    is_determined: Tensor

    def lacks(self, other: Moments, noticeable: float = _NOTICEABLE) -> str:
        """Return the number that is surely other in another fit, which goes further; empty if none is.

        A fit that lacks a tail has an sd that is too small, never one that is too large: where sds differ,
        the fit with the smaller one lacks something. Where means differ, both may. A number whose sd neither
        of them determines is not compared.

        :param noticeable: differences of means in sds, and of logs of sds, that matter.
        """
        errors = NormalDist().inv_cdf(1 - _FALSE_ALARMS / (2 * len(self.names)))
        scale = torch.maximum(self.sd, other.sd)
        shift = (other.mean - self.mean).abs() / scale
        shift_se = torch.hypot(self.mean_se, other.mean_se) / scale
        growth = other.sd.log() - self.sd.log()
        growth_se = torch.hypot(self.log_sd_se, other.log_sd_se)
        excess = torch.maximum(
            shift - (errors * shift_se).clamp(min=noticeable),
            growth - (errors * growth_se).clamp(min=noticeable),
        )
        is_constant = scale <= _CONSTANT * torch.maximum(self.mean.abs(), other.mean.abs())
        is_compared = (self.is_determined | other.is_determined) & ~is_constant
        excess = torch.where(is_compared, excess, -torch.inf).nan_to_num(-torch.inf)
        worst = int(excess.argmax())
        return self.names[worst] if excess[worst] > 0 else ""


def measure_moments(samples: Mapping[str, Tensor], log_weights: Tensor) -> Moments:
    """Return the moments of weighted draws.

    :param samples: draws of every site along a first dimension.
    :param log_weights: their log weights.

    Example::

        >>> found = measure_moments({"z": torch.tensor([1.0, 5.0])}, torch.zeros(2))
        >>> found.names, float(found.mean), float(found.sd)
        (('z',), 3.0, 2.0)
    """
    weights = log_weights.double().softmax(0)
    kept = weights > 0  # other draws may have values that are not finite
    weights = weights[kept]
    names: list[str] = []
    columns = []
    for name, values in samples.items():
        columns.append(values[kept].double().reshape(len(weights), -1))
        names += labels(name, values.shape[1:])
    numbers = torch.cat(columns, dim=-1)
    mean = weights @ numbers
    square = (numbers - mean).square()
    variance = weights @ square
    log_sd_se = (weights.square() @ (square - variance).square()).sqrt() / (2 * variance)
    known = [_is_determined(terms) for terms in (weights.unsqueeze(-1) * square).T]
    return Moments(
        names=tuple(names),
        mean=mean.cpu(),
        sd=variance.sqrt().cpu(),
        mean_se=(weights.square() @ square).sqrt().cpu(),
        log_sd_se=log_sd_se.cpu(),
        is_determined=torch.tensor(known, device="cpu"),
    )


def _is_determined(terms: Tensor) -> bool:
    """Whether the sum of positive terms, as many as draws, has a tail that is light enough."""
    if not terms.any():  # a constant
        return True
    try:
        return pareto_smooth(terms.log())[1] <= reliable_shape(len(terms))
    except ValueError:  # too few terms for a tail
        return False
