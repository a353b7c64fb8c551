"""Example 1 of the AdaAnn paper: one density with two modes, fitted with and without annealing.

    p(z) = 0.954 exp(-((z + 2)^2 - 3)^2),   modes at -2 +- sqrt(3), weight 1/2 each

The same model, guide and optimizer, once with Pyro's `SVI` and once with `AdaAnnSVI`. `SVI` finds one
mode, `AdaAnnSVI` both. Run it with::

    python examples/bimodal.py --out bimodal_results

Settings are those of the paper (Sections 2.4 and 4.1, Table 7), which needed 6.5 minutes for the
annealed fit and took 354 temperature steps; but half of its 8,000 steps at t = 1 are enough here
(``--paper`` for all of them). ``--settings natural`` takes about a hundred natural-gradient steps.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_adaann import (
    AdaAnnSchedule,
    AdaAnnSVI,
    AnnealingHistory,
    AnnealingSchedule,
    AutoPlanar,
    LinearSchedule,
    natural_svi,
    to_arviz,
)

MIDDLE = -2.0  # between the two modes


def log_density(z: Tensor) -> Tensor:
    """Return log p(z), elementwise; p integrates to 1 up to the three digits of 0.954."""
    return math.log(0.954) - ((z + 2) ** 2 - 3) ** 2


def model() -> None:
    """The Pyro program: a flat prior (its density is masked) times the density."""
    z = pyro.sample("z", dist.Normal(0.0, 10.0).mask(False))
    pyro.factor("log_density", log_density(z))


def make_guide() -> AutoPlanar:
    """Return 50 planar layers on the base N(0, 2^2)."""
    return AutoPlanar(model, num_transforms=50, base_loc=0.0, base_scale=2.0)


def fit_without_annealing(num_steps: int) -> AutoPlanar:
    """The loop that Pyro users write."""
    guide = make_guide()
    elbo = Trace_ELBO(num_particles=100, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.005}), elbo)
    for _ in range(num_steps):
        svi.step()
    return guide


def make_svi(
    num_final_steps: int,
    schedule: AnnealingSchedule | None = None,
    num_variance_samples: int | None = None,
) -> AdaAnnSVI:
    """The same with `AdaAnnSVI`; at t = 1 the learning rate is halved eight times."""
    optim = pyro.optim.StepLR(
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": 0.005},
            "step_size": max(num_final_steps // 8, 1),
            "gamma": 0.5,
        }
    )
    return AdaAnnSVI(
        model,
        make_guide(),
        optim,
        Trace_ELBO(num_particles=100, vectorize_particles=True),
        schedule=schedule or AdaAnnSchedule(tolerance=0.01, initial_inverse_temperature=0.01),
        num_initial_steps=500,
        num_steps_per_stage=2,
        num_final_steps=num_final_steps,
        num_final_particles=1000,
        num_variance_samples=num_variance_samples,  # the paper: 1,000
    )


@torch.no_grad()
def describe(guide: AutoPlanar, num_draws: int = 20_000) -> str:
    """Return the mode weight, log evidence (exact: 0) and effective sample size of the guide."""
    posterior = guide.get_posterior()
    z = posterior.sample((num_draws,))
    weights = (log_density(z[:, 0]) - posterior.log_prob(z)).exp()
    right = (z > MIDDLE).float().mean()
    ess = weights.sum() ** 2 / (weights**2).sum() / num_draws
    return (
        f"right mode {right:.3f} (exact 0.5), log evidence {weights.mean().log():+.4f} (exact 0), "
        f"effective sample size {ess:.3f} of the draws"
    )


@torch.no_grad()
def plot(guides: dict[str, AutoPlanar], history: AnnealingHistory, path: Path) -> None:
    """Draw both fitted densities over the exact one, and the annealing schedule."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    z = torch.linspace(-5, 1, 601)
    for panel, (name, guide) in zip(panels, guides.items(), strict=False):
        panel.fill_between(z, log_density(z).exp(), color="0.85", label="exact")
        panel.plot(z, guide.get_posterior().log_prob(z.unsqueeze(-1)).exp(), label=name)
        panel.set(xlabel="z", ylabel="density", title=name)
        panel.legend(loc="upper center", frameon=False)
    panels[1].sharey(panels[0])
    panels[2].semilogy(history.inverse_temperatures)
    panels[2].set(xlabel="stage", ylabel="inverse temperature", title="AdaAnn schedule")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Fit both ways, print both results, draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Takes about 40 seconds on one core.",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the fits")
    parser.add_argument("--out", type=Path, default=Path("bimodal_results"), help="folder of the files")
    parser.add_argument("--fast", action="store_true", help="a few steps only, to try the script")
    parser.add_argument("--paper", action="store_true", help="the paper's 8,000 steps at t = 1")
    parser.add_argument("--settings", choices=["paper", "natural"], default="paper", help="of AdaAnnSVI")
    args = parser.parse_args(arguments)

    start = time.perf_counter()
    pyro.set_rng_seed(args.seed)
    without = fit_without_annealing(num_steps=20 if args.fast else 1200)
    pyro.clear_param_store()  # a new fit of guides of the same name
    pyro.set_rng_seed(args.seed)
    if args.settings == "natural":
        svi = natural_svi(model, make_guide(), num_final_steps=2 if args.fast else 40)
    else:
        num_final_steps = 20 if args.fast else 8000 if args.paper else 4000
        schedule = LinearSchedule(10, initial_inverse_temperature=0.01) if args.fast else None
        svi = make_svi(num_final_steps, schedule)
    history = svi.run()

    print(f"SVI        {describe(without)}")
    print(f"AdaAnnSVI  {describe(svi.guide)}")
    print(f"{len(history.stages)} inverse temperatures (paper: 354), {history.num_steps} steps, "
          f"{time.perf_counter() - start:.0f} s for both fits")  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    guides = {"SVI": without, "AdaAnnSVI": svi.guide}
    plot(guides, history, args.out / "bimodal.png")
    to_arviz(svi, log_likelihood=False).to_netcdf(str(args.out / "posterior.nc"))
    print(f"wrote {args.out / 'bimodal.png'} and posterior.nc")


if __name__ == "__main__":
    main()
