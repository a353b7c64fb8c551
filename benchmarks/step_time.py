"""Time of one optimizer step, ours and the same flow from Pyro's parts, side by side.

    OMP_NUM_THREADS=1 python benchmarks/step_time.py [--quick] [--json FILE]

Every row is one model (a normal density), one flow, one number of particles. The drivers take
turns of six steps, so that both see the same machine; the figures are medians.

* ours: `AdaAnnSVI` with `AutoPlanar` or `AutoRealNVP`, annealing, log factors recycled;
* mixed: the same with `TraceMixedKL_ELBO(0.5)` in place of `Trace_ELBO`, as a multiple of ours;
* natural: the same with `NaturalStep()` and its 500 particles, whatever the row has, as a multiple
  of ours; in the rows with a target alone;
* stock: `pyro.infer.SVI` with `AutoNormalizingFlow` of `planar` layers, or of `AffineCoupling` layers
  with `permute` between them and the same networks, one for the scale and one for the shift.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_transform import ComposeTransformModule
from pyro.distributions.transforms import AffineCoupling, permute, planar
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoNormalizingFlow
from pyro.nn import DenseNN

from pyro_adaann import AdaAnnSVI, AutoPlanar, AutoRealNVP, NaturalStep, TraceMixedKL_ELBO

#: Steps that one driver takes before the other's turn.
STEPS_PER_TURN = 6
#: (flow, layers, hidden width, latents, particles): those with a target first, then the grid.
TARGETS = [
    ("planar", 250, 0, 3, 100),
    ("planar", 50, 0, 1, 100),
    ("planar", 250, 0, 3, 1000),
    ("realnvp", 12, 100, 3, 100),
]
GRID = [
    *product(["planar"], [10, 50, 250], [0], [1, 3, 20], [100, 1000]),
    *product(["realnvp"], [6, 12], [10, 100], [3, 20], [100, 1000]),
]


def make_model(latent_dim: int) -> Callable[[], None]:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(latent_dim), 10.0).to_event(1).mask(False))
        pyro.factor("log_density", -(z**2).sum(-1))

    return model


class ScaleAndShift(torch.nn.Module):
    """The two networks of a coupling layer, as `AffineCoupling` wants them."""

    def __init__(self, in_dim: int, out_dim: int, width: int) -> None:
        super().__init__()
        self.shift = DenseNN(in_dim, [width, width], [out_dim])
        self.log_scale = DenseNN(in_dim, [width, width], [out_dim])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.shift(x), torch.tanh(self.log_scale(x))


def stock_guide(model: Callable[[], None], flow: str, num_transforms: int, width: int) -> AutoNormalizingFlow:
    def make(dim: int) -> ComposeTransformModule:
        if flow == "planar":
            return ComposeTransformModule([planar(dim) for _ in range(num_transforms)])
        layers = []
        split = dim // 2
        for _ in range(num_transforms):
            networks = ScaleAndShift(split, dim - split, width)
            layers += [AffineCoupling(split, networks), permute(dim, torch.arange(dim).flip(0))]
        return ComposeTransformModule(layers[:-1])

    return AutoNormalizingFlow(model, make)


def our_guide(model: Callable[[], None], flow: str, num_transforms: int, width: int) -> AutoGuide:
    if flow == "planar":
        return AutoPlanar(model, num_transforms, base_loc=0.0)
    return AutoRealNVP(model, num_transforms, [width, width], base_loc=0.0)


def median_times(drivers: list[SVI], num_turns: int) -> list[float]:
    """Return the median time of a step of each driver, in milliseconds."""
    times: list[list[float]] = [[] for _ in drivers]
    for turn in range(num_turns + 1):
        for driver, record in zip(drivers, times, strict=True):
            for step in range(STEPS_PER_TURN):
                start = time.perf_counter()
                driver.step()
                # The first turn is for set-up, the first step of a turn for the caches.
                if turn and step:
                    record.append(1000 * (time.perf_counter() - start))
    return [statistics.median(record) for record in times]


def measure(
    flow: str, num_transforms: int, width: int, dim: int, num_particles: int, num_turns: int
) -> dict[str, object]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model = make_model(dim)

    def elbo() -> Trace_ELBO:
        return Trace_ELBO(num_particles=num_particles, vectorize_particles=True)

    def adam() -> pyro.optim.PyroOptim:
        return pyro.optim.Adam({"lr": 0.0005})

    def another_guide(name: str) -> AutoGuide:
        guide = our_guide(model, flow, num_transforms, width)
        # A class of its own, since the parameters in Pyro's store go by its name.
        guide.__class__ = type(f"{name}{type(guide).__name__}", (type(guide),), {})
        guide._pyro_name = type(guide).__name__
        return guide

    ours = AdaAnnSVI(model, our_guide(model, flow, num_transforms, width), adam(), elbo())
    stock = SVI(model, stock_guide(model, flow, num_transforms, width), adam(), elbo())
    mixed_loss = TraceMixedKL_ELBO(0.5, num_particles=num_particles)
    mixed = AdaAnnSVI(model, another_guide("Mixed"), adam(), mixed_loss)
    drivers = [ours, stock, mixed]
    if (flow, num_transforms, width, dim, num_particles) in TARGETS:
        drivers.append(AdaAnnSVI(model, another_guide("Natural"), NaturalStep()))
    our_time, stock_time, mixed_time, *natural_time = median_times(drivers, num_turns)
    return {
        "flow": flow,
        "layers": num_transforms,
        "hidden": width,
        "latents": dim,
        "particles": num_particles,
        "ours_ms": round(our_time, 3),
        "stock_ms": round(stock_time, 3),
        "ratio": round(stock_time / our_time, 2),
        "mixed": round(mixed_time / our_time, 2),
        "natural": [round(t / our_time, 2) for t in natural_time],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the rows with a target, few turns")
    parser.add_argument("--json", type=Path, default=None, help="where to write the rows")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("flow     layers hidden latents particles   ours ms  stock ms   ratio   mixed  natural")
    for case in TARGETS if args.quick else [*TARGETS, *(c for c in GRID if c not in TARGETS)]:
        row = measure(*case, num_turns=4 if args.quick else 8)
        rows.append(row)
        print(
            "{flow:8} {layers:6} {hidden:6} {latents:7} {particles:9} {ours_ms:9.2f} "
            "{stock_ms:9.2f} {ratio:7.1f} {mixed:7.2f}  {natural}".format(**row),
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
