"""Checks of the driver's arguments against each other, at construction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import ELBO
from pyro.infer.elbo import ELBOModule
from pyro.optim import PyroOptim

from pyro_adaann.checks import check_callable, check_count, kind_of
from pyro_adaann.objectives.capabilities import capabilities_of, check_can_temper
from pyro_adaann.objectives.traces import with_num_particles
from pyro_adaann.state.settings import FitSettings
from pyro_adaann.steps.base import Step
from pyro_adaann.steps.gradient import GradientStep

__all__ = ["check_parts", "make_step"]


def make_step(
    optim: Any,
    loss: Any,
    calls: tuple[Callable[..., Any], Callable[..., Any]],
    final_loss: Any,
    num_final_particles: int | None,
    max_gradient_ratio: float,
) -> Step:
    """Return the step that an optimizer and a loss stand for, or the step that is given.

    :param calls: the loss as `SVI` calls it, without and with gradients.
    :raises ValueError: if the arguments contradict each other.
    """
    final = _choose_final_loss(loss, final_loss, num_final_particles)
    if isinstance(optim, Step):
        return optim
    return GradientStep(loss, *calls, final, max_gradient_ratio)


def check_parts(
    model: Any, guide: Any, optim: Any, loss: Any, final_loss: Any, settings: FitSettings
) -> None:
    """Raise a `ValueError` if these parts do not go together."""
    check_callable("model", model, "model = Model()")
    check_callable("guide", guide, "guide = AutoPlanar(model)")
    is_step = isinstance(optim, Step)
    if is_step and not (loss is None and final_loss is None):
        raise ValueError(
            f"Expected no loss with {type(optim).__name__}, which has an objective of its own; got "
            f"{type(loss or final_loss).__name__}. Leave it out, or use a pyro.optim optimizer with it."
        )
    if not is_step:
        _check_optimizer_and_loss(optim, loss)
        if settings.stage_rule is not None and not isinstance(loss, ELBO):
            raise ValueError(
                f"Expected an ELBO, whose particles a stage rule weighs; got a {type(loss).__name__}. Use "
                f"Trace_ELBO."
            )
    if settings.schedule.initial_inverse_temperature < 1:
        check_can_temper(guide, optim if is_step else loss, settings.path)


def _check_optimizer_and_loss(optim: Any, loss: Any) -> None:
    if not isinstance(optim, PyroOptim):
        is_step = isinstance(optim, type) and issubclass(optim, Step)
        example = f"{optim.__name__}()" if is_step else "pyro.optim.Adam({'lr': 0.001})"
        of_torch = " of torch.optim" if isinstance(optim, torch.optim.Optimizer) else ""
        raise ValueError(
            f"Expected `optim` to be a pyro.optim.PyroOptim or a step such as NaturalStep; got "
            f"{kind_of(optim)}{of_torch}. Use for example {example}."
        )
    if loss is None:
        raise ValueError("Expected a loss with an optimizer; got None. Use for example Trace_ELBO().")
    if isinstance(loss, ELBOModule):
        raise ValueError(
            f"Expected `loss` to be an ELBO; got an ELBOModule, which is a {type(loss.elbo).__name__} with a "
            f"model and a guide. Pass the ELBO alone, since AdaAnnSVI has both."
        )
    if isinstance(loss, type) or not (isinstance(loss, ELBO) or callable(loss)):
        is_elbo = isinstance(loss, type) and issubclass(loss, ELBO)
        raise ValueError(
            f"Expected `loss` to be an ELBO or a function; got {kind_of(loss)}. Use for example "
            f"{loss.__name__ if is_elbo else 'Trace_ELBO'}()."
        )
    if isinstance(loss, ELBO):
        check_count("loss.num_particles", loss.num_particles, 1)
    if capabilities_of(loss).is_tempered:
        raise ValueError(
            f"Expected a loss of the untempered model; got {type(loss).__name__}, which AdaAnnSVI would "
            f"temper once more. Use Trace_ELBO here, or TemperedTrace_ELBO with pyro.infer.SVI."
        )


def _choose_final_loss(loss: Any, final_loss: Any, num_final_particles: int | None) -> ELBO | None:
    """Return the ELBO of the final stage, None for ``loss`` itself.

    :raises ValueError: if the arguments contradict each other.
    """
    check_count("num_final_particles", num_final_particles, 1)
    if final_loss is None and num_final_particles is None:
        return None
    if not isinstance(loss, ELBO):
        raise ValueError(
            f"Expected an ELBO as `loss`, which has particles, with `num_final_particles` or `final_loss`; "
            f"got a {type(loss).__name__}."
        )
    if num_final_particles is not None and final_loss is None:
        return with_num_particles(loss, num_final_particles)
    if num_final_particles is not None:
        raise ValueError(
            "Expected one of `final_loss` and `num_final_particles`; got both. A final loss has its own "
            "`num_particles`."
        )
    if not isinstance(final_loss, ELBO) or capabilities_of(final_loss).is_tempered:
        raise ValueError(
            f"Expected `final_loss` to be an ELBO of the untempered model; got {kind_of(final_loss)}. "
            f"Use for example Trace_ELBO()."
        )
    return final_loss
