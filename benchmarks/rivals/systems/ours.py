"""This package: `fit`, `natural_svi`, `AdaAnnSVI` with the paper's settings, `AnnealedSMC`."""

from __future__ import annotations

from typing import Any

import pyro
from pyro.infer import Trace_ELBO

from pyro_adaann import (
    AdaAnnSchedule,
    AdaAnnSVI,
    AnnealedSMC,
    AutoPlanar,
    diagnose,
    fit,
    importance_draws,
    natural_svi,
)

from ..targets import Target
from .base import Outcome
from .pyro_model import PyroModel

__all__ = ["adaann", "natural", "one_call", "smc"]

#: Verdicts on which the weighted draws may be used.
USABLE = ("GOOD", "USABLE WITH WEIGHTS")


def _counts(model: PyroModel) -> dict[str, int]:
    return {"num_densities": model.num_densities, "num_gradients": model.num_gradients}


def one_call(target: Target, seed: int) -> Outcome:
    """`fit`, nothing set."""
    model = PyroModel(target)
    result = fit(model, seed=seed, progress_bar=False)
    headline = result.level.headline
    return Outcome(
        result.draws.samples["z"].numpy(),
        result.draws.log_weights.numpy(),
        result.log_evidence,
        result.log_evidence_se,
        "" if headline in USABLE else headline,
        **_counts(model),
    )


def _outcome(svi: AdaAnnSVI, model: PyroModel) -> Outcome:
    diagnosis = diagnose(svi)
    headline = diagnosis.verdict.split(".")[0]
    draws = importance_draws(svi)
    return Outcome(
        draws.samples["z"].numpy(),
        draws.log_weights.numpy(),
        diagnosis.log_evidence,
        diagnosis.log_evidence_se,
        "" if headline in USABLE else headline,
        **_counts(model),
    )


def natural(target: Target, seed: int) -> Outcome:
    """`natural_svi` with its own guide, nothing set, then `diagnose`."""
    model = PyroModel(target)
    pyro.set_rng_seed(seed)
    svi = natural_svi(model)
    svi.run(progress_bar=False)
    return _outcome(svi, model)


def adaann(target: Target, seed: int) -> Outcome:
    """AdaAnn as published: the ELBO by Adam, planar layers, tolerance .01, five steps a stage, 100 draws."""
    model = PyroModel(target)
    pyro.set_rng_seed(seed)
    guide = AutoPlanar(model, 50, base_loc="prior", base_scale="prior")
    optim: Any = pyro.optim.Adam({"lr": 0.005})
    svi = AdaAnnSVI(
        model,
        guide,
        optim,
        Trace_ELBO(num_particles=100, vectorize_particles=True),
        path="joint",
        schedule=AdaAnnSchedule(0.01),
        num_initial_steps=500,
        num_steps_per_stage=5,
        num_final_steps=5000,
    )
    svi.run(progress_bar=False)
    return _outcome(svi, model)


def smc(target: Target, seed: int) -> Outcome:
    """`AnnealedSMC` from the prior, nothing set; its alarms are the lines of caution that it prints."""
    model = PyroModel(target)
    result = AnnealedSMC(model, seed=seed).run(progress_bar=False)
    alarms = [caution.split(":")[0] for caution in result.cautions]
    return Outcome(
        result.samples["z"].numpy(),
        result.log_weights.numpy(),
        result.log_evidence,
        result.log_evidence_error,
        ", ".join(alarms),
        **_counts(model),
    )
