"""From three latent variables to fifty: spline guides with natural steps on posteriors with known numbers.

    OMP_NUM_THREADS=1 python benchmarks/dimensions.py run [--targets NAME ...] [--seeds 0 1 2] [--part 0/2]
    python benchmarks/dimensions.py table

A fit that is in the result file already is not repeated, so a study that was stopped goes on; ``--part
i/n`` takes every n-th fit, for n processes side by side. ``natural_svi`` with its defaults but for what
SETTINGS says of a target. Errors are of 100,000 weighted draws: of the log evidence, of probabilities
(shares of modes), and of means and sds, in posterior sds and as a share.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import warnings
from pathlib import Path
from typing import Any

import pyro
import torch
from dimension_targets import TARGETS, DimensionTarget
from rivals.pace import Pace

from pyro_adaann import AutoSpline, diagnose, importance_draws, natural_svi

RESULTS = Path(__file__).resolve().parent / "results" / "dimensions.jsonl"
TABLE = Path(__file__).resolve().parents[1] / "docs" / "figures" / "dimensions.md"
NUM_DRAWS = 100_000
#: Draws of a step, where they are other than the default 500.
SETTINGS: dict[str, dict[str, Any]] = {
    "funnel, 10-D": {"num_particles": 2000},
    "many-well, 32-D": {"num_particles": 1000},
    "twenty bimodal coordinates": {"num_particles": 2000},
    "forty modes, 2-D": {"num_particles": 2000},
    "two modes, 50-D": {"num_particles": 1000},
    "eight schools, centered": {"num_particles": 2000},
    "collinear regression": {"num_particles": 1000},
}


def fit(name: str, seed: int) -> dict[str, Any]:
    """Return what a fit has found."""
    target = TARGETS[name]()
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = AutoSpline(target.model, base_loc=target.base_loc, base_scale=target.base_scale)
    svi = natural_svi(target.model, guide, **SETTINGS.get(name, {}))
    with Pace() as pace:
        svi.run(progress_bar=False)
    draws = importance_draws(svi, num_samples=NUM_DRAWS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diagnosis = diagnose(svi)
    record: dict[str, Any] = {
        "target": name,
        "seed": seed,
        "ess": draws.ess / NUM_DRAWS,
        "k_hat": draws.k_hat,
        "num_steps": svi.history.num_steps,
        "num_untracked": len(svi.history.untracked),
        "seconds": round(pace.seconds / pace.value, 1),
        "verdict": diagnosis.verdict.split(".")[0],
    }
    log_evidence = float(draws.log_weights.logsumexp(0)) - math.log(NUM_DRAWS)
    if target.log_evidence is not None:
        record["log_evidence_error"] = log_evidence - target.log_evidence
    record |= _errors(target, draws.samples, draws.log_weights.softmax(0))
    return record


def _errors(
    target: DimensionTarget, samples: dict[str, torch.Tensor], weights: torch.Tensor
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if target.shares is not None and target.events is not None:
        shares = weights @ target.events(samples).double()
        found["share_error"] = float((shares - target.shares).abs().max())
        found["relative_share_error"] = float((shares / target.shares - 1).abs().max())
    if target.moments is not None:
        means, sds = [], []
        for name, (mean, sd) in target.moments.items():
            values = samples[name].double().reshape(len(weights), -1)
            got = weights @ values
            got_sd = (weights @ (values - got).square()).sqrt()
            means.append(((got - mean.reshape(-1)) / sd.reshape(-1)).abs().max())
            sds.append((got_sd / sd.reshape(-1) - 1).abs().max())
        found["mean_error"], found["sd_error"] = float(max(means)), float(max(sds))
    return found


def _read() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def run(names: list[str], seeds: list[int], part: tuple[int, int]) -> None:
    """Make the fits that are missing."""
    wanted = [(name, seed) for seed in seeds for name in names]
    for name, seed in wanted[part[0] :: part[1]]:
        if any(r["target"] == name and r["seed"] == seed for r in _read()):
            continue
        try:
            record = fit(name, seed)
        except ValueError as error:
            record = {"target": name, "seed": seed, "verdict": f"ERROR {str(error)[:200]}"}
        print(json.dumps(record), flush=True)
        with open(RESULTS, "a") as file:
            file.write(json.dumps(record) + "\n")


def table() -> str:
    """Return the results as a Markdown table: median, and the worst in brackets."""
    rows = [
        "| target | seeds | log evidence error | ESS | worst share | means, sds | steps | CPU s | verdicts |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    records = _read()
    for name in TARGETS:
        mine = [r for r in records if r["target"] == name and "ess" in r]
        if not mine:
            continue

        def spread(key: str, form: str, worst: Any = max, mine: list[dict[str, Any]] = mine) -> str:
            values = [abs(r[key]) for r in mine if key in r]
            return f"{statistics.median(values):{form}} ({worst(values):{form}})" if values else ""

        verdicts = {v: sum(r["verdict"] == v for r in mine) for v in sorted({r["verdict"] for r in mine})}
        moments = ", ".join(filter(None, [spread("mean_error", ".3f"), spread("sd_error", ".3f")]))
        rows.append(
            f"| {name} | {len(mine)} | {spread('log_evidence_error', '.4f')} | {spread('ess', '.3f', min)} "
            f"| {spread('share_error', '.4f')} | {moments} | {spread('num_steps', '.0f')} "
            f"| {spread('seconds', '.0f')} | {', '.join(f'{v} {n}' for v, n in verdicts.items())} |"
        )
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(range(10)))
    parser.add_argument("--part", default="0/1")
    arguments = parser.parse_args()
    if arguments.command == "run":
        index, count = map(int, arguments.part.split("/"))
        run(arguments.targets, arguments.seeds, (index, count))
    else:
        TABLE.write_text(table())
    print(table())


if __name__ == "__main__":
    main()
