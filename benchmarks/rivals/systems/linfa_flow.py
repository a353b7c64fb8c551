"""LINFA, AdaAnn's first implementation: masked autoregressive flows, default settings, no surrogate.

It keeps its flow to itself; the draws are those that it has written last.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from linfa.run_experiment import experiment

from ..namespaces import NAMESPACES
from ..targets import Target
from .base import Outcome

__all__ = ["run"]


def run(target: Target, seed: int) -> Outcome:
    """5,000 draws of the flow after 5,001 steps at inverse temperature 1."""
    xp = NAMESPACES["torch"]()
    run = experiment()
    run.run_nofas, run.seed, run.input_size, run.output_dir = False, seed, target.dim, "linfa_results"
    run.model_logdensity = lambda z: target.log_density(xp, z).unsqueeze(-1)
    torch.manual_seed(seed)
    run.run()
    files = Path(run.output_dir).glob(f"{run.name}_samples_*")
    last = max(files, key=lambda path: int(path.name.rsplit("_", 1)[1]))
    return Outcome(np.loadtxt(last))
