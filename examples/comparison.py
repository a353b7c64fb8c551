r"""How far a fitted density is from an exact one with two modes that can be computed everywhere.

With q the fit, p the exact density and :math:`w = p / q`:

* the share of the first mode, from draws of q: as they are, and with the importance weights w, which put
  the share right as long as q has both modes;
* total variation :math:`\tfrac12 \int |q - p|` and :math:`\mathrm{KL}(p \| q) = \int p \log(p / q)`, by
  quadrature on a grid that holds all of p. What q has outside the grid counts as wrong. A lost mode makes KL
  large: how large says little;
* the effective sample size :math:`(\sum w)^2 / \sum w^2` as a share of the draws, the log evidence
  :math:`\log \bar w` (exact: that of p) and the ELBO :math:`\overline{\log w}`, from draws of q.
  None of the three can see a mode that q has lost: the evidence is then that of the other one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["Comparison", "Target", "compare", "make_grid"]

#: A mode is captured if the fit gives it at least a tenth of its weight of one half.
MIN_SHARE = 0.05


class Target(Protocol):
    """An exact density on R^d with two modes of weight one half."""

    def log_density(self, z: Tensor) -> Tensor:
        """Return the log density, normalized, of points ``(n, d)``."""

    def is_first_mode(self, z: Tensor) -> Tensor:
        """Return which points ``(n, d)`` are on the first mode's side."""

    def grid(self) -> tuple[Tensor, float]:
        """Return points ``(n, d)`` of a grid around both modes, and the volume of a cell."""


@dataclass(frozen=True)
class Comparison:
    """What the module's text defines; ``ess`` is a share of the draws."""

    first_mode: float
    weighted_first_mode: float
    total_variation: float
    kl: float
    ess: float
    log_evidence: float
    elbo: float

    @property
    def is_captured(self) -> bool:
        """Whether both modes have at least a tenth of their weight."""
        return MIN_SHARE <= self.first_mode <= 1 - MIN_SHARE

    def __str__(self) -> str:
        return (
            f"{'both modes' if self.is_captured else 'one mode'}, weights {self.first_mode:.3f} and "
            f"{1 - self.first_mode:.3f} (exact: 0.5; the first one with importance weights: "
            f"{self.weighted_first_mode:.3f}); total variation {self.total_variation:.3f}, log evidence "
            f"{self.log_evidence:+.4f} (exact: 0), effective sample size {self.ess:.3f} of the draws"
        )


def make_grid(bounds: list[tuple[float, float]], spacing: float) -> tuple[Tensor, float]:
    """Return the points ``(n, d)`` of a grid with a given spacing, and the volume of a cell."""
    axes = [torch.arange(low, high + spacing, spacing, dtype=torch.float64) for low, high in bounds]
    points = torch.cartesian_prod(*axes).reshape(-1, len(axes))
    return points, spacing ** len(axes)


@torch.no_grad()
def compare(posterior: dist.TorchDistribution, target: Target, num_draws: int = 20_000) -> Comparison:
    """Compare a fitted density, with ``log_prob`` at any point, to the exact one."""
    draws = posterior.sample(torch.Size([num_draws]))
    log_weights = (target.log_density(draws) - posterior.log_prob(draws)).double()
    log_sum, log_sum_squares = (torch.logsumexp(k * log_weights, 0).item() for k in (1, 2))

    grid, volume = target.grid()
    log_p = target.log_density(grid)
    log_q = posterior.log_prob(grid.to(draws)).double()
    p, q = log_p.exp(), log_q.exp()
    outside = max(1 - float(q.sum()) * volume, 0.0)
    is_first = target.is_first_mode(draws).double()
    return Comparison(
        first_mode=float(is_first.mean()),
        weighted_first_mode=float(log_weights.softmax(0) @ is_first),
        total_variation=0.5 * (float((q - p).abs().sum()) * volume + outside),
        kl=float((p * (log_p - log_q)).sum()) * volume,
        ess=math.exp(2 * log_sum - log_sum_squares) / num_draws,
        log_evidence=log_sum - math.log(num_draws),
        elbo=float(log_weights.mean()),
    )
