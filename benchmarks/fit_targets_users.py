"""Models for `fit` as a stranger may bring them: plates of plates, sparse shares, offsets, two explanations.

Written after `fit` was done and run as they are, like those of `fit_targets_new`. Closed forms or quadrature.
"""

from __future__ import annotations

import math

import fit_targets_more
import pyro
import pyro.distributions as dist
import torch
from fit_targets import FitTarget, grid, linear_posterior, moments_of, noise
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor

__all__: list[str] = []


def two_explanations() -> FitTarget:
    """A Gaussian process on seven points: a short length and little noise, or a long one and much."""
    x = torch.tensor([-2.2, -1.8, -1.3, -0.4, 0.1, 0.9, 1.6]).double()
    data = torch.tensor([-0.9, -0.3, -1.2, 0.6, -0.1, 1.1, 0.3]).double()

    def total(length: Tensor, noise: Tensor, x: Tensor) -> Tensor:
        distance = (x.unsqueeze(-1) - x).square()
        kernel = (-0.5 * distance / length[..., None, None] ** 2).exp()
        return kernel + (noise[..., None, None] ** 2 + 1e-6) * torch.eye(len(x)).to(x)

    def model(x: Tensor, y: Tensor) -> None:
        length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
        noise = pyro.sample("noise", dist.LogNormal(-1.5, 1.0))
        covariance = total(length, noise, x)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), covariance), obs=y)

    def log_density(log_length: Tensor, log_noise: Tensor) -> Tensor:
        covariance = total(log_length.exp(), log_noise.exp(), x)
        normal = dist.MultivariateNormal(torch.zeros(len(x)).double(), covariance, validate_args=False)
        prior = dist.Normal(0.0, 1.0).log_prob(log_length) + dist.Normal(-1.5, 1.0).log_prob(log_noise)
        return normal.log_prob(data) + prior

    (a, b), weights, evidence = grid(log_density, (-5, 5, 300), (-7.5, 4, 300))
    moments = {"length": moments_of(a.exp(), weights), "noise": moments_of(b.exp(), weights)}
    share = float(weights @ (a.exp() < 0.6).double())
    events = {"length < 0.6": lambda draws: draws["length"] < 0.6}
    return FitTarget(model, (x.float(), data.float()), moments, evidence, {"length < 0.6": share}, events)


def large_numbers() -> FitTarget:
    """An intercept of 23,000 and a slope of 1.5e-4, under priors of 1e5 and .01; not centered."""
    x = torch.linspace(2e7, 9e7, 30, dtype=torch.float64)
    data = (2.3e4 + 1.5e-4 * x + 500 * noise(63, 30)).float().double()
    prior = torch.tensor([1e5, 0.01]).double()

    def model(x: Tensor, y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1e5))
        b = pyro.sample("b", dist.Normal(0.0, 0.01))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a + b * x, 500.0), obs=y)

    design = torch.stack([torch.ones_like(x), x], -1)
    noise_sd = torch.full((1,), 500.0).double()
    mean, cov, evidence = linear_posterior(design, data, 0 * prior, prior, noise_sd)
    sd = cov[0].diagonal().sqrt()
    moments = {"a": (mean[0, 0], sd[0]), "b": (mean[0, 1], sd[1])}
    return FitTarget(model, (x.float(), data.float()), moments, float(evidence))


def offset() -> FitTarget:
    """A mean of 12345 that is known to .002, under N(0, 1e5), in double precision."""
    data = 12345 + 0.01 * noise(62, 20)
    scale = torch.tensor(1e5).double()

    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(torch.zeros(()).double(), scale))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 0.01), obs=y)

    one = torch.ones(1).double()
    mean, cov, evidence = linear_posterior(torch.ones(20, 1).double(), data, 0 * one, 1e5 * one, 0.01 * one)
    return FitTarget(model, (data,), {"mean": (mean[0, 0], cov[0, 0, 0].sqrt())}, float(evidence))


def flat_shares() -> FitTarget:
    """Thirty shares without data."""

    def model() -> None:
        pyro.sample("shares", dist.Dirichlet(torch.ones(30)))

    exact = dist.Dirichlet(torch.ones(30))
    return FitTarget(model, (), {"shares": (exact.mean, exact.variance.sqrt())}, 0.0)


def sparse_shares() -> FitTarget:
    """Twelve shares with a prior of .2 each, and sixty counts, of which seven kinds have none."""
    counts = torch.zeros(12)
    counts[:5] = torch.tensor([25.0, 18.0, 10.0, 6.0, 1.0])
    prior = torch.full((12,), 0.2)

    def model(x: Tensor) -> None:
        shares = pyro.sample("shares", dist.Dirichlet(prior))
        pyro.sample("x", dist.Multinomial(60, shares), obs=x)

    exact = dist.Dirichlet(counts + prior)
    evidence = float(dist.DirichletMultinomial(prior, 60).log_prob(counts))
    return FitTarget(model, (counts,), {"shares": (exact.mean, exact.variance.sqrt())}, evidence)


