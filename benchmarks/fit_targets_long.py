"""Models for `fit` with more latents than quadrature can take; their answers are of long NUTS runs.

`python benchmarks/fit_targets_long.py` runs NUTS again and prints the numbers that are written here, with
what the four chains differ by: .03 to .05 standard deviations of the kinetics, .015 of the network's
probabilities. It takes some twenty minutes.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from fit_targets import FitTarget, noise
from pyro.infer import MCMC, NUTS
from torch import Tensor

__all__: list[str] = []

PEOPLE = 10
TIMES = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0, 6.0, 9.0, 12.0, 24.0])
#: Logs of the rate of absorption beyond that of elimination, of the latter (1/h) and of the volume (l).
CENTER = torch.tensor([0.3, -2.3, 3.4])
DOSE = 320.0  # mg
#: Of the middle and the spread of the three logs: mean, then sd.
KINETICS = {
    "center": ([0.224, -2.128, 3.399], [0.169, 0.0768, 0.0710]),
    "spread": ([0.497, 0.216, 0.197], [0.138, 0.0691, 0.0650]),
}
#: Probabilities that the curve of the network lies above its true one.
NETWORK = {"-2": 0.505, "-0.5": 0.457, "0.5": 0.844, "2": 0.206}


def _log_concentration(logs: Tensor) -> Tensor:
    """Return the log concentrations after one dose by mouth, in one compartment: (..., people, times).

    Absorption is faster than elimination by the first number; with the two exchanged, and another volume,
    the curve would be the same.
    """
    excess, elimination, volume = logs.unsqueeze(-1).exp().unbind(-2)
    rise = -(-excess * TIMES).expm1()
    ratio = (1 + elimination / excess) * rise / volume
    return (DOSE * ratio).log() - elimination * TIMES


def kinetics() -> FitTarget:
    """One-compartment kinetics of ten people with three random effects each: 36 latents."""
    logs = CENTER.double() + torch.tensor([0.5, 0.2, 0.2]) * noise(81, PEOPLE, 3)
    data = (_log_concentration(logs) + 0.15 * noise(82, PEOPLE, len(TIMES))).float()

    def model(y: Tensor) -> None:
        center = pyro.sample("center", dist.Normal(torch.tensor([0.0, -2.0, 3.0]), 1.0).to_event(1))
        spread = pyro.sample("spread", dist.HalfNormal(0.5 * torch.ones(3)).to_event(1))
        with pyro.plate("people", PEOPLE):
            logs = pyro.sample("logs", dist.Normal(center, spread).to_event(1))
            pyro.sample("y", dist.Normal(_log_concentration(logs), 0.15).to_event(1), obs=y)

    moments = {name: (torch.tensor(mean), torch.tensor(sd)) for name, (mean, sd) in KINETICS.items()}
    return FitTarget(model, (data,), moments)


def _curve(weights: Tensor, x: Tensor) -> Tensor:
    """Return the values (..., num) of a network of one layer of five: weights (..., 1, 16), x (num,)."""
    slope, shift, factor = weights[..., :15].unflatten(-1, (3, 5)).unbind(-2)
    hidden = (slope * x.unsqueeze(-1) + shift).tanh()
    return (hidden * factor).sum(-1) + weights[..., 15]


def network() -> FitTarget:
    """A Bayesian network of 16 weights, of which 3,840 arrangements are the same curve."""
    x = torch.cat([torch.linspace(-2.5, -0.8, 12), torch.linspace(0.6, 2.5, 13)])
    data = (x.sin() + 0.2 * noise(83, 25)).float()

    def model(x: Tensor, y: Tensor) -> None:
        weights = pyro.sample("weights", dist.Normal(torch.zeros(16), 1.5).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(_curve(weights, x), 0.2), obs=y)

    def above(at: str) -> Callable[[dict[str, Tensor]], Tensor]:
        place = torch.tensor([float(at)])
        return lambda draws: _curve(draws["weights"].unsqueeze(-2), place).squeeze(-1) > place.sin()

    return FitTarget(model, (x, data), {}, None, dict(NETWORK), {at: above(at) for at in NETWORK})


def draw(target: FitTarget, num_samples: int) -> dict[str, Tensor]:
    """Return draws of NUTS, from four chains one after the other."""
    chains = []
    for seed in range(4):
        pyro.set_rng_seed(seed)
        mcmc = MCMC(NUTS(target.model, jit_compile=True, ignore_jit_warnings=True), num_samples, 500)
        mcmc.run(*target.args)
        chains.append(mcmc.get_samples())
    return {name: torch.stack([chain[name] for chain in chains]) for name in chains[0]}


def main() -> None:
    """Run NUTS on each model, and print what is written above."""
    torch.set_num_threads(1)
    target = kinetics()
    draws = draw(target, 1500)
    for name in KINETICS:
        means, sds = draws[name].mean(1), draws[name].flatten(0, 1).std(0)
        print(name, means.mean(0).tolist(), sds.tolist(), "chains differ by", means.std(0) / sds)
    target = network()
    draws = draw(target, 1500)
    for at, event in target.events.items():
        shares = torch.stack([event({"weights": chain}).double().mean() for chain in draws["weights"]])
        print(at, float(shares.mean()), "chains", shares.tolist())


if __name__ == "__main__":
    main()
