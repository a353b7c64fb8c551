"""Whole runs of the paper's examples 1, 4 and 5: time per phase, share of the schedule, memory.

    OMP_NUM_THREADS=1 python benchmarks/whole_runs.py bimodal lorenz hiv [--json FILE]

The fits are those of the scripts in ``examples/``, with their settings. The share of the schedule is
the time for log factors, their variance, the next inverse temperature and the change of stage, over the
time of the whole run. Peak memory is that of the process, so run one example at a time to read it.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch

from pyro_adaann import AdaAnnSVI
from pyro_adaann.objectives import base

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))


class Stopwatch:
    """Adds up the time spent in functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return watched


def run(name: str, svi: AdaAnnSVI, args: tuple[Any, ...]) -> dict[str, Any]:
    """Run a fit to its end; return the figures."""
    schedule = Stopwatch()
    stages = svi._fit.stages
    stages.advance = schedule.watch(stages.advance)
    base.log_factors = schedule.watch(base.log_factors)
    phases = {"initial": 0.0, "annealing": 0.0, "final": 0.0}
    while not svi.is_done:
        start = time.perf_counter()
        loss = svi.step(*args)
        svi._step_lr_scheduler(loss)
        seconds = time.perf_counter() - start
        is_first = len(svi.history.stages) == 1
        phase = "final" if svi.inverse_temperature == 1 else "initial" if is_first else "annealing"
        phases[phase] += seconds
    total = sum(phases.values())
    return {
        "example": name,
        "steps": svi.history.num_steps,
        "stages": len(svi.history.stages),
        **{f"{phase}_s": round(seconds, 1) for phase, seconds in phases.items()},
        "total_s": round(total, 1),
        "schedule_share": round(schedule.seconds / total, 4),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def prepare(name: str) -> tuple[AdaAnnSVI, tuple[Any, ...]]:
    """Return the fit of an example and the arguments of its model."""
    if name == "bimodal":
        import bimodal

        return bimodal.make_svi(num_final_steps=8000), ()
    if name == "lorenz":
        import lorenz

        data = lorenz.simulate(0.2, lorenz.DATA_SEED).float()
        return lorenz.make_svi(fast=False), (data, 0.2)
    import hiv

    return hiv.make_svi(fast=False, settings="paper"), (hiv.simulate(hiv.DATA_SEED).float(),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("examples", nargs="+", choices=["bimodal", "lorenz", "hiv"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None, help="where to write the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in args.examples:
        pyro.clear_param_store()
        pyro.set_rng_seed(args.seed)
        rows.append(run(name, *prepare(name)))
        print(rows[-1], flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
