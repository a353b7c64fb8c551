"""Missing data (``obs_mask``): missing values are summed out, or proper where the model uses them."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_adaann import AnnealedSMC, FitResult, fit
from pyro_adaann.sampling.missing import without_missing

NAN = float("nan")
BAR = {"progress_bar": False}
MASK = torch.tensor([True, True, False, True, False, True])
Y = torch.tensor([1.0, 0.2, NAN, 0.7, NAN, 1.6])


def mean_of_data(y: Tensor, mask: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 0.5), obs=y, obs_mask=mask)


def missing_covariate(x: Tensor, mask: Tensor, y: Tensor) -> None:
    """Linear and Gaussian: y is a noisy x, some of which is missing."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        x = pyro.sample("x", dist.Normal(mean, 1.0), obs=x, obs_mask=mask)
        pyro.sample("y", dist.Normal(x, 0.5), obs=y)


def latents(model: Any, *args: Any) -> list[str]:
    trace = poutine.trace(model).get_trace(*args)
    return [name for name in trace.stochastic_nodes if not trace.nodes[name]["fn"].has_enumerate_support]


def exact_mean_of_data() -> tuple[float, float, float]:
    y = Y[MASK].double()
    covariance = 0.25 * torch.eye(len(y)).double() + 4.0
    evidence = float(dist.MultivariateNormal(torch.zeros(len(y)).double(), covariance).log_prob(y))
    precision = 1 / 4 + len(y) / 0.25
    return float(y.sum() / 0.25 / precision), precision**-0.5, evidence


def particles(model: Any, *args: Any, seed: int, **kwargs: Any) -> Any:
    return AnnealedSMC(model, seed=seed).run(*args, **kwargs)


@pytest.mark.parametrize("sample", [fit, particles])
def test_missing_values_that_nobody_uses_are_summed_out(sample):
    """1,000 particles have a mean within .03 sds and an evidence within .05: bounds are five of these."""
    result = sample(mean_of_data, Y, MASK, seed=0, progress_bar=False)
    mean, sd, evidence = exact_mean_of_data()
    draws = result.draws.samples if isinstance(result, FitResult) else result.samples
    assert list(draws) == ["z"]
    assert abs(float(result.mean("z")) - mean) < 0.15 * sd
    assert abs(float(result.sd("z")) / sd - 1) < 0.15
    assert abs(result.log_evidence - evidence) < (0.01 if isinstance(result, FitResult) else 0.25)


def test_predictions_fill_what_is_missing(tmp_path):
    result = fit(mean_of_data, Y, MASK, seed=0, **BAR)
    result.save(tmp_path / "result")
    mean, sd, _ = exact_mean_of_data()
    for each in (result, FitResult.load(tmp_path / "result", mean_of_data, Y, MASK)):
        y = each.predictive(num_samples=2000)["y"]
        assert y.shape == (2000, 6)
        # Means of 2,000 draws of sd .55: five standard errors.
        assert ((y.mean(0) - mean).abs() < 0.07).all()
        assert ((y.std(0) - (sd**2 + 0.25) ** 0.5).abs() < 0.06).all()


def test_missing_values_that_the_model_uses_are_latent_and_proper():
    x = torch.tensor([0.5, NAN, -0.3, 1.0, NAN])
    y = torch.tensor([0.7, 2.0, -0.1, 1.5, -1.0])
    mask = ~x.isnan()
    result = fit(missing_covariate, x, mask, y, seed=0, **BAR)
    assert list(result.draws.samples) == ["mean", "x_unobserved"]
    # The known x and all y are jointly normal.
    size = int(mask.sum())
    both = torch.cat([x[mask], y]).double()
    covariance = torch.full((len(both), len(both)), 4.0).double()
    covariance += torch.block_diag(torch.eye(size), torch.eye(5) * 1.25).double()
    same = torch.arange(5)[mask].unsqueeze(1) == torch.arange(5)
    covariance[:size, size:] += same.double()
    covariance[size:, :size] += same.t().double()
    joint = dist.MultivariateNormal(torch.zeros(len(both)).double(), covariance)
    assert abs(result.log_evidence - float(joint.log_prob(both))) < 0.02
    # A missing x given y, and a mean that is known to `spread`: precision 1 + 4.
    weights = torch.linalg.solve(covariance, torch.full((len(both),), 4.0).double())
    mean = float(weights @ both)
    missing = (mean + 4 * y[~mask].double()) / 5
    sds = result.sd("x_unobserved")[~mask]
    assert ((result.mean("x_unobserved")[~mask] - missing).abs() < 0.1 * sds).all()


def test_values_that_are_used_in_a_part_of_their_range_are_latent():
    """Ten of ten draws miss a half of the range for one seed in 1,000."""

    def model(mask: Tensor) -> None:
        y = pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(NAN), obs_mask=mask)
        pyro.sample("x", dist.Normal(y.relu(), 0.5), obs=torch.tensor(0.3))

    for seed in range(5):
        pyro.set_rng_seed(seed)
        data = (torch.tensor(False),)
        assert latents(without_missing(model, data, {}), *data) == ["y_unobserved"]


def test_missing_counts_need_no_enumeration():
    def model(y: Tensor, mask: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Bernoulli(p), obs=y, obs_mask=mask)

    y = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    result = fit(model, y, MASK, seed=0, **BAR)  # four known, all 1: Beta(5, 1)
    assert abs(float(result.mean("p")) - 5 / 6) < 0.02
    assert abs(result.log_evidence + torch.tensor(5.0).log()) < 0.01


def test_a_known_value_that_is_nan_is_no_missing_one():
    y = Y.clone()
    y[0] = NAN
    with pytest.raises(ValueError, match="y_observed"):
        fit(mean_of_data, y, MASK, **BAR)


def test_other_models_are_left_as_they_are():
    def own_names(y: Tensor) -> None:
        z = pyro.sample("y_unobserved", dist.Normal(0.0, 1.0))
        pyro.sample("y_observed", dist.Normal(z, 1.0), obs=y)
        pyro.deterministic("other", z)

    assert without_missing(own_names, (torch.tensor(1.0),), {}) is own_names
    assert without_missing(mean_of_data, (Y[MASK], None), {}) is mean_of_data
    broken = lambda: 1 / 0  # noqa: E731
    assert without_missing(broken, (), {}) is broken
    changed = without_missing(mean_of_data, (Y, MASK), {})
    assert latents(mean_of_data, Y, MASK)[-1] == "y_unobserved"
    assert "y_unobserved" not in latents(changed, Y, MASK)
