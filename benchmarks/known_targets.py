"""Densities with exactly known modes, weights and evidence, in 2 to 20 latent variables.

Each is a mixture whose components have the given weights and far less than a thousandth of their mass on
the other side of the boundary between them, so the weight of a mode is that of its component.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


@dataclass(frozen=True)
class Target:
    """A density in closed form.

    :param log_components: log densities of the components at ``z`` of shape ``(..., dim)``, weights
        left out, shape ``(..., num_modes)``.
    :param weights: of the components.
    :param dim: number of latent variables.
    :param base_scale: a base scale that covers the modes.
    """

    log_components: Callable[[Tensor], Tensor]
    weights: tuple[float, ...]
    dim: int
    base_scale: float
    log_evidence: float = 0.0

    def model(self) -> None:
        flat = dist.Normal(torch.zeros(self.dim), self.base_scale).to_event(1).mask(False)
        z = pyro.sample("z", flat)
        log_weights = torch.tensor(self.weights).log()
        pyro.factor("density", (self.log_components(z) + log_weights).logsumexp(-1))

    def mode(self, z: Tensor) -> Tensor:
        """Return the number of the mode that every point belongs to."""
        return (self.log_components(z) + torch.tensor(self.weights).log()).argmax(-1)


def _normals(locs: Tensor, sds: Tensor) -> Callable[[Tensor], Tensor]:
    """Normal components with locations ``(num_modes, dim)`` and one sd each."""

    def log_components(z: Tensor) -> Tensor:
        distance = ((z.unsqueeze(-2) - locs) / sds.unsqueeze(-1)).square().sum(-1)
        return -0.5 * distance - locs.shape[-1] * (sds.log() + 0.9189385332)

    return log_components


def _two(dim: int, separation: float, sd: float) -> Callable[[Tensor], Tensor]:
    """Two normal components on the diagonal, so many sds apart."""
    half = torch.full((dim,), separation * sd / 2 / dim**0.5)
    return _normals(torch.stack([-half, half]), torch.tensor([sd, sd]))


def _bananas(z: Tensor) -> Tensor:
    """Two curved ridges, one above the other and bent away from it."""
    x, y = z.unbind(-1)
    across = dist.Normal(0.0, 1.0).log_prob(x)
    ridge = dist.Normal(1.5 + 0.5 * x.square(), 0.3)
    mirrored = dist.Normal(-1.5 - 0.5 * x.square(), 0.3)
    return torch.stack([across + ridge.log_prob(y), across + mirrored.log_prob(y)], dim=-1)


def _four() -> Callable[[Tensor], Tensor]:
    locs = torch.tensor([[-2.0, -2.0], [2.0, -2.0], [-2.0, 2.0], [2.0, 2.0]])
    return _normals(locs, torch.full((4,), 0.5))


TARGETS = {
    "two modes, 2-D, 8 sd": Target(_two(2, 8.0, 0.5), (0.7, 0.3), 2, 3.0),
    "four modes, 2-D": Target(_four(), (0.4, 0.3, 0.2, 0.1), 2, 3.0),
    "wide and narrow, 3-D": Target(
        _normals(torch.tensor([[-1.5] * 3, [1.5] * 3]), torch.tensor([0.8, 0.25])), (0.7, 0.3), 3, 3.0
    ),
    "two bananas, 2-D": Target(_bananas, (0.7, 0.3), 2, 3.0),
    "two modes, 5-D, 6 sd": Target(_two(5, 6.0, 0.5), (0.7, 0.3), 5, 2.0),
    "two modes, 20-D, 8 sd": Target(_two(20, 8.0, 0.5), (0.7, 0.3), 20, 1.0),
}
