"""Models as users write them, of 1 to 50 latents, whose posterior moments and mostly evidence are known.

Exact answers are in closed form or by quadrature on grids in double precision, never from a sampler.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["FitTarget", "grid", "linear_posterior", "moments_of", "noise"]

Moments = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class FitTarget:
    """A model with its data and what is known of its posterior.

    :param model: a Pyro model.
    :param args: its arguments.
    :param moments: for sites their exact means and standard deviations; nan where there is none.
    :param log_evidence: exact, None where not known.
    :param shares: probabilities of events, and ``events`` tells of which draws they are true.
    """

    model: Callable[..., None]
    args: tuple[Any, ...]
    moments: Moments
    log_evidence: float | None = None
    shares: dict[str, float] = field(default_factory=dict)
    events: dict[str, Callable[[dict[str, Tensor]], Tensor]] = field(default_factory=dict)


def noise(seed: int, *shape: int) -> Tensor:
    """Return standard normal numbers, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grid(
    log_density: Callable[..., Tensor], *axes: tuple[float, float, int]
) -> tuple[list[Tensor], Tensor, float]:
    """Return coordinates (flat), normalized weights and the log integral, by the midpoint rule."""
    lines = [
        low + (high - low) * (torch.arange(num, dtype=torch.float64) + 0.5) / num for low, high, num in axes
    ]
    points = [mesh.reshape(-1) for mesh in torch.meshgrid(*lines, indexing="ij")]
    values = log_density(*points).nan_to_num(-torch.inf)
    cell = sum(math.log((high - low) / num) for low, high, num in axes)
    return points, values.softmax(0), float(values.logsumexp(0)) + cell


def moments_of(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return weighted mean and standard deviation."""
    mean = weights @ values
    return mean, (weights @ (values - mean).square()).sqrt()


def linear_posterior(
    design: Tensor, data: Tensor, prior_loc: Tensor, prior_sd: Tensor, noise_sd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, covariance of normal coefficients and the log evidence; a batch of noises (k,)."""
    precision = torch.diag(prior_sd**-2) + (design.T @ design) / noise_sd.reshape(-1, 1, 1) ** 2
    covariance = torch.linalg.inv(precision)
    shift = prior_loc * prior_sd**-2 + (data @ design) / noise_sd.reshape(-1, 1) ** 2
    mean = (covariance @ shift.unsqueeze(-1)).squeeze(-1)
    total = design * prior_sd @ (design * prior_sd).T + noise_sd.reshape(-1, 1, 1) ** 2 * torch.eye(len(data))
    evidence = dist.MultivariateNormal(design @ prior_loc, total, validate_args=False).log_prob(data)
    return mean, covariance, evidence


def far_normal() -> FitTarget:
    """A prior N(0, 1) and data at 50: the posterior lies 36 prior sds away."""
    data = 50 + noise(0, 25)

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 5.0), obs=x)

    one = torch.ones(1, dtype=torch.float64)
    mean, cov, evidence = linear_posterior(torch.ones(25, 1).double(), data, 0 * one, one, 5 * one)
    return FitTarget(model, (data.float(),), {"z": (mean[0, 0], cov[0, 0, 0].sqrt())}, float(evidence))


def square_root() -> FitTarget:
    """Two modes of weight 1/2."""

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 3.0))
        pyro.sample("x", dist.Normal(z**2, 1.0), obs=x)

    def log_density(z: Tensor) -> Tensor:
        return dist.Normal(0.0, 3.0).log_prob(z) + dist.Normal(z**2, 1.0).log_prob(torch.tensor(4.0))

    (z,), weights, evidence = grid(log_density, (-12, 12, 100_000))
    events = {"z > 0": lambda draws: draws["z"] > 0}
    return FitTarget(
        model, (torch.tensor(4.0),), {"z": moments_of(z, weights)}, evidence, {"z > 0": 0.5}, events
    )


def half_cauchy() -> FitTarget:
    """A scale with a half-Cauchy prior and six data."""
    data = 2.5 * noise(1, 6)

    def model(x: Tensor) -> None:
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, scale), obs=x)

    def log_density(log_scale: Tensor) -> Tensor:
        scale = log_scale.exp()
        prior = math.log(2 / math.pi) - torch.log1p(scale**2)
        return prior + dist.Normal(0.0, scale.unsqueeze(-1)).log_prob(data).sum(-1) + log_scale

    (log_scale,), weights, evidence = grid(log_density, (-8, 12, 100_000))
    return FitTarget(model, (data.float(),), {"scale": moments_of(log_scale.exp(), weights)}, evidence)


def beta_binomial() -> FitTarget:
    """A probability at the edge of its support: no success in ten."""

    def model(x: Tensor) -> None:
        p = pyro.sample("p", dist.Uniform(0.0, 1.0))
        pyro.sample("x", dist.Binomial(10, p), obs=x)

    exact = dist.Beta(torch.tensor(1.0), torch.tensor(11.0))
    moments = {"p": (exact.mean, exact.variance.sqrt())}
    return FitTarget(model, (torch.tensor(0.0),), moments, -math.log(11))


