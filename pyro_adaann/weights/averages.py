r"""Log weights and averages under them.

With draws :math:`z_i \sim q` and weights :math:`w_i = p(x, z_i) / q(z_i)`,

.. math:: E_{p(z \mid x)}[f] \approx \frac{\sum_i w_i f(z_i)}{\sum_i w_i}, \qquad
          p(x) \approx \frac{1}{n} \sum_i w_i .

Weights stay logarithms throughout. Every function here counts a log weight that is not finite as minus
infinity, a draw of weight zero (:func:`finite_or_no_weight`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "effective_sample_size",
    "finite_or_no_weight",
    "log_mean_error",
    "log_mean_weight",
    "resample",
    "truncated_weights",
    "weighted_mean",
    "weighted_mean_and_sd",
]


def finite_or_no_weight(log_weights: Tensor) -> Tensor:
    """Return log weights in which those that are not finite are minus infinity, weights of zero.

    Example::

        >>> finite_or_no_weight(torch.tensor([0.5, torch.nan, torch.inf, -torch.inf]))
        tensor([0.5000,   -inf,   -inf,   -inf])
    """
    return torch.where(torch.isfinite(log_weights), log_weights, -torch.inf)


def effective_sample_size(log_weights: Tensor) -> float:
    r"""Return Kish's effective sample size :math:`(\sum_i w_i)^2 / \sum_i w_i^2`, between 1 and n.

    :param log_weights: log weights, shape ``(n,)``, up to a constant. 0 where no weight is positive.

    Example::

        >>> effective_sample_size(torch.zeros(100)), effective_sample_size(torch.tensor([torch.nan]))
        (100.0, 0.0)
    """
    log_weights = finite_or_no_weight(log_weights.double())
    log_ess = float(2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0))
    # NaN, infinity minus infinity, if no weight is positive.
    return 0.0 if math.isnan(log_ess) else min(round(math.exp(log_ess), 9), float(log_weights.numel()))


def log_mean_weight(log_weights: Tensor) -> float:
    r"""Return :math:`\log \frac{1}{n} \sum_i w_i`: of importance weights, the log normalizer.

    :param log_weights: log weights, shape ``(n,)``. Minus infinity where no weight is positive.

    Example::

        >>> log_mean_weight(torch.tensor([1.0, 1.0, -torch.inf, torch.nan]))  # 1 - log 2
        0.3068528194400548
    """
    log_weights = finite_or_no_weight(log_weights.double())
    return float(log_weights.logsumexp(0)) - math.log(log_weights.numel())


def log_mean_error(ess: float, num_draws: int) -> float:
    r"""Return the standard error of :func:`log_mean_weight` by the delta method.

    The relative variance of the weights is :math:`n / \mathrm{ESS} - 1`.

    :param ess: effective sample size of the draws.
    :param num_draws: how many there are, those of weight zero included.

    Example::

        >>> log_mean_error(50.0, 100)
        0.1
    """
    return math.sqrt(max(num_draws / ess - 1, 0.0) / num_draws) if ess > 0 else math.inf


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
    weights = finite_or_no_weight(log_weights.double()).softmax(0)
    # A draw of weight zero may be NaN, and is left out.
    kept = weights > 0
    return torch.tensordot(weights[kept], values[kept].double(), 1).to(dtype)


def weighted_mean_and_sd(values: Tensor, log_weights: Tensor) -> tuple[float, float]:
    """Return the mean and the standard deviation of numbers under their weights.

    :param values: one number per draw, shape ``(n,)``.
    :param log_weights: log weights, shape ``(n,)``, up to a constant.
    :raises ValueError: if the numbers of draws differ.

    Example::

        >>> weighted_mean_and_sd(torch.tensor([1.0, 5.0, torch.nan]), torch.tensor([0.0, 0.0, -torch.inf]))
        (3.0, 2.0)
    """
    mean = weighted_mean(values.double(), log_weights)
    return float(mean), math.sqrt(float(weighted_mean((values.double() - mean).square(), log_weights)))


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
    log_weights = finite_or_no_weight(log_weights.double())
    num_uniform = num_samples if replacement else log_weights.numel()
    uniform = torch.rand(num_uniform, dtype=log_weights.dtype, device=log_weights.device)
    if replacement:
        points = (torch.arange(num_samples, device=uniform.device) + uniform) / num_samples
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


def truncated_weights(log_weights: Tensor) -> Tensor:
    r"""Return weights that add up to 1, none of them above :math:`n^{-1/2}` times the sum before.

    Example::

        >>> truncated_weights(torch.tensor([8.0, 1.0, 1.0, 0.0]).log())  # 8 is cut at half of 10
        tensor([0.7143, 0.1429, 0.1429, 0.0000])
    """
    log_weights = finite_or_no_weight(log_weights)
    # Where none has a weight all have the same. No branch: a graphics card would be waited for.
    log_weights = torch.where((log_weights == -torch.inf).all(), 0.0, log_weights)
    limit = log_weights.logsumexp(0) - 0.5 * math.log(len(log_weights))
    return log_weights.clamp(max=limit).softmax(0)


def _check_same_length(values: Tensor, log_weights: Tensor) -> None:
    if len(values) != len(log_weights):
        raise ValueError(
            f"Expected as many draws as weights along the first dimension; got {len(values)} and "
            f"{len(log_weights)}."
        )
