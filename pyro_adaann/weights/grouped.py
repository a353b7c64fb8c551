r"""Weighted means over particles in groups that are independent of each other, and their errors.

With weights W that add up to 1, m the mean of f, and G groups,

.. math:: \mathrm{se}^2(m) \approx \frac{G}{G - 1} \sum_g \Big( \sum_{i \in g} W_i (f_i - m) \Big)^2 .

Resampled particles share ancestors, so the effective number of the weights would say too little. The spread
of a few groups is itself uncertain: errors are stated so that two of them cover as much as two of a known
spread, by Student's t with G - 1 degrees of freedom.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["grouped_mean", "student_factor"]

#: Of one group, the effective number of particles over that of the weights; cautious.
_SHARE_OF_ANCESTORS = 0.2


def student_factor(num_groups: int) -> float:
    """Return by what the error from the spread of so many groups is to be multiplied.

    So that twice the error covers as much as two standard deviations of a normal distribution; by the
    expansion of the quantiles of Student's t about it (Abramowitz and Stegun, 26.7.5), within .3 %.

    :param num_groups: at least 2.

    Example::

        >>> round(student_factor(16), 2), round(student_factor(2), 1)
        (1.09, 7.0)
    """
    nu, z = num_groups - 1, 2.0
    coverage = math.erf(z / math.sqrt(2))
    if nu == 1:
        return math.tan(math.pi / 2 * coverage) / z
    if nu == 2:
        return coverage * math.sqrt(2 / (1 - coverage**2)) / z
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / nu**k for k, term in enumerate(terms)) / z


def grouped_mean(values: Tensor, weights: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Return means and their standard errors.

    :param values: shape ``(n,)`` or ``(n, dim)``, group after group.
    :param weights: that add up to 1, shape ``(n,)``; values without weight do not count.
    :param num_groups: number of groups, of equally many particles.
    """
    weights = weights.reshape(-1, *[1] * (values.dim() - 1))
    values = torch.where(weights > 0, values, 0.0).to(weights)
    mean = (weights * values).sum(0)
    residuals = weights * (values - mean)
    if num_groups == 1:
        return mean, (residuals.square().sum(0) / _SHARE_OF_ANCESTORS).sqrt()
    of_groups = residuals.reshape(num_groups, -1, *values.shape[1:]).sum(1)
    spread = (of_groups.square().sum(0) * num_groups / (num_groups - 1)).sqrt()
    return mean, student_factor(num_groups) * spread
