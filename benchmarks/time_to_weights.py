"""How long until the modes have their weights? natural_svi, AdaAnn, Pyro's IAF guide, NUTS.

    OMP_NUM_THREADS=1 python benchmarks/time_to_weights.py [--seeds 3] [--targets "four modes, 2-D" ...]

Targets with exactly known weights (``known_targets.py``). A method is done when the shares of its own draws
are within 0.05 of the weights and, for a guide, its effective sample size is at least half of the draws. It
is asked at the end, or, for a guide that is trained without annealing, every 500 steps up to 10,000; the time
of asking does not count. NUTS runs four chains of 500 + 500 from draws of the base, and is asked for the
shares alone. Times are processor seconds of one process, in which the methods take turns. Writes
``benchmarks/results/time_to_weights.json``, and the table of the docs from it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from known_targets import TARGETS, Target
from modes import make_svi
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal
from torch import Tensor

from pyro_adaann import importance_draws

RESULTS = Path(__file__).resolve().parent / "results" / "time_to_weights.json"
TABLE = Path(__file__).resolve().parents[1] / "docs" / "figures" / "modes_time.md"
NUM_DRAWS = 10_000
MAX_STEPS, ASK_EVERY = 10_000, 500
NUM_CHAINS, NUM_SAMPLES = 4, 500


def shares_of(target: Target, z: Tensor) -> list[float]:
    """Return the share of every mode in draws."""
    modes = target.mode(z)
    return [float((modes == k).double().mean()) for k in range(len(target.weights))]


def judge(target: Target, svi: Any) -> dict[str, Any]:
    """Return shares and effective sample size of a guide, and whether they will do."""
    draws = importance_draws(svi, num_samples=NUM_DRAWS)
    shares, ess = shares_of(target, draws.samples["z"]), float(draws.ess) / NUM_DRAWS
    return {"shares": shares, "ess": ess, "done": _are_right(target, shares) and ess >= 0.5}


def _are_right(target: Target, shares: list[float]) -> bool:
    return max(abs(s - w) for s, w in zip(shares, target.weights, strict=True)) <= 0.05


def annealed(target: Target, settings: str) -> dict[str, Any]:
    """Run a fit of ``modes.py`` with planar layers to its end."""
    svi = make_svi(target, "planar", settings)
    start = time.process_time()
    history = svi.run(progress_bar=False)
    return {"seconds": time.process_time() - start, "steps": history.num_steps, **judge(target, svi)}


def iaf(target: Target) -> dict[str, Any]:
    """Train Pyro's `AutoIAFNormal` with Pyro's `SVI`, and ask now and then."""
    guide = AutoIAFNormal(target.model, hidden_dim=[40, 40], num_transforms=4)
    loss = Trace_ELBO(num_particles=100, vectorize_particles=True)
    svi = SVI(target.model, guide, pyro.optim.Adam({"lr": 0.002}), loss)
    seconds, num_steps, found = 0.0, 0, {"done": False}
    while num_steps < MAX_STEPS and not found["done"]:
        start = time.process_time()
        for _ in range(ASK_EVERY):
            svi.step()
        seconds += time.process_time() - start
        num_steps += ASK_EVERY
        found = judge(target, svi)
    return {"seconds": seconds, "steps": num_steps, **found}


def nuts(target: Target) -> dict[str, Any]:
    """Run chains one after the other from draws of the base, pooled."""
    start = time.process_time()
    draws = []
    for _ in range(NUM_CHAINS):
        z = dist.Normal(torch.zeros(target.dim), target.base_scale).sample()
        mcmc = MCMC(
            NUTS(target.model),
            num_samples=NUM_SAMPLES,
            warmup_steps=NUM_SAMPLES,
            initial_params={"z": z},
            disable_progbar=True,
        )
        mcmc.run()
        draws.append(mcmc.get_samples()["z"])
    shares = shares_of(target, torch.cat(draws))
    return {
        "seconds": time.process_time() - start,
        "steps": 2 * NUM_CHAINS * NUM_SAMPLES,
        "shares": shares,
        "ess": None,
        "done": _are_right(target, shares),
    }


METHODS = {
    "natural_svi": lambda target: annealed(target, "natural"),
    "AdaAnn (paper)": lambda target: annealed(target, "paper"),
    "SVI, AutoIAFNormal": iaf,
    "NUTS, 4 chains": nuts,
}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the median times, and how many fits were right."""
    lines = [
        "| target | method | right | CPU s, median | updates, median | shares, seed 0 |",
        "|---|---|---|---|---|---|",
    ]
    for target in TARGETS:
        for method in METHODS:
            part = [row for row in rows if (row["target"], row["method"]) == (target, method)]
            if part:
                shares = ", ".join(f"{share:.2f}" for share in part[0]["shares"])
                lines.append(
                    f"| {target} | {method} | {sum(row['done'] for row in part)} of {len(part)} | "
                    f"{statistics.median(row['seconds'] for row in part):.1f} | "
                    f"{statistics.median(row['steps'] for row in part):,.0f} | {shares} |"
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["two modes, 2-D, 8 sd", "four modes, 2-D", "two modes, 5-D, 6 sd"]
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=names)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for seed in range(args.seeds):
        for name in args.targets:
            for method, run in METHODS.items():
                pyro.clear_param_store()
                pyro.set_rng_seed(seed)
                rows.append({"target": name, "method": method, "seed": seed, **run(TARGETS[name])})
                print(rows[-1], flush=True)
                RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    TABLE.write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
