"""Posteriors of statistical models: eight schools, a Brownian motion with a gap, a logistic regression."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..namespaces import Namespace
from .base import LOG_2PI, Array, Target, Truth, log_normal, normal_prior
from .importance import importance_truth

__all__ = ["breast_cancer", "brownian_gap", "eight_schools"]

EFFECTS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def _normal_given(precision: Array, linear: Array) -> tuple[Array, Array]:
    """Return means and Cholesky factors of precisions of normal distributions ~ exp(-x P x / 2 + b x)."""
    mean = np.linalg.solve(precision, linear[..., None])[..., 0]
    return np.asarray(mean), np.asarray(np.linalg.cholesky(precision))


def _conditional_truth(
    points: Array, log_weights: Array, log_area: float, mean: Array, cholesky: Array, how: str
) -> Truth:
    """Return the truth where all but the first coordinates of ``points`` are normal given these.

    :param points: grid of the first coordinates, shape ``(m, k)``.
    :param log_weights: log marginal density at every grid point, shape ``(m,)``.
    :param log_area: log of the size of a cell of the grid.
    :param mean: of the other coordinates at every point of the grid, shape ``(m, d)``.
    :param cholesky: of their precision, shape ``(m, d, d)``.
    """
    highest = log_weights.max()
    weights = np.exp(log_weights - highest)
    log_evidence = float(highest + np.log(weights.sum()) + log_area)
    weights /= weights.sum()
    edge = (points == points.min(0)) | (points == points.max(0))
    if weights[edge.any(1)].sum() > 1e-4:
        raise AssertionError("Expected a grid that holds the posterior; got one with mass at its edge.")
    inverse = np.linalg.inv(cholesky)
    variance = (inverse**2).sum(-2)
    values = np.concatenate([points, mean], axis=1)
    means = weights @ values
    squares = np.concatenate([points**2, mean**2 + variance], axis=1)
    cells = np.array([np.diff(np.unique(column))[0] for column in points.T])

    def draw(rng: np.random.Generator, n: int) -> Array:
        at = rng.choice(len(points), size=n, p=weights)
        first = points[at] + cells * (rng.random((n, points.shape[1])) - 0.5)
        noise = np.einsum("nji,nj->ni", inverse[at], rng.standard_normal((n, mean.shape[1])))
        return np.concatenate([first, mean[at] + noise], axis=1)

    return Truth(draw, log_evidence, means, np.sqrt(weights @ squares - means**2), how)


def eight_schools() -> Target:
    """Eight schools in centered coordinates: log tau, mu and the eight effects."""

    def log_prior(xp: Namespace, z: Any) -> Any:
        log_tau, mu, theta = z[..., 0], z[..., 1], z[..., 2:]
        tau = xp.exp(log_tau)
        log_tau_density = math.log(2 / (5 * math.pi)) - xp.log1p((tau / 5) ** 2) + log_tau
        log_theta = xp.sum(log_normal(xp, theta, mu[..., None], tau[..., None]))
        return log_tau_density + log_normal(xp, mu, 0.0, 5.0) + log_theta

    def log_likelihood(xp: Namespace, z: Any) -> Any:
        return xp.sum(log_normal(xp, xp.array(EFFECTS), z[..., 2:], ERRORS))

    def from_normal(u: Array) -> Array:
        from scipy.special import ndtr

        tau = 5 * np.tan(0.5 * math.pi * ndtr(u[:, 0]))
        mu = 5 * u[:, 1]
        return np.concatenate(
            [np.log(tau)[:, None], mu[:, None], mu[:, None] + tau[:, None] * u[:, 2:]], axis=1
        )

    def truth() -> Truth:
        log_tau = np.linspace(-14.0, 7.0, 4001)
        tau = np.exp(log_tau)
        # Of mu and theta together: precision and linear term of the exponent.
        precision = np.zeros((len(tau), 9, 9))
        precision[:, 0, 0] = 1 / 25 + 8 / tau**2
        precision[:, 0, 1:] = precision[:, 1:, 0] = -1 / tau[:, None] ** 2
        for i in range(8):
            precision[:, i + 1, i + 1] = 1 / tau**2 + 1 / ERRORS[i] ** 2
        linear = np.broadcast_to(np.concatenate([[0.0], EFFECTS / ERRORS**2]), (len(tau), 9))
        mean, cholesky = _normal_given(precision, linear)
        log_det = 2 * np.log(np.diagonal(cholesky, axis1=1, axis2=2)).sum(-1)
        constant = -0.5 * (EFFECTS**2 / ERRORS**2).sum() - np.log(ERRORS).sum() - math.log(5)
        log_p = constant - 8 * log_tau - 4 * LOG_2PI + 0.5 * (linear * mean).sum(-1) - 0.5 * log_det
        log_p = log_p + math.log(2 / (5 * math.pi)) - np.log1p((tau / 5) ** 2) + log_tau
        step = math.log(log_tau[1] - log_tau[0])
        return _conditional_truth(log_tau[:, None], log_p, step, mean, cholesky, "quadrature over log tau")

    source = "Rubin, J. Educational Statistics 6 (1981); Gelman et al., Bayesian Data Analysis"
    return Target(10, log_prior, log_likelihood, from_normal, truth, source)


#: Observations of Inference Gym's "Brownian Motion Missing Middle Observations"; times 10 to 19 have none.
BROWNIAN = np.array([
    0.21592641, 0.118771404, -0.07945447, 0.037677474, -0.27885845, -0.1484156, -0.3250906, -0.22957903,
    -0.44110894, -0.09830782, -0.8786016, -0.83736074, -0.7384849, -0.8939254, -0.7774566, -0.70238715,
    -0.87771565, -0.51853573, -0.6948214, -0.6202789,
])  # fmt: skip
SEEN = np.r_[0:10, 20:30]


def brownian_gap() -> Target:
    """A Brownian motion at 30 times, 10 in the middle not observed: log scales of steps and noise, the
    path."""

    def log_prior(xp: Namespace, z: Any) -> Any:
        scales, path = z[..., :2], z[..., 2:]
        step = xp.exp(scales[..., 0])[..., None]
        log_steps = xp.sum(log_normal(xp, path[..., 1:], path[..., :-1], step))
        log_first = xp.sum(log_normal(xp, path[..., :1], 0.0, step))
        return xp.sum(log_normal(xp, scales, 0.0, 2.0)) + log_first + log_steps

    def log_likelihood(xp: Namespace, z: Any) -> Any:
        noise = xp.exp(z[..., 1])[..., None]
        early = xp.sum(log_normal(xp, xp.array(BROWNIAN[:10]), z[..., 2:12], noise))
        return early + xp.sum(log_normal(xp, xp.array(BROWNIAN[10:]), z[..., 22:], noise))

    def from_normal(u: Array) -> Array:
        scales = 2 * u[:, :2]
        return np.concatenate([scales, np.exp(scales[:, :1]) * u[:, 2:].cumsum(1)], axis=1)

    def truth() -> Truth:
        # The noise may be next to nothing: a third of a per cent of the posterior is below exp(-5).
        axes = np.linspace(-7.0, 1.5, 90), np.linspace(-12.0, 1.5, 190)
        points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
        steps, noise = np.exp(points[:, 0]), np.exp(points[:, 1])
        difference = np.eye(30) - np.eye(30, k=-1)
        seen = np.zeros(30)
        seen[SEEN] = 1.0
        observed = np.zeros(30)
        observed[SEEN] = BROWNIAN
        precision = (difference.T @ difference) / steps[:, None, None] ** 2 + np.diag(seen) / noise[
            :, None, None
        ] ** 2
        linear = observed / noise[:, None] ** 2
        mean, cholesky = _normal_given(precision, linear)
        log_det = 2 * np.log(np.diagonal(cholesky, axis1=1, axis2=2)).sum(-1)
        log_p = -30 * points[:, 0] - 20 * points[:, 1] - 10 * LOG_2PI - 0.5 * log_det
        # Squares of what is left, not differences of large squares: exact also where the noise is small.
        left = np.where(seen > 0, observed - mean, 0.0)
        log_p -= 0.5 * (left**2).sum(-1) / noise**2
        log_p -= 0.5 * ((mean @ difference.T) ** 2).sum(-1) / steps**2
        log_p += -0.5 * (points**2).sum(-1) / 4 - 2 * math.log(2) - LOG_2PI
        area = sum(math.log(axis[1] - axis[0]) for axis in axes)
        return _conditional_truth(points, log_p, area, mean, cholesky, "quadrature over both scales")

    source = "Inference Gym, BrownianMotionUnknownScalesMissingMiddleObservations"
    return Target(32, log_prior, log_likelihood, from_normal, truth, source)


def breast_cancer() -> Target:
    """A logistic regression of 569 tumors on 30 standardized features, with a standard normal prior."""
    from sklearn.datasets import load_breast_cancer

    features, labels = load_breast_cancer(return_X_y=True)
    features = (features - features.mean(0)) / features.std(0)
    design = np.concatenate([np.ones((len(labels), 1)), features], axis=1)
    signed = np.ascontiguousarray((design * (2 * labels[:, None] - 1.0)).T)
    log_prior, from_normal = normal_prior(31, 0.0, 1.0)

    def log_likelihood(xp: Namespace, z: Any) -> Any:
        return -xp.sum(xp.softplus(-(z @ xp.array(signed))))

    target = Target(
        31,
        log_prior,
        log_likelihood,
        from_normal,
        lambda: importance_truth("breast_cancer", target),
        "Breast Cancer Wisconsin (Diagnostic), as shipped by scikit-learn",
    )
    return target
