"""Table 2: what no annealing, the linear schedule and AdaAnn cost, as ratios.

    OMP_NUM_THREADS=1 python benchmarks/paper/study_times.py --trials 3

Example 2, symmetric, mu = 4, every fit with the package's guides and drivers. The methods take turns: trial
by trial, each of them runs once, all in one process, and the processor time of that process is what counts.
The page shows ratios within a trial, which a busy machine leaves alone better than minutes. Adds to
``benchmarks/results/paper/times.jsonl`` what is not there yet; a trial that was stopped runs again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyro
from pyro.infer import SVI
from records import RESULTS, Record, Task, add_arguments, missing_trials, read_records, run_tasks

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import mixture_1d
from mixture import make_elbo, make_svi

from pyro_adaann import AdaAnnSVI, AutoPlanar, LinearSchedule

#: Method and number of layers, in the order of the table.
METHODS = (("none", 25), ("none", 50), ("none", 75), ("linear", 50), ("adaann", 50))
CASE, MU = "symmetric", 4.0


def make_fit(method: str, num_transforms: int, fast: bool) -> tuple[SVI, int | None]:
    """Return a fit and its number of steps; None where its schedule decides."""
    target = mixture_1d.make_target(CASE, MU)
    rate = mixture_1d.learning_rate(CASE, MU)
    pyro.clear_param_store()
    guide = AutoPlanar(target.model, num_transforms, base_loc=0.0, base_scale=mixture_1d.BASE_SCALE)
    if method == "adaann":
        return make_svi(target, guide, rate, mixture_1d.TOLERANCE, fast=fast), None
    optim = pyro.optim.Adam({"lr": rate})
    if method == "none":
        return SVI(target.model, guide, optim, make_elbo()), 5 if fast else 8000
    schedule = LinearSchedule(3 if fast else 9900, initial_inverse_temperature=0.01)
    num_initial_steps = 5 if fast else 500
    svi = AdaAnnSVI(
        target.model,
        guide,
        optim,
        make_elbo(),
        schedule=schedule,
        num_initial_steps=num_initial_steps,
        num_steps_per_stage=1,
        num_final_steps=1,
    )
    return svi, None


def run(cell: Mapping[str, Any], trials: list[int]) -> list[Record]:
    """Run every method once for each trial."""
    records = []
    for trial in trials:
        record: Record = {"cpu_seconds": {}, "num_steps": {}}
        for method, num_transforms in METHODS:
            pyro.set_rng_seed(trial)
            svi, num_steps = make_fit(method, num_transforms, cell.get("fast", False))
            start = time.process_time()
            taken = 0
            while not svi.is_done if isinstance(svi, AdaAnnSVI) else taken < (num_steps or 0):
                svi.step()
                taken += 1
            name = f"{method} {num_transforms}"
            record["cpu_seconds"][name] = time.process_time() - start
            record["num_steps"][name] = taken
        records.append(record)
    return records


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, num_trials=3)
    args = parser.parse_args(arguments)
    args.file = args.file or RESULTS / "times.jsonl"
    cell = {"study": "times", **({"fast": True} if args.fast else {})}
    trials = missing_trials(read_records(args.file), cell, args.trials)
    run_tasks([Task(run, cell, [trial]) for trial in trials], args.file, args.workers)


if __name__ == "__main__":
    main()
