r"""Annealed variational objectives (AVO) for a deterministic flow, against AdaAnn.

    OMP_NUM_THREADS=1 python benchmarks/avo.py bimodal mixture2d four [--json FILE]

A stack of planar layers is cut into K blocks, :math:`z_k = T_k(z_{k-1})`, and every block is trained on a
tempered target of its own,

.. math:: L = \sum_k E[\log q_k(z_k) - \log p_{t_k}(z_k)], \qquad 0 < t_1 < \dots < t_K = 1,

with the gradient cut between blocks: block k sees the draws of the blocks before it as fixed numbers. For
stochastic layers this is the objective of Huang, Tan, Lacoste & Courville (NeurIPS 2018); with
deterministic ones the density of :math:`z_k` is known and no reverse model is needed. Compared at the same
number of optimizer steps, layers, particles and learning rate:

==============  ==========================================================================================
SVI             the whole stack on the posterior from the first step
AdaAnn          the whole stack on one tempered target after another, path "joint"
AVO K           K blocks, each on its target, for all steps
AVO K + ELBO    the same for all but the last steps, as many as AdaAnn spends at t = 1; these are for the
                whole stack on the posterior
==============  ==========================================================================================

The path is p^t or, with "bridge", q0^(1 - t) p^t; the t_k are equally spaced in log t from 0.01, or, on
the bridge, equally spaced. A step of AVO evaluates the density at K times as many points as one of AdaAnn.
Each target integrates to 1, so the log evidence to find is 0; 20,000 draws of every fit give the weights
of the modes, the KL divergence to the target (the negative ELBO), the log evidence by importance weights
and the effective sample size. A mode counts as kept with half of its weight or more.

Source: Huang, Tan, Lacoste & Courville, *Improving explorability in variational inference with annealed
variational objectives*, NeurIPS 2018.
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
from budget import MIXTURE_2D
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_adaann import AdaAnnSchedule, AdaAnnSVI, AutoPlanar
from pyro_adaann.transforms import PlanarStack

NUM_DRAWS = 20_000


@dataclass(frozen=True)
class Target:
    """A density that integrates to 1, its modes, and the settings of its fits."""

    log_prob: Callable[[Tensor], Tensor]  # (..., dim) to (...)
    modes: Tensor  # (num_modes, dim); a draw belongs to the nearest
    weights: Tensor
    base_scale: float
    num_transforms: int
    tolerance: float
    lr: float
    num_steps: int = 1800
    num_final_steps: int = 600

    def model(self) -> None:
        dim = self.modes.shape[1]
        z = pyro.sample("z", dist.Normal(torch.zeros(dim), 4.0).to_event(1).mask(False))
        pyro.factor("log_density", self.log_prob(z))


def mixture(means: Tensor, variance: float, weights: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the log density of a normal mixture with a common spherical covariance."""

    def log_prob(z: Tensor) -> Tensor:
        parts = dist.Normal(means, variance**0.5).to_event(1).log_prob(z.unsqueeze(-2))
        return (parts + weights.log()).logsumexp(-1)

    return log_prob


def paper_bimodal(z: Tensor) -> Tensor:
    """The paper's example 1, normalized to more digits than its 0.954."""
    return _LOG_CONSTANT - ((z[..., 0] + 2) ** 2 - 3) ** 2


_GRID = torch.linspace(-8.0, 4.0, 200_001, dtype=torch.float64)
_LOG_CONSTANT = -math.log(float(torch.trapezoid((-(((_GRID + 2) ** 2 - 3) ** 2)).exp(), _GRID)))
_FOUR = torch.tensor([[-2.0, -2.0], [2.0, -2.0], [-2.0, 2.0], [2.0, 2.0]])
_FOUR_WEIGHTS = torch.tensor([0.1, 0.2, 0.3, 0.4])
_HALVES = torch.tensor([0.5, 0.5])

TARGETS = {
    "bimodal": Target(
        paper_bimodal, torch.tensor([[-2 - 3**0.5], [-2 + 3**0.5]]), _HALVES, 2.0, 50, 0.01, 0.005
    ),
    "mixture2d": Target(
        mixture(MIXTURE_2D.means, MIXTURE_2D.variance, _HALVES),
        MIXTURE_2D.means,
        _HALVES,
        2.0,
        50,
        0.01,
        0.003,
    ),
    "four": Target(mixture(_FOUR, 1 / 8, _FOUR_WEIGHTS), _FOUR, _FOUR_WEIGHTS, 2.0, 50, 0.01, 0.003),
}


