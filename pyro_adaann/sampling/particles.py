r"""Groups of weighted particles: weights, evidence and its error, systematic resampling.

n particles are split into G groups of M that are resampled apart from each other. With
:math:`v_i = e^{(t' - t) f_i}`, every change of temperature multiplies the evidence of a group by
:math:`\sum_i W_i v_i` and its weights by v. The mean over groups is the evidence, and their spread
its error:

.. math:: \hat Z = \frac1G \sum_g \hat Z_g, \qquad
          \mathrm{se}^2(\log \hat Z) \approx \frac{\sum_g (\hat Z_g - \hat Z)^2}{G (G - 1)} .

Each :math:`\hat Z_g` is unbiased if temperatures and moves do not depend on the particles.

Source: Del Moral, Doucet and Jasra, *Sequential Monte Carlo samplers*, JRSS B 68 (2006).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from pyro_adaann.sampling.target import Points

__all__ = ["Particles", "combine_evidences", "systematic_resampling"]


@dataclass(frozen=True)
class Particles:
    """Points in groups, with weights.

    :param points: n = G M of them, group after group.
    :param log_weights: within the groups, shape ``(G, M)``; minus infinity is no weight.
    :param log_evidences: of every group up to its last resampling, shape ``(G,)``.
    :param num_broken: how many particles have lost their weight because a log density was NaN or infinite.
    """

    points: Points
    log_weights: Tensor
    log_evidences: Tensor
    num_broken: int = 0

    @property
    def total_log_weights(self) -> Tensor:
        """Log weights of all particles together, shape ``(n,)``: groups count by their evidence."""
        return (self.log_weights + self.log_evidences.unsqueeze(-1)).reshape(-1)

    @property
    def group_log_evidences(self) -> Tensor:
        """Log evidence of every group, shape ``(G,)``."""
        num = self.log_weights.shape[-1]
        return self.log_evidences + self.log_weights.logsumexp(-1) - math.log(num)

    @property
    def ess(self) -> Tensor:
        """Effective number of particles in every group, shape ``(G,)``; 0 in one without weight."""
        log_ess = 2 * self.log_weights.logsumexp(-1) - (2 * self.log_weights).logsumexp(-1)
        return torch.nan_to_num(log_ess.exp(), nan=0.0)

    def reweight(self, log_increment: Tensor) -> Particles:
        """Multiply the weights; a log increment that is NaN or plus infinity breaks its particle.

        :param log_increment: shape ``(n,)``.
        """
        increment = log_increment.double().reshape(self.log_weights.shape)
        had_weight = self.log_weights > -torch.inf
        is_broken = had_weight & ~(increment < torch.inf)
        log_weights = torch.where(had_weight & ~is_broken, self.log_weights + increment, -torch.inf)
        return replace(self, log_weights=log_weights, num_broken=self.num_broken + int(is_broken.sum()))

    def resample(self, threshold: float, generator: Generator) -> tuple[Particles, int]:
        """Resample the groups whose effective share of particles is below a threshold; say how many.

        Afterwards their particles have equal weights; a group without any weight stays as it is.
        """
        num_groups, num = self.log_weights.shape
        ess = self.ess
        is_due = (ess < threshold * num) & (ess > 0)
        index = systematic_resampling(self.log_weights, generator)
        own = torch.arange(num, device=index.device).expand(num_groups, num)
        index = torch.where(is_due.unsqueeze(-1), index, own)
        flat = (index + num * torch.arange(num_groups, device=index.device).unsqueeze(-1)).reshape(-1)
        resampled = replace(
            self,
            points=self.points[flat.to(self.points.x.device)],
            log_weights=torch.where(is_due.unsqueeze(-1), 0.0, self.log_weights),
            log_evidences=torch.where(is_due, self.group_log_evidences, self.log_evidences),
        )
        return resampled, int(is_due.sum())


def systematic_resampling(log_weights: Tensor, generator: Generator) -> Tensor:
    """Return indices into every group: a particle of weight W comes M W times, rounded up or down.

    :param log_weights: shape ``(G, M)``.
    :return: shape ``(G, M)``; rows without weight hold arbitrary indices.
    """
    num_groups, num = log_weights.shape
    weights = torch.nan_to_num(log_weights.softmax(-1), nan=1.0)
    start = torch.rand(num_groups, 1, generator=generator, dtype=torch.float64, device="cpu").to(
        weights.device
    )
    points = (torch.arange(num, device=weights.device) + start) / num
    total = weights.cumsum(-1)
    return torch.searchsorted(total / total[:, -1:], points, right=True).clamp(max=num - 1)


def combine_evidences(log_evidences: Tensor) -> tuple[float, float]:
    """Return the log of the mean evidence of groups, and its standard error, NaN with one group.

    Example::

        >>> combine_evidences(torch.tensor([0.0, 0.0]).double())
        (0.0, 0.0)
    """
    num = len(log_evidences)
    mean = float(log_evidences.logsumexp(0)) - math.log(num)
    if num < 2:
        return mean, math.nan
    ratios = (log_evidences - mean).exp()
    return mean, float(ratios.std(correction=1)) / math.sqrt(num)
