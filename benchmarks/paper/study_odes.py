"""Examples 4 and 5: Tables 4 and 6, and the schedules and posteriors of figures 10 to 12 and 14 to 17.

    OMP_NUM_THREADS=1 python benchmarks/paper/study_odes.py lorenz_0.2 lorenz_0.001 hiv --trials 3

Adds to ``benchmarks/results/paper/odes.jsonl`` what is not there yet: a fit of the example's own
``make_svi`` and data for every seed, with the paper's settings (minutes each) or, ``--settings natural``,
with natural gradients (seconds). The exact posteriors are those of ``benchmarks/reference/``.

Recorded are, for every mode, its share of the draws and the mean and sd of every parameter, with all draws
of the guide alike and with importance weights; the effective sample size (a share of the draws), Pareto
k-hat and the log evidence; of the first trial also the schedule and 400 draws.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyro
import torch
from records import RESULTS, Record, Task, add_arguments, missing_trials, read_records, run_tasks, thin
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import hiv
import lorenz
from posterior import moments, weighted_moments

from pyro_adaann import AdaAnnSVI, find_lost_parts, importance_draws

EXAMPLES = ("lorenz_0.2", "lorenz_0.001", "hiv")
NUM_DRAWS = 10_000  # as in the paper's tables


def prepare(example: str, settings: str, fast: bool) -> tuple[AdaAnnSVI, tuple[Any, ...]]:
    """Return the fit of an example, not yet run, and the arguments of its model."""
    if example == "hiv":
        return hiv.make_svi(fast, settings), (hiv.simulate(hiv.DATA_SEED).float(),)
    variance = float(example.removeprefix("lorenz_"))
    data = lorenz.simulate(variance, lorenz.DATA_SEED).float()
    return lorenz.make_svi(fast, settings), (data, variance)


def modes_of(example: str, draws: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return which draws are of which mode."""
    first = next(iter(draws.values()))
    if example == "hiv":
        return {"positive": first > 0, "negative": first <= 0}
    return {"only": torch.ones_like(first, dtype=torch.bool)}


def run(cell: Mapping[str, Any], trials: list[int]) -> list[Record]:
    """Run one fit after the other."""
    records = []
    for trial in trials:
        pyro.set_rng_seed(trial)
        pyro.clear_param_store()
        svi, args = prepare(cell["example"], cell["setting"], cell.get("fast", False))
        start = time.process_time()
        history = svi.run(*args, progress_bar=False)
        seconds = time.process_time() - start
        lost = find_lost_parts(svi, *args).lost if svi.ladder is not None else None
        record = {
            "num_stages": len(history.stages),
            "num_steps": history.num_steps,
            "num_untracked": len(history.untracked),
            "alarm": None if lost is None else bool(lost),
            "cpu_seconds": seconds,
            **describe(cell["example"], svi, args, with_draws=trial == 0),
        }
        if trial == 0:
            record["schedule"] = thin(history.inverse_temperatures)
        records.append(record)
    return records


def describe(example: str, svi: AdaAnnSVI, args: tuple[Any, ...], *, with_draws: bool) -> Record:
    """Return what the tables and figures show of a fit."""
    weighted = importance_draws(svi, *args, num_samples=NUM_DRAWS)
    draws = weighted.samples
    weights = torch.softmax(weighted.log_weights, 0)
    modes = {}
    for name, mask in modes_of(example, draws).items():
        modes[name] = {
            "share": float(mask.double().mean()),
            "weighted_share": float(weights[mask].sum()),
            "moments": moments({site: value[mask] for site, value in draws.items()}),
            "weighted_moments": weighted_moments(
                {site: value[mask] for site, value in draws.items()}, weighted.log_weights[mask]
            ),
        }
    record = {
        "modes": modes,
        "ess": float(weighted.ess) / NUM_DRAWS,
        "k_hat": float(weighted.k_hat),
        "log_evidence": float(weighted.log_weights.logsumexp(0)) - math.log(NUM_DRAWS),
    }
    if with_draws:
        record["draws"] = {site: value[:400].tolist() for site, value in draws.items()}
    return record


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("examples", nargs="+", choices=EXAMPLES)
    parser.add_argument("--settings", default="paper", choices=["paper", "natural"])
    add_arguments(parser, num_trials=3)
    args = parser.parse_args(arguments)
    args.file = args.file or RESULTS / "odes.jsonl"

    records = read_records(args.file)
    tasks = []
    for example in args.examples:
        cell = {"example": example, "setting": args.settings, **({"fast": True} if args.fast else {})}
        tasks += [Task(run, cell, [trial]) for trial in missing_trials(records, cell, args.trials)]
    run_tasks(sorted(tasks, key=lambda task: task.trials[0]), args.file, args.workers)


if __name__ == "__main__":
    main()
