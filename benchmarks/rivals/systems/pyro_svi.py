"""Pyro's own `SVI` with a flow guide: inverse autoregressive, and neural spline.

`SVI` has no defaults for optimizer and steps: Adam at .005, 5,000 steps of 32 draws. Draws are weighted by
Pyro's importance weights, whose k-hat above .7 counts as told.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pyro
import torch
from pyro.distributions.transforms import iterated, spline_autoregressive
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoNormalizingFlow
from pyro.infer.importance import psis_diagnostic, vectorized_importance_weights

from ..targets import Target
from .base import Outcome
from .pyro_model import PyroModel

__all__ = ["iaf", "spline"]

NUM_STEPS, NUM_PARTICLES, LEARNING_RATE, NUM_DRAWS = 5000, 32, 0.005, 10_000


def _run(target: Target, seed: int, guide_of: Any) -> Outcome:
    pyro.set_rng_seed(seed)
    model = PyroModel(target)
    guide = guide_of(model)
    loss = Trace_ELBO(num_particles=NUM_PARTICLES, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": LEARNING_RATE}), loss)
    for step in range(NUM_STEPS):
        try:
            svi.step()
        except ValueError as cause:  # Pyro's message ends in all values and shapes
            raise RuntimeError(f"SVI has parameters that are nan after step {step}") from cause
    with torch.no_grad():
        log_weights, guide_trace, _ = vectorized_importance_weights(
            model, guide, num_samples=NUM_DRAWS, max_plate_nesting=0, normalized=False
        )
        k_hat = float(psis_diagnostic(model, guide, num_particles=1000, max_simultaneous_particles=1000))
    log_evidence = float(log_weights.logsumexp(0)) - math.log(NUM_DRAWS)
    weights = log_weights.softmax(0)
    error = float((weights.square().sum() - 1 / NUM_DRAWS).clamp(min=0).sqrt())
    return Outcome(
        guide_trace.nodes["z"]["value"].reshape(NUM_DRAWS, -1).numpy(),
        log_weights.numpy(),
        log_evidence,
        error,
        "" if k_hat <= 0.7 else f"k-hat {k_hat:.2f}",
        model.num_densities,
        model.num_gradients,
    )


def iaf(target: Target, seed: int) -> Outcome:
    """`AutoIAFNormal` with two transforms."""
    return _run(target, seed, partial(AutoIAFNormal, num_transforms=2))


def spline(target: Target, seed: int) -> Outcome:
    """`AutoNormalizingFlow` with two autoregressive spline transforms on [-3, 3]."""
    transform = partial(iterated, 2, spline_autoregressive)
    return _run(target, seed, lambda model: AutoNormalizingFlow(model, transform))
