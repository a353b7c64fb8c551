"""What a target is: a density as prior times likelihood, and what is known of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..namespaces import Namespace

__all__ = ["LOG_2PI", "Array", "Formula", "Target", "Truth", "log_normal", "normal_prior", "over_prior"]

Array = NDArray[np.float64]
#: A function of a namespace and of points of shape ``(..., dim)``, with values of shape ``(...)``.
Formula = Callable[[Namespace, Any], Any]
LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class Truth:
    """What is known of a target, in the coordinates of its density.

    :param draw: exact draws, ``draw(rng, n)`` of shape ``(n, dim)``; None if there are none.
    :param log_evidence: log of the integral of prior times likelihood; None if it is not known.
    :param mean: means, nan for a coordinate that is not judged by moments; shape ``(dim,)``.
    :param sd: standard deviations, likewise.
    :param shares: probabilities of regions, shape ``(k,)``; none for a target of one region.
    :param regions: whether points ``(n, dim)`` are in each region, shape ``(n, k)``.
    :param how: how it is known, in a few words.
    :param quantities: what the moments are of, as a function of points ``(n, dim)``; by default these.
    """

    draw: Callable[[np.random.Generator, int], Array] | None
    log_evidence: float | None
    mean: Array
    sd: Array
    how: str
    shares: Array | None = None
    regions: Callable[[Array], NDArray[np.bool_]] | None = None
    quantities: Callable[[Array], Array] | None = None


@dataclass(frozen=True)
class Target:
    """A density on R^dim.

    :param dim: number of coordinates, all unconstrained.
    :param log_prior: log density of the prior, normalized; for a density without one, of the region in which
        a user would start.
    :param log_likelihood: the log density is the sum of both.
    :param from_normal: maps standard normal numbers ``(n, dim)`` to draws of the prior.
    :param truth: computes what is known.
    :param source: where the formula is published.
    """

    dim: int
    log_prior: Formula
    log_likelihood: Formula
    from_normal: Callable[[Array], Array]
    truth: Callable[[], Truth]
    source: str

    def log_density(self, xp: Namespace, z: Any) -> Any:
        """Return the log density at points of shape ``(..., dim)``."""
        return self.log_prior(xp, z) + self.log_likelihood(xp, z)

    def prior_draws(self, seed: int, num_draws: int) -> Array:
        """Return draws of the prior, shape ``(num_draws, dim)``."""
        return self.from_normal(np.random.default_rng(seed).standard_normal((num_draws, self.dim)))


def log_normal(xp: Namespace, x: Any, loc: Any, scale: Any) -> Any:
    """Return the log density of normal distributions, elementwise."""
    if isinstance(scale, float | int | np.ndarray):
        log_scale = xp.array(np.log(scale))
        scale = xp.array(scale)
    else:
        log_scale = xp.log(scale)
    return -0.5 * ((x - loc) / scale) ** 2 - log_scale - 0.5 * LOG_2PI


def normal_prior(
    dim: int, loc: float | Sequence[float], scale: float | Sequence[float]
) -> tuple[Formula, Callable[[Array], Array]]:
    """Return log density and transform of independent normal distributions."""
    locs = np.broadcast_to(np.asarray(loc, dtype=np.float64), (dim,)).copy()
    scales = np.broadcast_to(np.asarray(scale, dtype=np.float64), (dim,)).copy()

    def log_prior(xp: Namespace, z: Any) -> Any:
        return xp.sum(log_normal(xp, z, xp.array(locs), scales))

    return log_prior, lambda u: locs + scales * u


def over_prior(log_density: Formula, log_prior: Formula) -> Formula:
    """Return the log likelihood with which prior times likelihood is the given density."""
    return lambda xp, z: log_density(xp, z) - log_prior(xp, z)
