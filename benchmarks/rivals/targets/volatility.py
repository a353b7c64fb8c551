"""A stochastic volatility model: the last 100 returns of Inference Gym's series of the S&P 500.

Means and standard deviations are those of 50,000 draws of Stan that the wheel carries; they are of the
quantities of the model, which are functions of the unconstrained coordinates.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from scipy.special import expit, logit, ndtr

from ..namespaces import Namespace
from .base import Array, Target, Truth, log_normal
from .importance import REFERENCE

__all__ = ["stochastic_volatility"]

#: Of the beta distribution of (1 + persistence) / 2.
UP, DOWN = 20.0, 1.5
NUM_TIMES = 100


def _path(first: Any, noise: list[Any], persistence: Any) -> list[Any]:
    """Return the log volatilities of unit shocks."""
    path = [first]
    for shock in noise:
        path.append(persistence * path[-1] + shock)
    return path


def stochastic_volatility() -> Target:
    """Logit of (1 + persistence) / 2, mean log volatility, log of the shocks' scale, 100 standard shocks."""
    stored = json.loads((REFERENCE / "stochastic_volatility.json").read_text())
    returns = np.array(stored["returns"])

    def log_prior(xp: Namespace, z: Any) -> Any:
        log_up, log_down = -xp.softplus(-z[..., 0]), -xp.softplus(z[..., 0])
        constant = math.lgamma(UP + DOWN) - math.lgamma(UP) - math.lgamma(DOWN)
        log_persistence = constant + UP * log_up + DOWN * log_down
        log_mean = -xp.log1p((z[..., 1] / 5) ** 2) - math.log(5 * math.pi)
        scale = xp.exp(z[..., 2])
        log_scale = math.log(2 / (2 * math.pi)) - xp.log1p((scale / 2) ** 2) + z[..., 2]
        return log_persistence + log_mean + log_scale + xp.sum(log_normal(xp, z[..., 3:], 0.0, 1.0))

    def log_likelihood(xp: Namespace, z: Any) -> Any:
        # 1 - persistence^2 = 4 u (1 - u), exact also where the persistence is nearly one.
        log_up, log_down = -xp.softplus(-z[..., 0]), -xp.softplus(z[..., 0])
        persistence = 2 * xp.exp(log_up) - 1
        first = z[..., 3] * xp.exp(-0.5 * (math.log(4) + log_up + log_down))
        path = xp.stack(_path(first, [z[..., 3 + i] for i in range(1, NUM_TIMES)], persistence))
        log_volatility = z[..., 1:2] + xp.exp(z[..., 2:3]) * path
        return xp.sum(log_normal(xp, xp.array(returns), 0.0, xp.exp(log_volatility / 2)))

    def from_normal(u: Array) -> Array:
        from scipy.stats import beta

        share = np.clip(beta.ppf(ndtr(u[:, 0]), UP, DOWN), 1e-12, 1 - 1e-12)
        mean = 5 * np.tan(math.pi * (ndtr(u[:, 1]) - 0.5))
        scale = 2 * np.tan(0.5 * math.pi * ndtr(u[:, 2]))
        return np.column_stack([logit(share), mean, np.log(scale), u[:, 3:]])

    def quantities(z: Array) -> Array:
        persistence, scale = 2 * expit(z[:, 0]) - 1, np.exp(z[:, 2])
        first = z[:, 3] / np.sqrt(4 * expit(z[:, 0]) * expit(-z[:, 0]))
        path = np.stack(_path(first, list(z[:, 4:].T), persistence), axis=1)
        return np.column_stack([persistence, z[:, 1], scale, z[:, 1:2] + scale[:, None] * path])

    def truth() -> Truth:
        mean, sd = np.array(stored["mean"]), np.array(stored["sd"])
        return Truth(None, None, mean, sd, "50,000 draws of Stan", quantities=quantities)

    source = "Kim, Shephard and Chib, Review of Economic Studies 65 (1998); Inference Gym"
    return Target(3 + NUM_TIMES, log_prior, log_likelihood, from_normal, truth, source)
