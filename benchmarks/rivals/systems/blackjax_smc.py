"""blackjax's adaptive tempered SMC with HMC moves, tuned to the particles at every stage.

The kernel has no settings by default. The mass matrix is that of the manual's page on tuning inner kernels
(the particles' variances), the ten moves a stage are the default, step size and number of leapfrog steps the
usual ones.
"""

from __future__ import annotations

from typing import Any

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.smc import resampling
from blackjax.smc.tuning.from_particles import inverse_mass_matrix_from_particles

from ..namespaces import NAMESPACES
from ..targets import Target
from .base import Outcome

__all__ = ["run"]

NUM_PARTICLES, NUM_MOVES, NUM_LEAPFROG, TARGET_ESS = 2000, 10, 10, 0.5


def run(target: Target, seed: int) -> Outcome:
    """From draws of the prior until the temperature is 1."""
    xp = NAMESPACES["jax"]()
    step_size = 0.5 * target.dim**-0.25

    def log_likelihood(z: Any) -> Any:  # a trajectory that overflows has none
        value = target.log_likelihood(xp, z)
        return jnp.where(jnp.isnan(value), -jnp.inf, value)

    def parameters(inverse_mass: Any) -> dict[str, Any]:
        return {
            "step_size": jnp.asarray([step_size]),
            "inverse_mass_matrix": inverse_mass[None],
            "num_integration_steps": jnp.asarray([NUM_LEAPFROG]),
        }

    def update(key: Any, state: Any, info: Any) -> dict[str, Any]:
        return parameters(inverse_mass_matrix_from_particles(state.particles))

    start = jnp.asarray(target.prior_draws(seed, NUM_PARTICLES), dtype=jnp.result_type(float))
    smc = blackjax.inner_kernel_tuning(
        smc_algorithm=blackjax.adaptive_tempered_smc,
        logprior_fn=lambda z: target.log_prior(xp, z),
        loglikelihood_fn=log_likelihood,
        mcmc_step_fn=blackjax.hmc.build_kernel(),
        mcmc_init_fn=blackjax.hmc.init,
        resampling_fn=resampling.systematic,
        mcmc_parameter_update_fn=update,
        initial_parameter_value=parameters(inverse_mass_matrix_from_particles(start)),
        target_ess=TARGET_ESS,
        num_mcmc_steps=NUM_MOVES,
    )
    state, step = smc.init(start), jax.jit(smc.step)
    key, log_evidence, num_stages = jax.random.PRNGKey(seed), 0.0, 0
    while float(state.sampler_state.tempering_param) < 1:
        key, one = jax.random.split(key)
        state, info = step(one, state)
        log_evidence += float(info.log_likelihood_increment)
        num_stages += 1
    return Outcome(
        np.asarray(state.sampler_state.particles),
        np.asarray(jnp.log(state.sampler_state.weights)),
        log_evidence,
        num_gradients=num_stages * NUM_PARTICLES * NUM_MOVES * NUM_LEAPFROG,
        num_densities=num_stages * NUM_PARTICLES,
    )
