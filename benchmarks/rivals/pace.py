"""How slow the machine is at the moment: shared machines differ by a factor of three from day to day."""

from __future__ import annotations

import statistics
import time

import numpy as np

__all__ = ["pace"]

#: The processor's seconds of :func:`_work` on the machine on which most cells were run.
NOMINAL = 0.036
NUM_RUNS, NUM_ADDITIONS, NUM_PRODUCTS, SIZE = 5, 500_000, 20, 200


def pace() -> float:
    """Return the time that fixed work takes now as a multiple of its nominal one, the median of five runs.

    Half of it is Python's own, half matrix products and elementwise functions.
    """
    return statistics.median(_work() for _ in range(NUM_RUNS)) / NOMINAL


def _work() -> float:
    start = time.process_time()
    total = 0
    for number in range(NUM_ADDITIONS):
        total += number
    values = np.full((SIZE, SIZE), 1 / SIZE)
    for _ in range(NUM_PRODUCTS):
        values = np.tanh(values @ values)
    return time.process_time() - start
