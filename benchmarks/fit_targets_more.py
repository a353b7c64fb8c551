"""More of :mod:`fit_targets`: hierarchies, mixtures, time series, differential equations, flat priors."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from fit_targets import FitTarget, grid, moments_of, noise
from torch import Tensor

__all__: list[str] = []


def eight_schools() -> FitTarget:
    """Rubin's eight schools, centered: a funnel with data. Given tau all is normal."""
    effects = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)
    errors = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)

    def model(y: Tensor, sigma: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", 8):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    def given(tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log p(y | tau), and means and variances of mu and theta."""
        own = torch.eye(9, dtype=torch.float64)[:, 1:].unsqueeze(0) * tau.reshape(-1, 1, 1) ** 2
        prior = torch.full((9, 9), 25.0).double() + torch.cat([torch.zeros(len(tau), 9, 1), own], -1)
        cross = prior[:, :, 1:]
        total = cross[:, 1:] + torch.diag(errors**2)
        gain = torch.linalg.solve(total, cross.mT).mT
        variance = (prior - gain @ cross.mT).diagonal(dim1=1, dim2=2)
        zero = torch.zeros(8).double()
        evidence = dist.MultivariateNormal(zero, total, validate_args=False).log_prob(effects)
        return evidence, gain @ effects, variance

    def log_density(log_tau: Tensor) -> Tensor:
        tau = log_tau.exp()
        return given(tau)[0] + math.log(2 / (math.pi * 5)) - torch.log1p((tau / 5) ** 2) + log_tau

    (log_tau,), weights, evidence = grid(log_density, (-10, 9, 10_000))
    _, mean, variance = given(log_tau.exp())
    means = weights @ mean
    sds = (weights @ (variance + (mean - means).square())).sqrt()
    moments = {
        "mu": (means[0], sds[0]),
        "theta": (means[1:], sds[1:]),
        "tau": moments_of(log_tau.exp(), weights),
    }
    return FitTarget(model, (effects.float(), errors.float()), moments, evidence)


def correlation() -> FitTarget:
    """A correlation with an LKJ prior."""
    data = noise(20, 15, 2)
    data[:, 1] = 0.8 * data[:, 0] + 0.6 * data[:, 1]

    def model(x: Tensor) -> None:
        factor = pyro.sample("factor", dist.LKJCholesky(2, torch.tensor(2.0)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), scale_tril=factor), obs=x)

    def log_density(z: Tensor) -> Tensor:
        rho = z.tanh()
        # LKJ(2): 3/4 (1 - rho^2); in z, times 1 - rho^2.
        prior = math.log(0.75) + 2 * torch.log1p(-(rho**2))
        quadratic = (data[:, 0] ** 2).sum() - 2 * rho * data.prod(-1).sum() + (data[:, 1] ** 2).sum()
        log_det = torch.log1p(-(rho**2))
        n = len(data)
        return prior - n * math.log(2 * math.pi) - n * log_det / 2 - quadratic / (2 * (1 - rho**2))

    (z,), weights, evidence = grid(log_density, (-6, 6, 100_000))
    rho, height = moments_of(z.tanh(), weights), moments_of((1 - z.tanh() ** 2).sqrt(), weights)
    nan, zero = torch.tensor(torch.nan), torch.tensor(0.0)
    means = torch.stack([torch.stack([zero + 1, zero]), torch.stack([rho[0], height[0]]).float()])
    sds = torch.stack([torch.stack([nan, nan]), torch.stack([rho[1], height[1]]).float()])
    return FitTarget(model, (data.float(),), {"factor": (means, sds)}, evidence)


def mixture() -> FitTarget:
    """A mixture of two components of weights .3 and .7: two modes of unequal weight."""
    data = torch.cat([-1.5 + noise(21, 6), 1.5 + noise(22, 9)])

    def model(x: Tensor) -> None:
        locs = pyro.sample("locs", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
            loc = torch.where(k == 0, locs[..., 0], locs[..., 1])
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def log_density(a: Tensor, b: Tensor) -> Tensor:
        total = dist.Normal(0.0, 3.0).log_prob(a) + dist.Normal(0.0, 3.0).log_prob(b)
        for x in data:
            one = math.log(0.3) + dist.Normal(a, 1.0).log_prob(x)
            total = total + torch.logaddexp(one, math.log(0.7) + dist.Normal(b, 1.0).log_prob(x))
        return total

    (a, b), weights, evidence = grid(log_density, (-10, 10, 1000), (-10, 10, 1000))
    (a0, a1), (b0, b1) = moments_of(a, weights), moments_of(b, weights)
    moments = {"locs": (torch.stack([a0, b0]), torch.stack([a1, b1]))}
    share = float(weights @ (a < b).double())
    events = {"locs[0] < locs[1]": lambda draws: draws["locs"][:, 0] < draws["locs"][:, 1]}
    return FitTarget(model, (data.float(),), moments, evidence, {"locs[0] < locs[1]": share}, events)


def separation() -> FitTarget:
    """A logistic regression whose data are separated: the prior N(0, 10) holds the slope."""
    x = torch.tensor([-2.0, -1.5, -1.0, -0.5, 0.4, 0.8, 1.6, 2.1], dtype=torch.float64)
    y = (x > 0).double()

    def model(x: Tensor, y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 10.0))
        b = pyro.sample("b", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=a + b * x), obs=y)

    def log_density(a: Tensor, b: Tensor) -> Tensor:
        logits = a.unsqueeze(-1) + b.unsqueeze(-1) * x
        likelihood = torch.nn.functional.logsigmoid(torch.where(y > 0, logits, -logits)).sum(-1)
        return likelihood + dist.Normal(0.0, 10.0).log_prob(a) + dist.Normal(0.0, 10.0).log_prob(b)

    (a, b), weights, evidence = grid(log_density, (-50, 50, 800), (-20, 70, 800))
    moments = {"a": moments_of(a, weights), "b": moments_of(b, weights)}
    return FitTarget(model, (x.float(), y.float()), moments, evidence)


