"""Faults injected into fits, survived and lost.

    OMP_NUM_THREADS=1 python benchmarks/fault_injection.py [--num-rounds 2] [--json FILE]

The faults are those of ``tests/faults.py``, at random steps: log densities, gradients and variances that
are not finite or absurd, for one particle or for all; a process killed at every place of a write of its
checkpoint; a disk that fills up in the middle of one. Numbers: survived if the fit ends at exactly 1 with
the posterior's mean (within 0.35 sd) and sd (within 25 %). Files: survived if the fit that goes on from
the file has the losses of one that was never disturbed, bit for bit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import test_checkpoint
from faults import WRITE_PLACES, Fault, disk_with_room_for, kill_while_writing, survives

VALUES = (math.nan, math.inf, -math.inf, 1e30)
#: Faults of numbers in a fit, and the steps (or, for the variance, stages) among which they fall.
NUM_FAULTS = {"density": 10, "gradient": 10, "variance": 4}
RANGES = {"density": range(180), "gradient": range(180), "variance": range(1, 9)}


def count_numbers(num_rounds: int, rng: random.Random) -> Counter[tuple[str, str]]:
    """Count faults of numbers, by kind, in fits of `tests/faults.py`."""
    counts: Counter[tuple[str, str]] = Counter()
    for seed, where, share, value in itertools.product(range(num_rounds), NUM_FAULTS, ("one", "all"), VALUES):
        at = frozenset(rng.sample(RANGES[where], NUM_FAULTS[where]))
        kind = f"{where}, {share} particle{'s' * (share == 'all')}"
        is_fine = survives(Fault(where, share, value, at), seed)
        counts[kind, "injected"] += len(at)
        counts[kind, "survived" if is_fine else "lost"] += len(at)
        if not is_fine:
            print(f"lost: {where} {share} {value} at {sorted(at)}, seed {seed}", flush=True)
    return counts


def count_writes(num_rounds: int, rng: random.Random) -> Counter[tuple[str, str]]:
    """Count kills and full disks in the middle of a write."""
    counts: Counter[tuple[str, str]] = Counter()
    make, data = test_checkpoint.make, test_checkpoint.DATA
    for _, name in itertools.product(range(num_rounds), ("planar", "realnvp, lr")):
        whole = make(name, 0).run(data, progress_bar=False).losses
        for fault in (*WRITE_PLACES, "full"):
            with tempfile.TemporaryDirectory() as folder:
                path, num_steps = Path(folder) / "fit.ckpt", rng.randrange(1, len(whole) - 2)
                svi = make(name, 0)
                for _ in range(num_steps):
                    svi._step_lr_scheduler(svi.step(data))
                svi.save_checkpoint(path)
                svi._step_lr_scheduler(svi.step(data))
                if fault == "full":
                    room = rng.randrange(path.stat().st_size)
                    with disk_with_room_for(room), warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        svi.run(data, progress_bar=False, checkpoint=path, checkpoint_every=1)
                else:
                    kill_while_writing(lambda svi=svi, path=path: svi.save_checkpoint(path), fault)
                is_fine = make(name, 9).run(data, progress_bar=False, checkpoint=path).losses == whole
            kind = "full disk" if fault == "full" else "killed while writing"
            counts[kind, "injected"] += 1
            counts[kind, "survived" if is_fine else "lost"] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None, help="where to write the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    counts = count_numbers(args.num_rounds, rng) + count_writes(args.num_rounds, rng)
    kinds = list(dict.fromkeys(kind for kind, _ in counts))
    outcomes = ("injected", "survived", "lost")
    rows = [{"fault": kind, **{name: counts[kind, name] for name in outcomes}} for kind in kinds]
    for row in rows:
        print(row)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
