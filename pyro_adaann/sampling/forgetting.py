"""Have particles forgotten where they were before their moves?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["correlation", "have_forgotten"]


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
