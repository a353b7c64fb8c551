"""Winsorizing draws, and a standard deviation that is robust to outliers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["median_and_reach", "standard_deviation", "winsorize"]

#: How far a winsorized draw may be from the median, in units of the median distance.
_MAX_DISTANCE = 50.0


def winsorize(draws: Tensor) -> Tensor:
    """Return draws of which none is further from the median than 50 times the median distance.

    Otherwise one trajectory that diverges would dominate the variance. The log density of a normal
    distribution reaches that far four times in a million draws in one dimension, and less often in
    more. Draws that are not finite stay as they are.
    """
    median, reach = median_and_reach(draws)
    if not 0 < reach < math.inf:
        return draws
    return torch.where(torch.isfinite(draws), draws.clamp(median - reach, median + reach), draws)


def median_and_reach(draws: Tensor) -> tuple[float, float]:
    """Return the median of the finite draws and 50 times their median distance from it.

    Draws further away are outliers. NaN for both if no draw is finite.

    Example::

        >>> median_and_reach(torch.tensor([1.0, 2.0, 3.0, 4.0, torch.nan, 1e9]))
        (3.0, 50.0)
    """
    finite = draws[torch.isfinite(draws)]
    if not finite.numel():
        return math.nan, math.nan
    median = float(finite.median())
    return median, _MAX_DISTANCE * float((finite - median).abs().median())


def standard_deviation(draws: Tensor, log_weights: Tensor | None = None) -> float | None:
    """Return the sd of the finite draws, winsorized, or None if they do not determine one.

    They do not with fewer than two finite draws, or a spread below the rounding errors of
    single-precision numbers of their size. Safe against overflow of the squares. With weights it is
    the sd under them, with the effective number of draws minus one in the denominator.
    """
    moved = winsorize(draws.double())
    is_finite = torch.isfinite(moved)
    if log_weights is not None:
        is_finite &= torch.isfinite(log_weights)
    finite = moved[is_finite]
    if finite.numel() < 2:
        return None
    size = float(finite.abs().max())
    if size == 0:
        return None
    if log_weights is None:
        relative = float((finite / size).std(correction=1))
    else:
        weights = log_weights[is_finite].double().softmax(0)
        spread = finite / size - weights @ (finite / size)
        # 1 - sum of squares is 1 - 1 / ess.
        correction = float(1 - weights.square().sum())
        relative = math.sqrt(float(weights @ spread.square()) / correction) if correction > 0 else 0.0
    return relative * size if relative > torch.finfo(torch.float32).eps else None
