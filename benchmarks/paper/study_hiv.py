"""Example 5: where on the way do the modes go? Guide and tempered density, from t0 to 1.

    OMP_NUM_THREADS=1 python benchmarks/paper/study_hiv.py

Four fits of ``examples/hiv.py`` from the same seed: the paper's settings on the paper's path with T0 = 1,000
steps at t0 and with 5, on the path ``bridge`` with 1,000, and `natural_svi`. At some 60 inverse temperatures
on the way, 2,000 draws of the guide: the share of the mode with positive p1, with importance weights against
the tempered density and without, their effective sample size, and the spread of the draws. A fit ends after
``--max-steps`` updates if it has not come to 1. Writes ``benchmarks/results/paper/hiv_way.json`` and draws
``docs/figures/paper_hiv_way.png``.
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
from records import RESULTS, Record

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import hiv
from pyro.infer import Trace_ELBO

from pyro_adaann import AdaAnnSchedule, AdaAnnSVI, AutoPlanar, importance_draws

FIGURE = Path(__file__).resolve().parents[2] / "docs" / "figures" / "paper_hiv_way.png"
NUM_DRAWS, NUM_POINTS = 2000, 60


def make_fits() -> dict[str, Any]:
    """Return how to make every fit, by name."""

    def paper(path: str, num_initial_steps: int) -> AdaAnnSVI:
        return AdaAnnSVI(
            hiv.model,
            AutoPlanar(hiv.model, num_transforms=250, base_loc=0.0, base_scale=2.0),
            pyro.optim.Adam({"lr": 0.0005}),
            Trace_ELBO(num_particles=100, vectorize_particles=True),
            path=path,
            schedule=AdaAnnSchedule(0.005, initial_inverse_temperature=5e-5),
            num_initial_steps=num_initial_steps,
        )

    return {
        "paper's path, T0 = 1,000": lambda: paper("joint", 1000),
        "paper's path, T0 = 5": lambda: paper("joint", 5),
        "bridge, T0 = 1,000": lambda: paper("bridge", 1000),
        "natural_svi": lambda: hiv.make_svi(False, "natural"),
    }


def follow(svi: AdaAnnSVI, data: torch.Tensor, max_steps: int) -> list[Record]:
    """Run a fit and return what its guide was on the way."""
    records: list[Record] = []
    following = 0.0
    while svi.inverse_temperature < 1 and svi.history.num_steps < max_steps:
        svi.step(data)
        t = svi.inverse_temperature
        if t >= following:
            records.append({"t": t, "step": svi.history.num_steps, **look(svi, data)})
            following = t * (1 / 5e-5) ** (1 / NUM_POINTS)
    return records


def look(svi: AdaAnnSVI, data: torch.Tensor) -> Record:
    """Return shares, spread and effective sample size against the tempered density of the moment."""
    state = torch.get_rng_state()
    drawn = importance_draws(svi, data, num_samples=NUM_DRAWS)
    torch.set_rng_state(state)
    t, p1 = svi.inverse_temperature, drawn.samples["p1"]
    log_p = t * drawn.log_p
    if svi.path.name == "bridge":
        z = torch.stack([drawn.samples[name] for name in hiv.TRUTH], dim=-1)
        base = torch.distributions.Normal(0.0, 2.0).log_prob(z).sum(-1)
        log_p = log_p + (1 - t) * base
    log_weights = torch.where(torch.isfinite(log_p), log_p - drawn.log_q, -torch.inf)
    weights = log_weights.softmax(0)
    return {
        "share": float((p1 > 0).double().mean()),
        "weight": float(weights[p1 > 0].sum()),
        "ess": float(1 / weights.square().sum()) / NUM_DRAWS,
        "spread": float((p1.quantile(0.84) - p1.quantile(0.16)) / 2),
    }


def plot(found: dict[str, list[Record]], path: Path) -> None:
    """Draw the way of every fit."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained", sharex=True)
    for (name, records), color in zip(found.items(), ("C3", "C1", "C0", "C2"), strict=False):
        t = [record["t"] for record in records]
        label = f"{name} ({records[-1]['step']:,} updates)"
        panels[0].plot(t, [record["share"] for record in records], color=color, label=label)
        panels[0].plot(t, [record["weight"] for record in records], color=color, linestyle=":", linewidth=1)
        panels[1].plot(t, [record["ess"] for record in records], color=color)
        panels[2].plot(t, [record["spread"] for record in records], color=color)
    panels[0].axhline(0.5, color="0.7", linewidth=0.8)
    panels[0].set(title="share of one mode (dotted: weighted)", ylim=(0, 1), xscale="log")
    panels[1].set(title="effective sample size, share", ylim=(0, 1))
    panels[2].set(title="half width of the draws of p1", yscale="log")
    for panel in panels:
        panel.set(xlabel="inverse temperature")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=RESULTS / "hiv_way.json")
    args = parser.parse_args()
    data = hiv.simulate(hiv.DATA_SEED).float()
    found: dict[str, list[Record]] = {}
    for name, make in make_fits().items():
        pyro.clear_param_store()
        pyro.set_rng_seed(args.seed)
        found[name] = follow(make(), data, args.max_steps)
        last = found[name][-1]
        print(name, {key: round(value, 5) for key, value in last.items() if math.isfinite(value)}, flush=True)
    args.out.write_text(json.dumps(found) + "\n")
    plot(found, FIGURE)


if __name__ == "__main__":
    main()
