"""Densities in closed form: a funnel, wells, modes, an ill-conditioned normal, heavy tails.

None has a prior of its own. Each gets a normal one, the region in which a user would look for it, and the
quotient as likelihood, so that the product is the published density.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..namespaces import NAMESPACES, Namespace
from .base import LOG_2PI, Array, Formula, Target, Truth, log_normal, normal_prior, over_prior

__all__ = ["forty_modes", "funnel", "ill_conditioned", "many_well", "student_mixture", "two_modes_50"]


def _target(
    log_density: Formula, dim: int, scale: float | list[float], truth: Truth, source: str, loc: float = 0.0
) -> Target:
    log_prior, from_normal = normal_prior(dim, loc, scale)
    return Target(dim, log_prior, over_prior(log_density, log_prior), from_normal, lambda: truth, source)


def funnel() -> Target:
    """Neal's funnel: z_0 ~ N(0, 3^2), nine others N(0, exp(z_0)).

    The regions are thirds of z_0. Only z_0 is judged by moments: those of others hang on its largest values.
    """

    def log_density(xp: Namespace, z: Any) -> Any:
        neck, rest = z[..., 0], z[..., 1:]
        inner = -0.5 * rest**2 * xp.exp(-neck)[..., None] - 0.5 * neck[..., None] - 0.5 * LOG_2PI
        return log_normal(xp, neck, 0.0, 3.0) + xp.sum(inner)

    def draw(rng: np.random.Generator, n: int) -> Array:
        u = rng.standard_normal((n, 10))
        neck = 3 * u[:, :1]
        return np.concatenate([neck, np.exp(neck / 2) * u[:, 1:]], axis=1)

    third = 3 * 0.4307272992954576  # of the standard normal distribution

    def regions(z: Array) -> np.ndarray:
        return np.stack([z[:, 0] < -third, np.abs(z[:, 0]) <= third, z[:, 0] > third], axis=1)

    others = [math.nan] * 9
    truth = Truth(
        draw,
        0.0,
        np.array([0.0, *others]),
        np.array([3.0, *others]),
        "closed form",
        np.full(3, 1 / 3),
        regions,
    )
    source = "Neal, Slice sampling, Annals of Statistics 31 (2003)"
    return _target(log_density, 10, [3.0] + [10.0] * 9, truth, source)


def many_well(num_pairs: int = 16) -> Target:
    """Pairs with density exp(-x^4 + 6 x^2 + x / 2 - y^2 / 2): 2^16 modes; the regions are the signs of x."""

    def log_well(x: Any) -> Any:
        return -(x**4) + 6 * x**2 + 0.5 * x

    def log_density(xp: Namespace, z: Any) -> Any:
        x, y = z[..., :num_pairs], z[..., num_pairs:]
        return xp.sum(log_well(x) - 0.5 * y**2)

    grid = np.linspace(-4.5, 4.5, 200_001)
    step = grid[1] - grid[0]
    values = np.exp(np.asarray(log_well(grid)) - 9.0)
    total = values.sum()
    weights = values / total
    mean = float(weights @ grid)
    sd = math.sqrt(float(weights @ grid**2) - mean**2)
    log_evidence = num_pairs * (9.0 + math.log(total * step) + 0.5 * LOG_2PI)
    cumulated = weights.cumsum()

    def draw(rng: np.random.Generator, n: int) -> Array:
        x = np.interp(rng.random((n, num_pairs)), cumulated, grid)
        return np.concatenate([x, rng.standard_normal((n, num_pairs))], axis=1)

    truth = Truth(
        draw,
        log_evidence,
        np.array([mean] * num_pairs + [0.0] * num_pairs),
        np.array([sd] * num_pairs + [1.0] * num_pairs),
        "quadrature",
        np.full(num_pairs, weights[grid < 0].sum()),
        lambda z: z[:, :num_pairs] < 0,
    )
    source = "Noe et al., Science 365 (2019); Midgley et al., ICLR 2023 (FAB)"
    return _target(log_density, 2 * num_pairs, 2.0, truth, source)


def _mixture(
    locs: Array, sd: float, weights: Array, dof: float | None, scale: float, source: str, loc: float = 0.0
) -> Target:
    """A mixture of spherical normal components, or of Student t components with independent coordinates."""
    num_modes, dim = locs.shape
    t_constant = 0.0
    if dof is not None:
        t_constant = math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2) - 0.5 * math.log(dof * math.pi)

    def log_components(xp: Namespace, z: Any) -> Any:
        x = (z[..., None, :] - xp.array(locs)) / sd
        if dof is None:
            log_kernels = -0.5 * x**2 - 0.5 * LOG_2PI
        else:
            log_kernels = t_constant - (dof + 1) / 2 * xp.log1p(x**2 / dof)
        return xp.array(np.log(weights)) + xp.sum(log_kernels) - dim * math.log(sd)

    def log_density(xp: Namespace, z: Any) -> Any:
        return xp.logsumexp(log_components(xp, z))

    def draw(rng: np.random.Generator, n: int) -> Array:
        kind = rng.choice(num_modes, size=n, p=weights)
        noise = rng.standard_normal((n, dim)) if dof is None else rng.standard_t(dof, (n, dim))
        return locs[kind] + sd * noise

    xp = NAMESPACES["numpy"]()

    def regions(z: Array) -> np.ndarray:
        return np.asarray(log_components(xp, z)).argmax(-1)[:, None] == np.arange(num_modes)

    # A region is where its component has the largest density; its share by a million draws, to .0005 or
    # better.
    rng = np.random.default_rng(0)
    shares = np.mean([regions(draw(rng, 20_000)).mean(0) for _ in range(15)], axis=0)
    mean = weights @ locs
    variance = sd**2 * (1.0 if dof is None else dof / (dof - 2) if dof > 2 else math.nan)
    sds = np.sqrt(weights @ (locs - mean) ** 2 + variance)
    if dof is not None and dof <= 2:
        mean = np.full(dim, math.nan)  # an error in infinite sds says nothing
    truth = Truth(draw, 0.0, mean, sds, "closed form", shares, regions)
    return _target(log_density, dim, scale, truth, source, loc)


def forty_modes() -> Target:
    """Forty normal modes of sd log(1 + e) and equal weight in a square of side 80."""
    locs = np.random.default_rng(0).uniform(-40, 40, (40, 2))
    source = "Midgley et al., Flow annealed importance sampling bootstrap, ICLR 2023; locations drawn here"
    return _mixture(locs, math.log1p(math.e), np.full(40, 1 / 40), None, 40.0, source)


def two_modes_50() -> Target:
    """Two normal modes of weights .7 and .3 in 50 dimensions, 8 sds apart on the diagonal."""
    half = np.full((1, 50), 2.0 / math.sqrt(50))
    locs = np.concatenate([-half, half])
    return _mixture(locs, 0.5, np.array([0.7, 0.3]), None, 1.0, "here")


def student_mixture() -> Target:
    """Ten components with Student t coordinates of 2 degrees of freedom in a square of side 20."""
    locs = np.random.default_rng(1).uniform(-10, 10, (10, 2))
    source = "Blessing et al., Beyond ELBOs, ICML 2024; locations drawn here"
    return _mixture(locs, 1.0, np.full(10, 0.1), 2.0, 15.0, source)


def ill_conditioned(dim: int = 100) -> Target:
    """A normal distribution with sds from .1 to 10 along directions that are no axes."""
    sds = np.geomspace(0.1, 10, dim)
    rotation, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((dim, dim)))
    whiten = rotation / sds  # (dim, dim): a point times this is standard normal

    def log_density(xp: Namespace, z: Any) -> Any:
        white = z @ xp.array(whiten)
        return xp.sum(-0.5 * white**2 - 0.5 * LOG_2PI) - float(np.log(sds).sum())

    def draw(rng: np.random.Generator, n: int) -> Array:
        return (rng.standard_normal((n, dim)) * sds) @ rotation.T

    marginal = np.sqrt(rotation**2 @ sds**2)
    truth = Truth(draw, 0.0, np.zeros(dim), marginal, "closed form")
    source = "the ill-conditioned Gaussian of Inference Gym, with a geometric spectrum"
    return _target(log_density, dim, 10.0, truth, source)
