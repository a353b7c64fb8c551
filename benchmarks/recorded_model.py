"""How much of a step is Pyro's plumbing: steps with `record_model` against steps without, in one process.

    python benchmarks/recorded_model.py

Both fits take turns of six steps with the same random numbers, so that both see the same machine. Printed are
medians in milliseconds of the processor, their ratio, and the largest difference of the losses.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO

from pyro_adaann import AdaAnnSVI, AutoPlanar, AutoSpline, ConstantSchedule, NaturalStep

NUM_DRAWS, NUM_TURNS, STEPS_A_TURN = 200, 20, 6
GAINS = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
COLUMNS = torch.randn(30, 12, generator=torch.Generator().manual_seed(0))
ERRORS = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])


def one_vector() -> None:
    """One latent site and one observed one."""
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=torch.tensor(1.0))


def eight_schools() -> None:
    """Three latent sites and one observed one."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, ERRORS), obs=GAINS)


def site_by_site() -> None:
    """A regression whose coefficients are sites of their own: fifteen latent ones."""
    total = pyro.sample("offset", dist.Normal(0.0, 5.0))
    for i, column in enumerate(COLUMNS.unbind(1)):
        total = total + pyro.sample(f"slope_{i}", dist.Normal(0.0, 2.0)) * column
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    freedom = pyro.sample("freedom", dist.Gamma(2.0, 0.1))
    with pyro.plate("data", len(COLUMNS)):
        pyro.sample("y", dist.StudentT(freedom, total, scale), obs=COLUMNS.sum(1))


def adam() -> tuple[Any, ...]:
    elbo = Trace_ELBO(num_particles=NUM_DRAWS, vectorize_particles=True, max_plate_nesting=1)
    return pyro.optim.Adam({"lr": 0.001}), elbo


def natural() -> tuple[Any, ...]:
    return (NaturalStep(NUM_DRAWS, max_plate_nesting=1),)


class Side:
    """A fit with parameters and random numbers of its own."""

    def __init__(
        self, model: Callable[..., Any], guide: Callable[..., Any], parts: tuple[Any, ...], record: bool
    ) -> None:
        pyro.set_rng_seed(0)
        self.svi = AdaAnnSVI(
            model, guide(model), *parts, schedule=ConstantSchedule(0.5), path="bridge", record_model=record
        )
        self.times: list[float] = []
        self.losses: list[float] = []
        self._random = torch.get_rng_state()

    def take_turn(self) -> None:
        """Take a turn of steps."""
        torch.set_rng_state(self._random)
        for _ in range(STEPS_A_TURN):
            start = time.process_time()
            self.losses.append(self.svi.step())
            self.times.append(1000 * (time.process_time() - start))
        self._random = torch.get_rng_state()

    def median(self) -> float:
        return statistics.median(self.times[2 * STEPS_A_TURN :])


def main() -> int:
    torch.set_num_threads(1)
    pyro.settings.set(module_local_params=True)  # for two fits side by side
    print("| model | step | run, ms | recorded, ms | ratio | losses differ by |\n|---|---|---|---|---|---|")
    for model in (one_vector, eight_schools, site_by_site):
        for name, guide, parts in (
            ("planar 16, Adam", lambda model: AutoPlanar(model, 16), adam),
            ("spline, natural", AutoSpline, natural),
        ):
            sides = [Side(model, guide, parts(), record) for record in (False, True)]
            for _ in range(NUM_TURNS):
                for side in sides:
                    side.take_turn()
            run, recorded = (side.median() for side in sides)
            apart = max(abs(a - b) for a, b in zip(*(side.losses for side in sides), strict=True))
            print(
                f"| {model.__name__} | {name} | {run:.1f} | {recorded:.1f} | {run / recorded:.2f} "
                f"| {apart:.1g} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
