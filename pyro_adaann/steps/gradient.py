"""A step by a Pyro optimizer along the gradient of a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import pyro.infer.util
import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor

from pyro_adaann.annealing.history import Outcome, StepResult
from pyro_adaann.annealing.paths import Path
from pyro_adaann.objectives.elbo import ELBOObjective
from pyro_adaann.objectives.traces import captured_parameters
from pyro_adaann.steps.base import Call, Moved, Step
from pyro_adaann.steps.uninterrupted import uninterrupted

__all__ = ["GradientStep", "have_finite_norms", "is_finite", "to_float"]


@dataclass(frozen=True)
class GradientStep(Step):
    """A step of the fit's optimizer along the gradient of a loss, skipped if loss or gradient is not finite.

    :param loss: an ELBO or a callable ``loss(model, guide, *args, **kwargs)``.
    :param evaluate: the function by which `SVI` evaluates the loss.
    :param evaluate_and_grads: likewise, with gradients.
    :param final_loss: the ELBO at inverse temperature 1, None for ``loss``.
    :param max_gradient_ratio: bound on the gradient of one particle.
    """

    loss: Any
    evaluate: Callable[..., Any]
    evaluate_and_grads: Callable[..., Any]
    final_loss: ELBO | None
    max_gradient_ratio: float

    def num_draws(self) -> int:
        """Return the number of particles of the loss, 1 if it has none."""
        return getattr(self.loss, "num_particles", 1)

    def start(self) -> dict[str, float]:
        """Return an empty state: that of the optimizer is kept with the parameters."""
        return {}

    def slow_down(self, state: dict[str, float], factor: float) -> dict[str, float]:
        """Return the empty state: learning rates belong to the optimizer."""
        return state

    def make_objective(self, path: Path, num_recycled_draws: int) -> ELBOObjective:
        """Return the loss as the objective."""
        calls = self.evaluate, self.evaluate_and_grads
        return ELBOObjective(
            self.loss, *calls, path, self.final_loss, num_recycled_draws, self.max_gradient_ratio
        )

    def take(
        self,
        objective: ELBOObjective,
        call: Call,
        state: dict[str, float],
        ready: Callable[[dict[str, Tensor]], None],
    ) -> Moved:
        """Take one step of the optimizer."""
        loss, found = objective.leniency.insist(lambda: _loss_and_parameters(call))
        parameters = set(found.values())
        loss, outcome = to_float(loss), Outcome.DIVERGED
        if is_finite(parameters, loss if objective.reports_loss else 0.0):
            ready(found)
            with uninterrupted():
                call.optim(parameters)
            outcome = Outcome.ACCEPTED
        pyro.infer.util.zero_grads(parameters)
        return Moved(StepResult(outcome, loss), state)


def _loss_and_parameters(call: Call) -> tuple[Any, dict[str, Tensor]]:
    """Return the loss and the parameters that it depends on, which hold its gradient."""
    with poutine.trace(param_only=True) as capture:
        try:
            loss = call.loss_and_grads(call.model, call.guide, *call.args, **call.kwargs)
        except BaseException:
            # Particles before the one at fault may have left their gradients.
            pyro.infer.util.zero_grads(captured_parameters(capture.trace).values())
            raise
    return loss, captured_parameters(capture.trace)


def to_float(loss: Any) -> Any:
    """Return a loss as a float, or a tuple of losses, e.g. of ReweightedWakeSleep, as one of floats."""
    if isinstance(loss, tuple):
        return type(loss)(map(pyro.infer.util.torch_item, loss))
    return pyro.infer.util.torch_item(loss)


def is_finite(parameters: Collection[Tensor], loss: Any) -> bool:
    """Whether a loss and the gradients of the parameters are finite, and their squares too.

    A gradient of 1e20 is finite in single precision and its square is not: Adam's running average would be
    infinite and every later update zero, without an error.
    """
    if not all(map(math.isfinite, loss if isinstance(loss, tuple) else (loss,))):
        return False
    grads = [_entries(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if not grads:
        return True
    # Roots of sums of squares: finite only if all the squares are.
    return have_finite_norms(grads, 2)


def have_finite_norms(tensors: list[Tensor], order: int) -> bool:
    """Whether the norms of tensors are finite, wherever they live.

    Those of one device and type are computed by one launch there, and waited for once.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    norms = [torch.stack(torch._foreach_norm(group, ord=order)) for group in groups.values()]
    return all(math.isfinite(norm) for group in norms for norm in group.tolist())


def _entries(grad: Tensor) -> Tensor:
    """Return the numbers of a gradient that may be sparse, as that of an embedding."""
    return grad.coalesce().values() if grad.is_sparse else grad
