"""Example 1: no annealing, the linear schedule, and AdaAnn at four tolerances (figures 1 to 4).

    OMP_NUM_THREADS=1 python benchmarks/paper/study_bimodal.py --trials 5 --workers 2

``natural`` is the package's `natural_svi` with the same flow and base, not the paper's. Adds to
``benchmarks/results/paper/bimodal.jsonl`` what is not there yet. The annealed fits are those of
``examples/bimodal.py`` with the paper's 8,000 steps at t = 1 and M = 1,000; those without annealing (8,000
steps in all, four times as many trials, run together) have no more particles at t = 1 and no falling learning
rate. The first trial of every cell keeps its density and its schedule for the figures.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from records import RESULTS, Record, Task, add_arguments, missing_trials, read_records, run_tasks, thin
from together import Planars, fit_together
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import bimodal
from comparison import compare, make_grid

from pyro_adaann import AdaAnnSchedule, AnnealingSchedule, ConstantSchedule, LinearSchedule, natural_svi

TOLERANCES = (1.0, 0.1, 0.01, 0.001)
#: Where the densities of the figures are taken.
FIGURE_GRID = torch.linspace(-5.0, 1.0, 241)


class Bimodal:
    """The density of the example, normalized by quadrature: the paper's factor 0.954 has three digits."""

    def __init__(self) -> None:
        points, volume = self.grid()
        self.log_normalizer = math.log(float(bimodal.log_density(points).exp().sum()) * volume)

    def log_density(self, z: Tensor) -> Tensor:
        return bimodal.log_density(z[..., 0]) - self.log_normalizer

    def is_first_mode(self, z: Tensor) -> Tensor:
        return z[:, 0] > bimodal.MIDDLE

    def grid(self) -> tuple[Tensor, float]:
        return make_grid([(-7.0, 3.0)], 0.005)


def run_together(cell: Mapping[str, Any], trials: list[int]) -> list[Record]:
    """Run trials without annealing as one fit."""
    torch.manual_seed(trials[0])
    start = time.process_time()
    fitted = fit_together(
        Planars.make(len(trials), 1, 50, 2.0),
        Bimodal().log_density,
        ConstantSchedule(),
        base_scale=2.0,
        learning_rate=0.005,
        num_initial_steps=20 if cell.get("fast") else 8000,
        num_steps_per_stage=1,
    )
    seconds = (time.process_time() - start) / len(trials)
    base = dist.Normal(torch.zeros(1), 2.0).to_event(1)
    return [
        {
            **describe(dist.TransformedDistribution(base, [stack]), [1.0], trial),
            "num_steps": num_steps,
            "cpu_seconds": seconds,
        }
        for trial, stack, num_steps in zip(trials, fitted.stacks, fitted.num_steps, strict=True)
    ]


def run_driver(cell: Mapping[str, Any], trials: list[int]) -> list[Record]:
    """Run one annealed fit after the other."""
    fast = cell.get("fast", False)
    schedule: AnnealingSchedule = LinearSchedule(3 if fast else 9900)
    if cell["method"] == "adaann":
        schedule = AdaAnnSchedule(1e5 * cell["tolerance"] if fast else cell["tolerance"])
    records = []
    for trial in trials:
        pyro.set_rng_seed(trial)
        pyro.clear_param_store()
        if cell["method"] == "natural":
            svi = natural_svi(bimodal.model, bimodal.make_guide(), num_final_steps=2 if fast else 40)
        else:
            svi = bimodal.make_svi(20 if fast else 8000, schedule, num_variance_samples=1000)
        if cell["method"] == "linear":
            svi.num_steps_per_stage = 1
        start = time.process_time()
        history = svi.run(progress_bar=False)
        records.append(
            {
                "cpu_seconds": time.process_time() - start,
                "num_steps": history.num_steps,
                **describe(svi.guide.get_posterior(), history.inverse_temperatures, trial),
            }
        )
    return records


def describe(posterior: dist.TorchDistribution, inverse_temperatures: list[float], trial: int) -> Record:
    """Return what is recorded of every fit, and of the first one what the figures show."""
    record: Record = {**asdict(compare(posterior, Bimodal())), "num_stages": len(inverse_temperatures)}
    if trial == 0:
        with torch.no_grad():
            record["density"] = posterior.log_prob(FIGURE_GRID.unsqueeze(-1)).exp().tolist()
        record["schedule"] = thin(inverse_temperatures)
    return record


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tolerances", nargs="+", type=float, default=TOLERANCES, help="these alone")
    parser.add_argument("--methods", nargs="+", help="of the annealed ones; by default all")
    add_arguments(parser, num_trials=5)
    args = parser.parse_args(arguments)
    args.file = args.file or RESULTS / "bimodal.jsonl"

    records = read_records(args.file)
    mark = {"fast": True} if args.fast else {}
    tasks = []
    cell: dict[str, Any] = {"method": "none", "tolerance": None, **mark}
    if trials := missing_trials(records, cell, 4 * args.trials):
        tasks.append(Task(run_together, cell, trials))
    cells: list[dict[str, Any]] = [
        {"method": "adaann", "tolerance": tolerance, **mark} for tolerance in args.tolerances
    ]
    cells += [{"method": method, "tolerance": None, **mark} for method in ("natural", "linear")]
    if args.methods:
        cells = [cell for cell in cells if cell["method"] in args.methods]
    for cell in cells:
        tasks += [Task(run_driver, cell, [trial]) for trial in missing_trials(records, cell, args.trials)]
    run_tasks(sorted(tasks, key=lambda task: task.trials[0]), args.file, args.workers)


if __name__ == "__main__":
    main()
