"""A guide that starts at a full covariance, and the particles from which `fit` has it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from fit_models import errors, is_right
from fit_targets import FitTarget, _regression, noise
from fit_targets_new import sparse_means
from fit_targets_users import nested_plates

from pyro_adaann import (
    AdaAnnSVI,
    AnnealedSMC,
    AutoPlanar,
    AutoSpline,
    CESSSchedule,
    FitResult,
    NaturalStep,
    fit,
    natural_svi,
    one_by_one,
)
from pyro_adaann.fitting import attempts
from pyro_adaann.fitting.clock import Clock
from pyro_adaann.fitting.pilot import pilot_base
from pyro_adaann.fitting.progress import FitProgress

LOC = torch.tensor([3.0, -1.0, 0.5])
FACTOR = torch.tensor([[2.0, 0.0, 0.0], [1.9, 0.1, 0.0], [-1.0, 0.5, 1.0]])
START = dist.MultivariateNormal(LOC, scale_tril=FACTOR)
WATCH: Any = (FitProgress(False), Clock(None), SimpleNamespace(requested=False))


def model() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 5.0).to_event(1))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.tensor([1.0, 2.0, 0.0]))


def wide(num_latents: int, num_data: int) -> FitTarget:
    """Conjugate, with strong correlations: fewer data than coefficients."""
    return _regression(noise(91, num_data, num_latents), torch.ones(num_latents).double(), 0.3, 92)


@pytest.mark.parametrize("make", [AutoSpline, lambda *args, **kwargs: AutoPlanar(*args, 4, **kwargs)])
def test_a_guide_starts_at_the_normal_distribution_with_this_factor(make):
    pyro.set_rng_seed(0)
    guide = make(model, base_loc=LOC, base_scale=FACTOR).initialize()
    z = START.sample((500,))
    off = guide.get_posterior().log_prob(z).detach() - START.log_prob(z)
    assert float(off.abs().mean()) < 0.05  # planar layers start near the identity
    # 5,000 draws: each mean is within five standard errors, a part in a million fails.
    draws = guide.sample_posterior(5000)["z"]
    assert ((draws.mean(0) - LOC).abs() < 5 * START.stddev / 5000**0.5 + 0.05).all()
    torch.testing.assert_close(guide.quantiles([0.5])["z"][0], LOC, rtol=0, atol=0.1)


def test_a_bridge_starts_there_too():
    """At inverse temperature 1e-8 the guide is the tempered density: every draw has the same weight."""
    guide = AutoSpline(model, base_loc=LOC, base_scale=FACTOR)
    schedule = CESSSchedule(0.9, initial_inverse_temperature=1e-8)
    svi = AdaAnnSVI(model, guide, NaturalStep(200), path="bridge", schedule=schedule)
    with pytest.warns(UserWarning, match="inverse temperature 1e-08"):
        assert svi.evaluate_loss() == pytest.approx(0.0, abs=5e-3)
    result = AnnealedSMC(model, path="bridge", guide=guide, num_particles=512, seed=0).run(progress_bar=False)
    exact = float(dist.Normal(0.0, 26.0**0.5).log_prob(torch.tensor([1.0, 2.0, 0.0])).sum())
    assert abs(result.log_evidence - exact) < 5 * result.log_evidence_error


def test_a_fit_from_a_wide_one_is_right():
    """Of six seeds means were off by .013 at most, sds by 1 %.

    From FACTOR, between which and the posterior lie 20 of its sds, fits end UNRELIABLE.
    """
    pyro.set_rng_seed(0)
    wide_factor = torch.tensor([[4.0, 0.0, 0.0], [3.8, 3.0, 0.0], [-2.0, 1.0, 2.0]])
    svi = natural_svi(model, AutoSpline(model, base_loc=LOC, base_scale=wide_factor), num_final_steps=20)
    svi.run(progress_bar=False)
    draws = svi.guide.sample_posterior(20_000)["z"]
    exact = torch.tensor([1.0, 2.0, 0.0]) * 25 / 26
    torch.testing.assert_close(draws.mean(0), exact, rtol=0, atol=0.08)
    torch.testing.assert_close(draws.std(0), torch.full((3,), (25 / 26) ** 0.5), rtol=0.08, atol=0)


@pytest.mark.parametrize(
    "factor", [torch.ones(3, 3), torch.eye(2), torch.diag(torch.tensor([1.0, 0.0, 1.0])), torch.ones(2, 3)]
)
def test_a_matrix_that_is_no_factor_is_refused(factor):
    with pytest.raises(ValueError, match=r"lower triangular.*cholesky|of 3 rows"):
        AutoSpline(model, base_scale=factor).initialize()


def test_a_pilot_has_the_moments_of_the_posterior():
    """Some 600 effective particles: means are off by .04 sds, widths by 3 %; bounds are six times that."""
    target = wide(20, 10)
    start = pilot_base(target.model, target.args, {}, 20, 0, WATCH)
    assert start is not None
    loc, factor = start
    mean, sd = target.moments["beta"]
    assert float(((loc - mean) / sd).abs().max()) < 0.25
    sds = factor.square().sum(1).sqrt() / 1.5
    assert float((sds / sd - 1).abs().max()) < 0.2
    assert float((factor.tril() - factor).abs().max()) == 0


def test_there_is_no_pilot_where_the_prior_will_do_or_particles_will_not():
    target = wide(20, 10)
    assert pilot_base(target.model, target.args, {}, 3, 0, WATCH) is None
    assert pilot_base(target.model, target.args, {}, 1000, 0, WATCH) is None
    stopped: Any = (FitProgress(False), Clock(None), SimpleNamespace(requested=True))
    assert pilot_base(target.model, target.args, {}, 20, 0, stopped) is None
    late: Any = (FitProgress(False), Clock(1e-9), SimpleNamespace(requested=False))
    assert pilot_base(target.model, target.args, {}, 20, 0, late) is None
    assert pilot_base(one_by_one(target.model), target.args, {}, 20, 0, WATCH) is None

    def broken() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(20), 1.0).to_event(1))
        pyro.factor("f", z.sum(-1) * float("nan"))

    assert pilot_base(broken, (), {}, 20, 0, WATCH) is None


@pytest.mark.parametrize("seed", [0, 1])
def test_particles_that_lag_behind_are_no_start(seed):
    """Their last moves carry spikes and tails by .65 to 2.4 sds in ten runs, a hierarchy by .1; bound .4."""
    spikes, hierarchy = sparse_means(), nested_plates()
    assert pilot_base(spikes.model, spikes.args, {}, 16, seed, WATCH) is None
    assert pilot_base(hierarchy.model, hierarchy.args, {}, 21, seed, WATCH) is not None


def test_a_pilot_takes_a_quarter_of_the_time_that_is_left():
    assert Clock(None).part(0.25, 120.0).has(119.0)
    assert not Clock(None).part(0.25, 120.0).has(120.0)
    assert Clock(100.0).part(0.25, 120.0).has(24.0)
    assert not Clock(100.0).part(0.25, 120.0).has(25.0)


@pytest.mark.parametrize("start", [None, (LOC, FACTOR)])
@pytest.mark.parametrize("is_check", [False, True])
def test_from_particles_temperatures_start_later_and_steps_at_1_end_earlier(start, is_check, monkeypatch):
    monkeypatch.setattr(attempts, "pilot_base", lambda *_: start)
    watch: Any = (*WATCH[:2], SimpleNamespace(requested=True))  # ends after a step
    made = attempts.attempt(model, (), {}, attempts.Plan(0, {}, 100, is_check), 0, 500, watch, "fit")
    first = 1e-8 if start is None else 1e-4
    assert made.svi.history.stages[0].inverse_temperature == first
    is_short = is_check or start is not None
    assert (made.svi.num_final_steps, made.svi.max_num_final_steps) == (60, 60 if is_short else 180)


@pytest.mark.slow
def test_many_correlated_latents_are_fitted_and_stored(tmp_path: Path):
    target = wide(24, 12)
    result = fit(target.model, *target.args, seed=0, progress_bar=False)
    assert is_right(errors(target, result))
    result.save(tmp_path / "result")
    again = FitResult.load(tmp_path / "result", target.model, *target.args)
    draws = result.sample(5)
    torch.testing.assert_close(again.log_prob(draws), result.log_prob(draws))
