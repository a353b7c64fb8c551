r"""Weighted means over particles in groups that are independent of each other, and their errors.

With weights W that add up to 1, m the mean of f, and G groups,

.. math:: \mathrm{se}^2(m) \approx \frac{G}{G - 1} \sum_g \Big( \sum_{i \in g} W_i (f_i - m) \Big)^2 .

Resampled particles share ancestors, so the effective number of the weights would say too little.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["grouped_mean"]

#: Of one group, the effective number of particles over that of the weights; cautious.
_SHARE_OF_ANCESTORS = 0.2


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
    return mean, (of_groups.square().sum(0) * num_groups / (num_groups - 1)).sqrt()
