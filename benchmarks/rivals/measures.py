"""How far draws are from the truth."""

from __future__ import annotations

from typing import Any

import numpy as np

from .targets import Target, Truth
from .targets.base import Array

__all__ = ["LIMITS", "measure", "score", "sliced_wasserstein"]

#: What counts as right: log evidence in nats, shares, means in sds, sds relative.
LIMITS = {"evidence": 0.1, "share": 0.05, "mean": 0.1, "sd": 0.1}
#: Points and directions of the sliced Wasserstein distance.
NUM_POINTS, NUM_DIRECTIONS = 2000, 64


def resample(draws: Array, log_weights: Array, num_draws: int, rng: np.random.Generator) -> Array:
    """Return draws of equal weight by systematic resampling, in random order."""
    weights = np.exp(log_weights - log_weights.max())
    places = (rng.random() + np.arange(num_draws)) / num_draws
    index = np.searchsorted(weights.cumsum() / weights.sum(), places).clip(max=len(draws) - 1)
    return draws[rng.permutation(index)]


def sliced_wasserstein(x: Array, y: Array, seed: int = 0) -> float:
    """Return the mean 1-D Wasserstein distance over random directions; both sets have equally many points."""
    directions = np.random.default_rng(seed).standard_normal((x.shape[1], NUM_DIRECTIONS))
    directions /= np.linalg.norm(directions, axis=0)
    return float(np.abs(np.sort(x @ directions, axis=0) - np.sort(y @ directions, axis=0)).mean())


def wasserstein_ratio(draws: Array, log_weights: Array, truth: Truth) -> float | None:
    """Return the distance to exact draws as a multiple of that between two sets of exact draws.

    Coordinates are divided by their interquartile ranges. The floor is the mean of five pairs. None where no
    exact draws are to be had.
    """
    if truth.draw is None:
        return None
    rng = np.random.default_rng(0)
    exact = [truth.draw(rng, NUM_POINTS) for _ in range(6)]
    scale = np.subtract(*np.quantile(np.concatenate(exact), [0.75, 0.25], axis=0))
    floor = np.mean([sliced_wasserstein(exact[0] / scale, other / scale) for other in exact[1:]])
    points = resample(draws, log_weights, NUM_POINTS, rng)
    distance = np.mean([sliced_wasserstein(points / scale, other / scale) for other in exact])
    return float(distance / floor)


def measure(target: Target, truth: Truth, draws: Array, log_weights: Array) -> dict[str, Any]:
    """Return the largest errors of means (in sds), sds (relative) and shares, and the Wasserstein ratio."""
    finite = np.isfinite(draws).all(1) & np.isfinite(log_weights)
    if not finite.any():
        return {"mean": None, "sd": None, "share": None, "wasserstein": None}
    draws, log_weights = draws[finite], log_weights[finite]
    weights = np.exp(log_weights - log_weights.max())
    weights /= weights.sum()
    values = draws if truth.quantities is None else truth.quantities(draws)
    mean = weights @ values
    sd = np.sqrt(weights @ (values - mean) ** 2)
    judged = ~np.isnan(truth.mean)
    off = np.abs(mean - truth.mean)[judged] / truth.sd[judged]
    ratio = np.abs(sd / truth.sd - 1)[judged]
    share = None
    if truth.shares is not None and truth.regions is not None:
        share = float(np.abs(weights @ truth.regions(draws) - truth.shares).max())
    return {
        "mean": float(off.max()) if judged.any() else None,
        "sd": float(ratio.max()) if judged.any() else None,
        "share": share,
        "wasserstein": wasserstein_ratio(draws, log_weights, truth),
    }


def score(row: dict[str, Any]) -> float | None:
    """Return the worst error as a multiple of what counts as right; None for a cell without draws.

    A system that estimates no evidence is judged by its draws alone.
    """
    if row.get("mean") is None and row.get("share") is None:
        return None
    errors = [abs(row[name]) / limit for name, limit in LIMITS.items() if row.get(name) is not None]
    return max(errors)
