"""Are the modes kept, with their weights? The paper's settings against those that hold on to modes.

    OMP_NUM_THREADS=1 python benchmarks/modes.py run [--targets NAME ...] [--guides planar ...] [--seeds 10]
    python benchmarks/modes.py table

The targets of ``known_targets.py`` have exactly known modes, weights and log evidence (zero). A fit that
is in the result file already is not repeated, so a study that was stopped goes on. Both commands write
the table of the docs. ``paper`` is AdaAnn as published (tolerance 0.01, 5 steps a stage, minus the
ELBO); ``tracked`` is the mixed divergence (forward weight 0.9, 1,000 particles), stages that end at an
effective sample size of a half, and the conditional effective sample size 0.9 as schedule. Both refine
with 1,000 steps at 1, learning rate falling to a hundredth. ``slow`` is ``tracked`` with four tenths of
the learning rate. ``natural`` is `natural_svi`; Pyro's guide takes it on the path ``joint``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from known_targets import TARGETS, Target
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal

from pyro_adaann import (
    AdaAnnSchedule,
    AdaAnnSVI,
    AutoPlanar,
    AutoRealNVP,
    CESSSchedule,
    ESSStageRule,
    Ladder,
    TraceMixedKL_ELBO,
    diagnose,
    importance_draws,
    natural_svi,
)

RESULTS = Path(__file__).resolve().parent / "results" / "modes.jsonl"
TABLE = Path(__file__).resolve().parents[1] / "docs" / "figures" / "modes_known.md"
NUM_DRAWS = 20_000


def _planar(target: Target) -> AutoPlanar:
    return AutoPlanar(target.model, 100, base_loc=0.0, base_scale=target.base_scale)


def _realnvp(target: Target) -> AutoRealNVP:
    return AutoRealNVP(target.model, 6, [50, 50], base_loc=0.0, base_scale=target.base_scale)


def _iaf(target: Target) -> AutoIAFNormal:
    return AutoIAFNormal(target.model, hidden_dim=[40, 40], num_transforms=4)


GUIDES: dict[str, Callable[[Target], Any]] = {"planar": _planar, "realnvp": _realnvp, "iaf": _iaf}
LEARNING_RATES = {"planar": 0.002, "realnvp": 0.001, "iaf": 0.005}


def make_svi(target: Target, guide_name: str, settings: str) -> AdaAnnSVI:
    """Return a fit, not yet run."""
    guide = GUIDES[guide_name](target)
    if settings == "natural":
        # The path from the base, where the guide starts, is the preset's; Pyro's guide has none.
        joint = {"path": "joint", "schedule": CESSSchedule(0.9)} if guide_name == "iaf" else {}
        return natural_svi(target.model, guide, **joint)
    optim = pyro.optim.ExponentialLR(
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": LEARNING_RATES[guide_name] * (0.4 if settings == "slow" else 1.0)},
            "gamma": 0.01 ** (1 / 1000),
        }
    )
    if settings == "paper":
        loss = Trace_ELBO(num_particles=100, vectorize_particles=True)
        own: dict[str, Any] = {"schedule": AdaAnnSchedule(0.01)}
    else:
        loss = TraceMixedKL_ELBO(0.9, num_particles=1000)
        own = {"schedule": CESSSchedule(0.9), "stage_rule": ESSStageRule(0.5, max_num_steps=300)}
    ladder = Ladder()
    return AdaAnnSVI(
        target.model, guide, optim, loss, num_initial_steps=300, num_final_steps=1000, ladder=ladder, **own
    )


def fit(name: str, guide_name: str, settings: str, seed: int) -> dict[str, Any]:
    """Return what a fit has found."""
    target = TARGETS[name]
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    svi = make_svi(target, guide_name, settings)
    start = time.process_time()
    svi.run(progress_bar=False)
    seconds = time.process_time() - start
    draws = importance_draws(svi, num_samples=NUM_DRAWS)
    modes, weights = target.mode(draws.samples["z"]), draws.log_weights.softmax(0)
    shares = [float((modes == k).double().mean()) for k in range(len(target.weights))]
    weighted = [float(weights[modes == k].sum()) for k in range(len(target.weights))]
    diagnosis = diagnose(svi)
    assert diagnosis.ladder is not None
    return {
        "target": name,
        "guide": guide_name,
        "settings": settings,
        "seed": seed,
        "steps": svi.history.num_steps,
        "stages": len(svi.history.stages),
        "untracked": len(svi.history.untracked),
        "cpu_s": round(seconds, 1),
        "ess": round(draws.ess / NUM_DRAWS, 4),
        "k_hat": round(draws.k_hat, 2),
        "shares": [round(share, 4) for share in shares],
        "weights": [round(weight, 4) for weight in weighted],
        "log_evidence": round(float(draws.log_weights.logsumexp(0)) - math.log(NUM_DRAWS), 4),
        "alarm": bool(diagnosis.ladder.lost),
        "verdict": diagnosis.verdict.split(".")[0],
    }


def read(path: Path = RESULTS) -> list[dict[str, Any]]:
    """Return the fits of a result file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def weight_error(row: dict[str, Any], key: str = "weights") -> float:
    """Return the largest error of a mode's weight."""
    pairs = zip(row[key], TARGETS[row["target"]].weights, strict=True)
    return max(abs(got - exact) for got, exact in pairs)


