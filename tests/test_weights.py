"""Weights without a model: laws of averages, tails and outliers, on every ArviZ."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro.distributions import Delta, Normal
from torch import Tensor

from pyro_adaann import diagnose
from pyro_adaann.weights import (
    effective_sample_size,
    finite_or_no_weight,
    log_mean_error,
    log_mean_weight,
    median_and_reach,
    pareto_smooth,
    resample,
    student_factor,
    truncated_weights,
    weighted_mean,
    weighted_mean_and_sd,
    winsorize,
)


def with_nonfinite(log_weights: Tensor) -> Tensor:
    """Return the same weights with some of zero, each written in another way, in between."""
    zeros = torch.tensor([math.nan, math.inf, -math.inf], dtype=log_weights.dtype)
    return torch.cat([log_weights[:7], zeros, log_weights[7:]])


def test_a_log_weight_that_is_not_finite_is_a_weight_of_zero_everywhere():
    log_weights = torch.randn(200, dtype=torch.float64)
    more = with_nonfinite(log_weights)
    values = torch.randn(203, dtype=torch.float64)
    own = torch.cat([values[:7], values[10:]])
    assert effective_sample_size(more) == effective_sample_size(log_weights)
    # The mean is over all draws, those of weight zero included.
    assert log_mean_weight(more) == pytest.approx(log_mean_weight(log_weights) + math.log(200 / 203))
    assert float(weighted_mean(values, more)) == pytest.approx(float(weighted_mean(own, log_weights)))
    assert weighted_mean_and_sd(values, more) == pytest.approx(weighted_mean_and_sd(own, log_weights))
    assert pareto_smooth(more)[1] == pareto_smooth(log_weights)[1]
    assert not set(resample(more, 500).tolist()) & {7, 8, 9}
    assert (truncated_weights(more)[7:10] == 0).all()
    assert (finite_or_no_weight(more) > -torch.inf).sum() == 200


def test_without_a_weight_there_are_no_effective_draws():
    nothing = torch.tensor([math.nan, -math.inf])
    assert effective_sample_size(nothing) == 0
    assert log_mean_weight(nothing) == -math.inf
    assert log_mean_error(0.0, 2) == math.inf


def test_the_error_of_the_log_mean_is_the_spread_of_repeated_means():
    # 400 estimates know their sd with a relative error of 1 / sqrt(800) = 3.5 %: five of them, once in
    # two million choices of the seed.
    torch.manual_seed(0)
    draws = 0.5 * torch.randn(400, 1000, dtype=torch.float64)
    found = [log_mean_weight(row) for row in draws]
    stated = [log_mean_error(effective_sample_size(row), 1000) for row in draws]
    assert torch.tensor(found).std() == pytest.approx(sum(stated) / 400, rel=0.18)


@pytest.mark.parametrize("scale", [0.0, 1.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_weights_have_no_tail(scale, dtype):
    log_weights = torch.full((1000,), scale, dtype=dtype)
    smoothed, k_hat = pareto_smooth(log_weights)
    assert k_hat == -math.inf
    assert torch.equal(smoothed, log_weights.double())
    # Rounding in the last digits of some is no tail either.
    rounded = torch.where(torch.arange(1000) % 3 == 0, log_weights + scale * 1e-7, log_weights)
    assert pareto_smooth(rounded)[1] == -math.inf


def test_few_levels():
    def shape(*levels: tuple[float, int]) -> float:
        weights = torch.cat([torch.full((num,), weight) for weight, num in levels])
        return pareto_smooth(weights.log())[1]

    # Half of the draws count twice: a bound that is reached.
    assert shape((1.0, 500), (2.0, 500)) == -math.inf
    assert shape((1.0, 900), (2.0, 100)) == -math.inf
    assert shape((0.0, 500), (1.0, 500)) == -math.inf
    # Three draws stand for what the others do not show.
    assert shape((1.0, 997), (100.0, 3)) == math.inf


def test_the_exact_guide_is_good():
    def model() -> None:
        pyro.sample("z", Normal(0.0, 1.0))
        pyro.sample("x", Delta(torch.tensor(1.0)), obs=torch.tensor(1.0))

    d = diagnose((model, lambda: pyro.sample("z", Normal(0.0, 1.0))), num_samples=2000)
    assert d.k_hat == -math.inf
    assert d.is_good
    assert "the weights are equal" in str(d)
    assert d.log_evidence == 0
    assert d.ess == 2000


def test_outliers():
    draws = torch.cat([torch.randn(1001, dtype=torch.float64), torch.tensor([1e9, -1e9, math.nan])])
    median, reach = median_and_reach(draws)
    moved = winsorize(draws)
    assert torch.equal(moved[:1001], draws[:1001])
    assert moved[1001:1003].tolist() == pytest.approx([median + reach, median - reach])
    assert math.isnan(float(moved[1003]))
    assert all(map(math.isnan, median_and_reach(torch.tensor([math.nan]))))
    # Half of the draws at one place: no distance to measure by.
    same = torch.tensor([1.0, 1.0, 1.0, 5.0])
    assert torch.equal(winsorize(same), same)


def test_smoothing_keeps_the_scale_beside_a_weight_that_is_next_to_nothing():
    log_weights = 30 + torch.randn(1000, generator=torch.Generator().manual_seed(0)).double()
    expected = pareto_smooth(log_weights)[0].logsumexp(0)
    # In double precision a shift of 37 is lost in a number of this size.
    with_one = torch.cat([log_weights, torch.tensor([-1e20], dtype=torch.float64)])
    torch.testing.assert_close(pareto_smooth(with_one)[0].logsumexp(0), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("num_groups", [2, 3, 4, 6, 16, 64])
def test_twice_an_error_of_few_groups_covers_as_much_as_two_known_standard_deviations(num_groups):
    t = torch.distributions.StudentT(torch.tensor(num_groups - 1.0).double())
    angles = torch.linspace(0.0, math.atan(2 * student_factor(num_groups)), 20_001, dtype=torch.float64)
    density = t.log_prob(angles.tan()).exp() / angles.cos().square()
    covered = 2 * float(torch.trapezoid(density, angles))
    assert covered == pytest.approx(math.erf(math.sqrt(2)), abs=2e-4)
