"""Simulation-based calibration of `AnnealedSMC` on a small model, and of the same fits 20 % too narrow.

The model has five latent numbers: a line with a random slope for each of three groups, and their spread. Run
it with::

    OMP_NUM_THREADS=1 python benchmarks/calibration.py --num-datasets 100 --num-processes 2
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_adaann import AnnealedSMC, simulation_based_calibration

TIMES = torch.linspace(-1.0, 1.0, 8)
#: Observations of three groups; only their shape counts.
SEEN = torch.zeros(3, 8)


def model(y: Tensor) -> None:
    start = pyro.sample("start", dist.Normal(0.0, 1.0))
    spread = pyro.sample("spread", dist.Gamma(3.0, 3.0))
    with pyro.plate("groups", 3, dim=-2):
        slope = pyro.sample("slope", dist.Normal(0.0, spread))
        with pyro.plate("times", len(TIMES), dim=-1):
            pyro.sample("y", dist.Normal(start + slope * TIMES, 0.5), obs=y)


def right(model: Callable[..., Any], y: Tensor) -> dict[str, Tensor]:
    result = AnnealedSMC(model, num_particles=512).run(y, progress_bar=False)
    return result.resample(100, replacement=False)


def narrow(model: Callable[..., Any], y: Tensor) -> dict[str, Tensor]:
    draws = right(model, y)
    return {name: value.mean(0) + 0.8 * (value - value.mean(0)) for name, value in draws.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-datasets", type=int, default=100)
    parser.add_argument("--num-processes", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args(argv)
    for seed in args.seeds:
        for fit in (right, narrow):
            start, cpu = time.perf_counter(), time.process_time()
            calibration = simulation_based_calibration(
                model,
                fit,
                SEEN,
                num_datasets=args.num_datasets,
                num_processes=args.num_processes,
                progress_bar=False,
                seed=seed,
            )
            print(
                f"{fit.__name__}, seed {seed}: {time.perf_counter() - start:.0f} s, "
                f"{time.process_time() - cpu:.0f} CPU seconds of this process"
            )
            print(calibration)


if __name__ == "__main__":
    main()
