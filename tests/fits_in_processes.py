"""Short fits that a group of processes makes, to be compared with those of one process.

    python tests/fits_in_processes.py FOLDER INDEX COUNT [FIT ...]

runs as process INDEX of COUNT, which meet in the folder, and writes there what each fit has given.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, distributed

from pyro_adaann import (
    AdaAnnSchedule,
    AdaAnnSVI,
    AnnealedSMC,
    AutoPlanar,
    AutoSpline,
    ESSStageRule,
    Ladder,
    NaturalStep,
    TraceMixedKL_ELBO,
    diagnose,
    importance_draws,
)
from pyro_adaann.processes import shares
from pyro_adaann.steps import scores

#: Not a multiple of two or four: the shares differ.
NUM_PARTICLES = 41
NUM_STEPS = 50
X = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64)
Y = 2 * X + 0.3


def double(*values: float) -> Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)


def regression() -> None:
    """A prior that depends on another site, a positive site, a plate, and a factor."""
    scale = pyro.sample("scale", dist.HalfCauchy(double(1.0)))
    a = pyro.sample("a", dist.Normal(double(0.0), 3.0))
    b = pyro.sample("b", dist.Normal(a, 1.0))
    with pyro.plate("rows", len(X), dim=-1):
        pyro.sample("y", dist.Normal(a + b.abs() * X, scale + 0.1), obs=Y)
    pyro.factor("near", -((a - b) ** 2) / 500)


def unusual() -> None:
    """A mask that depends on the draws, a value that does, a factor, a scale, and a deterministic site."""
    a = pyro.sample("a", dist.Normal(double(0.0), 3.0))
    b = pyro.sample("b", dist.Gamma(2.0, 1 + a.abs()))
    pyro.deterministic("sum", a + b)
    with poutine.mask(mask=a > 0):
        pyro.sample("y", dist.Normal(b, 0.5), obs=double(1.0))
    with poutine.scale(scale=2.0):
        pyro.sample("zero", dist.Normal(double(0.0), 1.0), obs=a - b)
    pyro.factor("bound", -b.square())


def bounded() -> None:
    """Bounds that depend on the draws."""
    a = pyro.sample("a", dist.Normal(double(0.0), 3.0))
    b = pyro.sample("b", dist.Uniform(a - 1, a + 2))
    pyro.sample("y", dist.Normal(b, 0.5), obs=double(1.0))


def bounded_guide() -> None:
    """It draws constrained values, so the Jacobian is added to the model."""
    a = pyro.sample("a", dist.Normal(pyro.param("a_loc", double(0.0)), 1.0))
    free = dist.Normal(pyro.param("b_loc", double(0.0)).expand(a.shape), 1.0)
    moves = [dist.transforms.SigmoidTransform(), dist.transforms.AffineTransform(a - 1, 3.0)]
    pyro.sample("b", dist.TransformedDistribution(free, moves))


def learned() -> None:
    """A model with parameters of its own, one of them positive."""
    loc = pyro.param("loc", double(0.5))
    scale = pyro.param("scale", double(1.5), constraint=dist.constraints.positive)
    z = pyro.sample("z", dist.Normal(loc, 1.0))
    with pyro.plate("rows", len(X), dim=-1):
        pyro.sample("y", dist.Normal(loc * z * X, scale), obs=Y)


def mixture() -> None:
    locs = pyro.sample("locs", dist.Normal(double(0.0), 3.0).expand([2]).to_event(1))
    with pyro.plate("rows", len(X), dim=-1):
        k = pyro.sample("k", dist.Categorical(double(0.3, 0.7)), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(torch.where(k == 0, locs[..., 0], locs[..., 1]), 1.0), obs=Y)


def often_broken() -> None:
    """Torch refuses the parameters of some draws: those of one process may be good while others are not."""
    z = pyro.sample("z", dist.Normal(double(0.0), 2.0))
    pyro.sample("y", dist.Normal(torch.where(z > 1.5, torch.nan, z), 1.0), obs=double(1.0))


def often_rounded() -> None:
    """Torch refuses the rate of some draws: e to the power of -800 is 0."""
    rate = pyro.sample("rate", dist.LogNormal(double(0.0), 1.0))
    pyro.sample("y", dist.Exponential(rate), obs=double(1.0))


def anneal(
    model: Callable[[], None], guide: Any, *step: Any, **kwargs: Any
) -> tuple[AdaAnnSVI, dict[str, Any]]:
    settings: dict[str, Any] = {
        "schedule": AdaAnnSchedule(0.5, initial_inverse_temperature=0.2),
        "num_initial_steps": 5,
        "num_steps_per_stage": 2,
        "num_final_steps": 15,
        **kwargs,
    }
    svi = AdaAnnSVI(model, guide, *step, **settings)
    for _ in range(NUM_STEPS):
        svi.step()
    history = svi.history
    return svi, {
        "losses": torch.tensor([loss for stage in history.stages for loss in stage.losses]),
        "inverse temperatures": torch.tensor([stage.inverse_temperature for stage in history.stages]),
        "parameters": torch.cat([p.detach().reshape(-1) for p in svi._fit.parameters.tensors.values()]),
        "broken": torch.tensor([float(stage.num_broken) for stage in history.stages]),
    }


def adam() -> Any:
    return pyro.optim.Adam({"lr": 0.01})


def elbo(kind: Any = Trace_ELBO) -> Any:
    return kind(num_particles=NUM_PARTICLES, vectorize_particles=True)


def with_weights(svi: AdaAnnSVI, found: dict[str, Any]) -> dict[str, Any]:
    """Add the weights of draws and what the ladder says."""
    diagnosis = diagnose(svi, num_samples=101, batch_size=60)
    assert diagnosis.ladder is not None
    found["log weights"] = importance_draws(svi, num_samples=101, batch_size=60).log_weights
    found["evidence"] = torch.tensor([diagnosis.log_evidence, diagnosis.ess, diagnosis.k_hat])
    return found


def planar_adam() -> dict[str, Any]:
    return anneal(regression, AutoPlanar(regression, 16), adam(), elbo())[1]


def spline_adam() -> dict[str, Any]:
    return anneal(regression, AutoSpline(regression, 1, 4, [8, 8]), adam(), elbo())[1]


def planar_mixed() -> dict[str, Any]:
    loss = TraceMixedKL_ELBO(0.9, num_particles=NUM_PARTICLES)
    return anneal(regression, AutoPlanar(regression, 16), adam(), loss)[1]


def planar_natural() -> dict[str, Any]:
    return anneal(regression, AutoPlanar(regression, 16), NaturalStep(NUM_PARTICLES), path="bridge")[1]


def spline_natural() -> dict[str, Any]:
    guide = AutoSpline(regression, 1, 4, [8, 8])
    rule = ESSStageRule(0.3)
    return with_weights(
        *anneal(regression, guide, NaturalStep(NUM_PARTICLES), stage_rule=rule, ladder=Ladder())
    )


def pyro_guide() -> dict[str, Any]:
    return anneal(unusual, AutoNormal(unusual, init_scale=1.0), adam(), elbo())[1]


def jacobian() -> dict[str, Any]:
    return anneal(bounded, bounded_guide, adam(), elbo())[1]


def model_parameters() -> dict[str, Any]:
    return anneal(learned, AutoNormal(learned, init_scale=1.0), adam(), elbo(), path="likelihood")[1]


def enumerated() -> dict[str, Any]:
    guide = AutoNormal(poutine.block(mixture, hide=["k"]), init_scale=1.0)
    return anneal(mixture, guide, adam(), elbo(TraceEnum_ELBO))[1]


def enumerated_natural() -> dict[str, Any]:
    return anneal(mixture, AutoPlanar(poutine.block(mixture, hide=["k"]), 8), NaturalStep(NUM_PARTICLES))[1]


def broken() -> dict[str, Any]:
    return anneal(often_broken, AutoPlanar(often_broken, 4), adam(), elbo())[1]


def broken_natural() -> dict[str, Any]:
    return anneal(often_broken, AutoPlanar(often_broken, 4), NaturalStep(NUM_PARTICLES))[1]


def rounded() -> dict[str, Any]:
    return anneal(often_rounded, AutoPlanar(often_rounded, 4, base_scale=500.0), adam(), elbo())[1]


def rounded_natural() -> dict[str, Any]:
    guide = AutoPlanar(often_rounded, 4, base_scale=500.0)
    return anneal(often_rounded, guide, NaturalStep(NUM_PARTICLES))[1]


def particles() -> dict[str, Any]:
    stages = AnnealedSMC(regression, num_particles=32).run(progress_bar=False).stages
    # Later ones differ by more than rounding: trajectories of Hamiltonian Monte Carlo are chaotic.
    return {"evidence": torch.tensor([stage.log_evidence for stage in stages[:5]])}


FITS: dict[str, Callable[[], dict[str, Any]]] = {
    fit.__name__: fit
    for fit in (
        planar_adam,
        spline_adam,
        planar_mixed,
        planar_natural,
        spline_natural,
        pyro_guide,
        jacobian,
        model_parameters,
        enumerated,
        enumerated_natural,
        broken,
        broken_natural,
        rounded,
        rounded_natural,
        particles,
    )
}


def failing_in_one() -> None:
    z = pyro.sample("z", dist.Normal(double(0.0), 1.0))
    if distributed.is_initialized() and distributed.get_rank() == 1 and z.dim():
        raise KeyError("the solver has failed")


def with_own_noise() -> None:
    z = pyro.sample("z", dist.Normal(double(0.0), 1.0))
    pyro.sample("y", dist.Normal(z + torch.randn(z.shape), 1.0), obs=double(0.0))


def with_own_site() -> None:
    z = pyro.sample("z", dist.Normal(double(0.0), 1.0))
    pyro.sample("w", dist.Normal(z, 1.0))


def seeded_differently() -> None:
    pyro.sample("z", dist.Normal(double(0.0), 1.0))


def error_of(model: Callable[[], None], seed: int = 0) -> str:
    """Return the error of a step, or of draws, of a model."""
    pyro.clear_param_store()
    guide = AutoNormal(poutine.block(model, expose=["z"]))
    pyro.set_rng_seed(seed)
    try:
        if model is seeded_differently:
            importance_draws((model, guide), num_samples=100)
        else:
            AdaAnnSVI(model, guide, adam(), elbo()).step()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


ERRORS = (failing_in_one, with_own_noise, with_own_site, seeded_differently)


def run(names: list[str]) -> dict[str, Any]:
    """Return what fits give, by name."""
    found = {}
    for name in names:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        found[name] = FITS[name]()
    return found


def main(folder: str, index: str, count: str, *names: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=int(index), world_size=int(count)
    )
    shares._MIN_NUMBERS = 0  # also the little work of these fits is divided
    in_shares, divided = scores.in_shares, []
    scores.in_shares = lambda run, *values: divided.append(len(values[0])) or in_shares(run, *values)
    found = run(list(names))
    found["divided"] = sum(divided)
    found["errors"] = {model.__name__: error_of(model, seed=int(index)) for model in ERRORS}
    partial = Path(folder) / f"{index}.tmp"
    torch.save(found, partial)
    os.replace(partial, Path(folder) / f"{index}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
