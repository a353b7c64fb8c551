"""The least time that a step can take on a device: its arithmetic and its traffic at the device's own rates.

The rates are measured, by products of large matrices and by a copy. The work of a step is counted by hand,
from the shapes of the guide's parameters, for n draws and P parameters:

* forward, every parameter is multiplied by one number of every draw, and backward twice: 6 n P operations;
* every unit of a layer is written once and read once for every draw; every parameter is read, and its
  gradient and Adam's two averages are read or written, seven times in all;
* a natural step draws twice, and goes forward and back through n draws and n / 4 replayed ones for their
  scores; it takes the products of all pairs of them, and the Cholesky factor of the n x n matrix in double
  precision.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

#: Seconds for which each rate is measured.
PATIENCE = 0.3


@dataclass(frozen=True)
class Rates:
    """Operations in single and double precision, and bytes, per second."""

    single: float
    double: float
    bytes: float


@dataclass(frozen=True)
class Work:
    """Operations in single and double precision, and bytes."""

    single: float
    double: float
    bytes: float

    def milliseconds(self, rates: Rates) -> tuple[float, float]:
        """Return the least time of the arithmetic and that of the traffic."""
        arithmetic = self.single / rates.single + self.double / rates.double
        return 1000 * arithmetic, 1000 * self.bytes / rates.bytes


def measure_rates(device: torch.device, *, is_quick: bool) -> Rates:
    """Return what the device does per second, at its best of a few tries."""
    size = 256 if is_quick else 4096
    best = []
    for dtype in (torch.float32, torch.float64):
        a = torch.randn(size, size, dtype=dtype, device=device)
        best.append(2 * size**3 / shortest(lambda a=a: a @ a, device))
    numbers = torch.zeros(2**20 if is_quick else 2**27, device=device)
    other = torch.empty_like(numbers)
    traffic = 2 * numbers.nbytes / shortest(lambda: other.copy_(numbers), device)
    return Rates(*best, traffic)


def shortest(run: Callable[[], object], device: torch.device) -> float:
    """Return the shortest time of a few runs, in seconds."""
    times: list[float] = []
    while sum(times) < PATIENCE and len(times) < 20:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def work_of_step(guide: nn.Module, num_draws: int, *, is_natural: bool) -> Work:
    """Return the least work of a step with this guide, of the flows of this package."""
    num_parameters = num_units = num_products = 0
    for name, parameter in guide.named_parameters():
        num_parameters += parameter.numel()
        num_units += parameter.numel() if name.split(".")[-1] == "b" or "biases" in name else 0
        # What the product of two scores takes: of outer products, the products of their factors.
        is_map = "weights" in name
        factors = [parameter[..., 0], parameter[..., 0, :]] if is_map else [parameter]
        num_products += sum(factor.numel() for factor in factors)
    traffic = 4 * (2 * num_draws * num_units + 7 * num_parameters)
    if not is_natural:
        return Work(6 * num_draws * num_parameters, 0, traffic)
    num_rows = 1.25 * num_draws
    passes = 2 * num_parameters * (2 * num_draws + 4 * num_rows)
    gram = num_rows**2 * num_products  # half of the pairs, two operations each
    return Work(passes + gram, num_rows**3 / 3, traffic + 12 * num_rows**2)
