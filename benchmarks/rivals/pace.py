"""How slow the machine is while something runs: a shared one differs by a factor of three within minutes."""

from __future__ import annotations

import signal
import statistics
import time
from types import FrameType
from typing import Any

import numpy as np

__all__ = ["Pace"]

#: The processor's seconds of :func:`_work` on a machine with nothing else to do.
NOMINAL = 0.03
#: Seconds between two looks.
INTERVAL = 10.0
NUM_ADDITIONS, NUM_PASSES, SIZE = 500_000, 60, 20_000


class Pace:
    """The time that fixed work takes as a multiple of its nominal one, at both ends of a block and every ten
    seconds in between.

    The work is done in this process, half a per cent of the time of what runs here. The main thread alone may
    enter it.
    """

    def __init__(self) -> None:
        self._times: list[float] = []
        self._before: Any = None
        self._start = 0.0

    def __enter__(self) -> Pace:
        self._times = [_work() for _ in range(3)]
        self._before = signal.signal(signal.SIGALRM, self._look)
        signal.setitimer(signal.ITIMER_REAL, INTERVAL, INTERVAL)
        self._start = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        #: Processor's seconds of this process in the block, looks left out.
        self.seconds = time.process_time() - self._start - sum(self._times[3:])
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, self._before)
        self._times += [_work() for _ in range(3)]

    def _look(self, _: int, __: FrameType | None) -> None:
        self._times.append(_work())

    @property
    def value(self) -> float:
        """The mean so far."""
        return statistics.mean(self._times) / NOMINAL


def _work() -> float:
    """Return the time of work on one core, half of it Python's own, half elementwise functions."""
    start = time.process_time()
    total = 0
    for number in range(NUM_ADDITIONS):
        total += number
    values = np.linspace(-2.0, 2.0, SIZE)
    for _ in range(NUM_PASSES):
        values = np.tanh(1.5 * values)
    return time.process_time() - start
