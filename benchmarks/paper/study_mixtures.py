"""Examples 2 and 3: in how many trials does each method keep both modes, and how well?

    OMP_NUM_THREADS=1 python benchmarks/paper/study_mixtures.py mixture_1d --trials 20 --workers 2
    OMP_NUM_THREADS=1 python benchmarks/paper/study_mixtures.py mixture_2d --trials 20 --workers 2

Each adds to its file in ``benchmarks/results/paper/`` what is not there yet; stopped, it goes on at the next
start. By default four separations of every case; ``--all-mu`` for those of the paper, ``--methods`` for some
methods alone; ``--rate``, ``--particles`` and ``--final-steps`` for settings that are not the paper's. The
methods, with the paper's settings:

* ``none``: 8,000 steps at t = 1 (example 3: as many; the paper does not say);
* ``linear``: 500 steps at t = 0.01, then one at each of 9,900 inverse temperatures;
* ``adaann``: 500 steps at t = 0.01, then five a stage, the variance from 1,000 fresh draws;
* ``realnvp``: no annealing, 5,000 steps, in example 3 alone;
* ``covering``: ``adaann`` with the package's `TraceMixedKL_ELBO`, nine tenths of it the forward divergence;
  not the paper's;
* ``natural``: the package's `natural_svi` with the same flow and base; not the paper's;
* ``adaann_svi``, ``covering_svi``: the same through the package's driver, one trial at a time, ten times
  slower: to show that trials run together are the same.

All but the last three run the trials of a cell together (``together.py``), with the package's flows and
schedules.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from records import RESULTS, Record, Task, add_arguments, missing_trials, read_records, run_tasks
from together import Flows, Planars, RealNVPs, fit_together

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import mixture_1d
import mixture_2d
from comparison import compare
from mixture import Mixture, make_svi

from pyro_adaann import (
    AdaAnnSchedule,
    AnnealingSchedule,
    AutoPlanar,
    ConstantSchedule,
    LinearSchedule,
    TraceMixedKL_ELBO,
    natural_svi,
)

Cell = dict[str, Any]

#: Separations that run by default: both ends of the paper's ranges and two between them.
SEPARATIONS = {"symmetric": (1, 4, 8, 16), "asymmetric": (1, 3, 5, 8), "plane": (0.0, 0.5, 1.5, 2.5)}
#: The most trials that are worth running together: larger arrays leave the processor's cache.
MAX_TOGETHER = 25
#: Share of the forward divergence in ``covering``.
FORWARD_WEIGHT = 0.9


def flows_of(case: str) -> Iterator[Cell]:
    """Yield method and flow of every cell of a case, cheap ones first."""
    annealed = mixture_2d.NUM_TRANSFORMS if case == "plane" else mixture_1d.NUM_TRANSFORMS[case]
    for method in ("natural", "adaann", "covering", "linear", "adaann_svi", "covering_svi"):
        yield {"method": method, "num_transforms": annealed, "hidden_dim": 0}
    for num_transforms in (50, 75, 100) if case == "plane" else (25, 50, 75):
        yield {"method": "none", "num_transforms": num_transforms, "hidden_dim": 0}
    if case == "plane":
        for hidden_dim in (10, 25, 100):
            for num_transforms in (6, 12):
                yield {"method": "realnvp", "num_transforms": num_transforms, "hidden_dim": hidden_dim}


def target_of(cell: Mapping[str, Any]) -> tuple[Mixture, float, float, float]:
    """Return the density of a cell, the learning rate, the tolerance and the scale of the base."""
    case, mu = cell["case"], cell["mu"]
    if case == "plane":
        rate = cell["rate"] or mixture_2d.learning_rate(mu)
        return mixture_2d.make_target(mu), rate, mixture_2d.TOLERANCE, mixture_2d.BASE_SCALE
    rate = cell["rate"] or mixture_1d.learning_rate(case, mu)
    return mixture_1d.make_target(case, mu), rate, mixture_1d.TOLERANCE, mixture_1d.BASE_SCALE


def schedule_of(method: str, tolerance: float, fast: bool) -> tuple[AnnealingSchedule, int, int]:
    """Return the schedule of a method, its steps at the first inverse temperature and at every other."""
    if method == "linear":
        return LinearSchedule(3 if fast else 9900), 3 if fast else 500, 1
    if method.startswith(("adaann", "covering")):
        return AdaAnnSchedule(1e3 if fast else tolerance), 3 if fast else 500, 5
    return ConstantSchedule(), 3 if fast else 5000 if method == "realnvp" else 8000, 1


def run_together(cell: Mapping[str, Any], trials: list[int]) -> list[Record]:
    """Run trials of a cell as one fit."""
    target, rate, tolerance, base_scale = target_of(cell)
    torch.manual_seed(trials[0])
    size = cell["num_transforms"]
    flows: Flows
    if cell["hidden_dim"]:
        flows = RealNVPs.make(len(trials), target.dim, size, cell["hidden_dim"])
    else:
        flows = Planars.make(len(trials), target.dim, size, base_scale)
    schedule, num_initial_steps, num_steps_per_stage = schedule_of(
        cell["method"], tolerance, cell.get("fast", False)
    )
    start = time.process_time()
    fitted = fit_together(
        flows,
        target.log_density,
        schedule,
        base_scale=base_scale,
        learning_rate=rate,
        num_initial_steps=num_initial_steps,
        num_steps_per_stage=num_steps_per_stage,
        num_particles=cell["particles"] or 100,
        num_final_steps=cell["final_steps"] or 0,
        forward_weight=FORWARD_WEIGHT if cell["method"] == "covering" else None,
    )
    seconds = (time.process_time() - start) / len(trials)
    base = dist.Normal(torch.zeros(target.dim), base_scale).to_event(1)
    return [
        {
            "learning_rate": rate,
            **asdict(compare(dist.TransformedDistribution(base, [stack]), target)),
            "num_stages": len(path),
            "num_steps": num_steps,
            "cpu_seconds": seconds,
        }
        for stack, path, num_steps in zip(
            fitted.stacks, fitted.inverse_temperatures, fitted.num_steps, strict=True
        )
    ]


def run_driver(cell: Mapping[str, Any], trials: list[int]) -> list[Record]:
    """Run one trial of a cell with `AdaAnnSVI`."""
    target, rate, tolerance, base_scale = target_of(cell)
    records = []
    for trial in trials:
        pyro.set_rng_seed(trial)
        pyro.clear_param_store()
        guide = AutoPlanar(target.model, cell["num_transforms"], base_loc=0.0, base_scale=base_scale)
        fast = cell.get("fast", False)
        if cell["method"] == "natural":
            svi = natural_svi(target.model, guide, num_final_steps=2 if fast else 40)
        else:
            covering = TraceMixedKL_ELBO(FORWARD_WEIGHT, num_particles=100)
            loss = covering if cell["method"] == "covering_svi" else None
            svi = make_svi(target, guide, rate, tolerance, fast=fast, loss=loss)
        start = time.process_time()
        history = svi.run(progress_bar=False)
        records.append(
            {
                "learning_rate": 1.0 if cell["method"] == "natural" else rate,
                "cpu_seconds": time.process_time() - start,
                "num_stages": len(history.stages),
                "num_steps": history.num_steps,
                **asdict(compare(guide.get_posterior(), target)),
            }
        )
    return records


def separations(case: str, all_mu: bool) -> tuple[float, ...]:
    """Return which mu of a case run."""
    if not all_mu:
        return SEPARATIONS[case]
    return tuple(mixture_2d.LEARNING_RATES) if case == "plane" else mixture_1d.SEPARATIONS[case]


def make_tasks(args: argparse.Namespace) -> list[Task]:
    """Return what is missing in the result file."""
    records = read_records(args.file)
    cases = ["plane"] if args.example == "mixture_2d" else args.cases
    tasks = []
    for case in cases:
        for mu in args.mu or separations(case, args.all_mu):
            for flow in flows_of(case):
                if args.methods and flow["method"] not in args.methods:
                    continue
                if args.layers and flow["num_transforms"] not in args.layers:
                    continue
                cell = {"case": case, "mu": mu, **flow, "rate": args.rate, "particles": args.particles}
                cell["final_steps"] = args.final_steps
                if args.fast:
                    cell["fast"] = True
                trials = missing_trials(records, cell, args.trials)
                alone = flow["method"] == "natural" or flow["method"].endswith("_svi")
                if alone and (args.rate or args.particles or args.final_steps):
                    continue  # trials run together are enough to compare settings
                size = 1 if alone else MAX_TOGETHER
                run = run_driver if alone else run_together
                tasks += [Task(run, cell, trials[i : i + size]) for i in range(0, len(trials), size)]
    # One trial of every cell before the second of any: a study that is stopped has seen all of them.
    return sorted(tasks, key=lambda task: task.trials[0])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("example", choices=["mixture_1d", "mixture_2d"])
    parser.add_argument("--methods", nargs="+", help="by default all")
    parser.add_argument("--layers", nargs="+", type=int, help="flows of these sizes alone")
    parser.add_argument("--cases", nargs="+", default=["symmetric", "asymmetric"], help="of mixture_1d")
    parser.add_argument("--mu", nargs="+", type=float, help="these separations alone")
    parser.add_argument("--all-mu", action="store_true", help="all separations of the paper")
    parser.add_argument("--rate", type=float, help="another learning rate; rows of their own")
    parser.add_argument("--particles", type=int, help="other than 100 particles; rows of their own")
    parser.add_argument("--final-steps", type=int, help="further steps at t = 1; rows of their own")
    add_arguments(parser, num_trials=20)
    args = parser.parse_args(arguments)
    args.file = args.file or RESULTS / f"{args.example}.jsonl"
    run_tasks(make_tasks(args), args.file, args.workers)


if __name__ == "__main__":
    main()
