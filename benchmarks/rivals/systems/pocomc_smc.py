"""pocoMC: sequential Monte Carlo preconditioned by a normalizing flow, with its defaults."""

from __future__ import annotations

import numpy as np
import pocomc
from numpy.typing import NDArray

from ..namespaces import NAMESPACES
from ..targets import Target
from .base import Counter, Outcome

__all__ = ["run"]


class _Prior:
    """What pocoMC asks of a prior."""

    def __init__(self, target: Target, seed: int) -> None:
        self.target, self.dim = target, target.dim
        self.bounds = np.array([[-np.inf, np.inf]] * target.dim)
        self.xp = NAMESPACES["numpy"]()
        self.rng = np.random.default_rng(seed)

    def logpdf(self, z: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(self.target.log_prior(self.xp, z))

    def rvs(self, size: int = 1) -> NDArray[np.float64]:
        return self.target.from_normal(self.rng.standard_normal((size, self.dim)))


def run(target: Target, seed: int) -> Outcome:
    """One likelihood call for all particles."""
    xp = NAMESPACES["numpy"]()
    log_likelihood = Counter(lambda z: np.asarray(target.log_likelihood(xp, z)))
    sampler = pocomc.Sampler(_Prior(target, seed), log_likelihood, vectorize=True, random_state=seed)
    sampler.run(progress=False)
    draws, weights, _, _ = sampler.posterior()
    log_evidence, error = sampler.evidence()
    with np.errstate(divide="ignore"):
        log_weights = np.log(weights)
    error = None if error is None else float(error)
    return Outcome(draws, log_weights, float(log_evidence), error, num_densities=log_likelihood.count)
