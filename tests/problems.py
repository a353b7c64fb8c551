"""Models whose posteriors are known, in closed form or by quadrature."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_adaann import AutoFlow, AutoPlanar, AutoRealNVP


@dataclass(frozen=True)
class ConjugateNormal:
    """z ~ N(0, prior_sd^2) per dimension, x_i ~ N(z, noise_sd^2); independent dimensions."""

    data: Tensor  # (num_data, dim)
    prior_sd: float = 2.0
    noise_sd: float = 0.5

    @property
    def dim(self) -> int:
        return self.data.shape[-1]

    def model(self) -> None:
        prior = dist.Normal(torch.zeros(self.dim), self.prior_sd).to_event(1)
        z = pyro.sample("z", prior)
        with pyro.plate("data", len(self.data), dim=-1):
            pyro.sample("x", dist.Normal(z, self.noise_sd).to_event(1), obs=self.data)

    def log_prior(self, z: Tensor) -> Tensor:
        return dist.Normal(0.0, self.prior_sd).log_prob(z).sum(-1)

    def log_likelihood(self, z: Tensor) -> Tensor:
        noise = dist.Normal(z.unsqueeze(-2), self.noise_sd)
        return noise.log_prob(self.data).sum((-1, -2))

    def tempered(self, path: str, t: float, base: tuple[float, float]) -> tuple[Tensor, float]:
        """Mean (dim,) and sd of the tempered posterior; ``base`` is the guide's (loc, scale)."""
        prior = 1 / self.prior_sd**2
        likelihood = len(self.data) / self.noise_sd**2
        shift = self.data.sum(0) / self.noise_sd**2
        if path == "joint":
            precision, shift = t * (prior + likelihood), t * shift
        elif path == "likelihood":
            precision, shift = prior + t * likelihood, t * shift
        elif path == "kl_warmup":
            precision, shift = prior + likelihood / t, shift / t
        else:
            loc, scale = base
            precision = (1 - t) / scale**2 + t * (prior + likelihood)
            shift = (1 - t) * loc / scale**2 + t * shift
        return shift / precision, precision**-0.5


def conjugate_normal(dim: int = 2) -> ConjugateNormal:
    data = torch.linspace(-1.0, 2.0, 3 * dim).reshape(3, dim)
    return ConjugateNormal(data)


def half_cauchy_scale(data: Tensor) -> None:
    """A scale with a half-Cauchy prior: its tempered density is proper in log coordinates alone."""
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    with pyro.plate("rows", len(data), dim=-1):
        pyro.sample("x", dist.Normal(0.0, scale), obs=data)


#: Example 1 of the AdaAnn paper: modes at -2 +- sqrt(3), of equal weight, with evidence close to 1.
BIMODAL_CENTER = -2.0


def bimodal_log_density(z: Tensor) -> Tensor:
    return math.log(0.954) - ((z + 2) ** 2 - 3) ** 2


def bimodal() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 10.0).mask(False))
    pyro.factor("log_density", bimodal_log_density(z))


def mixture(data: Tensor) -> None:
    """Two components with a discrete assignment per datum, to be enumerated in the model."""
    locs = pyro.sample("locs", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    with pyro.plate("data", len(data), dim=-1):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
        loc = torch.where(k == 0, locs[..., 0], locs[..., 1])
        pyro.sample("x", dist.Normal(loc, 1.0), obs=data)


def mixture_log_joint(locs: Tensor, data: Tensor) -> Tensor:
    log_prior = dist.Normal(0.0, 3.0).log_prob(locs).sum(-1)
    components = dist.Normal(locs.unsqueeze(-2), 1.0).log_prob(data.unsqueeze(-1))
    weights = torch.tensor([0.3, 0.7]).log()
    return log_prior + torch.logsumexp(components + weights, -1).sum(-1)


def plated(data: Tensor, subsample_size: int | None = None) -> None:
    """Global and local latents, positive and bounded supports, a vector site, optional subsampling."""
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("rows", len(data), dim=-1, subsample_size=subsample_size) as index:
        mean = slope.sum(-1) + weights[..., 0]
        pyro.sample("x", dist.Normal(mean, scale), obs=data[index])


def agreeing_guide(problem: ConjugateNormal, path: str, t: float, flow: str) -> AutoFlow:
    """A guide that is the tempered posterior: its flow is the identity, all else in it free."""
    # On the bridge the base is part of the target, so it is a fixed point there.
    base = problem.tempered("joint", 1.0, (0.0, 1.0))
    loc, scale = problem.tempered(path, t, base) if path != "bridge" else base
    guide_type = AutoPlanar if flow == "planar" else AutoRealNVP
    guide = guide_type(problem.model, 4, base_loc=loc, base_scale=scale)
    guide.initialize()
    with torch.no_grad():
        for name, parameter in guide.named_parameters():
            if name.endswith(".u") or "weights.2" in name or "biases.2" in name:
                parameter.zero_()
    return guide