def many_rows() -> FitTarget:
    """A logistic regression on 100,000 rows; its posterior is normal to three digits (by Newton's method)."""
    x = torch.cat([torch.ones(100_000, 1), noise(23, 100_000, 2).float()], -1).double()
    truth = torch.tensor([-1.0, 0.5, 0.2]).double()
    uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(24), dtype=torch.float64)
    y = (uniform < (x @ truth).sigmoid()).double()

    def model(x: Tensor, y: Tensor) -> None:
        beta = pyro.sample("beta", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=(beta * x).sum(-1)), obs=y)

    beta = truth.clone()
    for _ in range(10):
        p = (x @ beta).sigmoid()
        hessian = x.T @ (x * (p * (1 - p)).unsqueeze(-1)) + torch.eye(3) / 4
        beta = beta + torch.linalg.solve(hessian, x.T @ (y - p) - beta / 4)
    sds = torch.linalg.inv(hessian).diagonal().sqrt()
    return FitTarget(model, (x.float(), y.float()), {"beta": (beta, sds)})


def decay() -> FitTarget:
    """A differential equation, y' = -k y, with its solution in closed form; both latents positive."""
    times = torch.linspace(0.2, 4, 20, dtype=torch.float64)
    data = 3 * (-0.8 * times).exp() + 0.1 * noise(25, 20)

    def model(times: Tensor, y: Tensor) -> None:
        start = pyro.sample("start", dist.LogNormal(0.0, 1.0))
        rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(start * (-rate * times).exp(), 0.1), obs=y)

    def log_density(log_start: Tensor, log_rate: Tensor) -> Tensor:
        curve = log_start.exp().unsqueeze(-1) * (-log_rate.exp().unsqueeze(-1) * times).exp()
        prior = dist.Normal(0.0, 1.0).log_prob(log_start) + dist.Normal(0.0, 1.0).log_prob(log_rate)
        return prior + dist.Normal(curve, 0.1).log_prob(data).sum(-1)

    (a, b), weights, evidence = grid(log_density, (0.7, 1.5, 800), (-0.8, 0.4, 800))
    moments = {"start": moments_of(a.exp(), weights), "rate": moments_of(b.exp(), weights)}
    return FitTarget(model, (times.float(), data.float()), moments, evidence)


def gaussian_process() -> FitTarget:
    """Length scale and noise of a Gaussian process on 20 points."""
    x = torch.linspace(0, 5, 20, dtype=torch.float64)
    data = x.sin() + 0.3 * noise(26, 20)

    def total(length: Tensor, noise: Tensor, x: Tensor) -> Tensor:
        distance = (x.unsqueeze(-1) - x).square()
        kernel = (-0.5 * distance / length.reshape(*length.shape, 1, 1) ** 2).exp()
        return kernel + noise.reshape(*noise.shape, 1, 1) ** 2 * torch.eye(len(x)).to(x)

    def model(x: Tensor, y: Tensor) -> None:
        length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        covariance = total(length, noise.clamp(min=1e-3), x)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), covariance), obs=y)

    def log_density(log_length: Tensor, log_noise: Tensor) -> Tensor:
        parts = []
        for a, b in zip(log_length.exp().split(2000), log_noise.exp().split(2000), strict=True):
            zero = torch.zeros(20).double()
            normal = dist.MultivariateNormal(zero, total(a, b, x), validate_args=False)
            parts.append(normal.log_prob(data))
        prior = dist.Normal(0.0, 1.0).log_prob(log_length) + dist.HalfNormal(1.0).log_prob(log_noise.exp())
        return torch.cat(parts) + prior + log_noise

    (a, b), weights, evidence = grid(log_density, (-3, 3.5, 250), (-3.5, 1, 200))
    moments = {"length": moments_of(a.exp(), weights), "noise": moments_of(b.exp(), weights)}
    return FitTarget(model, (x.float(), data.float()), moments, evidence)


