"""How often is the verdict wrong? Quick fits, good and bad, of densities that are known exactly.

``verdict``: four densities in 2, 8 and 32 dimensions, each fitted by a flow, by the same flow from a base
that is too narrow, by the same with next to no steps, and by a normal guide. A fit is right if its weighted
means are within .1 sd and its sds within 10 %. Right ones that are not usable by their verdict are false
alarms, wrong ones that are usable are misses.

``reach``: six densities, each fitted from a base that is much too narrow and from a wide one. A fit that
lacks 2 % of the evidence and more should have an alarm, one that lacks less than half a percent should not.

One line a fit, kept in a file, so that a run goes on where it ended::

    python benchmarks/verdicts.py              # all that the file does not have yet
    python benchmarks/verdicts.py --table      # the tables of the file, also for docs/diagnostics.md
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from fit_models import MAX_MEAN_ERROR, MAX_SD_ERROR
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal

from pyro_adaann import (
    AutoPlanar,
    CESSSchedule,
    Diagnosis,
    diagnose,
    importance_draws,
    natural_svi,
)
from pyro_adaann.diagnostics.rules import Level

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "verdicts.jsonl"
FIGURES = ROOT / "docs" / "figures"
NUM_SAMPLES = 5000

# --- densities, all with evidence 1; their means and sds in z ---------------------------------------------


Density = tuple[Callable[[], None], torch.Tensor, torch.Tensor]


def flat(dim: int, log_density: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
    """Return a model of nothing but a density."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1).mask(False))
        pyro.factor("density", log_density(z))

    return model


def normal(dim: int) -> Density:
    """Correlations of .6."""
    density = dist.MultivariateNormal(torch.zeros(dim), 0.4 * torch.eye(dim) + 0.6)
    return flat(dim, density.log_prob), torch.zeros(dim), torch.ones(dim)


def modes(dim: int) -> Density:
    """Weights of .3 and .7, six sds apart."""
    locs = torch.zeros(2, dim)
    locs[:, 0] = torch.tensor([-3.0, 3.0])
    parts = dist.Normal(locs, torch.ones(2, dim)).to_event(1)
    density = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), parts)
    mean, sd = torch.zeros(dim), torch.ones(dim)
    mean[0], sd[0] = 1.2, math.sqrt(1 + 9 * (1 - 0.16))
    return flat(dim, density.log_prob), mean, sd


def tails(dim: int) -> Density:
    """Student's t with five degrees of freedom in every coordinate."""
    density = dist.StudentT(5.0 * torch.ones(dim)).to_event(1)
    return flat(dim, density.log_prob), torch.zeros(dim), torch.full((dim,), math.sqrt(5 / 3))


def funnel(dim: int) -> Density:
    """Its first coordinate is the log variance of the others."""

    def log_density(z: torch.Tensor) -> torch.Tensor:
        v, x = z[..., :1], z[..., 1:]
        rest = dist.Normal(0.0, (v / 2).exp(), validate_args=False).log_prob(x).sum(-1)
        return rest + dist.Normal(0.0, 1.5).log_prob(v[..., 0])

    sd = torch.full((dim,), math.exp(1.5**2 / 4))
    sd[0] = 1.5
    return flat(dim, log_density), torch.zeros(dim), sd


DENSITIES = {make.__name__: make for make in (normal, modes, tails, funnel)}

# --- the verdict ---------------------------------------------------------------------------------------


def by_flow(model: Callable[[], Any], dim: int, base_scale: float = 3.0, **kwargs: Any) -> Any:
    """Fit a small flow by natural steps."""
    guide = AutoPlanar(model, 16, base_loc=0.0, base_scale=base_scale)
    svi = natural_svi(model, guide, num_particles=200, **{"num_final_steps": 15, **kwargs})
    svi.run(progress_bar=False)
    return svi


def by_normal(model: Callable[[], Any], dim: int) -> Any:
    """Fit a normal guide by Adam."""
    loss = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, AutoMultivariateNormal(model, init_scale=0.5), pyro.optim.Adam({"lr": 0.03}), loss)
    for _ in range(400):
        svi.step()
    return svi


WAYS: dict[str, Callable[[Callable[[], Any], int], Any]] = {
    "flow": by_flow,
    "narrow base": lambda model, dim: by_flow(model, dim, 0.4),
    "few steps": lambda model, dim: by_flow(model, dim, schedule=CESSSchedule(0.2), num_final_steps=1),
    "normal": by_normal,
}


def look(svi: Any) -> tuple[Diagnosis, dict[str, Any]]:
    """Diagnose a fit; return the diagnosis and what of it is kept."""
    d = diagnose(svi, num_samples=NUM_SAMPLES)
    reach = d.reach
    assert reach is not None
    lost = -math.expm1(d.log_evidence)
    return d, {
        "verdict": d.level.headline,
        "usable": d.level <= Level.USABLE_WITH_WEIGHTS,
        "k_hat": d.k_hat,
        "ess": d.ess / d.num_samples,
        "lost": lost,
        "short": reach.is_short,
        "beyond": reach.share,
        "effect": reach.effect,
        "known": reach.is_known,
    }


