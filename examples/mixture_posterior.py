"""The means of a two-component mixture: a posterior with two modes, and discrete sites summed out.

    mu_1, mu_2 ~ N(0, 5^2),   k_i ~ Categorical(0.5, 0.5),   x_i ~ N(mu_{k_i}, 1),   i = 1, ..., 20

The two means can change places (label switching), so the posterior has two modes of weight exactly 1/2
each, whatever the data; its evidence is exact by quadrature. The data are simulated with means 0 and 3.
The 20 assignments are enumerated by `TraceEnum_ELBO`; a scale common to all of them stays outside the sum
over assignments, so that tempering acts on the mixture and not on its components.

All fits start where people start a mixture, at a guess from the data (the quartiles), which lies in one
of the modes, and take the same number of steps: Pyro's `SVI`, and `AdaAnnSVI` on every path.
KL warm-up ("kl_warmup") is not for finding modes, and is here to show it: below 1 its target is *sharper*
than the posterior. Run it with::

    python examples/mixture_posterior.py --out mixture_posterior_results

Ten seeds (``--seed 100 --num-seeds 10``), median (least to largest); the settings were chosen with seeds
0 and 1, none of these. The exact log evidence is -43.793.

    way         weight of the start's mode  both modes found  log evidence off by       ESS share
    SVI         1.000 (1.000 to 1.000)      0 of 10           -0.693 (-0.694 to -0.692)  0.963
    joint       0.469 (0.050 to 0.989)      10 of 10          -0.003 (-0.055 to 0.001)   0.725
    likelihood  0.538 (0.077 to 0.891)      10 of 10           0.000 (-0.016 to 0.010)   0.506
    bridge      1.000 (1.000 to 1.000)      0 of 10           -0.694 (-0.694 to -0.692)  0.958
    kl_warmup   1.000 (1.000 to 1.000)      0 of 3            -0.694 (-0.694 to -0.693)  0.984

SVI loses a mode in every run, which its effective sample size does not show; log 2 = 0.693 of the evidence is
missing. Annealed from a flat density or from the prior, every run finds both. The weights
that the *guide* gives to them are often wrong: the reverse divergence hardly moves mass between separate
modes, so that random errors of the weights at their separation remain, and both modes keep at least half of
their weight in only 6 ("joint") and 4 ("likelihood") of 10 runs. Importance weights correct this, as the log
evidence shows. The path "bridge" starts from the guide's base: it needs one that covers
all modes, which here it does not.

Source: Jasra, Holmes & Stephens, *Markov chain Monte Carlo methods and the label switching problem*,
Statistical Science 20, 2005.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO
from torch import Tensor

from pyro_adaann import AdaAnnSchedule, AdaAnnSVI, AnnealingSchedule, AutoPlanar, LinearSchedule

NUM_DATA, SEPARATION, DATA_SEED = 20, 3.0, 36
WEIGHTS = torch.tensor([0.5, 0.5])
PATHS = ["joint", "likelihood", "bridge", "kl_warmup"]
# Settings of all fits, chosen with seeds 0 and 1.
NUM_TRANSFORMS, NUM_PARTICLES, LR, T0, NUM_STEPS = 32, 50, 0.005, 0.05, 1200


def simulate() -> Tensor:
    """Return data of means 0 and 3, the same whatever the seed of the fits."""
    generator = torch.Generator().manual_seed(DATA_SEED)
    second = torch.rand(NUM_DATA, generator=generator) < WEIGHTS[1]
    return torch.randn(NUM_DATA, generator=generator) + SEPARATION * second


def model(data: Tensor) -> None:
    """The mixture; the assignments are enumerated in the model."""
    means = pyro.sample("means", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
    with pyro.plate("data", len(data), dim=-1):
        k = pyro.sample("k", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
        mean = torch.where(k == 0, means[..., 0], means[..., 1])
        pyro.sample("x", dist.Normal(mean, 1.0), obs=data)


def log_joint(means: Tensor, data: Tensor) -> Tensor:
    """Return log p(means, data) with the assignments summed out; ``means`` of shape ``(..., 2)``."""
    log_prior = dist.Normal(0.0, 5.0).log_prob(means).sum(-1)
    components = dist.Normal(means.unsqueeze(-2), 1.0).log_prob(data.unsqueeze(-1))
    return log_prior + (components + WEIGHTS.log()).logsumexp(-1).sum(-1)


def exact(data: Tensor, num_points: int = 321) -> tuple[Tensor, Tensor, float]:
    """Return a grid of means, the posterior density on it, and the log evidence."""
    axis = torch.linspace(-5.0, 9.0, num_points)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1)
    values = log_joint(grid, data)
    log_evidence = values.flatten().logsumexp(0).item() + 2 * math.log(float(axis[1] - axis[0]))
    return grid, (values - log_evidence).exp(), log_evidence


def make_guide(data: Tensor) -> AutoPlanar:
    """Return planar layers over the means, on a base around the quartiles of the data.

    That is how people start a mixture: at a good guess, hence in one of the modes.
    """
    quartiles = data.quantile(torch.tensor([0.25, 0.75]))
    return AutoPlanar(poutine.block(model, hide=["k"]), NUM_TRANSFORMS, base_loc=quartiles, base_scale=1.0)


def make_elbo() -> TraceEnum_ELBO:
    """Return the loss of every fit; there is one plate in the model."""
    return TraceEnum_ELBO(num_particles=NUM_PARTICLES, vectorize_particles=True, max_plate_nesting=1)


def fit_without_annealing(data: Tensor, num_steps: int) -> AutoPlanar:
    """The loop that Pyro users write."""
    guide = make_guide(data)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": LR}), make_elbo())
    for _ in range(num_steps):
        svi.step(data)
    return guide


def fit_with_annealing(data: Tensor, path: str, num_steps: int) -> AutoPlanar:
    """Return the guide annealed on a path, in as many steps: a quarter at t0, a quarter at 1."""
    guide = make_guide(data)
    schedule: AnnealingSchedule = AdaAnnSchedule(initial_inverse_temperature=T0)
    if path == "kl_warmup":
        # No adaptive rule here, and nothing that a number of steps could choose.
        schedule = LinearSchedule(num_steps // 10, initial_inverse_temperature=T0)
    svi = AdaAnnSVI(
        model,
        guide,
        pyro.optim.Adam({"lr": LR}),
        make_elbo(),
        schedule=schedule,
        path=path,
        num_initial_steps=num_steps // 4,
        num_final_steps=num_steps // 4,
    )
    svi.run(data, progress_bar=False, num_steps=num_steps)
    return guide


@dataclass(frozen=True)
class Score:
    """What draws of a guide say about it; ``weight`` is that of the mode with mean 1 < mean 2."""

    weight: float
    log_evidence: float
    ess_share: float

    def has_both_modes(self, least: float) -> bool:
        """Return whether each of the two modes has at least this share of the draws."""
        return min(self.weight, 1 - self.weight) >= least


@torch.no_grad()
def evaluate(guide: AutoPlanar, data: Tensor, num_draws: int = 20_000) -> Score:
    """Return the score of a guide by importance weights."""
    posterior = guide.get_posterior()
    means = posterior.sample((num_draws,))
    log_weights = log_joint(means, data) - posterior.log_prob(means)
    log_evidence = (log_weights.logsumexp(0) - math.log(num_draws)).item()
    ess = (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp().item()
    weight = (means[:, 0] < means[:, 1]).float().mean().item()
    return Score(weight, log_evidence, ess / num_draws)


@torch.no_grad()
def plot(guides: dict[str, AutoPlanar], grid: Tensor, density: Tensor, path: Path) -> None:
    """Draw the exact posterior and that of every guide."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(guides) + 1, figsize=(2.4 * (len(guides) + 1), 2.6), sharey=True, layout="constrained"
    )
    densities = {"exact": density}
    for name, guide in guides.items():
        densities[name] = guide.get_posterior().log_prob(grid.reshape(-1, 2)).exp().reshape(density.shape)
    # The same colors for the same densities; a single mode of weight 1 is above the scale.
    levels = torch.linspace(0.0, float(density.max()), 9).tolist()
    x, y = grid.movedim(-1, 0).numpy()
    for panel, (name, values) in zip(panels, densities.items(), strict=True):
        panel.contourf(x, y, values.numpy(), levels=levels, cmap="Blues", extend="max")
        panel.set(title=name, aspect="equal", xlabel="mean 1", xlim=(-2.0, 6.0), ylim=(-2.0, 6.0))
    panels[0].set_ylabel("mean 2")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def summarize(values: Sequence[float]) -> str:
    """Return median, least and largest of the seeds."""
    return f"{statistics.median(values):7.3f} ({min(values):.3f} to {max(values):.3f})"


