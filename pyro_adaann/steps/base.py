"""What every step shares: it moves the parameters once, and says what became of it."""

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
    """What a step runs: model and guide with their arguments, and loss and optimizer as the fit has them."""

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
    """How the parameters of a guide move, once.

    A step holds settings, which never change: it may be shared by several fits. What changes from one step to
    the next is its state, a dictionary of numbers, which the fit keeps and writes into checkpoints.
    """

    @abstractmethod
    def num_draws(self) -> int:
        """Return the number of draws of the guide in a step."""

    @abstractmethod
    def start(self) -> dict[str, float]:
        """Return the state before the first step."""

    @abstractmethod
    def slow_down(self, state: dict[str, float], factor: float) -> dict[str, float]:
        """Return the state with steps that are ``factor`` times as long."""

    @abstractmethod
    def make_objective(self, path: Path, num_recycled_draws: int) -> Objective:
        """Return the objective that the step moves toward."""

    @abstractmethod
    def take(
        self,
        objective: Any,
        call: Call,
        state: dict[str, float],
        ready: Callable[[dict[str, Tensor]], None],
    ) -> Moved:
        """Move the parameters once, or leave them as they are.

        :param objective: what :meth:`make_objective` has returned.
        :param call: what to run.
        :param state: what the step before has left.
        :param ready: to be called with the parameters by name, unconstrained, before they move.
        """
