"""A posterior in closed form, for the tests of the laws."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["PRIOR_SD", "data", "model", "posterior"]

#: Standard deviations of the prior of each of two means, and of an observation.
PRIOR_SD, NOISE_SD = 2.0, 0.5


def data() -> Tensor:
    """Return the three observations of two means."""
    return torch.tensor([[-1.0, -0.4], [0.2, 0.8], [1.4, 2.0]])


def model() -> None:
    """Two means with normal priors, each observed three times."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), PRIOR_SD).to_event(1))
    with pyro.plate("data", 3, dim=-1):
        pyro.sample("x", dist.Normal(z, NOISE_SD).to_event(1), obs=data())


def posterior() -> tuple[Tensor, float]:
    """Return means and standard deviation of the posterior."""
    precision = 1 / PRIOR_SD**2 + 3 / NOISE_SD**2
    return data().sum(0) / NOISE_SD**2 / precision, precision**-0.5
