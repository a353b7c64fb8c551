"""How much time there is."""

from __future__ import annotations

import time

from pyro_adaann.processes.group import number_from_first

__all__ = ["Clock"]


class Clock:
    """The time that is left of a budget.

    :param budget: seconds in all; None for as many as it takes.
    """

    def __init__(self, budget: float | None) -> None:
        self._start = time.monotonic()
        self._budget = budget

    @property
    def passed(self) -> float:
        """Seconds since the start."""
        return number_from_first(time.monotonic() - self._start)

    @property
    def is_endless(self) -> bool:
        """Whether there is no budget."""
        return self._budget is None

    def has(self, seconds: float) -> bool:
        """Whether there are more than so many seconds left."""
        return self._budget is None or self.passed + seconds < self._budget

    def part(self, share: float, most: float) -> Clock:
        """Return a clock for a share of what is left, and so many seconds at most."""
        return Clock(most if self._budget is None else min(most, share * (self._budget - self.passed)))
