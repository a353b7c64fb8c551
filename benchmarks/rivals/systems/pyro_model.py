"""A target as a Pyro model: one site of the prior's distribution, and its likelihood as a factor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from ..namespaces import NAMESPACES
from ..targets import Target

__all__ = ["PyroModel"]

XP = NAMESPACES["torch"]()


class _Prior(TorchDistribution):
    """The prior of a target."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector

    def __init__(self, target: Target, batch_shape: Sequence[int] = ()) -> None:
        self.target = target
        super().__init__(torch.Size(batch_shape), torch.Size([target.dim]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Prior:
        return _Prior(self.target, batch_shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape + self.event_shape
        normal = torch.randn(shape).double().numpy().reshape(-1, self.target.dim)
        return torch.as_tensor(self.target.from_normal(normal), dtype=torch.get_default_dtype()).reshape(
            shape
        )

    def log_prob(self, value: Tensor) -> Tensor:
        return self.target.log_prior(XP, value).expand(value.shape[:-1])


class PyroModel:
    """The model, which counts evaluations of the density and those with gradient."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.num_densities = self.num_gradients = 0

    def __call__(self) -> None:
        """Run the model."""
        z = pyro.sample("z", _Prior(self.target))
        num_points = int(np.prod(z.shape[:-1]))
        if z.requires_grad:
            self.num_gradients += num_points
        else:
            self.num_densities += num_points
        # As `pyro.factor`, but a draw whose trajectory overflows is no error of the whole batch.
        factor = dist.Unit(self.target.log_likelihood(XP, z), validate_args=False)
        pyro.sample("likelihood", factor, obs=factor.sample(), infer={"is_auxiliary": True})
