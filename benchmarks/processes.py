"""How much faster is a step with several processes, for a model that costs 50 ms for the draws of a step?

    python benchmarks/processes.py [--counts 2 4]

The model sleeps in proportion to the draws that it is given. The script runs itself alone and by torchrun,
and prints for every kind of guide and step the time that passes in a step; the sum of its sleep and its
processor time; and its processor time alone, which is what the guide and the messages cost every process. The
first ratio is what a user sees, on a machine with a core for every process and no other work. Where processes
wait for a core whenever they wait for each other, the second one is what it would be, up to the time of
messages.
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
    """Return the median times of a step in ms: passed, sleep and processor, processor."""
    found = {}
    for kind, (make_guide, make_step) in KINDS.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = AdaAnnSVI(model, make_guide(), *make_step(), schedule=ConstantSchedule(0.5))
        times = []
        for _ in range(NUM_STEPS):
            start, busy, slept = time.perf_counter(), time.process_time(), _slept
            svi.step()
            passed, busy, slept = time.perf_counter() - start, time.process_time() - busy, _slept - slept
            times.append((passed, busy + slept, busy))
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


def start(count: int) -> dict[str, list[float]]:
    """Return what the first of so many processes measures."""
    group = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command = [sys.executable, *(group if count > 1 else []), __file__, "--measure"]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, list[float]] = json.loads(run.stdout.splitlines()[-1])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 4], help="numbers of processes")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        measure()
        return 0
    load = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{load}; milliseconds a step; in brackets one process by several")
    alone = start(1)
    print(f"{'':20} {'processes':>9} {'passed':>15} {'sleep+processor':>16} {'processor':>10}")
    for count in (1, *args.counts):
        found = alone if count == 1 else start(count)
        for kind, times in found.items():
            passed, busy, processor = (
                f"{time:.1f} ({one / time:.2f})" for one, time in zip(alone[kind], times, strict=True)
            )
            print(f"{kind:20} {count:9} {passed:>15} {busy:>16} {processor:>10}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