class Blocks(torch.nn.Module):
    """The stack in K blocks and the base it starts from."""

    def __init__(self, target: Target, num_blocks: int) -> None:
        super().__init__()
        dim = target.modes.shape[1]
        loc, scale = torch.zeros(dim), torch.full((dim,), target.base_scale)
        self.base = dist.Normal(loc, scale).to_event(1)
        self.blocks = torch.nn.ModuleList(
            PlanarStack(dim, target.num_transforms // num_blocks) for _ in range(num_blocks)
        )
        for block in self.blocks:
            block.reset_parameters(loc, scale)

    def visit(self, num_draws: int, *, cut: bool) -> list[tuple[Tensor, Tensor]]:
        """Return draws and their log density after every block.

        :param cut: whether a block sees the draws of those before it as fixed.
        """
        z = self.base.sample((num_draws,))
        log_q = self.base.log_prob(z)
        visited = []
        for block in self.blocks:
            if cut:
                z, log_q = z.detach(), log_q.detach()
            z, log_det = block.forward_and_log_det(z)
            log_q = log_q - log_det
            visited.append((z, log_q))
        return visited


def fit_avo(target: Target, num_blocks: int, path: str, num_whole_steps: int) -> tuple[Tensor, Tensor]:
    """Train the blocks apart and for the last ``num_whole_steps`` together; return draws and log q."""
    stack = Blocks(target, num_blocks)
    optim = torch.optim.Adam(stack.parameters(), lr=target.lr)
    share = torch.arange(1, num_blocks + 1) / num_blocks
    temperatures = 0.01 ** (1 - share) if path == "joint" else share
    for step in range(target.num_steps):
        cut = step < target.num_steps - num_whole_steps
        terms = []
        for t, (z, log_q) in zip(temperatures, stack.visit(100, cut=cut), strict=True):
            if cut or t == 1:
                log_p = t * target.log_prob(z)
                if path == "bridge":
                    log_p = log_p + (1 - t) * stack.base.log_prob(z)
                terms.append((log_q - log_p).mean())
        loss = torch.stack(terms).sum()
        optim.zero_grad()
        loss.backward()
        optim.step()
    with torch.no_grad():
        return stack.visit(NUM_DRAWS, cut=False)[-1]


def fit_guide(target: Target, *, is_annealed: bool) -> tuple[Tensor, Tensor]:
    """Fit the whole stack with SVI or AdaAnnSVI; return draws and log q."""
    guide = AutoPlanar(target.model, target.num_transforms, base_loc=0.0, base_scale=target.base_scale)
    elbo = Trace_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=0)
    optim = pyro.optim.Adam({"lr": target.lr})
    if is_annealed:
        svi = AdaAnnSVI(
            target.model,
            guide,
            optim,
            elbo,
            schedule=AdaAnnSchedule(target.tolerance, initial_inverse_temperature=0.01),
            num_final_steps=target.num_final_steps,
        )
        svi.run(progress_bar=False, num_steps=target.num_steps)
    else:
        plain = SVI(target.model, guide, optim, elbo)
        for _ in range(target.num_steps):
            plain.step()
    with torch.no_grad():
        posterior = guide.get_posterior()
        z = posterior.sample((NUM_DRAWS,))
        return z, posterior.log_prob(z)


#: Every way to fit a target.
WAYS: dict[str, Callable[[Target], tuple[Tensor, Tensor]]] = {
    "SVI": lambda target: fit_guide(target, is_annealed=False),
    "AdaAnn": lambda target: fit_guide(target, is_annealed=True),
    "AVO 5": lambda target: fit_avo(target, 5, "joint", 0),
    "AVO 5 + ELBO": lambda target: fit_avo(target, 5, "joint", target.num_final_steps),
    "AVO 10 + ELBO": lambda target: fit_avo(target, 10, "joint", target.num_final_steps),
    "AVO 5 bridge + ELBO": lambda target: fit_avo(target, 5, "bridge", target.num_final_steps),
}


def measure(target: Target, z: Tensor, log_q: Tensor) -> dict[str, Any]:
    """Return what draws of a fit say about it."""
    log_weights = (target.log_prob(z) - log_q).double()
    nearest = torch.cdist(z, target.modes).argmin(-1)
    shares = torch.bincount(nearest, minlength=len(target.modes)) / len(z)
    log_mean = log_weights.logsumexp(0) - math.log(len(z))
    ess = (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp() / len(z)
    return {
        "weights": [round(x, 3) for x in shares.tolist()],
        "num_modes_kept": int((shares > 0.5 * target.weights).sum()),
        "weight_error": round((shares - target.weights).abs().max().item(), 3),
        "kl": round(-log_weights.mean().item(), 4),
        "log_evidence": round(log_mean.item(), 4),
        "ess_share": round(ess.item(), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="+", choices=list(TARGETS))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--num-seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None, help="where to write the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in args.targets:
        for way in args.ways:
            for seed in range(args.seed, args.seed + args.num_seeds):
                pyro.clear_param_store()
                pyro.set_rng_seed(seed)
                draws = WAYS[way](TARGETS[name])
                rows.append({"target": name, "way": way, "seed": seed, **measure(TARGETS[name], *draws)})
                print(rows[-1], flush=True)
                if args.json:
                    args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
