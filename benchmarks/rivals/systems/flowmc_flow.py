"""flowMC: MALA chains and proposals from a spline flow trained on them.

Its bundle has defaults for all but the numbers of chains, steps, loops and epochs, which are those that its
configuration guide calls default.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flowMC.resource_strategy_bundle.RQSpline_MALA import RQSpline_MALA_Bundle
from flowMC.Sampler import Sampler

from ..namespaces import NAMESPACES
from ..targets import Target
from .base import Outcome

__all__ = ["run"]

NUM_CHAINS, NUM_LOCAL, NUM_GLOBAL, NUM_TRAINING, NUM_PRODUCTION, NUM_EPOCHS = 20, 50, 50, 3, 3, 30


def run(target: Target, seed: int) -> Outcome:
    """From draws of the prior."""
    xp = NAMESPACES["jax"]()
    key, own = jax.random.split(jax.random.PRNGKey(seed))
    bundle = RQSpline_MALA_Bundle(
        own,
        NUM_CHAINS,
        target.dim,
        lambda z, data: target.log_density(xp, z),
        NUM_LOCAL,
        NUM_GLOBAL,
        NUM_TRAINING,
        NUM_PRODUCTION,
        NUM_EPOCHS,
    )
    sampler = Sampler(
        n_dim=target.dim,
        n_chains=NUM_CHAINS,
        rng_key=key,
        resource_strategy_bundles=bundle,
        checkpoint_interval=0,
    )
    start = jnp.asarray(target.prior_draws(seed, NUM_CHAINS), dtype=jnp.result_type(float))
    sampler.sample(start, {})
    chains = np.asarray(sampler.resources["positions_production"].data)
    num_loops = NUM_CHAINS * (NUM_TRAINING + NUM_PRODUCTION)
    return Outcome(
        chains.reshape(-1, target.dim),
        num_gradients=num_loops * NUM_LOCAL,
        num_densities=num_loops * NUM_GLOBAL,
    )
