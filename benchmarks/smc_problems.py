"""Posteriors whose evidence is known: by closed forms, by quadrature, or by large references."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_adaann import SMCResult
from pyro_adaann.weights.grouped import grouped_mean

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
import hiv  # noqa: E402  (the examples are no package)
import lorenz  # noqa: E402

REFERENCE = ROOT / "benchmarks" / "reference"


@dataclass(frozen=True)
class Check:
    """A number of a posterior, a weighted mean over draws, and what it is exactly.

    :param label: what it is.
    :param values: of every draw, shape ``(n,)`` or ``(n, k)`` for k numbers, of which the worst counts.
    :param exact: what they are exactly.
    :param limit: by how much they may be off; .03 for shares, .05 for means in units of their sds.
    """

    label: str
    values: Callable[[dict[str, Tensor]], Tensor]
    exact: Any
    limit: float

    @property
    def num_errors(self) -> float:
        """By how many stated errors the worst may be off: exceeded in one of twenty right runs, about."""
        return 2.0 if torch.as_tensor(self.exact).numel() == 1 else 3.0

    def of(self, result: SMCResult) -> tuple[float, float]:
        """Return by how much the number of a result is off, and the standard error by its groups."""
        num_groups = len(result.group_log_evidences)
        values = self.values(result.samples).double()
        mean, error = grouped_mean(values, result.log_weights.double().exp(), num_groups)
        off = (mean - torch.as_tensor(self.exact)).reshape(-1)
        worst = int(off.abs().argmax())
        return float(off[worst]), float(error.reshape(-1)[worst])


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
    check: Check
    base: Any = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def log_integral(log_density: Callable[[Tensor], Tensor], low: float, high: float) -> float:
    z = torch.linspace(low, high, 200_001, dtype=torch.float64)
    return float(log_density(z).logsumexp(0)) + math.log(float(z[1] - z[0]))


def flat(dim: int) -> Any:
    return dist.Normal(torch.zeros(dim), 1.0).to_event(1).mask(False)


DESIGN = torch.randn(50, 5, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1.0, 1.0, 5)
OBSERVED = DESIGN @ torch.ones(5) + torch.randn(50, generator=torch.Generator().manual_seed(1))


def regression() -> None:
    slopes = pyro.sample("slopes", dist.Normal(torch.zeros(5), 5.0).to_event(1))
    mean = (DESIGN * slopes.unsqueeze(-2)).sum(-1)
    pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=OBSERVED)


def regression_exactly() -> tuple[float, Tensor, Tensor]:
    """Return log evidence, posterior means and sds."""
    design, y = DESIGN.double(), OBSERVED.double()
    covariance = torch.linalg.inv(design.T @ design + torch.eye(5).double() / 25)
    marginal = dist.MultivariateNormal(
        torch.zeros(50).double(), torch.eye(50).double() + 25 * design @ design.T
    )
    return float(marginal.log_prob(y)), covariance @ design.T @ y, covariance.diagonal().sqrt()


#: Half of the distance between two modes, 8 sds in all.
HALF = torch.full((10,), 4 / 10**0.5)


def two_modes() -> None:
    z = pyro.sample("z", flat(10))
    left, right = (dist.Normal(loc, 1.0).log_prob(z).sum(-1) for loc in (-HALF, HALF))
    pyro.factor("density", torch.logaddexp(left + math.log(0.7), right + math.log(0.3)))


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


def eight_schools_exactly() -> tuple[float, float, float]:
    """Return log evidence, mean and sd of log tau, by quadrature over mu and log tau."""
    mu = torch.linspace(-40.0, 40.0, 801, dtype=torch.float64).reshape(-1, 1, 1)
    log_tau = torch.linspace(-12.0, 9.0, 2101, dtype=torch.float64).reshape(1, -1, 1)
    tau = log_tau.exp()
    sd = (tau**2 + ERRORS**2).sqrt()
    log_p = dist.Normal(mu, sd).log_prob(EFFECTS).sum(-1)
    log_p = log_p + dist.Normal(0.0, 5.0).log_prob(mu[..., 0])
    log_p = log_p + (dist.HalfCauchy(5.0).log_prob(tau) + log_tau)[..., 0]
    weights = log_p.flatten().softmax(0).reshape(log_p.shape)
    log_evidence = float(log_p.logsumexp((0, 1))) + math.log(0.1 * 0.01)
    mean = float((weights * log_tau[..., 0]).sum())
    return log_evidence, mean, float((weights * (log_tau[..., 0] - mean).square()).sum().sqrt())


def reference(name: str) -> dict[str, Any]:
    posteriors: dict[str, Any] = json.loads((REFERENCE / f"{name}.json").read_text())["posteriors"]
    return posteriors


def lorenz_problem(variance: float) -> Problem:
    exact = reference("lorenz")[f"{variance:g}"]
    r = exact["names"].index("r")
    return Problem(
        lorenz.model,
        exact["log_evidence"],
        Check("mean r", lambda s: (s["r"] - exact["mean"][r]) / exact["sd"][r], 0.0, 0.05),
        dist.Normal(10.0, 4.0),
        (lorenz.simulate(variance, lorenz.DATA_SEED).float(), variance),
    )


def problems() -> dict[str, Problem]:
    schools = eight_schools_exactly()
    slopes = regression_exactly()
    hiv_modes = reference("hiv").values()
    right = log_integral(lambda z: torch.where(z > 0, log_well(z), -torch.inf), -4, 4)
    well = log_integral(log_well, -4.0, 4.0)
    gaussian = 0.5 * math.log(2 * math.pi)
    wide = dist.Normal(torch.zeros(10), torch.tensor([3.0] + [10.0] * 9)).to_event(1)
    return {
        "regression": Problem(
            regression,
            slopes[0],
            Check("worst mean", lambda s: (s["slopes"] - slopes[1]) / slopes[2], torch.zeros(5), 0.05),
        ),
        "two modes, 10-D": Problem(
            two_modes,
            0.0,
            Check("share left", lambda s: s["z"] @ HALF < 0, 0.7, 0.03),
            dist.Normal(0.0, 3.0),
        ),
        "HIV": Problem(
            hiv.model,
            math.log(sum(math.exp(mode["log_evidence"] - 80) for mode in hiv_modes)) + 80,
            Check("share p1 > 0", lambda s: s["p1"] > 0, 0.5, 0.03),
            dist.Normal(0.0, 2.0),
            (hiv.simulate(hiv.DATA_SEED).float(),),
        ),
        "Lorenz 0.2": lorenz_problem(0.2),
        "Lorenz 0.001": lorenz_problem(0.001),
        "eight schools, centered": Problem(
            eight_schools,
            schools[0],
            Check("mean log tau", lambda s: (s["tau"].log() - schools[1]) / schools[2], 0.0, 0.05),
        ),
        "funnel, 10-D": Problem(
            funnel,
            0.0,
            Check(
                "share v < -3",
                lambda s: s["v"] < -3,
                float(dist.Normal(0.0, 1.0).cdf(torch.tensor(-1.0))),
                0.03,
            ),
            wide,
        ),
        "many-well, 32-D": Problem(
            many_well,
            16 * (well + gaussian),
            Check(
                "worst share right",
                lambda s: s["z"][:, :16] > 0,
                torch.full((16,), math.exp(right - well)),
                0.03,
            ),
            dist.Normal(0.0, 2.0),
        ),
        "20 bimodals": Problem(
            bimodals,
            20 * log_integral(log_bimodal, -10.0, 6.0),
            Check("worst share right", lambda s: s["z"] > -2, torch.full((20,), 0.5), 0.03),
            dist.Normal(-2.0, 2.0),
        ),
    }