def main(arguments: list[str] | None = None) -> None:
    """Fit without annealing and on every path for every seed, print the tables, draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Takes about three minutes on one core for each seed.",
    )
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--num-seeds", type=int, default=1, help="number of seeds")
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=["SVI", *PATHS],
        default=["SVI", *PATHS],
        help="SVI, and paths of AdaAnnSVI",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("mixture_posterior_results"), help="folder of the figure"
    )
    parser.add_argument("--fast", action="store_true", help="a few steps only, to try the script")
    args = parser.parse_args(arguments)
    num_steps = 60 if args.fast else NUM_STEPS

    data = simulate()
    grid, density, log_evidence = exact(data, num_points=41 if args.fast else 321)
    area = float(grid[1, 0, 0] - grid[0, 0, 0]) ** 2
    weight = float((density * (grid[..., 0] < grid[..., 1])).sum()) * area
    print(f"exact: weight {weight:.3f}, log evidence {log_evidence:.3f}; {num_steps} steps for each fit")

    start = time.perf_counter()
    scores: dict[str, list[Score]] = {name: [] for name in args.ways}
    for seed in range(args.seed, args.seed + args.num_seeds):
        guides: dict[str, AutoPlanar] = {}
        for name, found in scores.items():
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            if name == "SVI":
                guides[name] = fit_without_annealing(data, num_steps)
            else:
                guides[name] = fit_with_annealing(data, name, num_steps)
            found.append(evaluate(guides[name], data))
            score = found[-1]
            print(
                f"seed {seed}  {name:10}  weight {score.weight:.3f}, log evidence "
                f"{score.log_evidence - log_evidence:+.3f} off, ESS share {score.ess_share:.3f}",
                flush=True,
            )

    print("median (least to largest); a mode is found with 1 % of the draws or more")
    for name, found in scores.items():
        print(
            f"{name:10}  both modes found in {sum(s.has_both_modes(0.01) for s in found)} of {len(found)}, "
            f"with half of their weight or more in {sum(s.has_both_modes(0.25) for s in found)}, weight "
            f"{summarize([s.weight for s in found])}, log evidence off by "
            f"{summarize([s.log_evidence - log_evidence for s in found])}, ESS share "
            f"{summarize([s.ess_share for s in found])}"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    plot(guides, grid, density, args.out / "mixture_posterior.png")
    print(f"wrote {args.out / 'mixture_posterior.png'}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
