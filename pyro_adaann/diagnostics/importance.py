"""Guide draws with their importance weights: weighted means, resampling."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_adaann.diagnostics.guide_draws import GuideDraws
from pyro_adaann.diagnostics.model_and_guide import Fit, get_inverse_temperature
from pyro_adaann.weights import effective_sample_size, pareto_smooth, resample, weighted_mean

__all__ = [
    "WeightedDraws",
    "importance_draws",
    "weigh_draws",
]


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
        """Effective sample size of the weighted draws."""
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
    """Draw from a fitted guide and weight the draws by the model.

    :param svi: an `AdaAnnSVI`, a `pyro.infer.SVI`, or a pair ``(model, guide)``.
    :param args: arguments of model and guide as in ``svi.step``, with ``kwargs``.
    :param num_samples: number of draws.
    :param batch_size: how many at a time.
    :param vectorize: whether model and guide run on a whole batch at once; False is slower and always works.
    :raises ValueError: if a plate is subsampled, if the guide misses a latent site, or if the model does
        not vectorize.

    Warns if annealing has not reached inverse temperature 1.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))
        >>> pyro.clear_param_store()  # a new fit
        >>> draws = importance_draws((model, AutoNormal(model, init_scale=1.0)), num_samples=1000)
        >>> 0.3 < float(draws.mean("z")) < 0.7  # exactly 0.5
        True
    """
    t = get_inverse_temperature(svi)
    if t < 1:
        warnings.warn(
            f"The fit stands at inverse temperature {t:.3g}: the samples are of a tempered posterior, and "
            f"only their weights lead to the posterior. Anneal to 1, for example with svi.run().",
            stacklevel=2,
        )
    return weigh_draws(GuideDraws(svi, args, kwargs, vectorize=vectorize), num_samples, batch_size)


def weigh_draws(draws: GuideDraws, num_samples: int, batch_size: int) -> WeightedDraws:
    """Draw, and keep the values of all latent sites with their weights."""
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