def hidden_markov() -> FitTarget:
    """Two hidden states with levels -d and d, by the forward algorithm; d and -d are nearly alike."""
    states = (torch.arange(30) // 6) % 2
    data = (2 * states - 1) * 1.0 + 0.7 * noise(27, 30)

    def forward(level: Tensor, stay: Tensor, y: Tensor) -> Tensor:
        low, high = (dist.Normal(sign * level.unsqueeze(-1), 0.7).log_prob(y) for sign in (-1, 1))
        a, b = math.log(0.8) + low[..., 0], math.log(0.2) + high[..., 0]
        for i in range(1, len(y)):
            kept_a, kept_b = a + stay.log(), b + stay.log()
            left_a, left_b = a + (-stay).log1p(), b + (-stay).log1p()
            a, b = (
                torch.logaddexp(kept_a, left_b) + low[..., i],
                torch.logaddexp(kept_b, left_a) + high[..., i],
            )
        return torch.logaddexp(a, b)

    def model(y: Tensor) -> None:
        level = pyro.sample("level", dist.Normal(0.0, 2.0))
        stay = pyro.sample("stay", dist.Beta(2.0, 1.0))
        pyro.factor("y", forward(level, stay, y))

    def log_density(level: Tensor, logit: Tensor) -> Tensor:
        stay = logit.sigmoid()
        prior = dist.Normal(0.0, 2.0).log_prob(level) + dist.Beta(2.0, 1.0).log_prob(stay)
        return prior + forward(level, stay, data) + stay.log() + (-stay).log1p()

    (level, logit), weights, evidence = grid(log_density, (-3, 3, 600), (-6, 9, 400))
    moments = {"level": moments_of(level, weights), "stay": moments_of(logit.sigmoid(), weights)}
    share = float(weights @ (level > 0).double())
    events = {"level > 0": lambda draws: draws["level"] > 0}
    return FitTarget(model, (data.float(),), moments, evidence, {"level > 0": share}, events)


def frequency() -> FitTarget:
    """The frequency of a sine from few data: several narrow modes."""
    times = torch.tensor([0.0, 1.3, 2.9, 3.1, 4.6, 6.2, 7.0, 9.1], dtype=torch.float64)
    data = (2.1 * times).sin() + 0.6 * noise(28, 8)

    def model(times: Tensor, y: Tensor) -> None:
        omega = pyro.sample("omega", dist.Uniform(0.5, 6.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal((omega * times).sin(), 0.6), obs=y)

    def log_density(omega: Tensor) -> Tensor:
        curve = (omega.unsqueeze(-1) * times).sin()
        return dist.Normal(curve, 0.6).log_prob(data).sum(-1) - math.log(5.5)

    (omega,), weights, evidence = grid(log_density, (0.5, 6.0, 100_000))
    return FitTarget(model, (times.float(), data.float()), {"omega": moments_of(omega, weights)}, evidence)


def flat() -> FitTarget:
    """A flat prior, and data three widths of its sampler away."""
    data = 30 + 2 * noise(29, 10)

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 10.0).mask(False))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 2.0), obs=x)

    mean, sd = data.mean(), torch.tensor(2 / 10**0.5)
    evidence = float(dist.Normal(mean, 2.0).log_prob(data).sum()) + math.log(float(sd) * (2 * math.pi) ** 0.5)
    return FitTarget(model, (data.float(),), {"z": (mean, sd)}, evidence)


def two_modes() -> FitTarget:
    """Two normal modes of weights .3 and .7 in ten dimensions, under a flat prior."""
    center = torch.full((10,), 2.0)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(10), 3.0).to_event(1).mask(False))
        parts = [
            math.log(weight) + dist.Normal(loc, 1.0).log_prob(z).sum(-1)
            for weight, loc in ((0.3, -center), (0.7, center))
        ]
        pyro.factor("density", torch.logaddexp(*parts))

    moments = {"z": (0.4 * center, torch.full((10,), math.sqrt(1 + 4 * (1 - 0.16))))}
    events = {"z[0] > 0": lambda draws: draws["z"].sum(-1) > 0}
    return FitTarget(model, (), moments, 0.0, {"z[0] > 0": 0.7}, events)


def wells() -> FitTarget:
    """Four double wells: sixteen modes of unequal weights in eight dimensions."""

    def well(a: Tensor) -> Tensor:
        return -(a**4) + 6 * a**2 + a / 2

    def model() -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros(4), 2.0).to_event(1).mask(False))
        b = pyro.sample("b", dist.Normal(torch.zeros(4), 2.0).to_event(1).mask(False))
        pyro.factor("density", (well(a) - b**2 / 2).sum(-1))

    (a,), weights, evidence = grid(well, (-5, 5, 100_000))
    mean, sd = moments_of(a, weights)
    moments = {"a": (mean.expand(4), sd.expand(4)), "b": (torch.zeros(4), torch.ones(4))}
    return FitTarget(model, (), moments, 4 * evidence + 2 * math.log(2 * math.pi))
