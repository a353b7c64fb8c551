"""All that the next stage of sequential Monte Carlo depends on, as a checkpoint keeps it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pyro_adaann.sampling.metric import Metric
from pyro_adaann.sampling.particles import Particles
from pyro_adaann.sampling.result import SMCStage
from pyro_adaann.sampling.sampler import Sampler
from pyro_adaann.sampling.target import Points

__all__ = ["restore", "state_of"]

_KIND = "AnnealedSMC"
#: Increased whenever the content of the state changes. Metrics have one factor for each group since 2, stages
#: a shift since 3.
_FORMAT = 3


def state_of(sampler: Sampler) -> dict[str, Any]:
    """Return the state of a sampler as tensors, numbers and strings."""
    assert sampler.particles is not None
    particles = sampler.particles
    return {
        "kind": _KIND,
        "format": _FORMAT,
        "settings": _fingerprint(sampler),
        "x": particles.points.x,
        "terms": particles.points.terms,
        "log_weights": particles.log_weights,
        "log_evidences": particles.log_evidences,
        "num_broken": particles.num_broken,
        "step_size": sampler.step_size,
        "seed": sampler.seed,
        "generator": sampler.generator.get_state(),
        "stages": [asdict(stage) for stage in sampler.stages],
    }


def restore(sampler: Sampler, state: dict[str, Any]) -> None:
    """Let a sampler go on from what :func:`state_of` has returned.

    :raises ValueError: if it is of another kind of run, of another format, or of other settings.
    """
    kind, version = state.get("kind"), state.get("format", 1)
    if kind == _KIND and version != _FORMAT:
        raise ValueError(
            f"Expected a checkpoint of AnnealedSMC of format {_FORMAT}; got one of format {version}. Read it "
            f"with the version of pyro_adaann that wrote it, or delete the file to start anew."
        )
    if kind != _KIND or state.get("settings") != _fingerprint(sampler):
        raise ValueError(
            f"Expected the checkpoint of a run with the settings {_fingerprint(sampler)}; got one of "
            f"{state.get('settings', 'another kind')}. Give another path, or delete the file to start anew."
        )
    device = sampler.target.model.example.device
    points = Points(state["x"].to(device), state["terms"].to(device))
    weights, evidences = state["log_weights"].to(device), state["log_evidences"].to(device)
    sampler.particles = Particles(points, weights, evidences, state["num_broken"])
    sampler.step_size, sampler.seed = state["step_size"], state["seed"]
    sampler.generator.set_state(state["generator"])
    sampler.stages = [
        SMCStage(
            **{
                **stage,
                "metric": Metric(**{k: v.to(device) for k, v in stage["metric"].items()}),
                "step_sizes": tuple(stage["step_sizes"]),
                "shift": tuple(stage["shift"]),
            }
        )
        for stage in state["stages"]
    ]


def _fingerprint(sampler: Sampler) -> str:
    settings, target = sampler.settings, sampler.target
    tuned = "" if settings.tuning is None else f", tuned by {len(settings.tuning)} stages of another run"
    return (
        f"{target.model.dim} latent variables, {settings.num_particles} particles in "
        f"{settings.num_groups} groups, path {target.path.name}, "
        f"{type(settings.schedule).__name__}, {settings.kernel}{tuned}"
    )
