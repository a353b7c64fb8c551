"""Cost of a natural step: against a step of Adam, in draws, and in memory.

    OMP_NUM_THREADS=1 python benchmarks/natural_step.py [--quick] [--json FILE]

* ratio: processor time of a step of `AdaAnnSVI` with `NaturalStep` by that of a step of `pyro.infer.SVI` with
  Adam and `Trace_ELBO`, the same guide and number of draws. The two take turns; the figures are medians.
* growth: time of a natural step with 4,000 draws by that with 1,000.
* memory: how much the peak of a fresh process grows by a natural step with 4,000 draws, once a small one has
  loaded what a step needs.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal

from pyro_adaann import AdaAnnSVI, AutoPlanar, AutoRealNVP, ConstantSchedule, NaturalStep

DIM = 10


def model() -> None:
    pyro.sample("z", dist.Normal(torch.zeros(DIM), 1.0).to_event(1))


#: Guides by name; a new one needs a line.
GUIDES: dict[str, Callable[[], Any]] = {
    "RealNVP 12 x 100": lambda: AutoRealNVP(model, 12, [100, 100], base_scale=1.5),
    "planar 64": lambda: AutoPlanar(model, 64, base_scale=1.5),
    "AutoIAFNormal 4 x 100": lambda: AutoIAFNormal(model, hidden_dim=[100, 100], num_transforms=4),
}
#: Of about 100,000 parameters, and of 300,000.
MIDDLE, LARGE = ((layers, [100, 100]) for layers in (5, 14))


def make_natural(make_guide: Callable[[], Any], num_draws: int) -> tuple[AdaAnnSVI, int]:
    """Return a fit at inverse temperature 1, and the number of parameters of its guide."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = make_guide()
    guide()
    size = sum(parameter.numel() for parameter in guide.parameters())
    return AdaAnnSVI(model, guide, NaturalStep(num_draws), schedule=ConstantSchedule()), size


def seconds(step: Callable[[], Any]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def ratio(make_guide: Callable[[], Any], num_draws: int, num_turns: int) -> dict[str, float]:
    """Return the times of both steps and their ratio."""
    natural, size = make_natural(make_guide, num_draws)
    elbo = Trace_ELBO(num_draws, vectorize_particles=True)
    adam = SVI(model, natural.guide, pyro.optim.Adam({"lr": 1e-4}), elbo)
    times: list[tuple[float, float]] = []
    for turn in range(num_turns + 1):
        pair = seconds(natural.step), seconds(adam.step)
        if turn:  # the first one warms up
            times.append(pair)
    ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "parameters": size,
        "natural, ms": 1000 * ours,
        "Adam, ms": 1000 * theirs,
        "ratio": ours / theirs,
    }


def growth(num_turns: int, few: int, many: int) -> dict[str, float]:
    """Return the times of a step with few and with many draws and their ratio."""
    medians = []
    for num_draws in (few, many):
        fit, size = make_natural(lambda: AutoRealNVP(model, *MIDDLE, base_scale=1.5), num_draws)
        medians.append(statistics.median([seconds(fit.step) for _ in range(num_turns + 1)][1:]))
    first, second = medians
    return {
        "parameters": size,
        f"{few} draws, s": first,
        f"{many} draws, s": second,
        "ratio": second / first,
    }


def memory(num_draws: int) -> dict[str, float]:
    """Return by how many megabytes a step raises the peak of this process."""

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000

    def step(layers: tuple[int, list[int]], draws: int) -> int:
        fit, size = make_natural(lambda: AutoRealNVP(model, *layers, base_scale=1.5), draws)
        fit.step()
        return size

    step((2, [10, 10]), 50)
    before = peak()
    size = step(LARGE, num_draws)
    return {"parameters": size, "draws": num_draws, "MB": peak() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small numbers of draws, to try the script")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.disable(logging.INFO)
    num_turns, num_draws, few, many = (1, 50, 50, 200) if args.quick else (9, 500, 1000, 4000)
    rows: dict[str, dict[str, float]] = {}
    # First, and in a process of its own: the peak never falls.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        rows["memory, RealNVP"] = pool.apply(memory, (many,))
    for name, make_guide in GUIDES.items():
        rows[f"{name}, {num_draws} draws"] = ratio(make_guide, num_draws, num_turns)
    rows["growth, RealNVP"] = growth(1 if args.quick else 3, few, many)
    for name, row in rows.items():
        print(f"{name:32}", "  ".join(f"{key} {value:.4g}" for key, value in row.items()))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
