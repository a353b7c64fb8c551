r"""The tail of importance weights: Pareto smoothing and the shape up to which weights are reliable."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from pyro_adaann.weights.averages import finite_or_no_weight

__all__ = ["pareto_smooth", "reliable_shape"]

#: Fewer weights have no tail to fit: ArviZ takes a fifth of them, and needs five.
_MIN_NUM_WEIGHTS = 25
#: A shape cannot be fitted to fewer different weights, nor is it needed where the largest of them are equal
#: up to this ratio: rounding moves log densities of a thousand nats so far in single precision.
_MIN_NUM_LEVELS, _EQUAL = 5, 1e-3


def pareto_smooth(log_weights: Tensor) -> tuple[Tensor, float]:
    r"""Return Pareto-smoothed log weights and the shape :math:`\hat k` of their tail.

    The largest weights are replaced by the quantiles of a generalized Pareto distribution fitted to
    them, by ArviZ. The tail is heavier the larger the shape: the weights have a variance below 1/2,
    a mean below 1. Weights of which five or more are the largest, all equal, have no tail and are not
    changed; their shape is minus infinity, as that of a bound that is reached. Plus infinity is the shape
    of one to four weights above thousands of equal ones.

    :param log_weights: log importance weights, shape ``(n,)``.
    :return: smoothed log weights on the scale of the given ones, and the shape.
    :raises ValueError: if fewer than 25 weights are finite and positive.

    Source: Vehtari et al., *Pareto smoothed importance sampling*, JMLR 25 (2024).

    Example::

        >>> log_weights = torch.randn(1000, generator=torch.Generator().manual_seed(0))
        >>> smoothed, k_hat = pareto_smooth(log_weights)
        >>> k_hat < 0.7
        True
        >>> pareto_smooth(torch.zeros(1000))[1]
        -inf
    """
    log_weights = finite_or_no_weight(log_weights.detach().double())
    is_positive = log_weights > -torch.inf
    positive = log_weights[is_positive]
    if positive.numel() < _MIN_NUM_WEIGHTS:
        raise ValueError(
            f"Expected at least {_MIN_NUM_WEIGHTS} finite log weights; got {positive.numel()} of "
            f"{log_weights.numel()}. Take more draws, or start the guide where the model has a finite "
            f"density."
        )
    shape = _shape_of_few_levels(positive)
    if shape is not None:
        return log_weights, shape
    normalized, k_hat = _psislw(positive.cpu().numpy())
    if not math.isfinite(k_hat):  # too many of the tail are equal for the fit of ArviZ 1.x
        return log_weights, math.inf
    # ArviZ shifts all weights so that they add up to 1; those below the tail, a fifth at most, are moved by
    # that alone. The lowest of them may be so low that the shift is lost in rounding.
    place = int(positive.kthvalue(max(1, 3 * len(positive) // 4)).indices)
    shift = float(positive[place]) - float(normalized[place])
    smoothed = torch.as_tensor(normalized, dtype=positive.dtype, device=positive.device) + shift
    return log_weights.masked_scatter(is_positive, smoothed), k_hat


def reliable_shape(num_weights: int) -> float:
    r"""Return the shape of the tail up to which weights are reliable: :math:`\min(1 - 1 / \log_{10} n, 0.7)`.

    Source: Vehtari et al., *Pareto smoothed importance sampling*, JMLR 25 (2024).

    Example::

        >>> reliable_shape(100), reliable_shape(10_000)
        (0.5, 0.7)
    """
    return min(1 - 1 / math.log10(num_weights), 0.7)


def _shape_of_few_levels(log_weights: Tensor) -> float | None:
    """Return the shape of a tail of so few different weights that none can be fitted, None otherwise."""
    num = log_weights.numel()
    num_tail = math.ceil(min(num / 5, 3 * math.sqrt(num)))  # ArviZ's
    tail = log_weights.topk(num_tail + 1).values
    above = tail[tail > tail[-1]]
    if len(above.unique()) >= _MIN_NUM_LEVELS:
        return None
    is_bounded = int((tail >= tail[0] - _EQUAL).sum()) >= _MIN_NUM_LEVELS
    return -math.inf if is_bounded else math.inf


def _psislw(log_weights: Any) -> tuple[Any, float]:
    with warnings.catch_warnings():
        # ArviZ warns of tails with few or equal weights, which the returned shape already tells.
        warnings.simplefilter("ignore")
        try:
            from arviz_stats.base import array_stats
        except ImportError:
            from arviz import psislw

            normalized, k_hat = psislw(log_weights)
        else:
            # This one takes log likelihoods, as leave-one-out does, and weighs by their inverse.
            normalized, k_hat = array_stats.psislw(-log_weights)
    return normalized, float(k_hat)