def nested_plates() -> FitTarget:
    """Twenty means in a plate of plates, with six data each: 21 latents."""
    data = noise(64, 5, 1) + 0.5 * noise(65, 5, 4) + 0.3 * noise(66, 6, 5, 4) + 1

    def model(y: Tensor) -> None:
        center = pyro.sample("center", dist.Normal(0.0, 2.0))
        with pyro.plate("columns", 4, dim=-1), pyro.plate("rows", 5, dim=-2):
            mean = pyro.sample("mean", dist.Normal(center, 1.0))
            with pyro.plate("data", 6, dim=-3):
                pyro.sample("y", dist.Normal(mean, 0.3), obs=y)

    means, error = data.mean(0), 0.3**2 / 6
    variance = 1 / (1 / 4 + 20 / (1 + error))
    center = variance * means.sum() / (1 + error)
    part = 1 / (1 + error)  # of the distance to the data that a mean goes, given the center
    sd = (error * part + (1 - part) ** 2 * variance) ** 0.5
    moments = {
        "center": (center, torch.tensor(variance).sqrt()),
        "mean": (center + part * (means - center), torch.full((5, 4), sd)),
    }
    return FitTarget(model, (data.float(),), moments)


def families() -> FitTarget:
    """Seven families of distributions side by side, without data."""
    known = {
        "gamma": dist.Gamma(0.5, 2.0),
        "beta": dist.Beta(0.5, 0.5),
        "student": dist.StudentT(5.0, 1.0, 2.0),
        "exponential": dist.Exponential(3.0),
        "laplace": dist.Laplace(0.0, 1.0),
        "gumbel": dist.Gumbel(0.0, 1.0),
        "weibull": dist.Weibull(2.0, 1.5),
    }

    def model() -> None:
        for name, family in known.items():
            pyro.sample(name, family)

    moments = {name: (family.mean, family.variance.sqrt()) for name, family in known.items()}
    return FitTarget(model, (), moments, 0.0)


def eight_schools_decentered() -> FitTarget:
    """The eight schools through `poutine.reparam`."""
    target = fit_targets_more.eight_schools()
    model = poutine.reparam(target.model, config={"theta": LocScaleReparam(0.0)})
    moments = {name: target.moments[name] for name in ("mu", "tau")}
    return FitTarget(model, target.args, moments, target.log_evidence)


def factor_and_deterministic() -> FitTarget:
    """A likelihood as a factor, and a site that is computed and used."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        y = pyro.deterministic("y", 2 * x)
        pyro.factor("data", dist.Normal(2.0, 0.5).log_prob(x))
        pyro.sample("z", dist.Normal(y, 1.0))

    mean, sd = torch.tensor(1.6), torch.tensor(0.2).sqrt()
    evidence = float(dist.Normal(0.0, 1.25**0.5).log_prob(torch.tensor(2.0)))
    moments = {"x": (mean, sd), "z": (2 * mean, (4 * sd**2 + 1).sqrt())}
    return FitTarget(model, (), moments, evidence)


def horseshoe() -> FitTarget:
    """A regression with a horseshoe prior; its six columns are orthogonal, so that quadrature is in two."""
    num = 40
    columns = torch.linalg.qr(noise(73, num, 6))[0] * num**0.5
    data = columns @ torch.tensor([2.0, 0, 0, -1.0, 0, 0.2]).double() + noise(74, num)

    def model(x: Tensor, y: Tensor) -> None:
        common = pyro.sample("common", dist.HalfCauchy(0.3))
        with pyro.plate("columns", 6):
            own = pyro.sample("own", dist.HalfCauchy(1.0))
            beta = pyro.sample("beta", dist.Normal(0.0, own * common))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal((beta.unsqueeze(-2) * x).sum(-1), 1.0), obs=y)

    def half_cauchy(log_scale: Tensor, width: float) -> Tensor:
        ratio = log_scale.exp() / width
        return math.log(2 / math.pi / width) - torch.log1p(ratio**2) + log_scale

    estimates, error = columns.T @ data / num, 1 / num
    log_common = torch.linspace(-14, 9, 461).double()
    log_own = torch.linspace(-20, 20, 4001).double()
    variance = (log_common.unsqueeze(-1) + log_own).exp() ** 2
    own_prior = half_cauchy(log_own, 1.0) + math.log(40 / 4000)
    terms = [dist.Normal(0.0, (variance + error).sqrt()).log_prob(b) + own_prior for b in estimates]
    total = sum(term.logsumexp(1) for term in terms) + half_cauchy(log_common, 0.3) + math.log(23 / 460)
    weights, part = total.softmax(0), variance / (variance + error)
    means, sds = [], []
    for estimate, term in zip(estimates, terms, strict=True):
        own_weights = weights.unsqueeze(-1) * term.softmax(1)
        mean = (own_weights * part).sum() * estimate
        square = (own_weights * (part * error + (part * estimate) ** 2)).sum()
        means.append(mean)
        sds.append((square - mean**2).sqrt())
    rest = float(dist.Normal(0.0, 1.0).log_prob(data - columns @ estimates).sum())
    evidence = float(total.logsumexp(0)) + rest + 3 * math.log(2 * math.pi * error)
    moments = {"beta": (torch.stack(means), torch.stack(sds))}
    return FitTarget(model, (columns.float(), data.float()), moments, evidence)
