"""The lynx and the hare: annealed inference in a Lotka-Volterra model of real data.

The Hudson's Bay Company counted the pelts of hares and lynxes it bought from 1900 to 1920. The
populations follow

    d log u / dt =  alpha - beta v        (u: hares,  thousands of pelts)
    d log v / dt = -gamma + delta u       (v: lynxes, thousands of pelts)

and the counts are lognormal around them. The priors are those of B. Carpenter's Stan case study
*Predator-Prey Population Dynamics: the Lotka-Volterra model in Stan* (2018). Run it with::

    python examples/lynx_hare.py --out lynx_hare_results

The settings are those of `natural_svi`, with planar layers on a base from draws of the prior, which take half
the time of its spline guide here.
``--settings paper`` are those of the AdaAnn paper's ODE examples: planar layers, Adam, the path
``"likelihood"``. It shows its progress, prints the posterior by ArviZ and a verdict on the fit, and writes
``posterior.nc`` and three figures: the trajectories with the data, the pairs of parameters, and the
annealing schedule.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from ode import Rhs, solve
from posterior import plot_pairs, plot_schedule
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.distributions import constraints

from pyro_adaann import (
    AdaAnnSchedule,
    AdaAnnSVI,
    AutoPlanar,
    Ladder,
    LinearSchedule,
    diagnose,
    natural_svi,
    to_arviz,
)

# Elton & Nicholson (1942), "The ten-year cycle in numbers of the lynx in Canada", Journal of Animal
# Ecology 11(2), as tabulated by Howard (2009); thousands of pelts, 1900 to 1920.
YEARS = torch.arange(1900, 1921)
HARES = [30.0, 47.2, 70.2, 77.4, 36.3, 20.6, 18.1, 21.4, 22.0, 25.4, 27.1,
         40.3, 57.0, 76.6, 52.3, 19.5, 11.2, 7.6, 14.6, 16.2, 24.7]  # fmt: skip
LYNXES = [4.0, 6.1, 9.8, 35.2, 59.4, 41.7, 19.0, 13.0, 8.3, 9.1, 7.4,
          8.0, 12.3, 19.5, 45.7, 51.1, 29.7, 15.8, 9.7, 10.1, 8.6]  # fmt: skip
PELTS = torch.tensor([HARES, LYNXES]).T  # (years, species)

# RK4 steps per year: within 2e-4 of the exact log populations near the posterior, a thousandth of
# the noise.
NUM_SUBSTEPS = 4


class PositiveNormal(dist.Normal):
    """A normal distribution restricted to the positive half-line."""

    support = constraints.positive

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value) - torch.special.log_ndtr(self.loc / self.scale)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        below_zero = torch.special.ndtr(-self.loc / self.scale)
        uniform = torch.rand(self._extended_shape(sample_shape), dtype=below_zero.dtype)
        uniform = below_zero + (1 - below_zero) * uniform
        return self.loc + self.scale * torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6))


def lotka_volterra(
    alpha: Tensor, beta: Tensor, gamma: Tensor, delta: Tensor, log_u0: Tensor, log_v0: Tensor
) -> tuple[Rhs, Tensor]:
    """Return the right-hand side and the initial state, both of shape ``(2,) + alpha.shape``.

    The state is the logarithm of both populations: they stay positive, and the right-hand side is
    growth + interaction * exp(y with its two entries swapped).
    """
    growth = torch.stack([alpha, -gamma])
    interaction = torch.stack([-beta, delta])

    def rhs(t: Tensor, y: Tensor) -> Tensor:
        return torch.addcmul(growth, interaction, y.flip(0).exp())

    return rhs, torch.stack([log_u0, log_v0])


def log_populations(params: Sequence[Tensor]) -> Tensor:
    """Return the log populations of every particle, shape ``(..., years, species)``."""
    times = (YEARS - YEARS[0]).to(params[0])
    return solve(lotka_volterra, params, times, NUM_SUBSTEPS).movedim((0, 1), (-2, -1))


def model(pelts: Tensor) -> None:
    """The Pyro program: priors, ODE and lognormal counts of shape ``(years, 2)``."""
    alpha = pyro.sample("alpha", PositiveNormal(1.0, 0.5))
    beta = pyro.sample("beta", PositiveNormal(0.05, 0.05))
    gamma = pyro.sample("gamma", PositiveNormal(1.0, 0.5))
    delta = pyro.sample("delta", PositiveNormal(0.05, 0.05))
    initial = pyro.sample("initial", dist.LogNormal(math.log(10), 1).expand([2]).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(-1, 1).expand([2]).to_event(1))

    log_pelts = log_populations([alpha, beta, gamma, delta, *initial.log().unbind(-1)])
    # Far from the data a trajectory may overflow; the driver handles such draws, so Pyro's check of
    # the location, which would stop the run, is off here.
    noise = dist.LogNormal(log_pelts, sigma.unsqueeze(-2), validate_args=False)
    pyro.sample("pelts", noise.to_event(2), obs=pelts)


def make_svi(fast: bool, settings: str = "natural") -> AdaAnnSVI:
    """Return the fit, not yet run, by natural gradients, with the paper's settings, or with tiny ones."""
    if settings == "natural":
        return make_natural_svi(fast)
    guide = AutoPlanar(model, num_transforms=4 if fast else 50)
    optim = pyro.optim.StepLR(
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": 0.005},
            "step_size": 400,
            "gamma": 0.5,
        }
    )
    return AdaAnnSVI(
        model,
        guide,
        optim,
        Trace_ELBO(num_particles=10 if fast else 100, vectorize_particles=True),
        # Most draws of the prior give trajectories far from the data, so annealing starts at 0.001, on the
        # path that keeps the prior: at small inverse temperatures the guide is near the prior.
        path="likelihood",
        schedule=AdaAnnSchedule(
            tolerance=2.0 if fast else 0.1,
            initial_inverse_temperature=0.5 if fast else 0.001,
        ),
        num_initial_steps=5 if fast else 500,
        num_final_steps=5 if fast else 3000,
    )


