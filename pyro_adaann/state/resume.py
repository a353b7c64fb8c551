"""The whole state of a fit as plain data, and a fit brought back to it."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.optim import PyroLRScheduler

from pyro_adaann.annealing.history import AnnealingStage, Recovery
from pyro_adaann.objectives.base import sites_in
from pyro_adaann.objectives.lenient import run_leniently
from pyro_adaann.objectives.traces import captured_parameters
from pyro_adaann.state.budget import StepPlan
from pyro_adaann.state.checkpoint import read_checkpoint
from pyro_adaann.state.fit import Fit
from pyro_adaann.state.random_states import get_random_states, set_random_states
from pyro_adaann.steps.base import Step
from pyro_adaann.version import __version__

__all__ = ["check_same_fit", "fit_state", "restore_fit", "settings_of"]


def fit_state(fit: Fit, settings: dict[str, str]) -> dict[str, Any]:
    """Return the whole state of a fit as plain data; :func:`restore_fit` takes it."""
    budget = fit.stages.budget
    return {
        "fit_id": fit.fit_id,
        "versions": {"pyro_adaann": __version__, "pyro": pyro.__version__, "torch": torch.__version__},
        "settings": settings,
        "parameters": fit.parameters.state(has_all_buffers=True),
        "history": dataclasses.asdict(fit.history),
        "objective": fit.objective.state(),
        "safety_net": fit.net.state(),
        "budget": None if budget is None else dataclasses.asdict(budget),
        "ladder": None if fit.rungs is None else fit.rungs.state(),
        "random": get_random_states(),
    }


def restore_fit(
    fit: Fit,
    settings: dict[str, str],
    state: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Restore a state that :func:`fit_state` has returned.

    :raises ValueError: if it is the state of another model, guide or other settings. The fit is then
        unchanged.
    """
    if "settings" not in state:
        raise ValueError(
            "Expected the checkpoint of a fit; got another file of pyro_adaann, such as that of a FitResult. "
            "Read it with FitResult.load."
        )
    _check_settings(settings, state["settings"])
    random, parameters = get_random_states(), fit.parameters
    try:
        # A guide makes its parameters when it first runs.
        with poutine.trace(param_only=True) as capture, pyro.validation_enabled(False), torch.no_grad():
            guide_trace = poutine.trace(parameters.guide).get_trace(*args, **kwargs)
            model = poutine.replay(parameters.model, trace=guide_trace)
            sites = sites_in(run_leniently(poutine.trace(model).get_trace, *args, **kwargs))
        found = captured_parameters(capture.trace)
        _check_sites(sites, state["objective"]["sites"])
        parameters.check(state["parameters"], found)
        parameters.restore(state["parameters"], found)
    except Exception:
        set_random_states(random)
        raise
    fit.history.stages[:] = [AnnealingStage(**stage) for stage in state["history"]["stages"]]
    fit.history.recoveries[:] = [Recovery(**recovery) for recovery in state["history"]["recoveries"]]
    fit.stages.tell_objective()
    fit.objective.restore(state["objective"])
    fit.net.restore(state["safety_net"])
    if fit.rungs is not None:
        fit.rungs.restore(state["ladder"])
    if state["budget"] is not None and fit.stages.budget is None:
        fit.stages.budget = StepPlan(**state["budget"])
    fit.fit_id = state["fit_id"]
    fit.net.keep()
    fit.register_guide(captured_parameters(guide_trace).values())
    set_random_states(state["random"])
    fit.is_together = False  # each process has set the random states of its own device


def settings_of(fit: Fit, optim: Any, loss: Any, final_loss: ELBO | None) -> dict[str, str]:
    """Return what must be the same in the fit that writes a checkpoint and the one that reads it."""
    settings = {"guide": type(fit.parameters.guide).__name__}
    settings["optim"] = repr(optim) if isinstance(optim, Step) else _describe_optim(optim)
    settings |= fit.settings.describe()
    for role, objective in (("loss", loss), ("final loss", final_loss)):
        if objective is not None:
            settings |= _describe_loss(role, objective)
    return settings


def _describe_loss(role: str, loss: Any) -> dict[str, str]:
    """Return the class of a loss and, of an ELBO, its numbers, switches and names."""
    settings = {role: type(loss).__name__}
    if isinstance(loss, ELBO):
        values = {name: value for name, value in vars(loss).items() if name != "max_plate_nesting"}
        settings |= {
            f"{role}.{name}": str(value)
            for name, value in values.items()
            if isinstance(value, bool | int | float | str)
        }
    return settings


def _describe_optim(optim: Any) -> str:
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


def _name(constructor: Any) -> str:
    return getattr(constructor, "__name__", type(constructor).__name__)


def check_same_fit(path: str | os.PathLike[str], fit_id: str, num_steps: int) -> None:
    """Raise a `ValueError` if a file is of another fit than the one that goes on."""
    if read_checkpoint(path)["fit_id"] != fit_id:
        raise ValueError(
            f"Expected a checkpoint file of this fit, which has taken {num_steps} steps; got "
            f"{os.fspath(path)!r} of another one. Give another path, or go on from the file with a "
            f"new AdaAnnSVI."
        )


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
