r"""Have particles forgotten where they were before their moves, and do moves carry them all the same way?

Moves leave the tempered density as it is, so that on average they carry particles of it nowhere. Where they
raise or lower the log factor, stage after stage, the particles are not yet of that density: they lag behind,
as where it has a part that is entered slowly. The shift of a stage has a standard error, from its groups; the
shifts of several stages are added, and so are the squares of their errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["correlation", "drift", "have_forgotten", "shift"]

#: Over how many of the latest stages shifts are added, besides all of them.
_WINDOWS = (5, 10, 20)
#: Fewest groups for a standard error: that of two or three is often far too small.
_MIN_GROUPS = 8


def correlation(before: Tensor, after: Tensor, weights: Tensor) -> tuple[float, float]:
    """Return the correlation of the first feature, and the largest of the others.

    :param before: features of every particle, shape ``(n, 1 + dim)``.
    :param after: the same after the moves.
    :param weights: of the particles, shape ``(n,)``.
    """
    kept = (weights > 0) & torch.isfinite(before).all(-1) & torch.isfinite(after).all(-1)
    if not bool(kept.any()):
        return 1.0, 1.0
    share = (weights[kept] / weights[kept].sum()).unsqueeze(-1)
    a, b = before[kept], after[kept]
    a, b = a - (share * a).sum(0), b - (share * b).sum(0)
    scale = ((share * a.square()).sum(0) * (share * b.square()).sum(0)).sqrt()
    result = torch.nan_to_num((share * a * b).sum(0) / scale)
    return float(result[0]), float(result[1:].max())


def have_forgotten(correlations: Sequence[tuple[float, float]], limit: float) -> bool:
    """Return whether moves may end, by the correlations after every move of the log factor and the positions.

    Both are below the limit; or the log factor's is, and that of the positions falls no further: particles
    that stay in their modes remember these for ever, and more moves are no help.
    """
    if not correlations:
        return False
    log_factor, position = correlations[-1]
    if log_factor > limit:
        return False
    half = correlations[(len(correlations) - 1) // 2][1]
    return position <= limit or (len(correlations) >= 4 and position > 0.9 * half)


def shift(before: Tensor, after: Tensor, weights: Tensor, num_groups: int) -> tuple[float, float]:
    """Return by how many of its sds moves have shifted the mean of a number, and the standard error.

    :param before: the number for every particle, shape ``(n,)``.
    :param after: the same after the moves.
    :param weights: of the particles, shape ``(n,)``.
    :param num_groups: which the particles are divided into; the error is infinite with fewer than eight
        that have any weight, too few to tell.
    """
    kept = (weights > 0) & torch.isfinite(before) & torch.isfinite(after)
    share = torch.where(kept, weights, 0.0)
    share = share / share.sum()
    a, b = torch.where(kept, before, 0.0), torch.where(kept, after, 0.0)
    sd = (share * (a - (share * a).sum()).square()).sum().sqrt()
    by_group = share.reshape(num_groups, -1)
    total = by_group.sum(1)
    means = ((by_group * ((b - a) / sd).reshape(num_groups, -1)).sum(1) / total)[total > 0]
    if len(means) < _MIN_GROUPS or not bool(torch.isfinite(means).all()):
        return 0.0, math.inf
    return float(means.mean()), float(means.std()) / math.sqrt(len(means))


def drift(shifts: Sequence[tuple[float, float]]) -> float:
    """Return the sum of the latest shifts in its standard errors, the largest of several windows."""
    known = [each for each in shifts if 0 < each[1] < math.inf]
    sums = [0.0]
    for window in (*_WINDOWS, len(known)):
        latest = known[-window:]
        if latest:
            sums.append(sum(a for a, _ in latest) / math.sqrt(sum(b**2 for _, b in latest)))
    return max(sums, key=abs)
