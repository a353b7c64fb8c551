"""How much faster is a step with several processes, for a model that costs 50 ms for the draws of a step?

    python benchmarks/processes.py [--count 2]

The model sleeps in proportion to the draws that it is given. The script runs itself once alone and once by
torchrun, and prints the time of a step, and the sum of its sleep and its processor time: on a machine with
other work, on which processes wait for a core whenever they wait for each other, that is what a step takes
where every process has a core, up to the time of messages.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from torch import distributed

from pyro_adaann import AdaAnnSVI, AutoPlanar, AutoSpline, ConstantSchedule, NaturalStep

NUM_DRAWS, SECONDS, NUM_STEPS = 200, 0.05, 40
_slept = 0.0


def model() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    seconds = SECONDS * z.shape[:-1].numel() / NUM_DRAWS
    time.sleep(seconds)
    global _slept
    _slept += seconds
    pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=torch.tensor(1.0))


def gradient_step() -> tuple[Any, ...]:
    elbo = Trace_ELBO(num_particles=NUM_DRAWS, vectorize_particles=True, max_plate_nesting=0)
    return pyro.optim.Adam({"lr": 0.001}), elbo


def natural_step() -> tuple[Any, ...]:
    return (NaturalStep(NUM_DRAWS, max_plate_nesting=0),)


KINDS: dict[str, tuple[Callable[[], Any], Callable[[], tuple[Any, ...]]]] = {
    "planar 16, Adam": (lambda: AutoPlanar(model, 16), gradient_step),
    "planar 50, Adam": (lambda: AutoPlanar(model, 50), gradient_step),
    "spline, Adam": (lambda: AutoSpline(model), gradient_step),
    "planar 16, natural": (lambda: AutoPlanar(model, 16), natural_step),
    "planar 50, natural": (lambda: AutoPlanar(model, 50), natural_step),
    "spline, natural": (lambda: AutoSpline(model), natural_step),
}


def time_steps() -> dict[str, list[float]]:
    """Return the median time of a step and that of its sleep and processor time, in ms."""
    found = {}
    for kind, (make_guide, make_step) in KINDS.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = AdaAnnSVI(model, make_guide(), *make_step(), schedule=ConstantSchedule(0.5))
        times = []
        for _ in range(NUM_STEPS):
            start, busy = time.perf_counter(), time.process_time() + _slept
            svi.step()
            times.append((time.perf_counter() - start, time.process_time() + _slept - busy))
        late = times[NUM_STEPS // 4 :]
        found[kind] = [1000 * statistics.median(column) for column in zip(*late, strict=True)]
    return found


def measure() -> None:
    """Print the times as the last line, of the first process alone."""
    logging.getLogger("pyro").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")
    found = time_steps()
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        print(json.dumps(found))
    if distributed.is_initialized():
        distributed.destroy_process_group()


def start(*command: str) -> dict[str, list[float]]:
    run = subprocess.run([sys.executable, *command, "--measure"], check=True, capture_output=True, text=True)
    found: dict[str, list[float]] = json.loads(run.stdout.splitlines()[-1])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2, help="number of processes")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        measure()
        return 0
    alone = start(__file__)
    together = start(
        "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.count}", __file__
    )
    print(f"{'a step, ms':20} {'':>24} {'alone':>8} {f'{args.count} processes':>12} {'ratio':>6}")
    for kind, times in alone.items():
        for what, one, all_ in zip(("passed", "sleep and processor"), times, together[kind], strict=True):
            print(f"{kind:20} {what:>24} {one:8.1f} {all_:12.1f} {one / all_:6.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
