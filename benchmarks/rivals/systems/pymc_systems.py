"""PyMC's sequential Monte Carlo and Pathfinder, with their defaults, one core."""

from __future__ import annotations

import logging
from typing import Any

import arviz as az
import numpy as np
import pymc as pm

from ..namespaces import NAMESPACES
from ..targets import Target
from .base import Outcome

__all__ = ["pathfinder", "smc"]

logging.getLogger("pymc").setLevel(logging.ERROR)


def _model(target: Target) -> pm.Model:
    xp = NAMESPACES["pytensor"]()
    with pm.Model() as model:
        # The median is a parameter so that PyMC knows the shape.
        z = pm.CustomDist(
            "z",
            target.from_normal(np.zeros((1, target.dim)))[0],
            logp=lambda value, median: target.log_prior(xp, value),
            random=lambda median, rng=None, size=None: target.from_normal(
                rng.standard_normal((1, target.dim))
            )[0],
            signature="(n)->(n)",
        )
        pm.Potential("likelihood", target.log_likelihood(xp, z))
    return model


def smc(target: Target, seed: int) -> Outcome:
    """Two chains of 2,000 particles, independent Metropolis moves."""
    num_chains, num_particles = 2, 2000
    start = target.prior_draws(seed, num_chains * num_particles).reshape(num_chains, num_particles, -1)
    with _model(target):
        data = pm.sample_smc(
            num_particles,
            start=[{"z": chain} for chain in start],
            chains=num_chains,
            cores=1,
            random_seed=[seed, seed + 1],
            progressbar=False,
        )
    # Lists of stages, by chain, in one of two shapes; all but the last stage of a chain are nan.
    stages = np.array(_flat(data.sample_stats["log_marginal_likelihood"].values.tolist()))
    ends = stages[np.isfinite(stages)]
    r_hat = float(az.rhat(data)["z"].max())
    return Outcome(
        data.posterior["z"].values.reshape(-1, target.dim),
        log_evidence=float(ends.mean()),
        log_evidence_error=float(ends.std(ddof=1) / np.sqrt(len(ends))),
        told="" if r_hat <= 1.01 else f"R-hat {r_hat:.2f}",
    )


def _flat(stages: Any) -> list[float]:
    """Return the numbers of lists within lists."""
    if isinstance(stages, list | tuple | np.ndarray):
        return [x for part in stages for x in _flat(part)]
    return [float(stages)]


def pathfinder(target: Target, seed: int) -> Outcome:
    """Four paths, 1,000 draws by Pareto-smoothed importance sampling, started around the prior's median."""
    import pymc_extras

    median = target.from_normal(np.zeros((1, target.dim)))[0]
    data = pymc_extras.fit_pathfinder(
        model=_model(target),
        initvals={"z": median},
        concurrent=None,
        cores=1,
        random_seed=seed,
        progressbar=False,
        display_summary=False,
    )
    k_hat = float(data.sample_stats["pareto_k"])
    told = "" if k_hat <= 0.7 else f"k-hat {k_hat:.2f}"
    return Outcome(data.posterior["z"].values.reshape(-1, target.dim), told=told)
