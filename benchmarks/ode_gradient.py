"""Time of the Lorenz log density with its gradient: ways to solve the ODE, side by side.

All ways use torchdiffeq's RK4 on the same grid (60 steps), for 100 particles, in single precision
on one core, and take turns in one process; ratios of medians are printed, and how far each gradient
is from that of the first way in double precision (largest relative difference).

    python benchmarks/ode_gradient.py
    python benchmarks/ode_gradient.py --compile

- ``plain``: backpropagation through ``odeint``, the right-hand side as one would write it.
- ``few operations``: the same with the example's right-hand side.
- ``tangents``: ``examples/ode.py``.
- ``compiled``: backpropagation through `torch.compile` of ``odeint``; the first call, which
  compiles, is timed by itself.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchdiffeq import odeint

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import lorenz
from ode import Problem, Rhs, solve

NOISE_VARIANCE = 0.2


def plain_lorenz(s: Tensor, b: Tensor, r: Tensor) -> tuple[Rhs, Tensor]:
    def rhs(t: Tensor, state: Tensor) -> Tensor:
        x, y, z = state[..., 0], state[..., 1], state[..., 2]
        return torch.stack([s * (y - x), x * (r - z) - y, x * y - b * z], dim=-1)

    return rhs, torch.ones((*s.shape, 3), dtype=s.dtype)


def backpropagate(problem: Problem, params: Tensor) -> Tensor:
    grid = torch.arange(61, dtype=params.dtype) * 0.025
    return odeint(*problem(*params), grid, method="rk4")[2::2]


def particles_first(params: Tensor) -> Tensor:
    return backpropagate(plain_lorenz, params).movedim(-1, 1)


def few_operations(params: Tensor) -> Tensor:
    return backpropagate(lorenz.lorenz, params)


def tangents(params: Tensor) -> Tensor:
    times = lorenz.TIMES.to(params.dtype)
    return solve(lorenz.lorenz, params.unbind(), times, lorenz.NUM_SUBSTEPS)[1:]


def gradient(way: Callable[[Tensor], Tensor], params: Tensor, data: Tensor) -> Tensor:
    params = params.clone().requires_grad_()
    residual = way(params) - data.to(params.dtype).unsqueeze(-1)
    (result,) = torch.autograd.grad(-0.5 / NOISE_VARIANCE * residual.square().sum(), params)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-particles", type=int, default=100)
    parser.add_argument("--num-repeats", type=int, default=50)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = lorenz.simulate(NOISE_VARIANCE, lorenz.DATA_SEED)
    truth = torch.tensor(list(lorenz.TRUTH.values()), dtype=torch.float64)
    params = truth.unsqueeze(-1) + 0.3 * torch.randn(3, args.num_particles, dtype=torch.float64)

    ways = {"plain": particles_first, "few operations": few_operations, "tangents": tangents}
    exact = gradient(particles_first, params, data)
    for name, way in ways.items():
        error = (gradient(way, params, data) / exact - 1).abs().max()
        print(f"{name:16} largest relative difference of the gradient {float(error):.1e}")
    if args.compile:
        ways["compiled"] = torch.compile(few_operations)
        start = time.perf_counter()
        gradient(ways["compiled"], params.float(), data)
        print(f"compiled         first call {time.perf_counter() - start:.1f} s")

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.num_repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            gradient(way, params.float(), data)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"{name:16} {1e3 * median:6.1f} ms, {medians['plain'] / median:4.1f} times faster")


if __name__ == "__main__":
    main()
