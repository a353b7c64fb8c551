"""PyMC's sequential Monte Carlo and Pathfinder, with their defaults, one core."""

from __future__ import annotations

import logging

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
        z = pm.CustomDist(
            "z",
            logp=lambda value: target.log_prior(xp, value),
            random=lambda rng=None, size=None: target.from_normal(rng.standard_normal((1, target.dim)))[0],
            ndim_supp=1,
            ndims_params=[],
            shape=(target.dim,),
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
    stages = np.asarray(data.sample_stats["log_marginal_likelihood"].values)
    evidences = np.array([[x for x in np.ravel(np.asarray(c, dtype=object)) if x is not None] for c in stages])
    ends = np.array([np.ravel(np.asarray(list(c)[-1], dtype=float))[-1] for c in evidences])
    r_hat = float(az.rhat(data)["z"].max())
    return Outcome(
        data.posterior["z"].values.reshape(-1, target.dim),
        log_evidence=float(ends.mean()),
        log_evidence_error=float(ends.std(ddof=1) / np.sqrt(len(ends))),
        told="" if r_hat <= 1.01 else f"R-hat {r_hat:.2f}",
    )


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
    group = data["pathfinder"] if "pathfinder" in data.groups() else {}
    k_hat = float(np.asarray(group["pareto_k"])) if "pareto_k" in group else float("nan")
    told = f"k-hat {k_hat:.2f}" if k_hat > 0.7 else ""
    return Outcome(data.posterior["z"].values.reshape(-1, target.dim), told=told)
