"""What a broken draw should cost: HIV with a RealNVP guide, and models with a hard boundary.

    OMP_NUM_THREADS=1 python benchmarks/broken_draws.py start whole edge [--json FILE]

``start``   the share of broken draws in the first steps of the HIV example with a RealNVP guide at
            t = 5e-5 on the paper's path, where draws that only drop out let the flow escape;
``whole``   the same fit through all stages to t = 1 with a bounded number of steps;
``edge``    the models of ``tests/test_broken.py``, a normal prior cut at an edge or a curve: how far the
            fit is from the truncated posterior, and how many of its draws are in the broken region.

Each with a cost of 3, 10 and 30 nats, and ``start`` with 0 too, which drops broken draws and no more.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO

from pyro_adaann import AdaAnnSchedule, AdaAnnSVI, AutoRealNVP, importance_draws
from pyro_adaann.objectives.capabilities import Capabilities

for folder in ("examples", "tests"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / folder))

COSTS = (3.0, 10.0, 30.0)


class CostlyELBO(Trace_ELBO):
    """`Trace_ELBO` with another cost of broken draws."""

    capabilities = Capabilities(drops_broken=True)


def make_hiv(seed: int, num_initial_steps: int, num_final_steps: int) -> tuple[AdaAnnSVI, torch.Tensor]:
    """Return the HIV fit of the paper's settings, but with a RealNVP guide, and its data."""
    import hiv

    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    svi = AdaAnnSVI(
        hiv.model,
        AutoRealNVP(hiv.model, 12, [100, 100], base_loc=0.0, base_scale=2.0),
        pyro.optim.Adam({"lr": 0.0005}),
        CostlyELBO(num_particles=100, vectorize_particles=True),
        path="joint",
        schedule=AdaAnnSchedule(0.005, initial_inverse_temperature=0.00005),
        num_initial_steps=num_initial_steps,
        num_final_steps=num_final_steps,
    )
    return svi, hiv.simulate(hiv.DATA_SEED).float()


def start(seed: int, num_steps: int) -> dict[str, Any]:
    """Return the broken share of the 20 steps before each of several marks."""
    svi, data = make_hiv(seed, num_initial_steps=10**9, num_final_steps=1)
    num_broken, shares = [0], {}
    for step in range(1, num_steps + 1):
        try:
            svi.step(data)
        except ValueError:  # all draws are broken, and stay so
            shares[f"error at {step}"] = 1.0
            break
        num_broken.append(svi.history.stages[-1].num_broken)
        if step in (20, 50, 100, 200, 500, 1000):
            shares[str(step)] = round((num_broken[-1] - num_broken[-21]) / 2000, 4)
    return {"broken_share": shares}


def whole(seed: int, num_steps: int) -> dict[str, Any]:
    """Return the broken share by decade of t, and what the fit has found."""
    svi, data = make_hiv(seed, num_initial_steps=1000, num_final_steps=num_steps // 3)
    history = svi.run(data, num_steps=num_steps, progress_bar=False)
    decades: dict[str, list[int]] = {}
    for stage in history.stages:
        t = stage.inverse_temperature
        name = "1" if t == 1 else f"1e{math.floor(math.log10(t))}"
        counts = decades.setdefault(name, [0, 0])
        counts[0] += stage.num_broken
        counts[1] += stage.num_particles
    draws = importance_draws(svi, data)
    positive = (draws.samples["p1"] > 0).float().mean().item()
    return {
        "num_steps": history.num_steps,
        "num_stages": len(history.stages),
        "num_recoveries": len(history.recoveries),
        "broken_share": {name: round(a / b, 5) for name, (a, b) in decades.items()},
        "weight_positive": round(positive, 3),
        "ess_share": round(draws.ess / len(draws.log_p), 4),
        "k_hat": round(draws.k_hat, 2),
    }


def edge(region: str, flow: str, seed: int, num_steps: int) -> dict[str, Any]:
    """Return how far a fit is from the exact truncated normal."""
    import test_broken

    test_broken.Trace_ELBO = CostlyELBO
    z = test_broken.fit(region, 2, flow, seed, num_steps, math.nan)
    exact = torch.randn(400_000, 2, generator=torch.Generator().manual_seed(1))
    exact = exact[~test_broken.REGIONS[region](exact)]
    is_broken = test_broken.REGIONS[region](z)
    good = z[~is_broken]
    return {
        "region": region,
        "flow": flow,
        "broken_share": round(is_broken.float().mean().item(), 5),
        "mean_error_in_sd": round(((good.mean(0) - exact.mean(0)).abs() / exact.std(0)).max().item(), 4),
        "sd_error": round((good.std(0) / exact.std(0) - 1).abs().max().item(), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="+", choices=["start", "whole", "edge"])
    parser.add_argument("--num-seeds", type=int, default=1)
    parser.add_argument("--costs", type=float, nargs="+", default=COSTS)
    parser.add_argument("--num-steps", type=int, default=3000, help="of a whole HIV fit")
    parser.add_argument("--flows", nargs="+", default=["planar", "realnvp"], help="of the edge study")
    parser.add_argument("--json", type=Path, default=None, help="where to write the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []

    def record(study: str, cost: float, seed: int, figures: dict[str, Any]) -> None:
        rows.append({"study": study, "cost": cost, "seed": seed, **figures})
        print(rows[-1], flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")

    for study in args.studies:
        costs = (0.0, *args.costs) if study == "start" else args.costs
        for cost in costs:
            CostlyELBO.capabilities = Capabilities(drops_broken=True, broken_cost=cost)
            for seed in range(args.num_seeds):
                if study == "start":
                    record(study, cost, seed, start(seed, 500 if cost else 300))
                elif study == "whole":
                    record(study, cost, seed, whole(seed, args.num_steps))
                else:
                    for region in ("edge", "curve"):
                        for flow in args.flows:
                            record(study, cost, seed, edge(region, flow, seed, 1000))


if __name__ == "__main__":
    main()