def make_natural_svi(fast: bool) -> AdaAnnSVI:
    """Return the fit, not yet run, by natural gradients."""
    num_transforms = 4 if fast else 64
    guide = AutoPlanar(model, num_transforms, base_loc="prior", base_scale="prior")
    if fast:
        return natural_svi(model, guide, num_particles=20, num_final_steps=2, schedule=LinearSchedule(3))
    # Rungs twice as far apart as by default: the diagnosis takes half as long.
    return natural_svi(model, guide, num_final_steps=80, ladder=Ladder(distance=2.0))


def columns_of(data: Any) -> dict[str, Tensor]:
    """Return the posterior draws by name, vectors by component, each of shape ``(num_draws,)``."""
    posterior = data["posterior"]
    draws: dict[str, Tensor] = {}
    for name in ("alpha", "beta", "gamma", "delta", "initial", "sigma"):
        is_vector = name in ("initial", "sigma")
        values = torch.tensor(np.asarray(posterior[name])).reshape(-1, 2 if is_vector else 1)
        labels = [f"{name} hare", f"{name} lynx"] if is_vector else [name]
        draws.update(zip(labels, values.unbind(-1), strict=True))
    return draws


def plot_trajectories(draws: dict[str, Tensor], path: Path) -> None:
    """Draw the counts over bands of the trajectories: medians and 90 % of the draws."""
    rates = [draws[name] for name in ("alpha", "beta", "gamma", "delta")]
    initial = [draws["initial hare"].log(), draws["initial lynx"].log()]
    populations = log_populations([*rates, *initial]).exp()
    bands = torch.quantile(populations, torch.tensor([0.05, 0.5, 0.95]).to(populations), dim=0)
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for i, (species, color) in enumerate((("hares", "tab:blue"), ("lynxes", "tab:orange"))):
        axes.fill_between(YEARS, bands[0, :, i], bands[2, :, i], color=color, alpha=0.25)
        axes.plot(YEARS, bands[1, :, i], color=color, label=species)
        axes.plot(YEARS, PELTS[:, i], "o", color=color, markersize=4)
    axes.set(xlabel="year", ylabel="pelts (thousands)", xticks=YEARS[::4].tolist())
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Fit, print the posterior and the verdict, write the draws and the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Takes about half a minute on one core, with --settings paper two minutes.",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the fit")
    parser.add_argument("--out", type=Path, default=Path("lynx_hare_results"), help="folder of the files")
    parser.add_argument("--settings", choices=["paper", "natural"], default="natural")
    parser.add_argument("--fast", action="store_true", help="a few steps only, to try the script")
    args = parser.parse_args(arguments)

    torch.set_num_threads(1)  # faster than two or more for arrays as small as these
    pyro.set_rng_seed(args.seed)
    svi = make_svi(args.fast, args.settings)
    svi.run(PELTS)

    # The counts are one event: one log likelihood for all of them, so none per observation.
    coords = {"species": ["hare", "lynx"], "year": YEARS.tolist()}
    dims = {"initial": ["species"], "sigma": ["species"], "pelts": ["year", "species"]}
    diagnosis = diagnose(svi, PELTS, num_samples=500 if args.fast else 10_000)
    data = to_arviz(
        svi,
        PELTS,
        num_samples=500 if args.fast else 4000,
        diagnosis=diagnosis,
        coords=coords,
        dims=dims,
        log_likelihood=False,
    )
    print(az.summary(data, kind="stats", round_to=3))
    print(diagnosis)

    args.out.mkdir(parents=True, exist_ok=True)
    data.to_netcdf(str(args.out / "posterior.nc"))
    draws = columns_of(data)
    plot_trajectories(draws, args.out / "trajectories.png")
    plot_pairs(draws, args.out / "pairs.png")
    plot_schedule(svi.history, args.out / "schedule.png")
    print(f"wrote posterior.nc and three figures to {args.out}")


if __name__ == "__main__":
    main()
