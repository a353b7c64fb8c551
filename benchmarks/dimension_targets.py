"""Posteriors of 2 to 50 latent variables whose evidence, mode weights or moments are known.

* funnel: Neal, *Slice sampling*, Annals of Statistics 31 (2003), with sd 3 and nine leaves.
* many-well: Noe et al., Science 365 (2019), as in Midgley et al., *Flow annealed importance sampling
bootstrap*,
  ICLR 2023: 16 pairs with energy x^4 - 6 x^2 - x / 2 + y^2 / 2.
* forty modes: the mixture of Midgley et al., sd log(1 + e) in a square of side 80; locations drawn here.
* eight schools: Rubin, *Estimation in parallel randomized experiments*, J. Educational Statistics 6 (1981);
the
  priors of Gelman et al., *Bayesian Data Analysis*.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


@dataclass(frozen=True)
class DimensionTarget:
    """A posterior with known numbers.

    :param model: a Pyro model.
    :param base_scale: scale of the base, in unconstrained coordinates.
    :param log_evidence: exact, None where unknown.
    :param shares: probabilities of events of the draws, and ``events`` computes them: ``(n, num_shares)``
        booleans.
    :param moments: exact means and sds of sites by name.
    :param base_loc: location of the base, 0 if not given.
    """

    model: Callable[[], None]
    base_scale: float | Tensor
    log_evidence: float | None
    shares: Tensor | None = None
    events: Callable[[dict[str, Tensor]], Tensor] | None = None
    moments: dict[str, tuple[Tensor, Tensor]] | None = None
    base_loc: float | Tensor = 0.0


def _density_model(dim: int, log_density: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1).mask(False))
        pyro.factor("density", log_density(z))

    return model


def _integral(
    log_density: Callable[[Tensor], Tensor], low: float, high: float
) -> tuple[float, Tensor, Tensor]:
    """Return the log integral on a line, with grid and normalized weights."""
    grid = torch.linspace(low, high, 400_001, dtype=torch.float64)
    values = log_density(grid)
    step = float(grid[1] - grid[0])
    return float(values.logsumexp(0)) + math.log(step), grid, values.softmax(0)


def funnel(dim: int = 10, sd: float = 3.0) -> DimensionTarget:
    """Neal's funnel: z_0 ~ N(0, sd^2), the others N(0, exp(z_0))."""

    def log_density(z: Tensor) -> Tensor:
        neck, rest = z[..., 0], z[..., 1:]
        return dist.Normal(0.0, sd).log_prob(neck) + (
            -0.5 * rest.square() * torch.exp(-neck).unsqueeze(-1)
            - 0.5 * neck.unsqueeze(-1)
            - 0.5 * math.log(2 * math.pi)
        ).sum(-1)

    thirds = dist.Normal(0.0, sd).icdf(torch.tensor([1 / 3, 2 / 3]))

    def events(samples: dict[str, Tensor]) -> Tensor:
        neck = samples["z"][:, 0]
        return torch.stack([neck < thirds[0], (neck >= thirds[0]) & (neck < thirds[1]), neck >= thirds[1]], 1)

    return DimensionTarget(_density_model(dim, log_density), 3.0, 0.0, torch.full((3,), 1 / 3), events)


def many_well(num_pairs: int = 16) -> DimensionTarget:
    """Pairs of a double well and a normal coordinate."""

    def well(x: Tensor) -> Tensor:
        return -x.pow(4) + 6 * x.square() + 0.5 * x

    def log_density(z: Tensor) -> Tensor:
        x, y = z[..., 0::2], z[..., 1::2]
        return (well(x) - 0.5 * y.square()).sum(-1)

    log_well, grid, weights = _integral(well, -6.0, 6.0)
    log_evidence = num_pairs * (log_well + 0.5 * math.log(2 * math.pi))
    shares = torch.full((num_pairs,), float(weights[grid < 0].sum()))
    model = _density_model(2 * num_pairs, log_density)
    return DimensionTarget(model, 2.0, log_evidence, shares, lambda samples: samples["z"][:, 0::2] < 0)


def bimodal_coordinates(dim: int = 20) -> DimensionTarget:
    """Independent mixtures of N(-2, .6^2) and N(2, .6^2) with weights from .2 to .8."""
    weights = torch.linspace(0.2, 0.8, dim)

    def log_density(z: Tensor) -> Tensor:
        left = weights.log() + dist.Normal(-2.0, 0.6).log_prob(z)
        right = torch.log1p(-weights) + dist.Normal(2.0, 0.6).log_prob(z)
        return torch.logaddexp(left, right).sum(-1)

    model = _density_model(dim, log_density)
    return DimensionTarget(model, 3.0, 0.0, weights, lambda samples: samples["z"] < 0)


