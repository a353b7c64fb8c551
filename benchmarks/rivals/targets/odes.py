"""Posteriors of differential equations: the AdaAnn paper's HIV and Lorenz, and two of predator and prey.

The equations, data and solver (RK4 by the 3/8 rule on a fixed grid) are those of this repository's examples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..namespaces import Namespace
from .base import Array, Formula, Target, log_normal, normal_prior, over_prior
from .importance import importance_truth

__all__ = ["hiv", "lorenz", "lotka_volterra", "lynx_hare"]

State = tuple[Any, ...]
DATA = Path(__file__).resolve().parent / "ode_data.json"
SOURCE = "Cobian et al., AdaAnn, arXiv 2202.00792"


def _solve(xp: Namespace, rhs: Callable[[State], State], start: State, step: float, num_steps: int) -> State:
    """Return all states after the first, each component stacked along a new first dimension."""

    def plus(state: State, *terms: tuple[float, State]) -> State:
        return tuple(
            y + step * sum(factor * slope[i] for factor, slope in terms) for i, y in enumerate(state)
        )

    def advance(state: State) -> State:
        a = rhs(state)
        b = rhs(plus(state, (1 / 3, a)))
        c = rhs(plus(state, (-1 / 3, a), (1.0, b)))
        d = rhs(plus(state, (1.0, a), (-1.0, b), (1.0, c)))
        return plus(state, (1 / 8, a), (3 / 8, b), (3 / 8, c), (1 / 8, d))

    return tuple(xp.scan(advance, start, num_steps))


def _sum_first(parts: Any) -> Any:
    return parts.sum(0)


def _column(xp: Namespace, data: Array, like: Any) -> Any:
    """Return data along the first dimension, for points of any batch shape."""
    return xp.array(data.reshape(-1, *[1] * like.ndim))


def hiv() -> Target:
    """Two mirrored curved modes of weight 1/2: production and death of cells, infected cells at the start."""
    data = np.array(json.loads(DATA.read_text())["hiv"])

    def log_density(xp: Namespace, z: Any) -> Any:
        p1, p2, start = z[..., 0], z[..., 1], z[..., 2]

        def rhs(state: State) -> State:
            x1, x2, x3 = state
            infection = 4.1 * x1 * x3
            return p1 - p2 * x1 - infection, infection - 10.2 * x2, 10.2 * p1 * x2 - 2.6 * x3

        virus = _solve(xp, rhs, (0.0 * p1, start, 0.0 * p1 + 1.0), 0.05, 40)[2]
        return _sum_first(log_normal(xp, virus, _column(xp, data, p1), math.sqrt(0.0005)))

    def regions(z: Array) -> np.ndarray:
        return (z[:, 0] > 0)[:, None]

    log_prior, from_normal = normal_prior(3, 0.0, 2.0)
    target = Target(
        3,
        log_prior,
        over_prior(log_density, log_prior),
        from_normal,
        lambda: importance_truth("hiv", target, shares=np.array([0.5]), regions=regions),
        SOURCE,
    )
    return target


def lorenz() -> Target:
    """A narrow mode nine sds of the start away: three parameters of the Lorenz system, noise variance .2."""
    data = np.array(json.loads(DATA.read_text())["lorenz"])

    def log_density(xp: Namespace, z: Any) -> Any:
        s, b, r = z[..., 0], z[..., 1], z[..., 2]

        def rhs(state: State) -> State:
            x1, x2, x3 = state
            return s * (x2 - x1), x1 * (r - x3) - x2, x1 * x2 - b * x3

        one = 0.0 * s + 1.0
        states = _solve(xp, rhs, (one, one, one), 0.025, 60)
        noise = math.sqrt(0.2)
        return sum(
            _sum_first(log_normal(xp, state[1::2], _column(xp, data[:, i], s), noise))
            for i, state in enumerate(states)
        )

    log_prior, from_normal = normal_prior(3, 10.0, 2.0)
    target = Target(
        3,
        log_prior,
        over_prior(log_density, log_prior),
        from_normal,
        lambda: importance_truth("lorenz", target),
        SOURCE,
    )
    return target


# Elton and Nicholson (1942), thousands of pelts, 1900 to 1920.
HARES = [30.0, 47.2, 70.2, 77.4, 36.3, 20.6, 18.1, 21.4, 22.0, 25.4, 27.1,
         40.3, 57.0, 76.6, 52.3, 19.5, 11.2, 7.6, 14.6, 16.2, 24.7]  # fmt: skip
LYNXES = [4.0, 6.1, 9.8, 35.2, 59.4, 41.7, 19.0, 13.0, 8.3, 9.1, 7.4,
          8.0, 12.3, 19.5, 45.7, 51.1, 29.7, 15.8, 9.7, 10.1, 8.6]  # fmt: skip
#: Priors of alpha, beta, gamma, delta, normal cut at 0; of the starts and the noise, lognormal.
RATE_LOCS, RATE_SCALES = np.array([1.0, 0.05, 1.0, 0.05]), np.array([0.5, 0.05, 0.5, 0.05])
LOG_LOCS, LOG_SCALES = np.array([math.log(10), math.log(10), -1.0, -1.0]), np.ones(4)


def _log_cut(loc: Array, scale: Array) -> Array:
    """Return the log probability of a normal distribution to be positive."""
    return np.array([math.log(0.5 * math.erfc(-x / math.sqrt(2))) for x in loc / scale])


def _lynx_prior() -> tuple[Formula, Callable[[Array], Array]]:
    log_cut = _log_cut(RATE_LOCS, RATE_SCALES)

    def log_prior(xp: Namespace, z: Any) -> Any:
        log_rates = z[..., :4]
        rates = log_normal(xp, xp.exp(log_rates), xp.array(RATE_LOCS), RATE_SCALES) - xp.array(log_cut)
        others = log_normal(xp, z[..., 4:], xp.array(LOG_LOCS), LOG_SCALES)
        return xp.sum(rates + log_rates) + xp.sum(others)

    def from_normal(u: Array) -> Array:
        from scipy.special import ndtr, ndtri

        below = ndtr(-RATE_LOCS / RATE_SCALES)
        rates = RATE_LOCS + RATE_SCALES * ndtri(below + (1 - below) * ndtr(u[:, :4]))
        return np.concatenate([np.log(np.maximum(rates, 1e-12)), LOG_LOCS + LOG_SCALES * u[:, 4:]], axis=1)

    return log_prior, from_normal


def _predation(xp: Namespace, rates: tuple[Any, ...]) -> Callable[[State], State]:
    """Return the slopes of the logs of prey and predators."""
    alpha, beta, gamma, delta = rates

    def rhs(state: State) -> State:
        prey, predators = state
        return alpha - beta * xp.exp(predators), -gamma + delta * xp.exp(prey)

    return rhs


def lynx_hare() -> Target:
    """Lotka-Volterra with real data: logs of four rates, of two starts, of two noise scales."""
    log_prior, from_normal = _lynx_prior()
    log_data = np.log(np.array([HARES, LYNXES]))

    def log_likelihood(xp: Namespace, z: Any) -> Any:
        rhs = _predation(xp, tuple(xp.exp(z[..., i]) for i in range(4)))
        total = 0.0
        paths = _solve(xp, rhs, (z[..., 4], z[..., 5]), 0.25, 80)
        for i, path in enumerate(paths):
            noise = xp.exp(z[..., 6 + i])
            log_first = log_normal(xp, z[..., 4 + i], xp.array(log_data[i, 0]), noise)
            later = log_normal(xp, path[3::4], _column(xp, log_data[i, 1:], noise), noise)
            total = total + log_first + _sum_first(later) - float(log_data[i].sum())
        return total

    target = Target(
        8,
        log_prior,
        log_likelihood,
        from_normal,
        lambda: importance_truth("lynx_hare", target),
        "Carpenter, Predator-Prey Population Dynamics: the Lotka-Volterra model in Stan (2018)",
    )
    return target


#: Prey and predators at 0, 2.1, ..., 18.9, the first observation of sbibm's task.
PREY = [31.783262, 1.1971166, 0.29703617, 0.71145046, 2.9415865,
        11.482614, 36.09036, 0.46229604, 0.38081983, 0.9173736]  # fmt: skip
PREDATORS = [0.8910395, 27.039942, 4.356176, 0.78444487, 0.17100818,
             0.1325878, 8.727008, 16.97251, 2.7902339, 0.47567415]  # fmt: skip


def lotka_volterra() -> Target:
    """Lotka-Volterra of sbibm: logs of four rates from twenty noisy numbers, with spikes between them."""
    log_data = np.log(np.array([PREY, PREDATORS]))
    log_prior, from_normal = normal_prior(4, [-0.125, -3.0, -0.125, -3.0], 0.5)
    start, noise = (math.log(30.0), 0.0), 0.1

    def log_likelihood(xp: Namespace, z: Any) -> Any:
        rhs = _predation(xp, tuple(xp.exp(z[..., i]) for i in range(4)))
        zero = 0.0 * z[..., 0]
        total = zero
        for i, path in enumerate(_solve(xp, rhs, (zero + start[0], zero + start[1]), 0.1, 189)):
            first = -0.5 * ((log_data[i, 0] - start[i]) / noise) ** 2 - math.log(
                noise * math.sqrt(2 * math.pi)
            )
            later = log_normal(xp, path[20::21], _column(xp, log_data[i, 1:], zero), noise)
            total = total + float(first - log_data[i].sum()) + _sum_first(later)
        return total

    target = Target(
        4,
        log_prior,
        log_likelihood,
        from_normal,
        lambda: importance_truth("lotka_volterra", target),
        "Lueckmann et al., Benchmarking Simulation-Based Inference, AISTATS 2021, task T.10, observation 1",
    )
    return target
