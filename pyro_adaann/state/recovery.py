"""The last good state of a fit, and when to go back to it."""

from __future__ import annotations

from typing import Any

from pyro_adaann.annealing.history import AnnealingHistory, Recovery
from pyro_adaann.state.parameters import FitParameters

__all__ = ["MAX_REJECTED", "RECOVERY_FACTOR", "HopelessFit", "SafetyNet"]

#: Attempts at a finite loss before the driver says that there is none.
MAX_REJECTED = 100
#: What a return multiplies the learning rate and the increments by.
RECOVERY_FACTOR = 0.5
_MAX_RECOVERIES = 10
#: Rejected steps in a row after which the fit returns to its last good state.
_NUM_REJECTED_TO_GO_BACK = 20
#: Steps between two good states that are kept.
_KEEP_EVERY = 100


class HopelessFit(Exception):
    """Steps keep failing; the parameters are the last good ones. The message says when."""


class SafetyNet:
    """Keeps a good state now and then, counts failed steps, and brings the fit back.

    :param parameters: the parameters of the fit.
    :param history: its history, which gets the recoveries.
    """

    def __init__(self, parameters: FitParameters, history: AnnealingHistory) -> None:
        self.parameters = parameters
        self.history = history
        self.num_rejected_in_a_row = 0
        self._last_good: tuple[dict[str, Any], float] | None = None

    @property
    def is_set(self) -> bool:
        """Whether there is a state to go back to."""
        return self._last_good is not None

    def keep(self) -> None:
        """Keep the present state as the last good one."""
        self._last_good = self.parameters.state(), self.history.stages[-1].inverse_temperature

    def accept(self, num_steps: int) -> None:
        """Count a good step."""
        self.num_rejected_in_a_row = 0
        if num_steps % _KEEP_EVERY == 0:
            self.keep()

    def reject(self, num_steps: int, is_hopeless: bool) -> bool:
        """Count a step that changed no parameter; return whether the fit went back.

        :raises HopelessFit: after 100 of them in a row, or at once if it is known to be.
        """
        self.history.stages[-1].num_rejected += 1
        self.num_rejected_in_a_row += 1
        if is_hopeless:
            self.num_rejected_in_a_row = MAX_REJECTED
        if self.num_rejected_in_a_row >= MAX_REJECTED:
            raise HopelessFit(f"{MAX_REJECTED} attempts")
        if self.num_rejected_in_a_row % _NUM_REJECTED_TO_GO_BACK == 0 and self.is_set:
            self.go_back(num_steps, "the loss or its gradient")
            return True
        return False

    def go_back(self, num_steps: int, cause: str) -> float:
        """Return to the last good state, with half the learning rate; return its inverse temperature.

        :raises HopelessFit: if that has not helped 10 times.
        """
        assert self._last_good is not None  # a step that is accepted keeps one before it
        state, t = self._last_good
        self.parameters.go_back(state, RECOVERY_FACTOR)
        recoveries = self.history.recoveries
        if len(recoveries) >= _MAX_RECOVERIES:
            raise HopelessFit(f"spite of {_MAX_RECOVERIES} returns to the last good state")
        recoveries.append(Recovery(num_steps, self.history.stages[-1].inverse_temperature, t, cause))
        return t

    @property
    def inverse_temperature(self) -> float:
        """The inverse temperature of the last good state."""
        assert self._last_good is not None
        return self._last_good[1]
