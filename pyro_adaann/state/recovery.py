"""The last good state of a fit, and when to go back to it."""

from __future__ import annotations

from typing import Any

from pyro_adaann.annealing.history import AnnealingHistory, Recovery
from pyro_adaann.state.parameters import FitParameters

__all__ = ["MAX_REJECTED", "RECOVERY_FACTOR", "NoFiniteStateError", "SafetyNet"]

#: Attempts at a finite loss before the driver raises an error.
MAX_REJECTED = 100
#: Factor of a recovery on the learning rate and on the increments.
RECOVERY_FACTOR = 0.5
_MAX_RECOVERIES = 10
#: Steps in a row that diverge after which the fit returns to its last good state.
_NUM_REJECTED_TO_GO_BACK = 20
#: Steps between two good states that are kept.
_KEEP_EVERY = 100


class NoFiniteStateError(Exception):
    """No step gives finite values; the parameters are the last good ones. The message counts the attempts."""


class SafetyNet:
    """Keeps a good state every 100 steps, counts steps that diverge, and restores the last good state.

    :param parameters: the parameters of the fit.
    :param history: its history, which gets the recoveries.
    """

    def __init__(self, parameters: FitParameters, history: AnnealingHistory) -> None:
        self.parameters = parameters
        self.history = history
        self.num_rejected_in_a_row = 0
        #: Recoveries since annealing began, or since the latest restart.
        self.num_recoveries = 0
        self._last_good: tuple[dict[str, Any], float] | None = None

    @property
    def is_set(self) -> bool:
        """Whether there is a state to go back to."""
        return self._last_good is not None

    @property
    def increment_factor(self) -> float:
        """What the increments of an adaptive schedule are multiplied by."""
        return RECOVERY_FACTOR**self.num_recoveries

    def keep(self) -> None:
        """Keep the present state as the last good one."""
        self._last_good = self.parameters.state(), self.history.stages[-1].inverse_temperature

    def begin_pass(self) -> None:
        """Reset the counts of recoveries and rejected steps."""
        self.num_recoveries = self.num_rejected_in_a_row = 0

    def accept(self, num_steps: int) -> None:
        """Count a good step."""
        self.num_rejected_in_a_row = 0
        if num_steps % _KEEP_EVERY == 0:
            self.keep()

    def reject(self, num_steps: int, is_hopeless: bool) -> bool:
        """Count a step that diverged and changed no parameter; return whether the fit went back.

        :raises NoFiniteStateError: after 100 of them in a row, or at once if it is known to be.
        """
        self.num_rejected_in_a_row += 1
        if is_hopeless:
            self.num_rejected_in_a_row = MAX_REJECTED
        if self.num_rejected_in_a_row >= MAX_REJECTED:
            raise NoFiniteStateError(f"{MAX_REJECTED} attempts")
        if self.num_rejected_in_a_row % _NUM_REJECTED_TO_GO_BACK == 0 and self.is_set:
            self.go_back(num_steps, "the loss or its gradient")
            return True
        return False

    def go_back(self, num_steps: int, cause: str) -> None:
        """Return to the last good state, with half the learning rate.

        :raises NoFiniteStateError: if that has not helped 10 times.
        """
        assert self._last_good is not None  # a step that is accepted keeps one before it
        state, t = self._last_good
        self.parameters.go_back(state, RECOVERY_FACTOR)
        if self.num_recoveries >= _MAX_RECOVERIES:
            raise NoFiniteStateError(f"spite of {_MAX_RECOVERIES} returns to the last good state")
        self.num_recoveries += 1
        stage = self.history.stages[-1]
        self.history.recoveries.append(Recovery(num_steps, stage.inverse_temperature, t, cause))

    @property
    def inverse_temperature(self) -> float:
        """The inverse temperature of the last good state."""
        assert self._last_good is not None
        return self._last_good[1]

    def state(self) -> dict[str, int]:
        """Return the counts as plain data; :meth:`restore` takes it."""
        return {"num_rejected_in_a_row": self.num_rejected_in_a_row, "num_recoveries": self.num_recoveries}

    def restore(self, state: dict[str, int]) -> None:
        """Go on from what :meth:`state` has returned."""
        self.num_rejected_in_a_row = state["num_rejected_in_a_row"]
        self.num_recoveries = state["num_recoveries"]
