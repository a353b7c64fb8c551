"""The whole state of a fit as plain data, and a fit brought back to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.optim import PyroLRScheduler, PyroOptim

from pyro_adaann.annealing.history import AnnealingHistory, AnnealingStage, Recovery
from pyro_adaann.objectives.mixed_kl import TraceMixedKL_ELBO
from pyro_adaann.objectives.objective import sites_in
from pyro_adaann.objectives.traces import captured_parameters
from pyro_adaann.state.checkpoint import get_random_states, set_random_states
from pyro_adaann.steps.natural import TraceNaturalKL_ELBO
from pyro_adaann.version import __version__

__all__ = ["fit_state", "restore_fit", "settings_of"]


def fit_state(svi: Any) -> dict[str, Any]:
    """Return all that decides how a fit goes on, as plain data; :func:`restore_fit` takes it."""
    return {
        "fit_id": svi._fit_id,
        "versions": {"pyro_adaann": __version__, "pyro": pyro.__version__, "torch": torch.__version__},
        "settings": svi._settings,
        "parameters": svi._parameters.state(),
        "buffers": {role: dict(part.named_buffers()) for role, part in _modules(svi).items()},
        "history": dataclasses.asdict(svi.history),
        "objective": svi._objective.state(),
        "num_rejected_in_a_row": svi._safety_net.num_rejected_in_a_row,
        "budget": None if svi._budget is None else dataclasses.asdict(svi._budget),
        "ladder": None if svi.ladder is None else svi.ladder.state(),
        "random": get_random_states(),
    }


def restore_fit(svi: Any, state: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Bring a fit to a state that :func:`fit_state` has returned.

    :raises ValueError: if it is the state of another model, guide or other settings. The fit is then
        what it was.
    """
    _check_settings(svi._settings, state["settings"])
    random = get_random_states()
    try:
        # A guide makes its parameters when it first runs.
        with poutine.trace(param_only=True) as capture, pyro.validation_enabled(False), torch.no_grad():
            guide_trace = poutine.trace(svi.guide).get_trace(*args, **kwargs)
            model = poutine.replay(svi.model, trace=guide_trace)
            sites = sites_in(poutine.trace(model).get_trace(*args, **kwargs))
        found = captured_parameters(capture.trace)
        _check_sites(sites, state["objective"]["sites"])
        svi._parameters.check(state["parameters"], found)
        buffers = {role: dict(part.named_buffers()) for role, part in _modules(svi).items()}
        _check_buffers(buffers, state["buffers"])
        svi._parameters.restore(state["parameters"], found)
    except Exception:
        set_random_states(random)
        raise
    with torch.no_grad():
        for role, values in state["buffers"].items():
            for name, value in values.items():
                buffers[role][name].copy_(value)
    svi.history.stages[:] = [AnnealingStage(**stage) for stage in state["history"]["stages"]]
    svi.history.recoveries[:] = [Recovery(**recovery) for recovery in state["history"]["recoveries"]]
    svi._objective.start_stage(svi.inverse_temperature, is_final=_is_final(svi.history, svi.schedule))
    svi._objective.restore(state["objective"])
    svi._safety_net.num_rejected_in_a_row = state["num_rejected_in_a_row"]
    svi._fit_id = state["fit_id"]
    if svi.ladder is not None:
        svi.ladder.restore(state["ladder"])
    set_random_states(state["random"])


def settings_of(svi: Any, loss: Any, final_loss: ELBO | None) -> dict[str, str]:
    """Return what must be the same in the fit that writes a checkpoint and the one that reads it."""
    settings = {
        "guide": type(svi.guide).__name__,
        "loss": type(loss).__name__,
        "schedule": repr(svi.schedule),
        "path": repr(svi.path),
        "stage_rule": repr(svi.stage_rule),
        "ladder": repr(svi.ladder),
        "optim": _describe_optim(svi.optim),
    }
    for role, elbo in (("", loss), ("final ", final_loss)):
        if isinstance(elbo, TraceMixedKL_ELBO):
            settings[f"{role}forward_weight"] = str(elbo.forward_weight)
            settings[f"{role}path_derivative"] = str(elbo.path_derivative)
        if isinstance(elbo, TraceNaturalKL_ELBO):
            settings[f"{role}max_kl"] = str(elbo.max_kl)
        if isinstance(elbo, ELBO):
            settings[f"{role}num_particles"] = str(elbo.num_particles)
            settings[f"{role}vectorize_particles"] = str(elbo.vectorize_particles)
    if final_loss is not None:
        settings["final loss"] = type(final_loss).__name__
    for name in ("num_initial_steps", "num_steps_per_stage", "num_final_steps", "num_variance_samples"):
        settings[name] = str(getattr(svi, name))
    settings["lr_schedule"] = svi.lr_schedule
    return settings


def _describe_optim(optim: PyroOptim) -> str:
    def describe(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{key}={describe(entry)}" for key, entry in sorted(value.items()))
        if isinstance(value, bool | int | float | str | list | tuple | None):
            return repr(value)
        return type(value).__name__  # the address of a function differs in every process

    text = f"{_name(optim.pt_optim_constructor)}({describe(optim.pt_optim_args)})"
    if optim.pt_clip_args:
        text += f" clipped at {describe(optim.pt_clip_args)}"
    if isinstance(optim, PyroLRScheduler):
        text += f" with {_name(optim.pt_scheduler_constructor)}({describe(optim.kwargs)})"
    return text


def _name(constructor: Callable[..., Any] | Any) -> str:
    return getattr(constructor, "__name__", type(constructor).__name__)


def _modules(svi: Any) -> dict[str, torch.nn.Module]:
    """Return guide and model where they are modules, or methods of one, by their role."""
    parts = {"guide": svi.guide, "model": svi.model}
    owners = {role: getattr(part, "__self__", part) for role, part in parts.items()}
    return {role: owner for role, owner in owners.items() if isinstance(owner, torch.nn.Module)}


def _is_final(history: AnnealingHistory, schedule: Any) -> bool:
    return history.stages[-1].inverse_temperature >= schedule.final_inverse_temperature


def _check_settings(expected: dict[str, str], got: dict[str, str]) -> None:
    for name in {**expected, **got}:
        if expected.get(name) != got.get(name):
            raise ValueError(
                f"Expected a checkpoint of a fit with {name} {expected.get(name)}; got one with "
                f"{got.get(name)}. Use the settings it was written with, or another checkpoint file."
            )


def _check_sites(expected: list[str], got: list[str] | None) -> None:
    if got is not None and expected != got:
        differing = [site for site in (*got, *expected) if site not in expected or site not in got]
        raise ValueError(
            f"Expected a checkpoint of this model, with sites {', '.join(expected)}; got one with "
            f"{', '.join(got)} (differing: {', '.join(differing) or 'the order'}). Use the model it was "
            f"written with, or another checkpoint file."
        )


def _check_buffers(expected: dict[str, Any], got: dict[str, Any]) -> None:
    def shapes(buffers: dict[str, Any]) -> dict[str, Any]:
        return {
            f"{role}.{name}": tuple(v.shape) for role, part in buffers.items() for name, v in part.items()
        }

    if shapes(expected) != shapes(got):
        raise ValueError(
            f"Expected a checkpoint with the buffers {shapes(expected)}; got {shapes(got)}. Use the model "
            f"and guide it was written with, or another checkpoint file."
        )
