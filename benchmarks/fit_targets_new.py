"""More models for `fit`, written after it was done and run as they are: nothing in it was chosen by them.

Their posteriors are known by quadrature, where coefficients are normal after integrating these.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from fit_targets import FitTarget, grid, linear_posterior, moments_of, noise
from pyro.distributions.transforms import OrderedTransform
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__: list[str] = []

#: Grid points that are scored at a time.
_CHUNK = 100_000


def _in_chunks(log_density, *points: Tensor) -> Tensor:
    return torch.cat([log_density(*parts) for parts in zip(*(p.split(_CHUNK) for p in points), strict=True)])


def zero_inflated() -> FitTarget:
    """Counts with more zeros than a Poisson distribution has."""
    data = torch.tensor([0.0, 0, 0, 0, 3, 0, 2, 0, 0, 5, 0, 1, 0, 0, 4])

    def model(y: Tensor) -> None:
        gate = pyro.sample("gate", dist.Beta(1.0, 1.0))
        rate = pyro.sample("rate", dist.Gamma(1.0, 0.5))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.ZeroInflatedPoisson(rate, gate=gate), obs=y)

    def log_density(logit: Tensor, log_rate: Tensor) -> Tensor:
        gate, rate = logit.sigmoid(), log_rate.exp()
        some = torch.log1p(-gate).unsqueeze(-1) + dist.Poisson(rate.unsqueeze(-1)).log_prob(data.double())
        none = torch.logaddexp(gate.log().unsqueeze(-1), some)
        likelihood = torch.where(data == 0, none, some).sum(-1)
        prior = dist.Gamma(1.0, 0.5).log_prob(rate) + log_rate
        return likelihood + prior + gate.log() + torch.log1p(-gate)

    (logit, log_rate), weights, evidence = grid(log_density, (-9, 5, 400), (-2.5, 3, 400))
    moments = {"gate": moments_of(logit.sigmoid(), weights), "rate": moments_of(log_rate.exp(), weights)}
    return FitTarget(model, (data,), moments, evidence)


def ordinal() -> FitTarget:
    """Three ordered answers: two ordered cut points and a slope."""
    x = noise(40, 40)
    y = (x + noise(41, 40) > 1.0).double() + (x + noise(41, 40) > -0.5).double()

    def model(x: Tensor, y: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
        base = dist.Normal(torch.zeros(2), 2.0).to_event(1)
        cuts = pyro.sample("cuts", dist.TransformedDistribution(base, [OrderedTransform()]))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.OrderedLogistic(slope * x, cuts), obs=y)

    def log_density(slope: Tensor, first: Tensor, log_step: Tensor) -> Tensor:
        low = first.unsqueeze(-1) - slope.unsqueeze(-1) * x
        high = low + log_step.exp().unsqueeze(-1)
        middle = torch.log(high.sigmoid() - low.sigmoid())
        likelihood = torch.where(y == 0, logsigmoid(low), torch.where(y == 1, middle, logsigmoid(-high)))
        normal = dist.Normal(0.0, 2.0)
        return likelihood.sum(-1) + sum(normal.log_prob(v) for v in (slope, first, log_step))

    def chunked(*points: Tensor) -> Tensor:
        return _in_chunks(log_density, *points)

    axes = (-1.0, 6.0, 90), (-4.5, 1.0, 90), (-2.0, 2.5, 90)
    (slope, first, log_step), weights, evidence = grid(chunked, *axes)
    cuts = torch.stack([first, first + log_step.exp()], -1)
    found = [moments_of(cuts[:, i], weights) for i in range(2)]
    moments = {
        "slope": moments_of(slope, weights),
        "cuts": (torch.stack([m for m, _ in found]), torch.stack([s for _, s in found])),
    }
    return FitTarget(model, (x.float(), y.float()), moments, evidence)


def autoregression() -> FitTarget:
    """A series with persistence near 1."""
    steps = noise(42, 40)
    values = [torch.zeros(()).double()]
    for step in steps:
        values.append(0.95 * values[-1] + 0.5 * step)
    data = torch.stack(values)

    def model(y: Tensor) -> None:
        persistence = pyro.sample("persistence", dist.Uniform(-1.0, 1.0))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("data", len(y) - 1):
            pyro.sample("y", dist.Normal(persistence * y[:-1], scale), obs=y[1:])

    def log_density(free: Tensor, log_scale: Tensor) -> Tensor:
        persistence = 2 * free.sigmoid() - 1
        normal = dist.Normal(persistence.unsqueeze(-1) * data[:-1], log_scale.exp().unsqueeze(-1))
        prior = dist.HalfNormal(1.0).log_prob(log_scale.exp()) + log_scale
        return normal.log_prob(data[1:]).sum(-1) + prior + logsigmoid(free) + logsigmoid(-free)

    (free, log_scale), weights, evidence = grid(log_density, (0.0, 16.0, 500), (-1.6, 0.5, 300))
    moments = {
        "persistence": moments_of(2 * free.sigmoid() - 1, weights),
        "scale": moments_of(log_scale.exp(), weights),
    }
    return FitTarget(model, (data.float(),), moments, evidence)


def three_labels() -> FitTarget:
    """Three components without an order: six modes."""
    data = torch.cat([noise(43, 8) - 4, noise(44, 8), noise(45, 8) + 4])

    def model(y: Tensor) -> None:
        with pyro.plate("components", 3):
            locs = pyro.sample("locs", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(y)):
            parts = dist.Normal(locs.unsqueeze(-2), 1.0)
            pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(torch.ones(3)), parts), obs=y)

    def log_density(*locs: Tensor) -> Tensor:
        parts = torch.stack([dist.Normal(loc.unsqueeze(-1), 1.0).log_prob(data) for loc in locs])
        prior = sum(dist.Normal(0.0, 5.0).log_prob(loc) for loc in locs)
        return (parts.logsumexp(0) - math.log(3)).sum(-1) + prior

    def chunked(*points: Tensor) -> Tensor:
        return _in_chunks(log_density, *points)

    points, weights, evidence = grid(chunked, *[(-8.0, 8.0, 110)] * 3)
    mean, sd = moments_of(points[0], weights)
    events = {
        "ascending": lambda d: (d["locs"][:, 0] < d["locs"][:, 1]) & (d["locs"][:, 1] < d["locs"][:, 2])
    }
    moments = {"locs": (mean.expand(3), sd.expand(3))}
    return FitTarget(model, (data.float(),), moments, evidence, {"ascending": 1 / 6}, events)


def growth() -> FitTarget:
    """A population of thousands and a rate of thousandths."""
    times = torch.linspace(0, 400, 12, dtype=torch.float64)
    data = 2e4 * (0.004 * times).exp() + 2e3 * noise(46, 12)

    def model(times: Tensor, y: Tensor) -> None:
        start = pyro.sample("start", dist.LogNormal(9.0, 2.0))
        rate = pyro.sample("rate", dist.Normal(0.0, 0.01))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(start * (rate * times).exp(), 2e3), obs=y)

    def log_density(log_start: Tensor, rate: Tensor) -> Tensor:
        curve = (log_start.unsqueeze(-1) + rate.unsqueeze(-1) * times).exp()
        prior = dist.Normal(9.0, 2.0).log_prob(log_start) + dist.Normal(0.0, 0.01).log_prob(rate)
        return dist.Normal(curve, 2e3).log_prob(data).sum(-1) + prior

    (a, b), weights, evidence = grid(log_density, (9.6, 10.2, 600), (0.0032, 0.0048, 600))
    moments = {"start": moments_of(a.exp(), weights), "rate": moments_of(b, weights)}
    return FitTarget(model, (times.float(), data.float()), moments, evidence)


def saturation() -> FitTarget:
    """Michaelis and Menten's curve from small doses: only the ratio of both constants is known well."""
    dose = torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5, 3.0]).double()
    data = 10 * dose / (8 + dose) + 0.1 * noise(47, 6)

    def model(dose: Tensor, y: Tensor) -> None:
        top = pyro.sample("top", dist.HalfNormal(50.0))
        half = pyro.sample("half", dist.HalfNormal(50.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(top * dose / (half + dose), 0.1), obs=y)

    def log_density(log_top: Tensor, log_ratio: Tensor) -> Tensor:
        top, half = log_top.exp(), (log_top + log_ratio).exp()
        curve = top.unsqueeze(-1) * dose / (half.unsqueeze(-1) + dose)
        prior = dist.HalfNormal(50.0).log_prob(top) + dist.HalfNormal(50.0).log_prob(half)
        return dist.Normal(curve, 0.1).log_prob(data).sum(-1) + prior + 2 * log_top + log_ratio

    (a, b), weights, evidence = grid(log_density, (1.0, 6.0, 1500), (-2.5, 0.8, 1500))
    moments = {"top": moments_of(a.exp(), weights), "half": moments_of((a + b).exp(), weights)}
    return FitTarget(model, (dose.float(), data.float()), moments, evidence)


def random_walk() -> FitTarget:
    """A random walk of thirty steps with an unknown step: 31 latents, and a funnel."""
    num = 30
    data = (0.3 * noise(48, num)).cumsum(0) + 0.5 * noise(49, num)

    def model(y: Tensor) -> None:
        step = pyro.sample("step", dist.HalfNormal(1.0))
        increments = pyro.sample("increments", dist.Normal(torch.zeros(num), 1.0).to_event(1))
        path = step.unsqueeze(-1) * increments.cumsum(-1)
        pyro.sample("y", dist.Normal(path, 0.5).to_event(1), obs=y)

    sums = torch.ones(num, num).double().tril()

    def normal_part(step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = [
            linear_posterior(s * sums, data, torch.zeros(num).double(), torch.ones(num).double(), half)
            for s in step
        ]
        means, covariances, evidences = zip(*parts, strict=True)
        return torch.cat(means), torch.cat(covariances), torch.cat(evidences)

    half = torch.full((1,), 0.5).double()

    def log_density(log_step: Tensor) -> Tensor:
        step = log_step.exp()
        return normal_part(step)[2] + dist.HalfNormal(1.0).log_prob(step) + log_step

    (log_step,), weights, evidence = grid(log_density, (-8.0, 1.2, 400))
    mean, covariance, _ = normal_part(log_step.exp())
    means = weights @ mean
    variances = weights @ (covariance.diagonal(dim1=1, dim2=2) + (mean - means).square())
    moments = {"step": moments_of(log_step.exp(), weights), "increments": (means, variances.sqrt())}
    return FitTarget(model, (data.float(),), moments, evidence)


def sparse_means() -> FitTarget:
    """Eight means, each with a half-Cauchy scale of its own: 16 latents, spikes and heavy tails."""
    data = torch.tensor([0.1, -0.4, 0.8, -1.2, 0.3, 6.0, -0.7, 2.0]).double()

    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            scale = pyro.sample("scale", dist.HalfCauchy(0.3))
            mean = pyro.sample("mean", dist.Normal(0.0, scale))
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    means, sds, evidence = [], [], 0.0
    for y in data:

        def log_density(log_scale: Tensor, y: Tensor = y) -> Tensor:
            scale = log_scale.exp()
            prior = math.log(2 / math.pi / 0.3) - torch.log1p((scale / 0.3) ** 2)
            return dist.Normal(0.0, (1 + scale**2).sqrt()).log_prob(y) + prior + log_scale

        (log_scale,), weights, part = grid(log_density, (-25.0, 25.0, 100_000))
        share = 1 / (1 + (-2 * log_scale).exp())
        mean = weights @ (share * y)
        means.append(mean)
        sds.append((weights @ (share + (share * y - mean).square())).sqrt())
        evidence += part
    return FitTarget(model, (data.float(),), {"mean": (torch.stack(means), torch.stack(sds))}, evidence)


def survival() -> FitTarget:
    """Weibull lifetimes, half of them censored."""
    times = 2 * (-torch.rand(24, generator=torch.Generator().manual_seed(50)).double().log()) ** (1 / 1.5)
    seen = times < 1.6
    times = times.clamp(max=1.6)

    def log_likelihood(shape: Tensor, scale: Tensor, times: Tensor, seen: Tensor) -> Tensor:
        ratio = times.log() - scale.log()
        hazard = shape.log() - scale.log() + (shape - 1) * ratio
        return torch.where(seen, hazard, 0.0) - (shape * ratio).exp()

    def model(times: Tensor, seen: Tensor) -> None:
        shape = pyro.sample("shape", dist.Gamma(2.0, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
        with pyro.plate("data", len(times)):
            pyro.factor("times", log_likelihood(shape, scale, times, seen))

    def log_density(log_shape: Tensor, log_scale: Tensor) -> Tensor:
        shape, scale = log_shape.exp(), log_scale.exp()
        likelihood = log_likelihood(shape.unsqueeze(-1), scale.unsqueeze(-1), times, seen).sum(-1)
        prior = dist.Gamma(2.0, 1.0).log_prob(shape) + log_shape
        return likelihood + prior + dist.Normal(0.0, 2.0).log_prob(log_scale)

    (a, b), weights, evidence = grid(log_density, (-1.5, 2.0, 600), (-1.5, 5.0, 600))
    moments = {"shape": moments_of(a.exp(), weights), "scale": moments_of(b.exp(), weights)}
    return FitTarget(model, (times.float(), seen), moments, evidence)
