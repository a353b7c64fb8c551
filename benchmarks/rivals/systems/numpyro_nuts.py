"""NumPyro's NUTS: four chains of 1,000 draws after 1,000 of warm-up, from draws of the prior."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.diagnostics import split_gelman_rubin
from numpyro.infer import MCMC, NUTS

from ..namespaces import NAMESPACES
from ..targets import Target
from .base import Outcome

__all__ = ["dense", "run"]


def run(target: Target, seed: int, **settings: object) -> Outcome:
    """Everything else as it is by default."""
    xp = NAMESPACES["jax"]()
    kernel = NUTS(potential_fn=lambda z: -target.log_density(xp, z), **settings)
    mcmc = MCMC(
        kernel, num_warmup=1000, num_samples=1000, num_chains=4, chain_method="sequential", progress_bar=False
    )
    start = jnp.asarray(target.prior_draws(seed, 4), dtype=jnp.result_type(float))
    fields = ("num_steps", "diverging")
    mcmc.warmup(jax.random.PRNGKey(seed), init_params=start, extra_fields=fields, collect_warmup=True)
    num_gradients = int(mcmc.get_extra_fields()["num_steps"].sum())
    mcmc.run(mcmc.post_warmup_state.rng_key, extra_fields=fields)
    chains = np.asarray(mcmc.get_samples(group_by_chain=True))
    extra = mcmc.get_extra_fields()
    r_hat, num_diverging = float(np.max(split_gelman_rubin(chains))), int(extra["diverging"].sum())
    told = [f"R-hat {r_hat:.2f}"] if not r_hat <= 1.01 else []
    told += [f"{num_diverging} divergences"] if num_diverging else []
    return Outcome(
        chains.reshape(-1, target.dim),
        told=", ".join(told),
        num_gradients=num_gradients + int(extra["num_steps"].sum()),
    )


def dense(target: Target, seed: int) -> Outcome:
    """With the manual's setting for correlated posteriors, `dense_mass=True`."""
    return run(target, seed, dense_mass=True)