def gamma_poisson() -> FitTarget:
    """A rate with a gamma prior."""
    data = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0])

    def model(x: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(0.5, 0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(rate), obs=x)

    a, b = 0.5 + float(data.sum()), 0.1 + len(data)
    evidence = 0.5 * math.log(0.1) - math.lgamma(0.5) + math.lgamma(a) - a * math.log(b)
    evidence -= float((data + 1).lgamma().sum())
    return FitTarget(model, (data,), {"rate": (torch.tensor(a / b), torch.tensor(a**0.5 / b))}, evidence)


def dirichlet() -> FitTarget:
    """Four shares, one of them of a kind that was never seen."""
    counts = torch.tensor([12.0, 5.0, 1.0, 0.0])

    def model(x: Tensor) -> None:
        shares = pyro.sample("shares", dist.Dirichlet(torch.full((4,), 0.5)))
        pyro.sample("x", dist.Multinomial(18, shares), obs=x)

    exact = dist.Dirichlet(counts + 0.5)
    evidence = dist.DirichletMultinomial(torch.full((4,), 0.5), 18).log_prob(counts)
    return FitTarget(model, (counts,), {"shares": (exact.mean, exact.variance.sqrt())}, float(evidence))


def _regression(design: Tensor, prior_sd: Tensor, noise_sd: float, seed: int) -> FitTarget:
    truth = prior_sd * noise(seed, design.shape[1]) / 4
    data = design @ truth + noise_sd * noise(seed + 1, len(design))

    def model(x: Tensor, y: Tensor) -> None:
        beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[1]), prior_sd.float()).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal((beta * x).sum(-1), noise_sd), obs=y)

    one = torch.ones(1, dtype=torch.float64)
    mean, cov, evidence = linear_posterior(design, data, 0 * prior_sd, prior_sd, noise_sd * one)
    moments = {"beta": (mean[0], cov[0].diagonal().sqrt())}
    return FitTarget(model, (design.float(), data.float()), moments, float(evidence))


def regression() -> FitTarget:
    """Three coefficients."""
    return _regression(noise(2, 40, 3), torch.full((3,), 2.0).double(), 0.5, 3)


def collinear() -> FitTarget:
    """Intercept and slope on the years 1950 to 2010, not centered: correlation -.9999."""
    years = torch.arange(1950.0, 2011.0, dtype=torch.float64) / 1000
    return _regression(
        torch.stack([torch.ones_like(years), years], -1), torch.tensor([100.0, 50.0]).double(), 0.2, 5
    )


def ill_scaled() -> FitTarget:
    """Coefficients on scales from 1e-4 to 1e4."""
    scales = torch.tensor([1e-4, 1.0, 1e4]).double()
    return _regression(noise(7, 30, 3) / scales, 5 * scales, 1.0, 8)


def wide_regression() -> FitTarget:
    """Fifty coefficients and thirty data: most of them stay as the prior has them."""
    return _regression(noise(10, 30, 50), torch.ones(50).double(), 1.0, 11)


def line() -> FitTarget:
    """A straight line with wide priors and an unknown noise."""
    x = torch.linspace(0, 10, 32, dtype=torch.float64)
    data = 3 + 2 * x + 0.7 * noise(12, 32)

    def model(x: Tensor, y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 100.0))
        b = pyro.sample("b", dist.Normal(0.0, 50.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a + b * x, sigma), obs=y)

    design = torch.stack([torch.ones_like(x), x], -1)
    prior = torch.zeros(2).double(), torch.tensor([100.0, 50.0]).double()

    def log_density(log_sigma: Tensor) -> Tensor:
        evidence = linear_posterior(design, data, *prior, log_sigma.exp())[2]
        return evidence + dist.HalfNormal(10.0).log_prob(log_sigma.exp()) + log_sigma

    (log_sigma,), weights, evidence = grid(log_density, (-2, 2, 2000))
    mean, cov, _ = linear_posterior(design, data, *prior, log_sigma.exp())
    means = weights @ mean
    sds = (weights @ (cov.diagonal(dim1=1, dim2=2) + (mean - means).square())).sqrt()
    moments = {
        "a": (means[0], sds[0]),
        "b": (means[1], sds[1]),
        "sigma": moments_of(log_sigma.exp(), weights),
    }
    return FitTarget(model, (x.float(), data.float()), moments, evidence)


def rosenbrock() -> FitTarget:
    """A banana of aspect a thousand: x ~ N(1, 10), y ~ N(x^2, 0.1)."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(1.0, 10.0))
        pyro.sample("y", dist.Normal(x**2, 0.1))

    moments = {
        "x": (torch.tensor(1.0), torch.tensor(10.0)),
        "y": (torch.tensor(101.0), torch.tensor((2 * 100.0**2 + 4 * 100 + 0.01) ** 0.5)),
    }
    return FitTarget(model, (), moments, 0.0)


def _funnel(num_leaves: int, sd: float) -> FitTarget:
    def model() -> None:
        neck = pyro.sample("neck", dist.Normal(0.0, sd))
        with pyro.plate("leaves", num_leaves):
            pyro.sample("leaf", dist.Normal(0.0, (neck / 2).exp()))

    return FitTarget(model, (), {"neck": (torch.tensor(0.0), torch.tensor(sd))}, 0.0)


def small_funnel() -> FitTarget:
    """A funnel of three latents, sd 1.5."""
    return _funnel(2, 1.5)


def funnel() -> FitTarget:
    """Neal's funnel of ten latents."""
    return _funnel(9, 3.0)


def student() -> FitTarget:
    """Heavy tails: Student's t with four degrees of freedom, two of them."""

    def model() -> None:
        with pyro.plate("two", 2):
            pyro.sample("z", dist.StudentT(4.0, 0.0, 1.0))

    return FitTarget(model, (), {"z": (torch.zeros(2), torch.full((2,), 2**0.5))}, 0.0)