def run_verdict(name: str, dim: int, way: str, seed: int) -> dict[str, Any]:
    """Fit a density in one way, and compare the verdict with what is true."""
    model, mean, sd = DENSITIES[name](dim)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    svi = WAYS[way](model, dim)
    _, found = look(svi)
    draws = importance_draws(svi, num_samples=NUM_SAMPLES)
    values, weights = draws.samples["z"].double(), draws.log_weights.double().softmax(0)
    own_mean = weights @ values
    own_sd = (weights @ (values - own_mean).square()).sqrt()
    mean_error = float(((own_mean - mean).abs() / sd).max())
    sd_error = float((own_sd / sd - 1).abs().max())
    is_right = mean_error <= MAX_MEAN_ERROR and sd_error <= MAX_SD_ERROR
    return {**found, "mean": mean_error, "sd": sd_error, "right": is_right}


# --- reach ---------------------------------------------------------------------------------------------


def scales() -> None:
    pyro.sample("z", dist.Normal(torch.zeros(2), torch.tensor([0.1, 10.0])).to_event(1))


def rosenbrock() -> None:
    x = pyro.sample("x", dist.Normal(1.0, math.sqrt(10.0)))
    pyro.sample("y", dist.Normal(x**2, math.sqrt(0.1)))


def student() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(False))
    pyro.factor("density", dist.StudentT(3.0, 0.0, 3.0).log_prob(z))


def skewed() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(False))
    gamma = dist.Gamma(1.0, 0.1, validate_args=False)
    pyro.factor("density", gamma.log_prob(z.clamp(min=1e-6)) - 50 * (-z).clamp(min=0.0))


#: Density, narrow and wide base, layers of the planar guide of each.
REACH: dict[str, tuple[Callable[[], Any], tuple[float, int], tuple[float, int]]] = {
    "scales": (scales, (0.5, 4), (5.0, 30)),
    "funnel": (DENSITIES["funnel"](2)[0], (0.4, 4), (4.0, 30)),
    "rosenbrock": (rosenbrock, (2.0, 4), (8.0, 30)),
    "student": (student, (0.5, 4), (10.0, 30)),
    "skewed": (skewed, (2.0, 4), (20.0, 30)),
    "ten tails": (DENSITIES["tails"](10)[0], (0.3, 4), (2.0, 30)),
}


def run_reach(name: str, base: str, seed: int) -> dict[str, Any]:
    """Fit from a narrow or a wide base, and keep what the fit lacks and whether there is an alarm."""
    model, narrow, wide = REACH[name]
    base_scale, num_transforms = narrow if base == "narrow" else wide
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    # An affine layer would make up for any width.
    affine: Any = None if base == "narrow" else "auto"
    guide = AutoPlanar(model, num_transforms, base_loc=0.0, base_scale=base_scale, affine=affine)
    svi = natural_svi(model, guide, num_particles=300, ladder=None)
    svi.run(progress_bar=False)
    return look(svi)[1]


# --- all of them ---------------------------------------------------------------------------------------

Key = tuple[Any, ...]
STUDIES: dict[str, Callable[..., dict[str, Any]]] = {"reach": run_reach, "verdict": run_verdict}


def keys() -> list[Key]:
    """Return the study and the arguments of every fit, the quick ones first."""
    found: list[Key] = []
    for seed in range(5):
        found += [("reach", *key, seed) for key in itertools.product(REACH, ("narrow", "wide"))]
        found += [("verdict", *key, seed) for key in itertools.product(DENSITIES, (2, 8), WAYS)]
    large = [("verdict", *key) for key in itertools.product(DENSITIES, (32,), WAYS, range(5))]
    return found + sorted(large, key=lambda key: key[-1])


def verdict_table(rows: list[dict[str, Any]]) -> str:
    """Return how often the verdict is wrong, by way of fitting."""
    lines = ["| fit | right | of these false alarms | wrong | of these missed |", "|---|---|---|---|---|"]
    for way in [*WAYS, "all"]:
        own = [row for row in rows if way in ("all", row["key"][3])]
        count = Counter((row["right"], row["usable"]) for row in own)
        right, wrong = count[True, True] + count[True, False], count[False, True] + count[False, False]
        lines.append(f"| {way} | {right} | {count[True, False]} | {wrong} | {count[False, True]} |")
    return "\n".join(lines)


def reach_table(rows: list[dict[str, Any]]) -> str:
    """Return how often there is an alarm for fits that lack a part and for those that do not."""
    lines = [
        "| density | lacks 2 % or more | alarm of reach | not usable | lacks < .5 % | alarm of reach |",
        "|---|---|---|---|---|---|",
    ]
    for name in [*REACH, "all"]:
        own = [row for row in rows if name in ("all", row["key"][1])]
        short = [row for row in own if row["lost"] >= 0.02]
        whole = [row for row in own if row["lost"] < 0.005]
        seen = sum(row["short"] or not row["known"] for row in short)
        unusable = sum(not row["usable"] for row in short)
        false = sum(row["short"] or not row["known"] for row in whole)
        lines.append(f"| {name} | {len(short)} | {seen} | {unusable} | {len(whole)} | {false} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run what the file does not have, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="run nothing, write the tables of the page")
    parser.add_argument("--max-fits", type=int, default=None, help="stop after so many")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    done = {tuple(row["key"]) for row in rows}
    todo = [] if args.table else [key for key in keys() if key not in done][: args.max_fits]
    for key in todo:
        study, *arguments_of_fit = key
        rows.append({"key": key, **STUDIES[study](*arguments_of_fit)})
        with args.out.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    for study, table in (("verdict", verdict_table), ("reach", reach_table)):
        text = table([row for row in rows if row["key"][0] == study])
        print(text, end="\n\n")
        if args.table:
            (FIGURES / f"verdicts_{study}.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
