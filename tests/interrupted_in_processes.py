"""A script as a user would start it by torchrun; the last process may be told to die at a step.

torchrun --nproc-per-node=4 tests/interrupted_in_processes.py CHECKPOINT RESULT [--die-at STEP]
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from typing import Any

import pyro
import torch
from fits_in_processes import regression
from pyro.infer import Trace_ELBO
from torch import distributed

from pyro_adaann import AdaAnnSVI, AutoPlanar, LinearSchedule


def fit(checkpoint: str | None, *, progress_bar: bool, die_at: int | None = None) -> dict[str, Any]:
    """Return what a fit of 40 steps gives, with a checkpoint every five of them."""
    count = 0

    def model() -> None:
        nonlocal count
        count += 1
        if count == die_at and distributed.get_rank() == distributed.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        regression()

    svi = AdaAnnSVI(
        model,
        AutoPlanar(regression, 8),
        pyro.optim.Adam({"lr": 0.01}),
        Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1),
        schedule=LinearSchedule(9),
        num_initial_steps=5,
        num_steps_per_stage=2,
        num_final_steps=19,
    )
    history = svi.run(progress_bar=progress_bar, checkpoint=checkpoint, checkpoint_every=5)
    return {
        "losses": history.losses,
        "runs": count,
        "parameters": torch.cat([p.detach().reshape(-1) for p in svi.guide.parameters()]),
    }


def main(checkpoint: str, result: str, *die_at: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    distributed.init_process_group("gloo")
    pyro.set_rng_seed(distributed.get_rank())  # a fit makes them alike
    found = fit(checkpoint, progress_bar=True, die_at=int(die_at[1]) if die_at else None)
    if distributed.get_rank() == 0:
        torch.save(found, result)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
