"""Fit the proposals of the importance-sampled truths, and store them.

    python -m benchmarks.rivals.targets.reference [NAME ...]

From draws of a start the log density of the mixture is adapted by population Monte Carlo: draw, weigh, move
every component to the weighted moments of what it is responsible for. Source: Cappe et al., *Adaptive
importance sampling in general mixture classes*, Statistics and Computing 18 (2008).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize

from ..namespaces import NAMESPACES
from .base import Array, Target
from .bayesian import breast_cancer
from .importance import REFERENCE, StudentMixture
from .odes import hiv, lorenz, lotka_volterra, lynx_hare
from .simulators import slcp

__all__ = ["adapt", "main"]

NUM_DRAWS = 50_000


def _log_density(target: Target) -> Callable[[Array], Array]:
    xp = NAMESPACES["numpy"]()

    def log_density(z: Array) -> Array:
        with np.errstate(all="ignore"):
            values = np.asarray(target.log_density(xp, z))
        return np.where(np.isfinite(values), values, -1e300)

    return log_density


def _laplace(target: Target, start: Array) -> tuple[Array, Array]:
    """Return the mode next to a start and the inverse of the curvature there, by torch's gradients."""
    import torch

    xp = NAMESPACES["torch"]()
    torch.set_default_dtype(torch.float64)

    def negative(z: torch.Tensor) -> torch.Tensor:
        return -target.log_density(xp, z)

    def value_and_gradient(z: Array) -> tuple[float, Array]:
        point = torch.tensor(z, requires_grad=True)
        value = negative(point)
        (gradient,) = torch.autograd.grad(value, point)
        return float(value.detach()), gradient.numpy()

    mode = minimize(value_and_gradient, start, jac=True, method="BFGS").x
    hessian = torch.autograd.functional.hessian(negative, torch.tensor(mode)).numpy()
    return mode, np.linalg.inv((hessian + hessian.T) / 2)


def adapt(target: Target, mixture: StudentMixture, num_rounds: int = 15, seed: int = 0) -> StudentMixture:
    """Return the mixture after some rounds of draws, weights and moments."""
    log_density = _log_density(target)
    rng = np.random.default_rng(seed)
    for _ in range(num_rounds):
        z = mixture.draw(rng, NUM_DRAWS)
        parts = mixture.log_components(z)
        log_mixture = np.logaddexp.reduce(parts, axis=1)
        log_weights = log_density(z) - log_mixture
        # Truncated: no draw has more than a thousandth of what all have.
        weights = np.exp(log_weights - log_weights.max())
        weights = np.minimum(weights, max(weights.sum() / 1000, weights.mean() * math.sqrt(NUM_DRAWS)))
        ess = weights.sum() ** 2 / (weights**2).sum()
        print(f"effective {ess:,.0f} of {NUM_DRAWS:,}", flush=True)
        owned = np.exp(parts - log_mixture[:, None]) * (weights / weights.sum())[:, None]
        shares = owned.sum(0)
        kept = shares > 1e-3
        locs = (owned[:, kept].T @ z) / shares[kept][:, None]
        covariances = []
        for k, loc in zip(np.flatnonzero(kept), locs, strict=True):
            centered = z - loc
            covariance = (owned[:, k] / shares[k] * centered.T) @ centered
            covariances.append(covariance + 1e-6 * np.diag(np.diagonal(covariance)))
        mixture = StudentMixture(shares[kept] / shares[kept].sum(), locs, np.array(covariances))
    return mixture


def _around(target: Target, start: Array) -> StudentMixture:
    mode, covariance = _laplace(target, start)
    return StudentMixture([1.0], mode[None], 1.2 * covariance[None])


def _slcp_start(target: Target) -> StudentMixture:
    """Return forty components around draws of the prior, weighted by the likelihood to the power .3."""
    z = target.prior_draws(0, 400_000)
    log_likelihood = np.asarray(target.log_likelihood(NAMESPACES["numpy"](), z))
    log_likelihood = np.where(np.isfinite(log_likelihood), log_likelihood, -1e300)
    weights = np.exp(0.3 * (log_likelihood - log_likelihood.max()))
    rng = np.random.default_rng(0)
    chosen = z[rng.choice(len(z), 40, p=weights / weights.sum())]
    covariance = np.cov(z[rng.choice(len(z), 4000, p=weights / weights.sum())].T)
    return StudentMixture(np.full(40, 1 / 40), chosen, np.array([0.1 * covariance] * 40))


MAKERS: dict[str, Callable[[], StudentMixture]] = {
    "breast_cancer": lambda: adapt(t := breast_cancer(), _around(t, np.zeros(31))),
    "hiv": lambda: _mirrored(adapt(t := hiv(), _around(t, np.array([1.2, 0.8, 1.5])))),
    "lorenz": lambda: adapt(t := lorenz(), _around(t, np.array([10.0, 8 / 3, 28.0]))),
    "lynx_hare": lambda: adapt(
        t := lynx_hare(), _around(t, np.log([0.55, 0.028, 0.80, 0.024, 34.0, 5.9, 0.25, 0.25]))
    ),
    "lotka_volterra": lambda: adapt(
        t := lotka_volterra(), _around(t, np.log([0.6859, 0.1076, 0.8879, 0.1168]))
    ),
    "slcp": lambda: adapt(t := slcp(), _slcp_start(t), 40),
}


def _mirrored(one: StudentMixture) -> StudentMixture:
    """Return the mixture with its mirror image: HIV's posterior is symmetric in p1 and x2(0) together."""
    mirror = np.array([-1.0, 1.0, -1.0])
    return StudentMixture(
        np.concatenate([one.weights, one.weights]) / 2,
        np.concatenate([one.locs, one.locs * mirror]),
        np.concatenate([one.covariances, one.covariances * np.outer(mirror, mirror)]),
    )


def main(arguments: list[str] | None = None) -> None:
    """Fit and store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(MAKERS), metavar="NAME", help=", ".join(MAKERS))
    REFERENCE.mkdir(exist_ok=True)
    for name in parser.parse_args(arguments).names:
        print(name)
        made = MAKERS[name]()
        stored = {
            "made_by": f"python -m benchmarks.rivals.targets.reference {name}",
            "weights": made.weights.round(6).tolist(),
            "locs": made.locs.round(6).tolist(),
            "covariances": [[[float(f"{x:.6g}") for x in row] for row in c] for c in made.covariances],
        }
        stored["weights"] = (np.array(stored["weights"]) / np.sum(stored["weights"])).tolist()
        (REFERENCE / f"{name}.json").write_text(json.dumps(stored) + "\n")


if __name__ == "__main__":
    main()
