"""Models for `fit` whose posteriors have unusual shapes: separate, bent, hollow; by quadrature.

Written after `fit` was done and run as they are, like those of `fit_targets_new`.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from fit_targets import FitTarget, grid, moments_of
from torch import Tensor

__all__: list[str] = []


def outliers() -> FitTarget:
    """A location with a Cauchy prior, three data that do not agree and Cauchy noise."""
    data = torch.tensor([-6.0, 5.0, 20.0]).double()

    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Cauchy(0.0, 10.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Cauchy(z, 1.0), obs=y)

    def log_density(z: Tensor) -> Tensor:
        return dist.Cauchy(0.0, 10.0).log_prob(z) + dist.Cauchy(z.unsqueeze(-1), 1.0).log_prob(data).sum(-1)

    (z,), weights, evidence = grid(log_density, (-3000.0, 3000.0, 1_000_000))
    shares, events = {}, {}
    for low, high in ((-100.0, 0.0), (0.0, 12.0)):
        name = f"{low:g} < z < {high:g}"
        shares[name] = float(weights[(z > low) & (z < high)].sum())
        events[name] = lambda d, low=low, high=high: (d["z"] > low) & (d["z"] < high)
    return FitTarget(model, (data.float(),), {"z": moments_of(z, weights)}, evidence, shares, events)


def ring() -> FitTarget:
    """A radius that is known and an angle that is not."""

    def model(y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(1.0, 3.0))
        b = pyro.sample("b", dist.Normal(0.0, 3.0))
        pyro.sample("y", dist.Normal((a**2 + b**2).sqrt(), 0.1), obs=y)

    def log_density(a: Tensor, b: Tensor) -> Tensor:
        radius = dist.Normal((a**2 + b**2).sqrt(), 0.1).log_prob(torch.tensor(4.0).double())
        return radius + dist.Normal(1.0, 3.0).log_prob(a) + dist.Normal(0.0, 3.0).log_prob(b)

    (a, b), weights, evidence = grid(log_density, (-5, 5, 1200), (-5, 5, 1200))
    moments = {"a": moments_of(a, weights), "b": moments_of(b, weights)}
    return FitTarget(model, (torch.tensor(4.0),), moments, evidence)


def product() -> FitTarget:
    """A product that is known and two factors that are not: two thin bent arms."""

    def model(y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 3.0))
        b = pyro.sample("b", dist.Normal(0.0, 3.0))
        pyro.sample("y", dist.Normal(a * b, 0.3), obs=y)

    def log_density(a: Tensor, b: Tensor) -> Tensor:
        likelihood = dist.Normal(a * b, 0.3).log_prob(torch.tensor(4.0).double())
        return likelihood + dist.Normal(0.0, 3.0).log_prob(a) + dist.Normal(0.0, 3.0).log_prob(b)

    (a, b), weights, evidence = grid(log_density, (-14, 14, 2000), (-14, 14, 2000))
    moments = {"a": moments_of(a, weights), "b": moments_of(b, weights)}
    events = {"a > 0": lambda draws: draws["a"] > 0}
    return FitTarget(model, (torch.tensor(4.0),), moments, evidence, {"a > 0": 0.5}, events)