def is_right(row: dict[str, Any]) -> bool:
    """Whether weights are within 0.03 and the log evidence within 0.05 of the exact ones."""
    return "error" not in row and weight_error(row) <= 0.03 and abs(row["log_evidence"]) <= 0.05


def table() -> str:
    """Return a table of all targets, guides and settings, over seeds."""
    cells: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in read():
        cells.setdefault((row["target"], row["guide"], row["settings"]), []).append(row)
    lines = [
        "| target | guide | settings | right | false alarms | wrong and said so | wrong unseen | no fit | "
        "worst weight error | guide's own | log evidence error | ESS | updates |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (target, guide, settings), rows in sorted(cells.items()):
        num_fits, rows = len(rows), [row for row in rows if "error" not in row]
        if not rows:
            none = f"| {target} | {guide} | {settings} | 0 of {num_fits} | 0 | 0 | 0 | {num_fits} |"
            lines.append(none + " - |" * 5)
            continue
        wrong = [row for row in rows if not is_right(row)]
        said = sum(row["alarm"] or row["verdict"] == "UNRELIABLE" for row in wrong)
        false_alarms = sum(row["alarm"] for row in rows if is_right(row))
        median = {key: statistics.median(row[key] for row in rows) for key in ("ess", "steps")}
        lines.append(
            f"| {target} | {guide} | {settings} | {len(rows) - len(wrong)} of {num_fits} | {false_alarms} | "
            f"{said} | {len(wrong) - said} | {num_fits - len(rows)} | {max(map(weight_error, rows)):.3f} | "
            f"{max(weight_error(row, 'shares') for row in rows):.3f} | "
            f"{max(abs(row['log_evidence']) for row in rows):.3f} | {median['ess']:.2f} | "
            f"{median['steps']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--guides", nargs="+", default=list(GUIDES), choices=list(GUIDES))
    parser.add_argument("--settings", nargs="+", default=["paper", "tracked", "natural"])
    parser.add_argument("--seeds", type=int, default=10, help="how many, from 0")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.command == "run":
        done = {(row["target"], row["guide"], row["settings"], row["seed"]) for row in read()}
        for seed in range(args.seeds):
            for name in args.targets:
                for guide in args.guides:
                    for settings in args.settings:
                        if (name, guide, settings, seed) in done:
                            continue
                        try:
                            row = fit(name, guide, settings, seed)
                        except ValueError as error:  # the driver gives up and says why
                            cell = {"target": name, "guide": guide, "settings": settings, "seed": seed}
                            row = {**cell, "error": str(error)}
                        with RESULTS.open("a") as file:
                            file.write(json.dumps(row) + "\n")
                        print(row, flush=True)
    TABLE.write_text(table() + "\n")
    print(table())


if __name__ == "__main__":
    main()
