"""Run targets by systems, seed by seed; a run that was stopped goes on.

    python -m benchmarks.rivals [--quick] [--targets NAME ...] [--systems NAME ...] [--seeds 5] [--limit 300]
    python -m benchmarks.rivals.report

Every cell is a process of its own, in the environment of its system, which is made from its pinned
requirements at first. A cell that the result file has already is not run again. Five seeds of every cell
would take days: but for `fit`, a system that has had two minutes of the processor on a target, or cannot run
it, gets no further seed there.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from .results import RESULTS, read
from .runner import run_cell
from .systems import SYSTEMS
from .targets import QUICK, TARGETS

__all__ = ["main"]

ENVIRONMENTS = Path.home() / ".cache" / "pyro_adaann_rivals"


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", metavar="NAME", choices=TARGETS, help=", ".join(TARGETS))
    parser.add_argument("--systems", nargs="+", metavar="NAME", choices=SYSTEMS, help=", ".join(SYSTEMS))
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them")
    parser.add_argument("--limit", type=int, default=300, help="seconds of the processor a cell")
    parser.add_argument(
        "--enough", type=int, default=120, help="seconds on a target after which a system gets no more seeds"
    )
    parser.add_argument("--quick", action="store_true", help="four targets, one seed, 60 seconds a cell")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS, help="folder of the environments")
    args = parser.parse_args(arguments)
    targets = args.targets or (QUICK if args.quick else TARGETS)
    seeds = range(args.first_seed, args.first_seed + (1 if args.quick else args.seeds))
    limit = min(args.limit, 60) if args.quick else args.limit
    cells = [
        (target, system, seed) for seed in seeds for target in targets for system in args.systems or SYSTEMS
    ]
    rows = read(args.out)
    done = {(row["target"], row["system"], row["seed"]) for row in rows}
    cells = [cell for cell in cells if cell not in done]
    had: dict[tuple[str, str], float] = defaultdict(float)
    for row in rows:
        had[row["target"], row["system"]] += _seconds(row)
    known: dict[str, Any] = {}
    start = time.monotonic()
    for i, (target, system, seed) in enumerate(cells):
        if system != "fit" and had[target, system] >= args.enough:
            continue
        row = run_cell(system, target, seed, limit, args.environments, known)
        row["limit"] = limit
        had[target, system] += _seconds(row)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        minutes = (time.monotonic() - start) / 60
        print(
            f"{i + 1}/{len(cells)} {minutes:.1f} min: {target} | {system} | seed {seed}: {_brief(row)}",
            flush=True,
        )


def _seconds(row: dict[str, Any]) -> float:
    """Return what a cell took of the processor, at the usual pace; no end to what cannot be run."""
    return math.inf if "cannot" in row else float(row["process_seconds"]) / float(row.get("pace") or 1)


def _brief(row: dict[str, Any]) -> str:
    if "cannot" in row:
        return str(row["cannot"])
    names = ("evidence", "mean", "sd", "share", "wasserstein", "seconds")
    told = f", told: {row['told']}" if row["told"] else ""
    return ", ".join(f"{name} {row[name]:.3g}" for name in names if row.get(name) is not None) + told


if __name__ == "__main__":
    main()
