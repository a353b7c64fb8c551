"""Results of hierarchies that were fitted in other coordinates speak of the model's own sites."""

from __future__ import annotations

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from test_decentering import Y, known_and_unknown, rates
from torch import Tensor

from pyro_adaann import FitResult, fit
from pyro_adaann.fitting.coordinates import Coordinates
from pyro_adaann.fitting.decentering import Start

pytestmark = pytest.mark.xdist_group("decentered fits")  # `two_fits` are made once, in one worker

NOISE = torch.full((4,), 2.0)


@functools.cache
def two_fits() -> FitResult:
    return fit(known_and_unknown, NOISE, Y[:4], seed=0, num_fits=2, progress_bar=False)


def neck(tau: Tensor) -> Tensor:
    """Return the log density of (tau, y) for data of sd 2, mu and theta integrated out."""
    total = 25.0 + (tau.reshape(-1, 1, 1).square() + 4.0) * torch.eye(4).double()
    evidence = dist.MultivariateNormal(torch.zeros(4).double(), total).log_prob(Y[:4].double())
    return evidence + dist.HalfNormal(2.0).log_prob(tau)


def test_the_neck_of_a_hierarchy_has_its_share():
    """Of the probability of small scales a centered fit has lost up to all.

    Shares of 20,000 draws with more than 10,000 effective: four errors are .004 of a share of .024.
    """
    result = two_fits()
    grid = (torch.arange(20_000).double() + 0.5) / 2000
    log_p = neck(grid)
    weights = log_p.softmax(0)
    assert result.log_evidence == pytest.approx(float(log_p.logsumexp(0)) - math.log(2000), abs=0.01)
    tau, own = result.draws.samples["tau"].double(), result.draws.log_weights.double().softmax(0)
    for bound in (0.05, 0.2, 1.0):
        exact = float(weights[grid < bound].sum())
        assert float(own[tau < bound].sum()) == pytest.approx(exact, rel=0.17, abs=0.001), bound
    assert result.is_good


def log_normal_groups(noise: Tensor, y: Tensor):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("groups", len(y)):
        factor = pyro.sample("factor", dist.LogNormal(mu, tau))
        pyro.sample("y", dist.Normal(factor.log(), noise), obs=y)


def test_log_normal_groups_have_the_evidence_of_normal_ones():
    result = fit(log_normal_groups, NOISE, Y[:4], seed=0, progress_bar=False)
    assert result.centered["factor"].tolist() == [0.0] * 4
    assert set(result.svi.guide._unconstrained_shapes) == {"mu", "tau", "factor_base_decentered"}
    # Both errors are below .003.
    assert result.log_evidence == pytest.approx(two_fits().log_evidence, abs=0.01)
    logs, weights = result.draws.samples["factor"].log().double(), result.draws.log_weights.softmax(0)
    error = (weights.double() @ logs - two_fits().mean("theta")) / two_fits().sd("theta")
    assert error.abs().max() < 0.05  # five errors of 10,000 draws


def test_a_result_speaks_of_the_sites_of_the_model(tmp_path):
    result = two_fits()
    assert result.centered["theta"].tolist() == [0.0] * 4
    assert list(result.draws.samples) == ["mu", "tau", "theta"]
    assert result.mean("theta").shape == (4,)
    assert "_decentered" not in str(result)
    assert "_decentered" not in repr(result)
    some = {name: values[:200] for name, values in result.draws.samples.items()}
    torch.testing.assert_close(result.log_prob(some).double(), result.draws.log_q[:200], atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="got none of theta"):
        result.log_prob({"mu": some["mu"], "tau": some["tau"]})
    at_boundary = {**some, "tau": torch.zeros_like(some["tau"])}
    assert (result.log_prob(at_boundary) == -torch.inf).all()
    found = result.predictive(num_samples=50)
    assert set(found) == {"y"}
    args = NOISE, Y[:4]
    result.save(tmp_path / "result.pt")
    loaded = FitResult.load(tmp_path / "result.pt", known_and_unknown, *args)
    torch.testing.assert_close(loaded.log_prob(some), result.log_prob(some))
    assert set(loaded.predictive(num_samples=5)) == {"y"}
    assert loaded.to_arviz(num_samples=50)["posterior"]["theta"].shape == (1, 50, 4)
    with pytest.raises(
        ValueError, match=r"shape \(4,\) at site 'theta' where this has Normal of shape \(8,\)"
    ):
        FitResult.load(tmp_path / "result.pt", known_and_unknown, torch.ones(8), Y)
    with pytest.raises(ValueError, match="where this has no such site"):
        FitResult.load(tmp_path / "result.pt", rates)
    loaded.save(tmp_path / "again.pt")
    assert str(FitResult.load(tmp_path / "again.pt")) == str(result)


# ArviZ 0.23 leaves to xarray how data sets are put beside each other.
@pytest.mark.filterwarnings("ignore:In a future version of xarray:FutureWarning")
@pytest.mark.parametrize("by_fit", [False, True])
def test_an_export_has_the_sites_of_the_model(by_fit):
    result = two_fits()
    data = result.to_arviz(by_fit=by_fit, num_samples=2000)
    assert set(data["posterior"].data_vars) == {"mu", "tau", "theta"}
    assert data["posterior"]["theta"].shape == (2 if by_fit else 1, 2000, 4)
    # Four errors of 2,000 draws, and of as many of which half count.
    for chain in data["posterior"]["theta"].values:
        error = torch.as_tensor(chain.mean(0)) - result.mean("theta")
        assert (error.abs() / result.sd("theta")).max() < 0.13
    assert data["log_likelihood"]["y"].shape[-1] == 4


def test_one_can_go_on_in_the_coordinates_of_the_guide(monkeypatch):
    start = Start(Coordinates(known_and_unknown, (NOISE, Y[:4]), {}, {"theta": torch.zeros(4)}))
    monkeypatch.setattr("pyro_adaann.fitting.fit.choose_start", lambda *_: start)
    result = fit(known_and_unknown, NOISE, Y[:4], seed=0, budget=1e-3, progress_bar=False)
    assert set(result.svi.guide._unconstrained_shapes) == {"mu", "tau", "theta_decentered"}
    num_steps = result.svi.history.num_steps
    result.svi.step(NOISE, Y[:4])
    assert result.svi.history.num_steps == num_steps + 1
