"""Example 5 of the AdaAnn paper: an HIV model whose posterior has two modes.

    x1' = p1 - p2 x1 - p3 x1 x3        healthy cells, start 0
    x2' = p3 x1 x3 - p4 x2             infected cells, start unknown, truth 1.5
    x3' = p1 p4 x2 - p5 x3             free virus (10^4 RNA per mL), start 1, observed

Unknown are p1, p2 and x2(0), true values 1.2, 0.8 and 1.5, under a flat prior; p3 = 4.1, p4 = 10.2
and p5 = 2.6 per month are known. The virus is observed at 40 times, every 0.05 up to 2 months, with
normal noise of variance 0.0005. Changing the signs of p1 and x2(0) changes the signs of x1 and x2
and leaves x3 as it is: the posterior has two modes, each of weight exactly 1/2. Run it with::

    python examples/hiv.py --out hiv_results

The settings, `natural_svi`, keep both modes: the path starts from the guide's own base (under a flat prior
the paper's path, p(x, z)^t, is not normalizable along p1 x2(0) = const, and at t = 5e-5 the guide widens
without bound), every stage lasts until the guide fits its density, and natural gradients of a mode-covering
divergence change the layers jointly. ``--settings paper`` are those of the paper (Section 4.5 and Table 7)
except for the path. The result is printed beside the paper's Table 6 and the exact
posterior of the same data, which ``benchmarks/reference/ode_exact.py`` computes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from ode import Rhs, solve
from posterior import (
    format_table,
    load_reference,
    moments,
    plot_pairs,
    plot_schedule,
    weighted_moments,
)
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyro_adaann import (
    AdaAnnSchedule,
    AdaAnnSVI,
    AutoPlanar,
    LinearSchedule,
    WeightedDraws,
    diagnose,
    importance_draws,
    natural_svi,
    to_arviz,
)

TRUTH = {"p1": 1.2, "p2": 0.8, "x2_start": 1.5}
P3, P4, P5 = 4.1, 10.2, 2.6
X1_START, X3_START = 0.0, 1.0
TIMES = torch.arange(41, dtype=torch.float64) * 0.05
NOISE_VARIANCE = 0.0005
DATA_SEED = 20220202

# Mean and sd of 10,000 draws. The paper's data are other draws of the noise, so its means may
# differ by about one sd.
PAPER = {
    "positive": {"p1": (1.2019, 0.0274), "p2": (0.8609, 0.2196), "x2_start": (1.5060, 0.0452)},
    "negative": {"p1": (-1.2014, 0.0249), "p2": (0.8485, 0.2001), "x2_start": (-1.5067, 0.0412)},
}


def hiv(p1: Tensor, p2: Tensor, x2_start: Tensor) -> tuple[Rhs, Tensor]:
    """Return the right-hand side and the initial state, both of shape ``(3,) + p1.shape``."""
    one = torch.ones_like(p1)
    decay = -torch.stack([p2, P4 * one, P5 * one])
    production = P4 * p1

    # Gains and losses apart: on small tensors the number of operations is the cost.
    def rhs(t: Tensor, y: Tensor) -> Tensor:
        x1, x2, x3 = y.unbind()
        infection = P3 * x1 * x3
        return torch.addcmul(torch.stack([p1 - infection, infection, production * x2]), decay, y)

    return rhs, torch.stack([X1_START * one, x2_start, X3_START * one])


def simulate(data_seed: int) -> Tensor:
    """Return the noisy virus load at the 40 times after the first, shape ``(40,)``, float64."""
    params = [torch.tensor(value, dtype=torch.float64) for value in TRUTH.values()]
    virus = solve(hiv, params, TIMES)[1:, 2]
    generator = torch.Generator().manual_seed(data_seed)
    noise = torch.randn(virus.shape, generator=generator, dtype=torch.float64)
    return virus + NOISE_VARIANCE**0.5 * noise


def model(data: Tensor) -> None:
    """The Pyro program: flat priors, the ODE and normal noise; ``data`` of shape ``(40,)``."""
    # A flat prior: the normal distribution only serves to draw a first value, its density is
    # masked.
    flat = dist.Normal(0.0, 2.0).mask(False)
    p1 = pyro.sample("p1", flat)
    p2 = pyro.sample("p2", flat)
    x2_start = pyro.sample("x2_start", flat)
    virus = solve(hiv, [p1, p2, x2_start], TIMES.to(p1))[1:, 2]
    # Far from the data a trajectory may overflow; the driver handles such draws, so Pyro's check of
    # the location, which would stop the run, is off here.
    noise = dist.Normal(virus.movedim(0, -1), NOISE_VARIANCE**0.5, validate_args=False)
    pyro.sample("data", noise.to_event(1), obs=data)


def make_svi(fast: bool, settings: str = "natural") -> AdaAnnSVI:
    """Return the fit, not yet run, with settings that keep both modes, the paper's, or tiny ones."""
    if settings == "natural":
        return make_natural_svi(fast)
    guide = AutoPlanar(model, num_transforms=4 if fast else 250, base_loc=0.0, base_scale=2.0)
    # The learning rate is constant while annealing and falls at t = 1.
    optim = pyro.optim.StepLR(
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": 0.0005},
            "step_size": 1000,
            "gamma": 0.75,
        }
    )
    return AdaAnnSVI(
        model,
        guide,
        optim,
        Trace_ELBO(num_particles=10 if fast else 100, vectorize_particles=True),
        # Not the paper's path, on which AdaAnn's steps shrink to nothing, see above.
        path="bridge",
        # With hardly any training the log densities stay far apart, and AdaAnn's steps small.
        schedule=AdaAnnSchedule(1e6 if fast else 0.005, initial_inverse_temperature=0.00005),
        num_initial_steps=5 if fast else 1000,
        num_steps_per_stage=2 if fast else 5,
        num_final_steps=5 if fast else 5000,
        num_final_particles=10 if fast else 200,
    )


