r"""Modes of two samples of a posterior, and the share of either sample in each.

A region is split where one of its samples, in one latent number, is sparse between two dense parts. Density
is one over the width of m neighbors, with a relative error of :math:`1 / \sqrt m` in tails as in the bulk;
sparse is a width of three times the least on either side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_adaann.weights import grouped_mean

__all__ = ["ModeShare", "find_modes"]

#: How much wider neighbors are between two modes than in the modes.
_RATIO = 3.0
#: Neighbors of a density, at least, and as a share of the sample.
_NUM_NEIGHBORS, _NEIGHBOR_SHARE = 20, 1 / 30
_MAX_MODES = 8
#: Draws of either sample that are looked at.
_NUM_DRAWS = 2000
#: Differences of shares below this, or this many standard errors, are not worth a word.
_MATTERS, _SIGNIFICANT = 0.05, 5.0


@dataclass(frozen=True)
class ModeShare:
    """The share of the posterior in one region, as the guide and as particles have it.

    :param where: the region, as inequalities; empty if it is everything.
    :param guide: share of the guide's draws.
    :param particles: share of the particles' weight.
    :param error: standard error of the difference.
    """

    where: str
    guide: float
    particles: float
    error: float

    @property
    def matters(self) -> bool:
        """Whether the shares differ by more than noise and enough for a word."""
        return abs(self.guide - self.particles) > max(_MATTERS, _SIGNIFICANT * self.error)

    def __str__(self) -> str:
        return f"{self.where}: {self.guide:.0%} of the guide's draws, {self.particles:.0%} of the particles"


def find_modes(
    labels: Sequence[str], guide: Tensor, particles: Tensor, log_weights: Tensor, num_groups: int
) -> tuple[ModeShare, ...]:
    """Return the modes of either sample, one region if neither has more than one.

    :param labels: names of the latent numbers.
    :param guide: draws of equal weight, shape ``(n, dim)``.
    :param particles: draws, shape ``(m, dim)``.
    :param log_weights: of the particles, ``(m,)``.
    :param num_groups: of particles in a row that are independent of each other, for the error of a share.

    Example::

        >>> z = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))
        >>> both = torch.where(torch.arange(1000).unsqueeze(-1) % 4 > 0, z + 5.0, z - 5.0)
        >>> for mode in find_modes(["z"], z - 5.0, both, torch.zeros(1000), 10):
        ...     print(mode.where.split(" ")[:2], mode.guide, round(mode.particles, 2), mode.matters)
        ['z', '<'] 1.0 0.25 True
        ['z', '>'] 0.0 0.75 True
    """
    weights = log_weights.double().softmax(0)
    regions = _regions([_even(particles.double(), weights), _thinned(guide.double())])
    modes = []
    for region in regions:
        inside = region.contains(guide)
        share = float(inside.double().mean())
        got, error = map(float, grouped_mean(region.contains(particles), weights, num_groups))
        noise = math.sqrt(share * (1 - share) / len(guide))
        modes.append(ModeShare(region.name(labels), share, got, math.hypot(error, noise)))
    return tuple(modes)


@dataclass(frozen=True)
class _Region:
    """Points with ``low < x <= high``, two vectors."""

    low: Tensor
    high: Tensor

    def contains(self, x: Tensor) -> Tensor:
        return ((x > self.low) & (x <= self.high)).all(-1)

    def halves(self, column: int, cut: float) -> list[_Region]:
        low, high = self.low.clone(), self.high.clone()
        low[column], high[column] = cut, cut
        return [_Region(self.low, high), _Region(low, self.high)]

    def name(self, labels: Sequence[str]) -> str:
        words = []
        for label, low, high in zip(labels, self.low.tolist(), self.high.tolist(), strict=True):
            if low > -math.inf and high < math.inf:
                words.append(f"{low:.3g} < {label} < {high:.3g}")
            elif low > -math.inf:
                words.append(f"{label} > {low:.3g}")
            elif high < math.inf:
                words.append(f"{label} < {high:.3g}")
        return " and ".join(words)


def _regions(samples: list[Tensor]) -> list[_Region]:
    """Split all of space as long as a sample has a valley in a region."""
    all_space = samples[0].new_full((samples[0].shape[-1],), math.inf)
    waiting, done = [_Region(-all_space, all_space)], list[_Region]()
    while waiting:
        region = waiting.pop(0)
        cut = None
        if len(waiting) + len(done) + 1 < _MAX_MODES:
            found = (_valley(sample[region.contains(sample)]) for sample in samples)
            cut = next((valley for valley in found if valley is not None), None)
        if cut is None:
            done.append(region)
        else:
            waiting += region.halves(*cut)
    return done


def _valley(x: Tensor) -> tuple[int, float] | None:
    """Return the column with the deepest valley and where it is deepest, or None."""
    m = max(_NUM_NEIGHBORS, round(_NEIGHBOR_SHARE * len(x)))
    if len(x) < 3 * m + 1:
        return None
    x = x.sort(dim=0).values
    width = x[m:] - x[:-m]
    left = width.cummin(dim=0).values[: -2 * m]
    right = width.flip(0).cummin(dim=0).values.flip(0)[2 * m :]
    ratio = torch.nan_to_num(width[m:-m] / torch.maximum(left, right), nan=0.0)
    flat = int(ratio.argmax())
    row, column = divmod(flat, x.shape[-1])
    if float(ratio[row, column]) < _RATIO:
        return None
    between = x[row + m : row + 2 * m + 1, column]
    widest = int(between.diff().argmax())
    return column, float((between[widest] + between[widest + 1]) / 2)


def _even(x: Tensor, weights: Tensor) -> Tensor:
    """Return draws of equal weight, each point as often as its weight says, rounded."""
    num = min(len(x), _NUM_DRAWS)
    at = (torch.arange(num, device=x.device, dtype=torch.float64) + 0.5) / num
    return x[torch.searchsorted(weights.cumsum(0), at).clamp(max=len(x) - 1)]


def _thinned(x: Tensor) -> Tensor:
    return x[:: max(1, -(-len(x) // _NUM_DRAWS))]
