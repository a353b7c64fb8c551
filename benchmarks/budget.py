"""A number of steps instead of a tolerance: does it arrive, and is the fit as good?

    OMP_NUM_THREADS=1 python benchmarks/budget.py bimodal mixture1d mixture2d lorenz hiv [--json FILE]

Every example is fitted with the paper's tolerance first, which takes N steps, and then, from the same
seed, with `run(num_steps=N)`, where the driver chooses the tolerance. ``bimodal``, ``lorenz`` and ``hiv``
are the fits of the scripts in ``examples/`` with fewer steps at t = 1, to end in minutes: 1,000, and 2,000
for HIV, which has a tolerance of 0.02 in place of 0.005. ``mixture1d`` is the paper's symmetric example 2
with modes at -2 and 2, ``mixture2d`` its example 3 with mu = 0.5 (settings of its Table 7; it gives no
number of steps at t = 1, here 1,000).

A fit is measured by 20,000 draws: weight of one mode, ELBO, its distance from the log evidence by
importance weights (for a good fit the KL divergence from guide to posterior, in nats), and effective
sample size.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor
from whole_runs import prepare

from pyro_adaann import AdaAnnSchedule, AdaAnnSVI, AutoPlanar, diagnose


@dataclass(frozen=True)
class Mixture:
    """Two normal distributions of equal weight and covariance, and the paper's settings for them."""

    means: Tensor  # (2, dim)
    variance: float
    num_transforms: int
    tolerance: float
    lr: float

    def model(self) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(self.means.shape[1]), 4.0).to_event(1).mask(False))
        parts = dist.Normal(self.means, self.variance**0.5).to_event(1).log_prob(z.unsqueeze(-2))
        pyro.factor("log_density", parts.logsumexp(-1) - math.log(2))

    def make_svi(self, base_scale: float) -> AdaAnnSVI:
        return AdaAnnSVI(
            self.model,
            AutoPlanar(self.model, self.num_transforms, base_loc=0.0, base_scale=base_scale),
            pyro.optim.Adam({"lr": self.lr}),
            Trace_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=0),
            schedule=AdaAnnSchedule(self.tolerance, initial_inverse_temperature=0.01),
            num_final_steps=1000,
            num_variance_samples=1000,
        )


MIXTURE_1D = Mixture(torch.tensor([[-2.0], [2.0]]), 1 / 16, 50, 0.005, 0.02)
MIXTURE_2D = Mixture(torch.tensor([[-1.5, 0.5], [1.5, 0.5]]), 1 / 32, 75, 0.01, 0.0008)


def make_bimodal() -> tuple[AdaAnnSVI, tuple[Any, ...]]:
    """The example's fit with 1,000 steps at 1."""
    import bimodal

    return bimodal.make_svi(num_final_steps=1000), ()


def make_lorenz() -> tuple[AdaAnnSVI, tuple[Any, ...]]:
    """The example's fit with 1,000 steps at 1."""
    svi, args = prepare("lorenz")
    svi.num_final_steps = 1000
    return svi, args


def make_hiv() -> tuple[AdaAnnSVI, tuple[Any, ...]]:
    """The example's fit with a quarter of its stages and 2,000 steps at 1."""
    svi, args = prepare("hiv")
    svi.schedule = AdaAnnSchedule(0.02, initial_inverse_temperature=0.00005)
    svi.num_final_steps = 2000
    return svi, args


#: How to make a fit and its model's arguments, and the site whose sign (beyond an offset) tells the mode.
EXAMPLES: dict[str, tuple[Callable[[], tuple[AdaAnnSVI, tuple[Any, ...]]], str | None, float]] = {
    "bimodal": (make_bimodal, "z", -2.0),
    "mixture1d": (lambda: (MIXTURE_1D.make_svi(4.0), ()), "z", 0.0),
    "mixture2d": (lambda: (MIXTURE_2D.make_svi(2.0), ()), "z", 0.0),
    "lorenz": (make_lorenz, None, 0.0),
    "hiv": (make_hiv, "p1", 0.0),
}


def measure(name: str, seed: int, num_steps: int | None) -> dict[str, Any]:
    """Run a fit to its end, with a budget or without; return the figures."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    make, site, middle = EXAMPLES[name]
    svi, args = make()
    history = svi.run(*args, progress_bar=False, num_steps=num_steps)
    pyro.set_rng_seed(seed + 1000)
    diagnosis = diagnose(svi, *args, num_samples=20_000)
    row = {
        "example": name,
        "seed": seed,
        "asked": num_steps,
        "steps": history.num_steps,
        "ends_at": svi.inverse_temperature,
        "stages": len(history.stages),
        "final_steps_promised": svi.num_final_steps,
        "final_steps": history.stages[-1].num_steps,
        "elbo": round(diagnosis.elbo, 4),
        "gap": round(diagnosis.log_evidence - diagnosis.elbo, 4),
        "ess_share": round(diagnosis.ess / 20_000, 4),
    }
    if site is not None:
        draws = svi.guide.sample_posterior(20_000, *args)[site].reshape(20_000, -1)[:, 0]
        row["mode_weight"] = round((draws > middle).float().mean().item(), 4)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("examples", nargs="+", choices=list(EXAMPLES))
    parser.add_argument("--num-seeds", type=int, default=1)
    parser.add_argument("--json", type=Path, default=None, help="where to write the figures, kept up to date")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    if args.json and args.json.exists():
        rows = [row for row in json.loads(args.json.read_text()) if row["example"] not in args.examples]
    for name in args.examples:
        for seed in range(args.num_seeds):
            num_steps = None
            for _ in range(2):
                rows.append(measure(name, seed, num_steps))
                num_steps = rows[-1]["steps"]
                print(rows[-1], flush=True)
                if args.json:
                    args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
