"""Hierarchies for `fit`: some groups have few data and others many. Quadrature over the common scales."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from fit_targets import FitTarget, grid, moments_of, noise
from torch import Tensor

__all__: list[str] = []


def counties() -> FitTarget:
    """Forty groups of one to eight data each, a slope, and two unknown scales: 44 latents."""
    num = 40
    sizes = 1 + (noise(80, num).abs() * 4).floor().clamp(max=7).long()
    group = torch.repeat_interleave(torch.arange(num), sizes)
    x = (noise(81, len(group)) > 0.8).double()
    y = 1.4 + 0.3 * noise(82, num)[group] - 0.7 * x + 0.75 * noise(83, len(group))

    def model(group: Tensor, x: Tensor, y: Tensor) -> None:
        center = pyro.sample("center", dist.Normal(0.0, 10.0))
        spread = pyro.sample("spread", dist.HalfCauchy(1.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
        error = pyro.sample("error", dist.HalfCauchy(1.0))
        with pyro.plate("groups", num):
            level = pyro.sample("level", dist.Normal(center, spread))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(level[..., group] + slope * x, error), obs=y)

    # Given both scales, center, slope and the distances of the levels from the center are normal.
    design = torch.cat([torch.ones(len(y), 1).double(), x.unsqueeze(1), torch.eye(num).double()[group]], 1)

    def given(spread: Tensor, error: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log p(y | spread, error), mean and covariance."""
        prior = torch.full((len(spread), 2 + num), 0.01).double()
        prior[:, 2:] = spread.unsqueeze(1) ** -2
        precision = torch.diag_embed(prior) + design.T @ design / error.reshape(-1, 1, 1) ** 2
        covariance = torch.linalg.inv(precision)
        shift = (y @ design) / error.unsqueeze(1) ** 2
        mean = (covariance @ shift.unsqueeze(-1)).squeeze(-1)
        log_det = torch.logdet(precision) - prior.log().sum(1) + 2 * len(y) * error.log()
        square = y @ y / error**2 - (mean * shift).sum(1)
        return -0.5 * (log_det + square + len(y) * math.log(2 * math.pi)), mean, covariance

    def log_density(log_spread: Tensor, log_error: Tensor) -> Tensor:
        spread, error = log_spread.exp(), log_error.exp()
        prior = sum(dist.HalfCauchy(1.0).log_prob(scale) + scale.log() for scale in (spread, error))
        return given(spread, error)[0] + prior

    (log_spread, log_error), weights, evidence = grid(log_density, (-9, 1, 250), (-0.6, 0.2, 50))
    _, mean, covariance = given(log_spread.exp(), log_error.exp())
    # Levels are the center plus a distance.
    sums = torch.eye(2 + num).double()
    sums[2:, 0] = 1.0
    means = mean @ sums.T
    variances = (sums @ covariance @ sums.T).diagonal(dim1=1, dim2=2)
    average = weights @ means
    sds = (weights @ (variances + (means - average).square())).sqrt()
    moments = {
        "center": (average[0], sds[0]),
        "spread": moments_of(log_spread.exp(), weights),
        "slope": (average[1], sds[1]),
        "error": moments_of(log_error.exp(), weights),
        "level": (average[2:], sds[2:]),
    }
    return FitTarget(model, (group, x.float(), y.float()), moments, evidence)


def pumps() -> FitTarget:
    """Failures of ten pumps of a power plant, with log normal rates: 12 latents.

    Data: Gaver and O'Muircheartaigh, Technometrics 29 (1987).
    """
    failures = torch.tensor([5.0, 1.0, 5.0, 14.0, 3.0, 19.0, 1.0, 1.0, 4.0, 22.0])
    hours = torch.tensor([94.32, 15.72, 62.88, 125.76, 5.24, 31.44, 1.048, 1.048, 2.096, 10.48])

    def model(failures: Tensor, hours: Tensor) -> None:
        center = pyro.sample("center", dist.Normal(0.0, 2.0))
        spread = pyro.sample("spread", dist.HalfNormal(2.0))
        with pyro.plate("pumps", 10):
            rate = pyro.sample("rate", dist.LogNormal(center, spread))
            pyro.sample("failures", dist.Poisson(rate * hours), obs=failures)

    # Given center and spread the log rates are independent: one line of numbers for each.
    line = torch.linspace(-9.0, 5.0, 1401, dtype=torch.float64)
    counts = dist.Poisson(line.exp().unsqueeze(1) * hours.double()).log_prob(failures.double())

    def given(center: Tensor, spread: Tensor) -> Tensor:
        """Return log p(log rate, failures | center, spread), shape (grid, line, pumps)."""
        return dist.Normal(center.unsqueeze(1), spread.unsqueeze(1)).log_prob(line).unsqueeze(-1) + counts

    def log_density(center: Tensor, spread: Tensor) -> Tensor:
        each = given(center, spread).logsumexp(1) + math.log(0.01)
        prior = dist.Normal(0.0, 2.0).log_prob(center) + dist.HalfNormal(2.0).log_prob(spread)
        return each.sum(-1) + prior

    (center, spread), weights, evidence = grid(log_density, (-7, 5, 60), (0.05, 6, 60))
    shares = given(center, spread).softmax(1)
    mean, square = (weights @ (line.exp() ** k @ shares) for k in (1, 2))
    moments = {
        "center": moments_of(center, weights),
        "spread": moments_of(spread, weights),
        "rate": (mean, (square - mean.square()).sqrt()),
    }
    return FitTarget(model, (failures, hours), moments, evidence)
