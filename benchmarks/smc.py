"""Sequential Monte Carlo on posteriors whose evidence is known: errors beside those it states, and its cost.

Three schedules at about equal numbers of evaluations: AdaAnn's rule with its default tolerance, CESS at 0.9,
and as many equal increments as AdaAnn has made. Run it with::

    OMP_NUM_THREADS=1 python benchmarks/smc.py --seeds 5 --json benchmarks/results/smc.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_adaann import AdaAnnSchedule, AnnealedSMC, CESSSchedule, LinearSchedule, SMCResult

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
import hiv  # noqa: E402  (the examples are no package)
import lorenz  # noqa: E402

REFERENCE = ROOT / "benchmarks" / "reference"


@dataclass(frozen=True)
class Problem:
    """A posterior with known evidence.

    :param model: the Pyro model.
    :param log_evidence: its log evidence.
    :param check: one number of the posterior, and what it is exactly.
    :param base: what the bridge starts from; None for the prior, on path "likelihood".
    """

    model: Callable[..., Any]
    log_evidence: float
    check: tuple[str, Callable[[SMCResult], float], float]
    base: Any = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def log_integral(log_density: Callable[[Tensor], Tensor], low: float, high: float) -> float:
    z = torch.linspace(low, high, 200_001, dtype=torch.float64)
    return float(log_density(z).logsumexp(0)) + math.log(float(z[1] - z[0]))


def flat(dim: int) -> Any:
    return dist.Normal(torch.zeros(dim), 1.0).to_event(1).mask(False)


def share(result: SMCResult, is_in: Callable[[dict[str, Tensor]], Tensor]) -> float:
    return float(result.log_weights.exp()[is_in(result.samples)].sum())


def funnel() -> None:
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(torch.zeros(9), (v / 2).exp().unsqueeze(-1)).to_event(1))


def log_well(x: Tensor) -> Tensor:
    return -(x**4) + 6 * x**2 + x / 2


def many_well() -> None:
    z = pyro.sample("z", flat(32))
    pyro.factor("density", (log_well(z[..., :16]) - z[..., 16:].square() / 2).sum(-1))


def log_bimodal(z: Tensor) -> Tensor:
    return math.log(0.954) - ((z + 2) ** 2 - 3) ** 2


def bimodals() -> None:
    z = pyro.sample("z", flat(20))
    pyro.factor("density", log_bimodal(z).sum(-1))


EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def eight_schools() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, ERRORS), obs=EFFECTS)


def eight_schools_exactly() -> tuple[float, float]:
    """Return log evidence and the mean of log tau, by quadrature over mu and log tau."""
    mu = torch.linspace(-40.0, 40.0, 801, dtype=torch.float64).reshape(-1, 1, 1)
    log_tau = torch.linspace(-12.0, 9.0, 2101, dtype=torch.float64).reshape(1, -1, 1)
    tau = log_tau.exp()
    sd = (tau**2 + ERRORS**2).sqrt()
    log_p = dist.Normal(mu, sd).log_prob(EFFECTS).sum(-1)
    log_p = log_p + dist.Normal(0.0, 5.0).log_prob(mu[..., 0])
    log_p = log_p + (dist.HalfCauchy(5.0).log_prob(tau) + log_tau)[..., 0]
    weights = log_p.flatten().softmax(0).reshape(log_p.shape)
    log_evidence = float(log_p.logsumexp((0, 1))) + math.log(0.1 * 0.01)
    return log_evidence, float((weights * log_tau[..., 0]).sum())


def reference(name: str) -> dict[str, Any]:
    posteriors: dict[str, Any] = json.loads((REFERENCE / f"{name}.json").read_text())["posteriors"]
    return posteriors


def problems() -> dict[str, Problem]:
    schools = eight_schools_exactly()
    hiv_modes = reference("hiv").values()
    lorenz_mode = reference("lorenz")["0.2"]
    right = log_integral(lambda z: torch.where(z > 0, log_well(z), -torch.inf), -4, 4)
    well = log_integral(log_well, -4.0, 4.0)
    gaussian = 0.5 * math.log(2 * math.pi)
    wide = dist.Normal(torch.zeros(10), torch.tensor([3.0] + [10.0] * 9)).to_event(1)
    return {
        "HIV": Problem(
            hiv.model,
            math.log(sum(math.exp(mode["log_evidence"] - 80) for mode in hiv_modes)) + 80,
            ("share p1 > 0", lambda r: share(r, lambda s: s["p1"] > 0), 0.5),
            dist.Normal(0.0, 2.0),
            (hiv.simulate(hiv.DATA_SEED).float(),),
        ),
        "Lorenz 0.2": Problem(
            lorenz.model,
            lorenz_mode["log_evidence"],
            ("mean r", lambda r: float(r.mean("r")), lorenz_mode["mean"][lorenz_mode["names"].index("r")]),
            dist.Normal(10.0, 4.0),
            (lorenz.simulate(0.2, lorenz.DATA_SEED).float(), 0.2),
        ),
        "eight schools, centered": Problem(
            eight_schools,
            schools[0],
            (
                "mean log tau",
                lambda r: float(r.log_weights.exp() @ r.samples["tau"].log().double()),
                schools[1],
            ),
        ),
        "funnel, 10-D": Problem(funnel, 0.0, ("sd v", lambda r: float(r.sd("v")), 3.0), wide),
        "many-well, 32-D": Problem(
            many_well,
            16 * (well + gaussian),
            (
                "share right",
                lambda r: float(
                    r.log_weights.exp() @ (r.samples["z"][:, :16] > 0).double().mean(-1)
                ),
                math.exp(right - well),
            ),
            dist.Normal(0.0, 2.0),
        ),
        "20 bimodals": Problem(
            bimodals,
            20 * log_integral(log_bimodal, -10.0, 6.0),
            (
                "share right",
                lambda r: float(r.log_weights.exp() @ (r.samples["z"] > -2).double().mean(-1)),
                0.5,
            ),
            dist.Normal(-2.0, 2.0),
        ),
    }  # fmt: skip


def run(problem: Problem, schedule: Any, seed: int, num_particles: int) -> dict[str, Any]:
    path = "likelihood" if problem.base is None else "bridge"
    smc = AnnealedSMC(
        problem.model, path=path, base=problem.base, schedule=schedule, num_particles=num_particles, seed=seed
    )
    start = time.perf_counter()
    result = smc.run(*problem.args, progress_bar=False, **problem.kwargs)
    label, number, exact = problem.check
    return {
        "seed": seed,
        "error": result.log_evidence - problem.log_evidence,
        "stated": result.log_evidence_error,
        "ess": result.ess,
        "num_stages": len(result.stages),
        "num_unforgotten": result.num_unforgotten,
        "num_evaluations": result.num_evaluations,
        "seconds": time.perf_counter() - start,
        "check": label,
        "got": number(result),
        "exact": exact,
    }


def mean(records: list[dict[str, Any]], key: str) -> float:
    return sum(record[key] for record in records) / len(records)


def row(name: str, schedule: str, records: list[dict[str, Any]]) -> str:
    rms = math.sqrt(sum(record["error"] ** 2 for record in records) / len(records))
    hits = sum(abs(record["error"]) < 2 * record["stated"] for record in records)
    spread = math.sqrt(sum((r["got"] - r["exact"]) ** 2 for r in records) / len(records))
    return (
        f"| {name} | {schedule} | {mean(records, 'error'):+.3f} | {rms:.3f} | "
        f"{mean(records, 'stated'):.3f} | {hits}/{len(records)} | "
        f"{records[0]['check']} {records[0]['exact']:.3f} +- {spread:.3f} | "
        f"{mean(records, 'num_stages'):.0f} | {mean(records, 'num_unforgotten'):.1f} | "
        f"{mean(records, 'num_evaluations') / 1e3:,.0f} | {mean(records, 'seconds'):.1f} |"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--problems", nargs="+", choices=list(problems()), default=list(problems()))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--num-particles", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    print(
        "| problem | schedule | mean error | rms error | stated | within 2 | a number, exact +- rms error | ",
        end="",
    )
    print("stages | not forgotten | evaluations / 1000 | seconds |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    results: dict[str, Any] = {}
    for name, problem in problems().items():
        if name not in args.problems:
            continue
        num_stages = 2
        for schedule in ("AdaAnn", "CESS", "linear"):
            kinds = {"AdaAnn": AdaAnnSchedule(0.32), "CESS": CESSSchedule(0.9)}
            linear = LinearSchedule(num_stages - 1, initial_inverse_temperature=1 / num_stages)
            kind = kinds.get(schedule, linear)
            records = [run(problem, kind, seed, args.num_particles) for seed in range(args.seeds)]
            if schedule == "AdaAnn":
                num_stages = round(mean(records, "num_stages"))
            results[f"{name}, {schedule}"] = records
            print(row(name, schedule, records), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
