r"""Draws and their weights: effective sample size, truncation, Pareto smoothing, resampling, winsorizing.

With draws :math:`z_i \sim q` and weights :math:`w_i = p(x, z_i) / q(z_i)`,

.. math:: E_{p(z \mid x)}[f] \approx \frac{\sum_i w_i f(z_i)}{\sum_i w_i}, \qquad
          p(x) \approx \frac{1}{n} \sum_i w_i .

Weights stay logarithms throughout. A log weight that is not finite counts as minus infinity, a draw of
weight zero.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "effective_sample_size",
    "finite_or_no_weight",
    "pareto_smooth",
    "reliable_shape",
    "resample",
    "standard_deviation",
    "truncated_weights",
    "weighted_mean",
    "winsorize",
]

#: How far a winsorized draw may be from the median, in units of the median distance.
_MAX_DISTANCE = 50.0
#: Fewer weights have no tail to fit: ArviZ takes a fifth of them, and needs five.
_MIN_NUM_WEIGHTS = 25


def finite_or_no_weight(log_weights: Tensor) -> Tensor:
    """Return log weights, minus infinity in place of those that are not finite.

    Example::

        >>> finite_or_no_weight(torch.tensor([1.0, torch.nan, torch.inf]))
        tensor([1., -inf, -inf])
    """
    return torch.where(torch.isfinite(log_weights), log_weights, -torch.inf)


def pareto_smooth(log_weights: Tensor) -> tuple[Tensor, float]:
    r"""Return Pareto-smoothed log weights and the shape :math:`\hat k` of their tail.

    The largest weights are replaced by the quantiles of a generalized Pareto distribution fitted to
    them, by ArviZ. The tail is heavier the larger the shape: the weights have a variance below 1/2,
    a mean below 1.

    :param log_weights: log importance weights, shape ``(n,)``; minus infinity is a weight of zero.
    :return: smoothed log weights on the scale of the given ones, and the shape.
    :raises ValueError: if fewer than 25 weights are positive or one is NaN or infinite.

    Source: Vehtari et al., *Pareto smoothed importance sampling*, JMLR 25 (2024).

    Example::

        >>> log_weights = torch.randn(1000, generator=torch.Generator().manual_seed(0))
        >>> smoothed, k_hat = pareto_smooth(log_weights)
        >>> k_hat < 0.7
        True
    """
    log_weights = log_weights.detach().double()
    is_positive = log_weights > -torch.inf
    positive = log_weights[is_positive]
    if positive.numel() < _MIN_NUM_WEIGHTS or not torch.isfinite(positive).all():
        raise ValueError(
            f"Expected at least {_MIN_NUM_WEIGHTS} finite log weights, and else minus infinity; got "
            f"{int(torch.isfinite(positive).sum())} of {log_weights.numel()}. Take more draws, or start "
            f"the guide where the model has a finite density."
        )
    normalized, k_hat = _psislw(positive.cpu().numpy())
    # ArviZ shifts all weights so that they add up to 1; those below the tail are moved by that alone.
    lowest = int(positive.argmin())
    shift = float(positive[lowest]) - float(normalized[lowest])
    smoothed = torch.as_tensor(normalized).to(positive) + shift
    return log_weights.masked_scatter(is_positive, smoothed), k_hat


def reliable_shape(num_weights: int) -> float:
    r"""Return the shape of the tail up to which weights are reliable: :math:`\min(1 - 1 / \log_{10} n, 0.7)`.

    Source: Vehtari et al., *Pareto smoothed importance sampling*, JMLR 25 (2024).

    Example::

        >>> reliable_shape(100), reliable_shape(10_000)
        (0.5, 0.7)
    """
    return min(1 - 1 / math.log10(num_weights), 0.7)


def _psislw(log_weights: Any) -> tuple[Any, float]:
    with warnings.catch_warnings():
        # The shape says it, in the end: a tail of few or equal weights has none.
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


def effective_sample_size(log_weights: Tensor) -> float:
    r"""Return Kish's effective sample size :math:`(\sum_i w_i)^2 / \sum_i w_i^2`, between 1 and n.

    :param log_weights: log weights, shape ``(n,)``, up to a constant.

    Example::

        >>> effective_sample_size(torch.zeros(100))
        100.0
    """
    log_weights = log_weights.double()
    log_ess = 2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)
    return min(round(float(log_ess.exp()), 9), float(log_weights.numel()))


def weighted_mean(values: Tensor, log_weights: Tensor) -> Tensor:
    """Return the mean of draws under their weights, in the dtype of the draws.

    :param values: one value per draw, shape ``(n, ...)``. For probabilities pass comparisons.
    :param log_weights: log weights, shape ``(n,)``, up to a constant; best those of
        :func:`pareto_smooth`.
    :raises ValueError: if the numbers of draws differ.

    Example::

        >>> float(weighted_mean(torch.tensor([1.0, 5.0]), torch.tensor([3.0, 1.0]).log()))
        2.0
    """
    _check_same_length(values, log_weights)
    dtype = values.dtype if values.is_floating_point() else torch.get_default_dtype()
    weights = log_weights.double().softmax(0)
    # A draw without weight may be NaN, and adds nothing.
    kept = weights > 0
    return torch.tensordot(weights[kept], values[kept].double(), 1).to(dtype)


def resample(log_weights: Tensor, num_samples: int, *, replacement: bool = True) -> Tensor:
    """Return indices of draws, taken in proportion to their weights, in random order.

    With replacement the sampling is stratified: a draw of weight w comes close to ``num_samples * w``
    times. Without, no draw comes twice: for starting points of other samplers, or where weights are
    unreliable.

    :param log_weights: log weights, shape ``(n,)``, up to a constant.
    :param num_samples: how many.
    :param replacement: whether a draw may come more than once.
    :return: indices, shape ``(num_samples,)``.
    :raises ValueError: without replacement, if fewer draws have a weight.

    Source: Kitagawa, *Monte Carlo filter and smoother*, JCGS 5 (1996); without replacement, Kool et
    al., *Stochastic beams and where to find them*, ICML 2019.

    Example::

        >>> resample(torch.tensor([0.0, -torch.inf, 0.0]), 2, replacement=False).sort().values
        tensor([0, 2])
    """
    log_weights = log_weights.double()
    uniform = torch.rand(num_samples if replacement else log_weights.numel()).to(log_weights)
    if replacement:
        points = (torch.arange(num_samples).to(uniform) + uniform) / num_samples
        total = log_weights.softmax(0).cumsum(0)
        index = torch.searchsorted(total / total[-1], points, right=True)
        return index[torch.randperm(num_samples, device=index.device)]
    num_positive = int((log_weights > -torch.inf).sum())
    if num_positive < num_samples:
        raise ValueError(
            f"Expected `num_samples` <= {num_positive}, the draws that have a weight; got {num_samples}. "
            f"Take more draws, or replacement=True."
        )
    return (log_weights - (-uniform.log()).log()).topk(num_samples).indices


def _check_same_length(values: Tensor, log_weights: Tensor) -> None:
    if len(values) != len(log_weights):
        raise ValueError(
            f"Expected as many draws as weights along the first dimension; got {len(values)} and "
            f"{len(log_weights)}."
        )


def truncated_weights(log_weights: Tensor) -> Tensor:
    r"""Return weights that add up to 1, none of them above :math:`n^{-1/2}` times the sum before.

    Example::

        >>> truncated_weights(torch.tensor([8.0, 1.0, 1.0, 0.0]).log())  # 8 is cut at half of 10
        tensor([0.7143, 0.1429, 0.1429, 0.0000])
    """
    log_weights = torch.where(torch.isfinite(log_weights), log_weights, -torch.inf)
    if (log_weights == -torch.inf).all():
        return torch.full_like(log_weights, 1 / len(log_weights))
    limit = log_weights.logsumexp(0) - 0.5 * math.log(len(log_weights))
    return log_weights.clamp(max=limit).softmax(0)


def standard_deviation(draws: Tensor, log_weights: Tensor | None = None) -> float | None:
    """Return the sd of the finite draws, outliers moved in, or None where they do not determine one.

    That is with fewer than two finite draws, or a spread below the rounding errors of
    single-precision numbers of their size. Safe against overflow of the squares. With weights it is
    the sd under them, with the effective number of draws minus one in the denominator.
    """
    moved = winsorize(draws.double())
    is_finite = torch.isfinite(moved)
    if log_weights is not None:
        is_finite &= torch.isfinite(log_weights)
    finite = moved[is_finite]
    if finite.numel() < 2:
        return None
    size = float(finite.abs().max())
    if size == 0:
        return None
    if log_weights is None:
        relative = float((finite / size).std(correction=1))
    else:
        weights = log_weights[is_finite].double().softmax(0)
        spread = finite / size - weights @ (finite / size)
        # 1 - sum of squares is 1 - 1 / ess.
        correction = float(1 - weights.square().sum())
        relative = math.sqrt(float(weights @ spread.square()) / correction) if correction > 0 else 0.0
    return relative * size if relative > torch.finfo(torch.float32).eps else None


def winsorize(draws: Tensor) -> Tensor:
    """Return draws of which none is further from the median than 50 times the median distance.

    One trajectory that blows up would else be the whole variance. The log density of a normal
    distribution reaches that far four times in a million draws in one dimension, and less often in
    more. Draws that are not finite stay as they are.
    """
    is_finite = torch.isfinite(draws)
    finite = draws[is_finite]
    if not finite.numel():
        return draws
    median = finite.median()
    reach = _MAX_DISTANCE * float((finite - median).abs().median())
    if not 0 < reach < math.inf:
        return draws
    return torch.where(is_finite, draws.clamp(median - reach, median + reach), draws)
