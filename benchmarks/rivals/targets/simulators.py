"""Simulators whose likelihoods have formulas, from the benchmark of simulation-based inference (sbibm).

Their priors are uniform on a box, here in coordinates z with theta = bound (2 sigmoid(z) - 1).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..namespaces import Namespace
from .base import LOG_2PI, Array, Formula, Target, Truth, log_normal
from .importance import importance_truth

__all__ = ["slcp", "two_moons"]

SOURCE = "Lueckmann et al., Benchmarking simulation-based inference, AISTATS 2021"


def _box() -> tuple[Formula, Any]:
    """Return log density and transform of the uniform distribution on a box, in unconstrained coordinates."""

    def log_prior(xp: Namespace, z: Any) -> Any:
        return -xp.sum(xp.softplus(z) + xp.softplus(-z))

    def from_normal(u: Array) -> Array:
        from scipy.special import log_ndtr

        return np.asarray(log_ndtr(u) - log_ndtr(-u))

    return log_prior, from_normal


def _theta(xp: Namespace, z: Any, bound: float) -> Any:
    return bound * xp.tanh(0.5 * z)  # 2 sigmoid(z) - 1


def two_moons() -> Target:
    """Two crescents, mirror images of each other, without mass outside of sharp edges; x = (0, 0)."""
    log_prior, from_normal = _box()

    def log_likelihood(xp: Namespace, z: Any) -> Any:
        theta = _theta(xp, z, 1.0)
        first, second = theta[..., 0], theta[..., 1]
        # The simulator: x = r (cos a, sin a) + (.25 - |first + second|, second - first) / (1, sqrt 2) ...
        across = xp.abs(first + second) / math.sqrt(2) - 0.25
        along = (first - second) / math.sqrt(2)
        # ... with a uniform on a half circle, that is, only to its right, and r ~ N(.1, .01^2).
        radius = xp.sqrt(across**2 + along**2 + 1e-30)
        log_ring = log_normal(xp, radius, 0.1, 0.01) - math.log(math.pi) - xp.log(radius)
        return xp.where(across > 0, log_ring, xp.array(-np.inf))

    def draw(rng: np.random.Generator, n: int) -> Array:
        angle = math.pi * (rng.random(n) - 0.5)
        radius = 0.1 + 0.01 * rng.standard_normal(n)
        sign = np.where(rng.random(n) < 0.5, -1.0, 1.0)
        total = sign * math.sqrt(2) * (radius * np.cos(angle) + 0.25)
        difference = math.sqrt(2) * radius * np.sin(angle)
        theta = np.stack([(total + difference) / 2, (total - difference) / 2], axis=1)
        return np.asarray(2 * np.arctanh(theta))

    def truth() -> Truth:
        # Moments by a fine product rule in angle and radius; both crescents lie within the box.
        angle = math.pi * ((np.arange(2000) + 0.5) / 2000 - 0.5)
        nodes, weights = np.polynomial.hermite_e.hermegauss(40)
        angles, radii = np.meshgrid(angle, 0.1 + 0.01 * nodes, indexing="ij")
        shares = np.broadcast_to(weights / weights.sum() / len(angle), angles.shape)
        total = math.sqrt(2) * (radii * np.cos(angles) + 0.25)
        difference = math.sqrt(2) * radii * np.sin(angles)
        moon = 2 * np.arctanh(np.stack([(total + difference) / 2, (total - difference) / 2]))
        # The other crescent has (first, second) replaced by (-second, -first).
        mean = (shares * moon).sum((1, 2))
        square = (shares * moon**2).sum((1, 2))
        means = (mean - mean[::-1]) / 2
        sds = np.sqrt((square + square[::-1]) / 2 - means**2)
        half = np.array([0.5])
        return Truth(draw, math.log(0.5), means, sds, "closed form", half, lambda z: (z.sum(1) > 0)[:, None])

    return Target(2, log_prior, log_likelihood, from_normal, truth, f"{SOURCE}: two moons")


#: Four points simulated at theta = (.7, -2.9, -1, -.9, .6), the parameters of Papamakarios et al. (2019), by
#: np.random.default_rng(0): loc + noise @ factor.T.
SLCP_TRUTH = np.array([0.7, -2.9, -1.0, -0.9, 0.6])


def slcp_data() -> Array:
    """Return the four observed points, shape ``(4, 2)``."""
    first, second, correlation = SLCP_TRUTH[2] ** 2, SLCP_TRUTH[3] ** 2, math.tanh(SLCP_TRUTH[4])
    noise = np.random.default_rng(0).standard_normal((4, 2))
    x = SLCP_TRUTH[0] + first * noise[:, 0]
    y = SLCP_TRUTH[1] + second * (correlation * noise[:, 0] + math.sqrt(1 - correlation**2) * noise[:, 1])
    return np.stack([x, y], axis=1)


def slcp() -> Target:
    """Simple likelihood, complex posterior: two means, two signed roots of sds, a correlation; four modes."""
    log_prior, from_normal = _box()
    data = slcp_data()

    def log_likelihood(xp: Namespace, z: Any) -> Any:
        theta = _theta(xp, z, 3.0)
        x = (xp.array(data[:, 0]) - theta[..., 0:1]) / theta[..., 2:3] ** 2
        y = (xp.array(data[:, 1]) - theta[..., 1:2]) / theta[..., 3:4] ** 2
        correlation = xp.tanh(theta[..., 4:5])
        log_scales = xp.log(theta[..., 2:3] ** 2) + xp.log(theta[..., 3:4] ** 2)
        rest = 1 - correlation**2
        quadratic = (x**2 - 2 * correlation * x * y + y**2) / rest
        return xp.sum(-0.5 * quadratic - 0.5 * xp.log(rest) - log_scales - LOG_2PI)

    def regions(z: Array) -> np.ndarray:
        right, up = z[:, 2] > 0, z[:, 3] > 0
        return np.stack([right & up, right & ~up, ~right & up, ~right & ~up], axis=1)

    target = Target(
        5,
        log_prior,
        log_likelihood,
        from_normal,
        lambda: importance_truth("slcp", target, 100_000, np.full(4, 0.25), regions),
        f"{SOURCE}: SLCP",
    )
    return target