def make_natural_svi(fast: bool) -> AdaAnnSVI:
    """Return the fit, not yet run, with settings that keep both modes."""
    guide = AutoPlanar(model, num_transforms=4 if fast else 100, base_loc=0.0, base_scale=2.0)
    if fast:
        return natural_svi(model, guide, num_particles=20, num_final_steps=2, schedule=LinearSchedule(3))
    return natural_svi(model, guide)


def report(weighted: WeightedDraws, is_known: bool) -> None:
    """Print weight and moments of both modes beside the paper's, without and with importance weights."""
    draws, weights = weighted.samples, weighted.log_weights.softmax(0)
    for mode, sign in (("positive", 1), ("negative", -1)):
        is_in = sign * draws["p1"] > 0
        share, weight = float(is_in.double().mean()), float(weights[is_in].sum())
        print(f"mode with {mode} p1: {share:.3f} of the guide, weight {weight:.3f} (exact: 0.5)")
        truth = {name: value * (1 if name == "p2" else sign) for name, value in TRUTH.items()}
        exact = load_reference("hiv", mode) if is_known else None
        part = {name: value[is_in] for name, value in draws.items()}
        columns = {"exact": exact, "paper": PAPER[mode]}
        if is_in.sum() > 1:
            own = {
                "guide": moments(part),
                "weighted": weighted_moments(part, weighted.log_weights[is_in]),
            }
            columns = {**own, **columns}
        print(format_table(truth, columns))


def plot_data(data: Tensor, draws: dict[str, Tensor], path: Path) -> None:
    """Draw the data and the trajectories of 50 posterior draws."""
    import matplotlib.pyplot as plt

    times = torch.linspace(0, 2, 201, dtype=torch.float64)
    virus = solve(hiv, [value[:50].double() for value in draws.values()], times)[:, 2]
    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    axes.plot(times, virus, color="tab:blue", linewidth=0.5, alpha=0.3)
    axes.plot(TIMES[1:], data, "k.", markersize=4)
    axes.set(xlabel="time (months)", ylabel="virus (10$^4$ RNA per mL)")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="HIV dynamics (AdaAnn paper, example 5).",
        epilog="Takes about 30 seconds on one core, with --settings paper five minutes.",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the fit")
    parser.add_argument("--data-seed", type=int, default=DATA_SEED, help="seed of the data")
    parser.add_argument("--settings", choices=["paper", "natural"], default="natural")
    parser.add_argument("--fast", action="store_true", help="tiny settings, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("hiv_results"), help="folder of the figures")
    args = parser.parse_args(argv)

    data = simulate(args.data_seed).float()
    pyro.set_rng_seed(args.seed)
    pyro.clear_param_store()
    svi = make_svi(args.fast, args.settings)
    history = svi.run(data)
    weighted = importance_draws(svi, data)

    report(weighted, args.data_seed == DATA_SEED)
    print(f"{len(history.stages)} stages (paper: 4645)")
    print(f"effective sample size: {weighted.ess:.0f} of {len(weighted.log_p)} draws")

    diagnosis = diagnose(svi, data, num_samples=500 if args.fast else 10_000)
    print(diagnosis)

    # What is kept and drawn are posterior draws, resampled by their weights.
    posterior = weighted.resample(len(weighted.log_p))
    args.out.mkdir(parents=True, exist_ok=True)
    exported = to_arviz(svi, data, diagnosis=diagnosis, log_likelihood=False, weighted=True)
    exported.to_netcdf(str(args.out / "posterior.nc"))
    plot_data(data, posterior, args.out / "data.png")
    plot_schedule(history, args.out / "schedule.png")
    plot_pairs(posterior, args.out / "posterior.png", TRUTH, bins=150)


if __name__ == "__main__":
    main()
