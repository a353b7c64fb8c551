"""One target by one system, in the system's own environment; started by the runner.

    python -m rivals.cell SYSTEM TARGET SEED FILE.npz

Writes the draws to the file and prints one line of JSON. Seconds are the processor's, from the moment when
the system is imported and the target is made until the draws are there, those of its child processes
included: compiling is in them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
from typing import Any

import numpy as np

from .systems import SYSTEMS
from .targets import TARGETS

__all__ = ["main", "run"]


def run(system: str, target: str, seed: int, path: str) -> dict[str, Any]:
    """Return what is known of the run besides its draws, which are written to ``path``."""
    entry = SYSTEMS[system]
    module, _, function = entry.function.partition(":")
    run_system = getattr(importlib.import_module(f".systems.{module}", __package__), function)
    made = TARGETS[target]()
    version = importlib.metadata.version(entry.version_of)
    start = _seconds()
    outcome = run_system(made, seed)
    seconds = _seconds() - start
    draws = np.asarray(outcome.draws, dtype=np.float64)
    log_weights = np.zeros(len(draws)) if outcome.log_weights is None else outcome.log_weights
    np.savez(path, draws=draws, log_weights=np.asarray(log_weights, dtype=np.float64))
    told = {name: getattr(outcome, name) for name in ("told", "num_densities", "num_gradients")}
    evidence = {name: getattr(outcome, name) for name in ("log_evidence", "log_evidence_error")}
    return {**told, **evidence, "seconds": round(seconds, 2), "version": version}


def _seconds() -> float:
    """Return the processor's seconds of this process and of its ended children: a C compiler is one."""
    return sum(os.times()[:4])


def main() -> None:
    """Run one cell."""
    system, target, seed, path = sys.argv[1:]
    print("\n" + json.dumps(run(system, target, int(seed), path)))


if __name__ == "__main__":
    main()
