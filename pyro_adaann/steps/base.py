"""The base class of steps: one update of the parameters, and a record of its outcome."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyro_adaann.annealing.history import StepResult
from pyro_adaann.annealing.paths import Path
from pyro_adaann.objectives.base import Objective

__all__ = ["Call", "Moved", "Step"]


@dataclass(frozen=True)
class Call:
    """What a step evaluates: model and guide with their arguments, and the present loss and optimizer."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss_and_grads: Callable[..., Any]
    optim: Any


@dataclass(frozen=True)
class Moved:
    """What a step returns: the result for the history, and the state for the next step."""

    result: StepResult
    state: dict[str, float]


class Step(ABC):
    """One update of the parameters of a guide.

    A step holds settings, which never change, so several fits may share it. Its state, a dictionary of
    numbers, changes from one update to the next; the fit keeps it and writes it into checkpoints.
    """

    @abstractmethod
    def num_draws(self) -> int:
        """Return the number of draws of the guide in a step."""

    @abstractmethod
    def start(self) -> dict[str, float]:
        """Return the state before the first step."""

    @abstractmethod
    def slow_down(self, state: dict[str, float], factor: float) -> dict[str, float]:
        """Return the state with step lengths multiplied by ``factor``."""

    @abstractmethod
    def make_objective(self, path: Path, num_recycled_draws: int) -> Objective:
        """Return the objective that the step minimizes."""

    @abstractmethod
    def take(
        self,
        objective: Any,
        call: Call,
        state: dict[str, float],
        ready: Callable[[dict[str, Tensor]], None],
    ) -> Moved:
        """Update the parameters once, or leave them unchanged.

        :param objective: the result of :meth:`make_objective`.
        :param call: what to evaluate.
        :param state: the state that the previous step returned.
        :param ready: to be called with the unconstrained parameters by name before they change.
        """
