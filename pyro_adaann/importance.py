r"""Importance weights of guide draws: Pareto smoothing, weighted means, resampling.

With draws :math:`z_i \sim q` and weights :math:`w_i = p(x, z_i) / q(z_i)`,

.. math:: E_{p(z \mid x)}[f] \approx \frac{\sum_i w_i f(z_i)}{\sum_i w_i}, \qquad
          p(x) \approx \frac{1}{n} \sum_i w_i .

Weights stay logarithms throughout. A weight of minus infinity counts as a draw of weight zero.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_adaann.draws import GuideDraws
from pyro_adaann.fits import Fit

__all__ = [
    "WeightedDraws",
    "effective_sample_size",
    "importance_draws",
    "pareto_smooth",
    "reliable_shape",
    "resample",
    "weighted_mean",
]

#: Fewer weights have no tail to fit: ArviZ takes a fifth of them, and needs five.
_MIN_NUM_WEIGHTS = 25


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


@dataclass(frozen=True)
class WeightedDraws:
    """Draws of the latent variables from a guide, with their importance weights.

    :param samples: for every latent site of the model its draws, shape ``(n,) + shape of the site``.
    :param log_p: log joint density of the model at every draw, shape ``(n,)``.
    :param log_q: log density of the guide, likewise.
    :param log_weights: Pareto-smoothed log weights, likewise.
    :param k_hat: shape of the tail of the weights.

    Example::

        >>> zero = torch.zeros(2)
        >>> draws = WeightedDraws({"z": torch.tensor([1.0, 5.0])}, zero, zero, zero, k_hat=0.1)
        >>> float(draws.mean("z")), draws.ess
        (3.0, 2.0)
        >>> draws.resample(4)["z"].shape
        torch.Size([4])
    """

    samples: dict[str, Tensor]
    log_p: Tensor
    log_q: Tensor
    log_weights: Tensor
    k_hat: float

    @property
    def ess(self) -> float:
        """Effective number of draws behind a weighted mean."""
        return effective_sample_size(self.log_weights)

    def mean(self, name: str) -> Tensor:
        """Return the posterior mean of a site."""
        return weighted_mean(self.samples[name], self.log_weights)

    def resample(self, num_samples: int, *, replacement: bool = True) -> dict[str, Tensor]:
        """Return draws of equal weight, as :func:`resample` does."""
        index = resample(self.log_weights, num_samples, replacement=replacement)
        return {name: value[index] for name, value in self.samples.items()}


def importance_draws(
    svi: Fit,
    *args: Any,
    num_samples: int = 10_000,
    batch_size: int = 1000,
    vectorize: bool = True,
    **kwargs: Any,
) -> WeightedDraws:
    """Draw from a fitted guide and weigh the draws against the model.

    :param svi: an `AdaAnnSVI`, a `pyro.infer.SVI`, or a pair ``(model, guide)``.
    :param args: arguments of model and guide as in ``svi.step``, with ``kwargs``.
    :param num_samples: number of draws.
    :param batch_size: how many at a time.
    :param vectorize: whether model and guide run for a batch at once; slower, but safe, without.
    :raises ValueError: if a plate is subsampled, if the guide misses a latent site, or if the model does
        not vectorize.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))
        >>> draws = importance_draws((model, AutoNormal(model, init_scale=1.0)), num_samples=1000)
        >>> 0.3 < float(draws.mean("z")) < 0.7  # exactly 0.5
        True
    """
    draws = GuideDraws(svi, args, kwargs, vectorize=vectorize)
    samples: dict[str, list[Tensor]] = {name: [] for name in draws.latent_names}
    batches = []
    for batch in draws.batches(num_samples, batch_size):
        batches.append((batch.log_p, batch.log_q, batch.log_weights))
        for name, parts in samples.items():
            parts.append(draws.values(batch.guide_trace, name, len(batch.log_p)))
    log_p, log_q, log_weights = map(torch.cat, zip(*batches, strict=True))
    smoothed, k_hat = pareto_smooth(log_weights)
    cat = {name: torch.cat(parts) for name, parts in samples.items()}
    return WeightedDraws(cat, log_p, log_q, smoothed, k_hat)
