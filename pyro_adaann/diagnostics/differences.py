"""Marginal by marginal: how draws of a guide differ from weighted particles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_adaann.weights import effective_sample_size, grouped_mean

__all__ = ["Difference", "compare_marginals"]

#: Differences below these are not worth a word: in sds, as a ratio of sds, and as a share of the draws.
_MEAN, _SD, _SHARE = 0.15, 0.15, 0.1
#: In units of standard errors, of 15 degrees of freedom with 16 groups: by chance once in 6,000.
_SIGNIFICANT = 5.0


@dataclass(frozen=True)
class Difference:
    """One number of the posterior, as the guide and as sequential Monte Carlo have it.

    :param name: the site with its index.
    :param mean_shift: mean of the guide minus that of the particles, in the particles' sds.
    :param mean_error: its standard error.
    :param sd_ratio: sd of the guide over that of the particles.
    :param sd_error: standard error of its logarithm.
    :param share: largest difference between the two distribution functions.
    :param noise: what that would be by chance, its 99 % quantile roughly.
    :param where: the value at which it is.
    :param is_below: whether the guide has too little below that value, not above.
    """

    name: str
    mean_shift: float
    mean_error: float
    sd_ratio: float
    sd_error: float
    share: float
    noise: float
    where: float
    is_below: bool

    @property
    def matters(self) -> bool:
        """Whether it is more than noise and large enough for a word."""
        is_shifted = abs(self.mean_shift) > max(_MEAN, _SIGNIFICANT * self.mean_error)
        is_scaled = abs(math.log(max(self.sd_ratio, 1e-9))) > max(_SD, _SIGNIFICANT * self.sd_error)
        return is_shifted or is_scaled or self.share > max(_SHARE, self.noise)

    def __str__(self) -> str:
        side = "below" if self.is_below else "above"
        return (
            f"{self.name}: mean {self.mean_shift:+.2f} sd, sd x {self.sd_ratio:.2f}; the guide lacks "
            f"{self.share:.0%} of the draws, {side} {self.where:.3g}"
        )


def compare_marginals(
    labels: Sequence[str], guide: Tensor, particles: Tensor, log_weights: Tensor, num_groups: int
) -> tuple[Difference, ...]:
    """Return the differences of all latent numbers, the largest share first.

    :param labels: names of the latent numbers.
    :param guide: draws of equal weight, shape ``(n, dim)``.
    :param particles: draws, shape ``(m, dim)``.
    :param log_weights: of the particles, ``(m,)``.
    :param num_groups: of particles in a row that are independent of each other.
    """
    weights = log_weights.double().softmax(0)
    mean, mean_error = grouped_mean(particles, weights, num_groups)
    variance, variance_error = grouped_mean((particles - mean).square(), weights, num_groups)
    sd = variance.sqrt().clamp(min=1e-300)
    kept = weights > 0
    # Resampled particles share ancestors, so the effective number is at most that of the weights; a fifth
    # of it is cautious.
    noise = 1.63 * math.sqrt(1 / len(guide) + 5 / effective_sample_size(log_weights[kept]))
    differences = []
    for i, label in enumerate(labels):
        gap, where = _largest_gap(guide[:, i], particles[kept, i], weights[kept])
        differences.append(
            Difference(
                name=label,
                mean_shift=float((guide[:, i].mean() - mean[i]) / sd[i]),
                mean_error=math.hypot(float(mean_error[i] / sd[i]), 1 / math.sqrt(len(guide))),
                sd_ratio=float(guide[:, i].std() / sd[i]),
                sd_error=float(variance_error[i] / sd[i].square()) / 2,
                share=abs(gap),
                noise=noise,
                where=where,
                is_below=gap > 0,
            )
        )
    return tuple(sorted(differences, key=lambda difference: -difference.share))


def _largest_gap(guide: Tensor, particles: Tensor, weights: Tensor) -> tuple[float, float]:
    """Return the particles' distribution function minus the guide's where they differ most, and where."""
    points = torch.cat([guide, particles]).sort().values
    below_guide = torch.searchsorted(guide.sort().values, points, right=True) / len(guide)
    order = particles.argsort()
    total = torch.cat([weights.new_zeros(1), weights[order].cumsum(0)])
    below_particles = total[torch.searchsorted(particles[order].contiguous(), points, right=True)]
    gap = below_particles - below_guide
    at = int(gap.abs().argmax())
    return float(gap[at]), float(points[at])
