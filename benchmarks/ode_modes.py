"""Lorenz and HIV over seeds, with the paper's settings and those that track, beside the exact posterior.

    OMP_NUM_THREADS=1 python benchmarks/ode_modes.py run hiv --settings tracked --seeds 20
    python benchmarks/ode_modes.py table

The fits are those of ``examples/hiv.py`` and ``examples/lorenz.py``. A fit that is in the result file
already is not repeated. A tracked fit in which the ladder sees a lost mode is annealed again from the
rung below, up to three times, and all its steps count. Shares, sds and means are given twice: of the
guide's own draws, and with importance weights; sds over exact sds, means as differences in exact sds
(``reference/ode_exact.py``).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_adaann import WeightedDraws, find_lost_modes, importance_draws, weighted_mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import hiv
import lorenz
from posterior import load_reference

RESULTS = Path(__file__).resolve().parent / "results" / "ode_modes.jsonl"
NUM_DRAWS = 20_000
NOISE = {"lorenz 0.2": 0.2, "lorenz 0.001": 0.001}


def fit(name: str, settings: str, seed: int) -> dict[str, Any]:
    """Return what a fit has found."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    if name == "hiv":
        args: tuple[Any, ...] = (hiv.simulate(hiv.DATA_SEED).float(),)
        svi = hiv.make_svi(False, settings)
    else:
        args = (lorenz.simulate(NOISE[name], lorenz.DATA_SEED).float(), NOISE[name])
        svi = lorenz.make_svi(False, settings)
    start = time.process_time()
    svi.run(*args, progress_bar=False)
    restarts = 0
    while settings == "tracked" and restarts < 3 and (lost := find_lost_modes(svi, *args).lost):
        svi.restart(lost[0].rung)
        svi.run(*args, progress_bar=False)
        restarts += 1
    seconds = time.process_time() - start
    draws = importance_draws(svi, *args, num_samples=NUM_DRAWS)
    row = {
        "example": name,
        "settings": settings,
        "seed": seed,
        "steps": svi.history.num_steps,
        "restarts": restarts,
        "stages": len(svi.history.stages),
        "untracked": len(svi.history.untracked),
        "cpu_s": round(seconds),
        "ess": round(draws.ess / NUM_DRAWS, 3),
        "k_hat": round(draws.k_hat, 2),
        "log_evidence": round(float(draws.log_weights.logsumexp(0)) - math.log(NUM_DRAWS), 3),
        "alarm": None if svi.ladder is None else bool(find_lost_modes(svi, *args).lost),
    }
    if name == "hiv":
        positive = draws.samples["p1"] > 0
        row["share"] = round(float(positive.double().mean()), 3)
        row["weight"] = round(float(draws.log_weights.softmax(0)[positive].sum()), 3)
        parts = {"positive": positive, "negative": ~positive}
    else:
        parts = {f"{NOISE[name]:g}": torch.ones(NUM_DRAWS, dtype=torch.bool)}
    row["modes"] = [_moments(draws, name, key, is_in) for key, is_in in parts.items() if is_in.sum() > 10]
    return row


def _moments(draws: WeightedDraws, name: str, key: str, is_in: Tensor) -> dict[str, list[float]]:
    exact = load_reference(name.split()[0], key)
    assert exact is not None
    found: dict[str, list[float]] = {"sd": [], "weighted_sd": [], "mean": [], "weighted_mean": []}
    for site, value in draws.samples.items():
        x = value[is_in].double()
        flat = torch.zeros(len(x))
        for label, log_weights in (("", flat), ("weighted_", draws.log_weights[is_in])):
            mean = weighted_mean(x, log_weights)
            sd = float(weighted_mean((x - mean) ** 2, log_weights)) ** 0.5
            found[f"{label}sd"].append(round(sd / exact[site][1], 4))
            found[f"{label}mean"].append(round((float(mean) - exact[site][0]) / exact[site][1], 4))
    return found


def read() -> list[dict[str, Any]]:
    """Return the fits of the result file."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def table() -> str:
    """Return a table over seeds."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in read():
        cells.setdefault((row["example"], row["settings"]), []).append(row)
    lines = [
        "| example | settings | seeds | updates | restarts | ESS | sds, guide | sds, weighted | "
        "means, weighted | share of a mode | its weight | log evidence | alarms |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (example, settings), rows in sorted(cells.items()):

        def span(key: str, rows: list[dict[str, Any]] = rows) -> str:
            values = [value for row in rows for mode in row["modes"] for value in mode[key]]
            return f"{min(values):.2f} to {max(values):.2f}"

        def over(key: str, rows: list[dict[str, Any]] = rows) -> str:
            values = [row[key] for row in rows if row.get(key) is not None]
            return f"{min(values):.2f} to {max(values):.2f}" if values else "-"

        updates = statistics.median(row["steps"] for row in rows)
        restarts = sum(row.get("restarts", 0) for row in rows)
        alarms = sum(bool(row["alarm"]) for row in rows) if rows[0]["alarm"] is not None else "-"
        lines.append(
            f"| {example} | {settings} | {len(rows)} | {updates:.0f} | {restarts} | {over('ess')} | "
            f"{span('sd')} | {span('weighted_sd')} | {span('weighted_mean')} | {over('share')} | "
            f"{over('weight')} | {over('log_evidence')} | {alarms} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("examples", nargs="*", choices=["hiv", *NOISE, []])
    parser.add_argument("--settings", nargs="+", default=["tracked"], choices=["paper", "tracked"])
    parser.add_argument("--seeds", type=int, default=10, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.command == "run":
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            for name in args.examples:
                for settings in args.settings:
                    if any(
                        (row["example"], row["settings"], row["seed"]) == (name, settings, seed)
                        for row in read()
                    ):
                        continue
                    row = fit(name, settings, seed)
                    with RESULTS.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(row, flush=True)
    print(table())


if __name__ == "__main__":
    main()
