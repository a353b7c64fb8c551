r"""Several fits beside what all of them hold together: how much each holds, and how alike the draws are.

The weighted draws of a fit alone have a distribution function for every number of every site, and so have
those of all fits together. Their largest difference is the share of the draws that would have to move.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_adaann.diagnostics.importance import WeightedDraws
from pyro_adaann.diagnostics.numbers import labels
from pyro_adaann.weights import finite_or_no_weight, log_mean_weight

__all__ = ["Agreement", "compare_fits"]


class Agreement(NamedTuple):
    """What a fit holds of the whole, and its largest difference from the whole.

    :param share: of the evidence of all fits together.
    :param difference: of the distribution functions of the number that differs most.
    :param where: its name.
    """

    share: float
    difference: float
    where: str


def compare_fits(draws: WeightedDraws, own_log_weights: Tensor) -> list[Agreement]:
    """Compare every fit with the mixture of all.

    :param draws: of the mixture, as many of every fit, one fit after the other.
    :param own_log_weights: weights of every fit's draws against its own density, ``(num_fits, n)``.
    """
    num_fits, num_each = own_log_weights.shape
    weights = draws.log_weights.double().softmax(0)
    worst = [(0.0, "")] * num_fits
    for name, values in draws.samples.items():
        for place, label in enumerate(labels(name, values.shape[1:])):
            column = values.reshape(len(values), -1)[:, place]
            order = column.argsort()
            whole = weights[order].cumsum(0)
            for i, own in enumerate(own_log_weights):
                part = torch.zeros_like(weights)
                part[i * num_each : (i + 1) * num_each] = finite_or_no_weight(own.double()).softmax(0)
                difference = float((part[order].cumsum(0) - whole).abs().max())
                worst[i] = max(worst[i], (difference, label))
    evidence = log_mean_weight(draws.log_weights)
    shares = [math.exp(min(log_mean_weight(own) - evidence, 0.0)) for own in own_log_weights]
    return [Agreement(share, *found) for share, found in zip(shares, worst, strict=True)]
