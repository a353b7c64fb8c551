"""Example 3 of the AdaAnn paper: two narrow normal distributions in the plane.

    p(z) = N(z | (-mu - 1, mu), I/32) / 2 + N(z | (mu + 1, mu), I/32) / 2

With mu the modes move apart and up, away from the center of the guide's base N(0, 4 I). Without annealing a
planar flow, and the more expressive RealNVP too, often ends on one of them; with AdaAnn the planar flow has
both. Run it with::

    python examples/mixture_2d.py --mu 0.5 --out mixture_2d_results

Settings are those of the paper (Section 4.3, Tables 3 and 7): no refinement at t = 1, a constant learning
rate. How often each method finds both modes: ``benchmarks/paper/study_mixtures.py``.
"""

from __future__ import annotations

import argparse

import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from mixture import Mixture, fit_both, parse_arguments, save

from pyro_adaann import AutoPlanar

BASE_SCALE = 2.0
SCALE = (1 / 32) ** 0.5
TOLERANCE = 0.01
NUM_TRANSFORMS = 75
#: Learning rates of the separations that the paper runs.
LEARNING_RATES = {0.0: 0.001, 0.5: 0.0008, 1.0: 0.0005, 1.5: 0.0005, 2.0: 0.0005, 2.5: 0.0002}


def make_target(mu: float) -> Mixture:
    """Return the density at a separation."""
    return Mixture(((-mu - 1, mu), (mu + 1, mu)), SCALE)


def learning_rate(mu: float) -> float:
    """Return the rate of the nearest separation of the paper."""
    return LEARNING_RATES[min(LEARNING_RATES, key=lambda known: abs(known - mu))]


def plot(target: Mixture, posteriors: dict[str, dist.TorchDistribution]) -> Figure:
    """Draw the exact density and both fitted ones."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    points, _ = target.grid()
    axes = [points[:, k].unique() for k in range(2)]
    densities = {"exact": target.log_density(points)}
    with torch.no_grad():
        densities |= {name: posterior.log_prob(points.float()) for name, posterior in posteriors.items()}
    # The same colors for the same densities; a single mode of weight 1 is above the scale.
    levels = torch.linspace(0.0, float(densities["exact"].exp().max()), 9).tolist()
    for panel, (name, values) in zip(figure.subplots(1, 3, sharey=True), densities.items(), strict=True):
        table = values.exp().reshape(len(axes[0]), len(axes[1]))
        panel.contourf(axes[0], axes[1], table.T, levels=levels, cmap="Blues", extend="max")
        panel.set(xlabel="$z_1$", title=name, aspect="equal")
    figure.axes[0].set_ylabel("$z_2$")
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Fit without and with annealing, print both results, save draws and figures."""
    parser = argparse.ArgumentParser(
        description="Two modes in the plane (AdaAnn paper, example 3).",
        epilog="Takes about 75 seconds on one core.",
    )
    parser.add_argument("--mu", type=float, default=0.5, help="how far the modes are from mu = 0")
    args = parse_arguments(parser, arguments, "mixture_2d_results")

    target = make_target(args.mu)

    def make_guide() -> AutoPlanar:
        num_transforms = 4 if args.fast else NUM_TRANSFORMS
        return AutoPlanar(target.model, num_transforms, base_loc=0.0, base_scale=BASE_SCALE)

    posteriors, svi = fit_both(target, make_guide, learning_rate(args.mu), TOLERANCE, args)
    print("paper at mu = 0.5: AdaAnn 2,575 updates (5 % 2,485, 95 % 2,748), both modes in all 50 trials")
    save(svi, args.out, plot(target, posteriors))


if __name__ == "__main__":
    main()
