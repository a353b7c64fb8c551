"""Nested sampling: dynesty and nautilus, with their defaults, over the prior's transform of the unit cube."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from ..namespaces import NAMESPACES
from ..targets import Target
from .base import Counter, Outcome

__all__ = ["run_dynesty", "run_nautilus"]


def _from_cube(target: Target, cube: NDArray[np.float64]) -> NDArray[np.float64]:
    normal = ndtri(np.clip(np.atleast_2d(cube), 1e-15, 1 - 1e-15))
    return target.from_normal(normal).reshape(cube.shape)


def _log_likelihood(target: Target) -> Counter:
    xp = NAMESPACES["numpy"]()
    return Counter(lambda z: np.asarray(target.log_likelihood(xp, z)))


def run_nautilus(target: Target, seed: int) -> Outcome:
    """2,000 live points, 10,000 effective draws, one likelihood call for many points."""
    from nautilus import Sampler

    log_likelihood = _log_likelihood(target)

    def floored(z: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.maximum(log_likelihood(z), -1e300)  # it takes no -inf

    sampler = Sampler(
        lambda cube: _from_cube(target, cube), floored, n_dim=target.dim, vectorized=True, seed=seed
    )
    sampler.run(verbose=False)
    points, log_weights, _ = sampler.posterior()
    error = 1 / np.sqrt(sampler.n_eff)
    return Outcome(
        points, log_weights, float(sampler.log_z), float(error), num_densities=log_likelihood.count
    )


def run_dynesty(target: Target, seed: int) -> Outcome:
    """500 live points, the static sampler."""
    from dynesty import NestedSampler

    log_likelihood = _log_likelihood(target)

    def floored(z: NDArray[np.float64]) -> float:
        return max(float(log_likelihood(z)), -1e300)

    sampler = NestedSampler(
        floored,
        lambda cube: _from_cube(target, cube),
        target.dim,
        rstate=np.random.default_rng(seed),
    )
    sampler.run_nested(print_progress=False)
    found = sampler.results
    return Outcome(
        found.samples,
        found.logwt - found.logz[-1],
        float(found.logz[-1]),
        float(found.logzerr[-1]),
        num_densities=log_likelihood.count,
    )
