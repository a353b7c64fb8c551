"""Truth by importance sampling from a mixture of Student t distributions that was fitted beforehand.

`python -m benchmarks.rivals.targets.reference NAME` fits the mixture and stores it in
``reference/NAME.json``; here it is only weighed. The number of draws and the effective sample size are part
of what is told.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..namespaces import NAMESPACES
from .base import Array, Target, Truth

__all__ = ["DOF", "REFERENCE", "StudentMixture", "importance_truth"]

REFERENCE = Path(__file__).resolve().parent / "reference"
#: Degrees of freedom: tails that are heavier than those of any target here.
DOF = 7.0


class StudentMixture:
    """A mixture of multivariate Student t distributions with ``DOF`` degrees of freedom.

    :param weights: shape ``(k,)``.
    :param locs: shape ``(k, dim)``.
    :param covariances: of the normal distributions whose tails are widened, shape ``(k, dim, dim)``.
    """

    def __init__(self, weights: Any, locs: Any, covariances: Any) -> None:
        self.weights, self.locs = np.asarray(weights, float), np.asarray(locs, float)
        self.covariances = np.asarray(covariances, float)
        self.factors = np.linalg.cholesky(self.covariances)

    def draw(self, rng: np.random.Generator, n: int) -> Array:
        """Return ``n`` draws, shape ``(n, dim)``."""
        kind = rng.choice(len(self.weights), size=n, p=self.weights)
        normal = np.einsum("nij,nj->ni", self.factors[kind], rng.standard_normal((n, self.locs.shape[1])))
        return np.asarray(self.locs[kind] + normal * np.sqrt(DOF / rng.chisquare(DOF, (n, 1))))

    def log_components(self, z: Array) -> Array:
        """Return weighted log densities of the components, shape ``(n, k)``."""
        dim = z.shape[-1]
        constant = math.lgamma((DOF + dim) / 2) - math.lgamma(DOF / 2) - dim / 2 * math.log(DOF * math.pi)
        parts = []
        for weight, loc, factor in zip(self.weights, self.locs, self.factors, strict=True):
            white = np.linalg.solve(factor, (z - loc).T)
            log_det = np.log(np.diagonal(factor)).sum()
            kernel = -(DOF + dim) / 2 * np.log1p((white**2).sum(0) / DOF)
            parts.append(math.log(weight) + constant - log_det + kernel)
        return np.stack(parts, axis=1)

    def log_density(self, z: Array) -> Array:
        """Return log densities, shape ``(n,)``."""
        parts = self.log_components(z)
        highest = parts.max(1)
        return np.asarray(highest + np.log(np.exp(parts - highest[:, None]).sum(1)))


def importance_truth(
    name: str,
    target: Target,
    num_draws: int = 40_000,
    shares: Array | None = None,
    regions: Callable[[Array], Any] | None = None,
) -> Truth:
    """Return the truth by the mixture stored under a name."""
    stored = json.loads((REFERENCE / f"{name}.json").read_text())
    proposal = StudentMixture(stored["weights"], stored["locs"], stored["covariances"])
    z = proposal.draw(np.random.default_rng(20260101), num_draws)
    xp = NAMESPACES["numpy"]()
    with np.errstate(over="ignore", invalid="ignore"):
        log_p = np.asarray(target.log_density(xp, z))
    log_weights = np.where(np.isfinite(log_p), log_p, -np.inf) - proposal.log_density(z)
    highest = log_weights.max()
    weights = np.exp(log_weights - highest)
    log_evidence = float(highest + math.log(weights.mean()))
    weights /= weights.sum()
    ess = 1 / (weights**2).sum()
    mean = weights @ z
    sd = np.sqrt(weights @ (z - mean) ** 2)

    def draw(rng: np.random.Generator, n: int) -> Array:
        return z[rng.choice(num_draws, size=n, p=weights)]

    how = f"importance sampling, {ess:,.0f} effective of {num_draws:,} draws"
    return Truth(draw, log_evidence, mean, sd, how, shares, regions)