def _mixture(locs: Tensor, sds: Tensor, weights: Tensor, base_scale: float) -> DimensionTarget:
    dim = locs.shape[-1]

    def log_components(z: Tensor) -> Tensor:
        distance = ((z.unsqueeze(-2) - locs) / sds.unsqueeze(-1)).square().sum(-1)
        return weights.log() - 0.5 * distance - dim * (sds.log() + 0.5 * math.log(2 * math.pi))

    def events(samples: dict[str, Tensor]) -> Tensor:
        return log_components(samples["z"]).argmax(-1, keepdim=True) == torch.arange(len(weights))

    model = _density_model(dim, lambda z: log_components(z).logsumexp(-1))
    # The weight of a mode is its component's, but for what components have beyond the boundary: by 10^6
    # draws.
    generator = torch.Generator().manual_seed(1)
    kind = torch.multinomial(weights, 1_000_000, replacement=True, generator=generator)
    z = locs[kind] + sds[kind].unsqueeze(-1) * torch.randn(len(kind), dim, generator=generator)
    shares = torch.cat([events({"z": part}).double() for part in z.split(50_000)]).mean(0)
    return DimensionTarget(model, base_scale, 0.0, shares.float(), events)


def forty_modes() -> DimensionTarget:
    """Forty normal modes of sd log(1 + e) and equal weight in a square of side 80."""
    locs = 80 * torch.rand(40, 2, generator=torch.Generator().manual_seed(0)) - 40
    return _mixture(locs, torch.full((40,), math.log1p(math.e)), torch.full((40,), 1 / 40), 40.0)


def two_modes(dim: int = 50) -> DimensionTarget:
    """Two normal modes of sd .5, 8 sds apart on the diagonal, with weights .7 and .3."""
    half = torch.full((dim,), 8.0 * 0.5 / 2 / math.sqrt(dim))
    return _mixture(torch.stack([-half, half]), torch.tensor([0.5, 0.5]), torch.tensor([0.7, 0.3]), 1.0)


EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def eight_schools() -> DimensionTarget:
    """Eight schools in centered coordinates, by quadrature over tau, given which all is normal."""

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", 8):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("effects", dist.Normal(theta, ERRORS), obs=EFFECTS)

    grid = torch.linspace(-15.0, 9.0, 20_001, dtype=torch.float64)  # log tau
    tau = grid.exp().unsqueeze(-1)
    effects, errors = EFFECTS.double(), ERRORS.double()
    variance = errors.square() + tau.square()
    # Effects given tau: covariance diag(variance) + 25 (Sherman and Morrison, and its determinant).
    precision = 1 / 25 + (1 / variance).sum(-1)
    mean_mu = (effects / variance).sum(-1) / precision
    log_det = variance.log().sum(-1) + (25 * precision).log()
    quadratic = (effects.square() / variance).sum(-1) - precision * mean_mu.square()
    log_likelihood = -0.5 * (8 * math.log(2 * math.pi) + log_det + quadratic)
    log_prior = math.log(2 / math.pi / 5) - torch.log1p((tau.squeeze(-1) / 5).square()) + grid
    log_p = log_likelihood + log_prior
    weights = log_p.softmax(0)
    log_evidence = float(log_p.logsumexp(0)) + math.log(float(grid[1] - grid[0]))
    mu = weights @ mean_mu
    mu_sd = (weights @ (1 / precision + mean_mu.square()) - mu.square()).sqrt()
    shrink = tau.square() / variance
    theta_given = shrink * effects + (1 - shrink) * mean_mu.unsqueeze(-1)
    theta = weights @ theta_given
    within = tau.square() * errors.square() / variance + (1 - shrink).square() / precision.unsqueeze(-1)
    theta_sd = (weights @ (within + theta_given.square()) - theta.square()).sqrt()
    moments = {"mu": (mu.float(), mu_sd.float()), "theta": (theta.float(), theta_sd.float())}
    return DimensionTarget(model, torch.full((10,), 5.0), log_evidence, moments=moments)


def collinear_regression() -> DimensionTarget:
    """A line through the years 1952 to 2013, intercept and slope correlated to .9999; conjugate."""
    years = torch.arange(1952.0, 2014.0)
    generator = torch.Generator().manual_seed(0)
    y = 0.02 * (years - 1980) + 5.0 + 0.3 * torch.randn(len(years), generator=generator)
    prior_sd, noise = torch.tensor([100.0, 1 / 30]), 0.3

    def model() -> None:
        intercept = pyro.sample("intercept", dist.Normal(0.0, 100.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 1 / 30))
        with pyro.plate("data", len(years), dim=-1):
            pyro.sample("y", dist.Normal(intercept + slope * years, noise), obs=y)

    design = torch.stack([torch.ones_like(years), years], 1).double()
    precision = torch.diag(1 / prior_sd.double().square()) + design.T @ design / noise**2
    covariance = torch.linalg.inv(precision)
    mean = covariance @ (design.T @ y.double()) / noise**2
    total = design @ torch.diag(prior_sd.double().square()) @ design.T
    total += noise**2 * torch.eye(len(years), dtype=torch.float64)
    zero = torch.zeros(len(years), dtype=torch.float64)
    log_evidence = float(torch.distributions.MultivariateNormal(zero, total).log_prob(y.double()))
    sds = covariance.diagonal().sqrt()
    moments = {name: (mean[i].float(), sds[i].float()) for i, name in enumerate(("intercept", "slope"))}
    return DimensionTarget(model, prior_sd, log_evidence, moments=moments)


TARGETS: dict[str, Callable[[], DimensionTarget]] = {
    "funnel, 10-D": funnel,
    "many-well, 32-D": many_well,
    "twenty bimodal coordinates": bimodal_coordinates,
    "forty modes, 2-D": forty_modes,
    "two modes, 50-D": two_modes,
    "eight schools, centered": eight_schools,
    "collinear regression": collinear_regression,
}
