"""Parts of both mixture examples: the density, the fits, the figures."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from comparison import compare, make_grid
from matplotlib.figure import Figure
from posterior import plot_schedule
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_adaann import AdaAnnSchedule, AdaAnnSVI, AutoFlow, natural_svi, to_arviz

#: Sds around the means that the grid covers, and its points per sd.
_NUM_SDS = 7
_POINTS_PER_SD = {1: 10, 2: 4}


@dataclass(frozen=True)
class Mixture:
    """Two normal distributions of equal weight, of covariance ``scale^2 I`` both.

    :param means: two points of R^d.
    :param scale: standard deviation of every coordinate.
    """

    means: tuple[tuple[float, ...], tuple[float, ...]]
    scale: float

    @property
    def dim(self) -> int:
        """The dimension d."""
        return len(self.means[0])

    def log_density(self, z: Tensor) -> Tensor:
        """Return the log density, normalized, of points ``(..., d)``."""
        log_constant = self.dim * math.log(self.scale * math.sqrt(2 * math.pi)) + math.log(2)
        return torch.logaddexp(*self._exponents(z)) - log_constant

    def _exponents(self, z: Tensor) -> tuple[Tensor, Tensor]:
        first, second = (z - torch.tensor(mean, dtype=z.dtype) for mean in self.means)
        factor = -0.5 / self.scale**2
        return factor * first.square().sum(-1), factor * second.square().sum(-1)

    def is_first_mode(self, z: Tensor) -> Tensor:
        """Return which points ``(n, d)`` are nearer to the first mean."""
        first, second = self._exponents(z)
        return first > second

    def grid(self) -> tuple[Tensor, float]:
        """Return points ``(n, d)`` of a grid around both modes, and the volume of a cell."""
        margin = _NUM_SDS * self.scale
        bounds = [(min(pair) - margin, max(pair) + margin) for pair in zip(*self.means, strict=True)]
        return make_grid(bounds, self.scale / _POINTS_PER_SD[self.dim])

    def model(self) -> None:
        """The Pyro program: a flat prior (its density is masked) times the density."""
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([self.dim]).to_event(1).mask(False))
        pyro.factor("log_density", self.log_density(z))


def make_elbo() -> Trace_ELBO:
    """Return the loss of all fits: 100 particles."""
    return Trace_ELBO(num_particles=100, vectorize_particles=True)


def fit_without_annealing(target: Mixture, guide: AutoFlow, learning_rate: float, num_steps: int) -> None:
    """The loop that Pyro users write."""
    svi = SVI(target.model, guide, pyro.optim.Adam({"lr": learning_rate}), make_elbo())
    for _ in range(num_steps):
        svi.step()


def make_svi(
    target: Mixture,
    guide: AutoFlow,
    learning_rate: float,
    tolerance: float,
    *,
    loss: Trace_ELBO | None = None,
    fast: bool = False,
) -> AdaAnnSVI:
    """Return the same with `AdaAnnSVI`, not yet run; the paper does not refine these fits at t = 1."""
    # With hardly any training the log densities stay far apart, and AdaAnn's steps small.
    schedule = AdaAnnSchedule(1e3 if fast else tolerance, initial_inverse_temperature=0.01)
    return AdaAnnSVI(
        target.model,
        guide,
        pyro.optim.Adam({"lr": learning_rate}),
        loss or make_elbo(),
        schedule=schedule,
        num_initial_steps=5 if fast else 500,
        num_steps_per_stage=5,
        num_final_steps=5,
        num_variance_samples=20 if fast else 1000,
    )


def parse_arguments(
    parser: argparse.ArgumentParser, arguments: list[str] | None, folder: str
) -> argparse.Namespace:
    """Add the options of both examples to their own, and parse.

    :param folder: the default of ``--out``.
    """
    parser.add_argument("--seed", type=int, default=0, help="seed of the fits")
    parser.add_argument("--settings", choices=["paper", "natural"], default="paper", help="of AdaAnnSVI")
    parser.add_argument("--fast", action="store_true", help="a few steps only, to try the script")
    parser.add_argument("--out", type=Path, default=Path(folder), help="folder of the files")
    return parser.parse_args(arguments)


def fit_both(
    target: Mixture,
    make_guide: Callable[[], AutoFlow],
    learning_rate: float,
    tolerance: float,
    args: argparse.Namespace,
) -> tuple[dict[str, dist.TorchDistribution], AdaAnnSVI]:
    """Fit without and with annealing from the same seed; print both beside the exact density.

    :return: both fitted densities, and the annealed fit.
    """
    pyro.set_rng_seed(args.seed)
    pyro.clear_param_store()
    guide = make_guide()
    fit_without_annealing(target, guide, learning_rate, num_steps=20 if args.fast else 8000)
    posteriors = {"SVI": guide.get_posterior()}

    pyro.set_rng_seed(args.seed)
    pyro.clear_param_store()  # a new fit of a guide of the same name
    if args.settings == "natural":
        svi = natural_svi(target.model, make_guide(), num_final_steps=2 if args.fast else 40)
    else:
        svi = make_svi(target, make_guide(), learning_rate, tolerance, fast=args.fast)
    history = svi.run()
    posteriors["AdaAnnSVI"] = svi.guide.get_posterior()
    for name, posterior in posteriors.items():
        print(f"{name:9}  {compare(posterior, target)}")
    print(f"AdaAnnSVI: {len(history.stages)} inverse temperatures, {history.num_steps} updates")
    return posteriors, svi


def save(svi: AdaAnnSVI, folder: Path, figure: Figure) -> None:
    """Write draws, schedule and the figure of the densities to a folder, and say so."""
    folder.mkdir(parents=True, exist_ok=True)
    to_arviz(svi, log_likelihood=False).to_netcdf(str(folder / "posterior.nc"))
    plot_schedule(svi.history, folder / "schedule.png")
    figure.savefig(folder / "densities.png", dpi=150)
    plt.close(figure)
    print(f"wrote posterior.nc, schedule.png and densities.png to {folder}")
