"""The time of a step on a device, by flow and number of draws; `gpu.py` prints it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from floors import measure_rates, work_of_step
from launches import count_launches, count_waits
from pyro.infer import Trace_ELBO

from pyro_adaann import AdaAnnSVI, AutoPlanar, AutoRealNVP, AutoSpline, ConstantSchedule, NaturalStep

#: No more cells of a row once one has taken this long, in seconds.
MAX_CELL = 15.0
#: (flow, a guide from a model, step by number of draws, numbers of draws), largest last.
Row = tuple[str, Callable[[Any], Any], Callable[[int], tuple[Any, ...]], Sequence[int]]


def make_model(dim: int, device: torch.device) -> Callable[[], None]:
    """Two modes in the first coordinate, the others normal."""
    zero, sd = torch.zeros(dim, device=device), torch.full((dim,), 3.0, device=device)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(zero, sd).to_event(1))
        pyro.factor("log_density", -2 * (z[..., 0].abs() - 2).square() - z[..., 1:].square().sum(-1))

    return model


def adam(*, is_fused: bool = False) -> Any:
    """Return Adam, which updates a parameter by one kernel if it is fused, else by a dozen."""
    return pyro.optim.Adam({"lr": 0.005, "fused": is_fused})


def elbo(num_particles: int) -> Trace_ELBO:
    return Trace_ELBO(num_particles=num_particles, vectorize_particles=True)


def gradient(num_draws: int) -> tuple[Any, ...]:
    return adam(is_fused=True), elbo(num_draws)


def natural(num_draws: int) -> tuple[Any, ...]:
    return (NaturalStep(num_draws),)


def rows(*, is_quick: bool) -> list[Row]:
    if is_quick:
        return [
            ("planar 20", lambda m: AutoPlanar(m, 20), gradient, [100, 1000]),
            ("RealNVP 2 x 10", lambda m: AutoRealNVP(m, 2, [10, 10]), gradient, [100, 1000]),
            ("natural, planar 20", lambda m: AutoPlanar(m, 20), natural, [100]),
        ]
    many = [100, 1000, 10_000, 100_000]
    return [
        ("planar 250", lambda m: AutoPlanar(m, 250), gradient, many),
        ("planar 50", lambda m: AutoPlanar(m, 50), gradient, many),
        ("RealNVP 12 x 100", lambda m: AutoRealNVP(m, 12, [100, 100]), gradient, many),
        ("spline", AutoSpline, gradient, many),
        ("natural, planar 64", lambda m: AutoPlanar(m, 64), natural, [500, 4000]),
        ("natural, planar 250", lambda m: AutoPlanar(m, 250), natural, [500, 4000]),
        ("natural, RealNVP 12 x 100", lambda m: AutoRealNVP(m, 12, [100, 100]), natural, [500, 4000]),
        ("natural, spline", AutoSpline, natural, [500, 4000]),
    ]


def time_steps(device: torch.device, *, is_quick: bool) -> list[dict[str, Any]]:
    """Return a record for every cell of the table, and print it."""
    found = []
    rates = measure_rates(device, is_quick=is_quick)
    print(
        f"\nshown: {rates.single:.1e} operations/s, {rates.double:.1e} in double, {rates.bytes:.1e} bytes/s"
    )
    print(f"{'':49}least ms")
    print(
        f"{'a step':26} {'draws':>8} {'ms':>8} {'arithmetic':>11} {'bytes':>7} {'launches':>9} {'waits':>6}"
    )
    for name, make_guide, make_step, counts in rows(is_quick=is_quick):
        for num_draws in counts:
            start = time.perf_counter()
            svi, cell = time_step(make_guide, make_step(num_draws), device, 5 if is_quick else 25)
            work = work_of_step(svi.guide, num_draws, is_natural=make_step is natural)
            arithmetic, traffic = work.milliseconds(rates)
            cell |= {"least_arithmetic_ms": arithmetic, "least_traffic_ms": traffic}
            found.append({"step": name, "draws": num_draws, **cell})
            waits = "" if cell["waits"] is None else cell["waits"]
            print(
                f"{name:26} {num_draws:8,} {cell['ms']:8.2f} {arithmetic:11.3f} {traffic:7.3f} "
                f"{cell['launches']:9} {waits:>6}",
                flush=True,
            )
            if time.perf_counter() - start > MAX_CELL:
                break
    return found


def time_step(
    make_guide: Callable[[Any], Any], step: tuple[Any, ...], device: torch.device, num_steps: int
) -> tuple[AdaAnnSVI, dict[str, Any]]:
    """Return a fit and the median time of its step in ms, what a step launches and how often it waits."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model = make_model(3, device)
    svi = AdaAnnSVI(model, make_guide(model), *step, schedule=ConstantSchedule(0.5))
    times: list[float] = []
    began = time.perf_counter()
    while (len(times) < num_steps and time.perf_counter() - began < MAX_CELL / 3) or len(times) < 3:
        start = time.perf_counter()
        svi.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - start))
    return svi, {
        "ms": round(statistics.median(times[len(times) // 3 :]), 3),
        "launches": count_launches(svi.step, device),
        "waits": count_waits(svi.step, device),
    }
