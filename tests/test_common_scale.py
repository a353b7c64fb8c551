"""`poutine.scale` around model and guide is divided out of weights; around the model alone it counts."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_adaann import (
    AdaAnnSchedule,
    AdaAnnSVI,
    ESSStageRule,
    LinearSchedule,
    NaturalStep,
    TraceMixedKL_ELBO,
    diagnose,
    importance_draws,
)
from pyro_adaann.objectives.sites import common_scale


def model() -> None:
    pyro.sample("z", dist.Normal(0.0, 1.0))


def guide() -> None:
    loc = pyro.param("loc", torch.tensor(0.5))
    sd = pyro.param("sd", torch.tensor(0.2), constraint=dist.constraints.positive)
    pyro.sample("z", dist.Normal(loc, sd))


def scaled(fn, scale: float):
    return poutine.scale(fn, scale=scale)


def elbo() -> Trace_ELBO:
    return Trace_ELBO(num_particles=50, vectorize_particles=True)


@pytest.mark.parametrize("scale", [0.01, 100.0])
@pytest.mark.parametrize("loss", [elbo, TraceMixedKL_ELBO])
@pytest.mark.parametrize("path", ["joint", "likelihood"])
def test_the_schedule_is_that_of_the_fit_without_it(scale, loss, path):
    def fit(scale: float) -> AdaAnnSVI:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)

        def observed() -> None:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=torch.tensor(1.0))

        return AdaAnnSVI(
            scaled(observed, scale),
            scaled(guide, scale),
            pyro.optim.Adam({"lr": 0.01, "eps": 0.0}),  # which then does not see a scale of the gradient
            loss(),
            path=path,
            schedule=AdaAnnSchedule(0.05),
            stage_rule=ESSStageRule(0.3),
            num_initial_steps=3,
            num_steps_per_stage=2,
            num_final_steps=2,
        )

    plain, other = fit(1.0), fit(scale)
    for svi in (plain, other):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi.run(progress_bar=False)
    times = [svi.history.inverse_temperatures for svi in (plain, other)]
    assert len(times[0]) > 4
    assert times[1] == pytest.approx(times[0], rel=1e-3)
    # The loss stays the user's.
    assert other.history.losses == pytest.approx([scale * loss for loss in plain.history.losses], rel=1e-3)


def test_the_verdict_is_about_the_posterior():
    fits = [(model, guide), (scaled(model, 0.01), scaled(guide, 0.01))]
    results = []
    for fit in fits:
        pyro.set_rng_seed(0)
        results.append((diagnose(fit, num_samples=1000), importance_draws(fit, num_samples=100)))
    (plain, draws), (other, other_draws) = results
    assert not plain.verdict.startswith("GOOD")
    assert other.k_hat == pytest.approx(plain.k_hat, rel=1e-3)
    assert other.ess == pytest.approx(plain.ess, rel=1e-3)
    torch.testing.assert_close(other_draws.log_weights, draws.log_weights, rtol=1e-3, atol=1e-3)


def test_natural_steps_do_not_see_it():
    def losses(scale: float) -> list[float]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        step = NaturalStep(100)
        svi = AdaAnnSVI(scaled(model, scale), scaled(guide, scale), step, schedule=LinearSchedule(3))
        return [svi.step() for _ in range(5)]

    assert losses(0.01) == pytest.approx(losses(1.0), rel=1e-3)


def test_a_scale_of_the_model_alone_is_part_of_the_model():
    def batch() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.scale(scale=4.0):
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    # Posterior N(4/5, 1/5).
    def exact() -> None:
        pyro.sample("z", dist.Normal(0.8, 0.2**0.5))

    draws = importance_draws((batch, exact), num_samples=100)
    torch.testing.assert_close(draws.log_weights, draws.log_weights.mean().expand(100), rtol=0, atol=1e-4)
    both = importance_draws((scaled(batch, 0.1), scaled(exact, 0.1)), num_samples=100)
    torch.testing.assert_close(both.log_weights, both.log_weights.mean().expand(100), rtol=0, atol=1e-4)


def test_sub_sampled_plates_are_no_common_scale():
    def local(size: int) -> None:
        with pyro.plate("data", 100, subsample_size=size):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide(size: int) -> None:
        with pyro.plate("data", 100, subsample_size=size):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    assert poutine.trace(guide).get_trace(10).nodes["z"]["scale"] == 10
    assert common_scale(poutine.trace(guide).get_trace(10)) == 1
    assert common_scale(poutine.trace(scaled(guide, 0.1)).get_trace(10)) == pytest.approx(0.1)
    AdaAnnSVI(local, guide, pyro.optim.Adam({"lr": 0.01}), elbo()).step(10)
    AdaAnnSVI(scaled(local, 0.1), scaled(guide, 0.1), pyro.optim.Adam({"lr": 0.01}), elbo()).step(10)


@pytest.mark.parametrize(
    ("scale", "common"),
    [(torch.tensor(0.1), 0.1), (torch.full((3,), 0.1), 0.1), (torch.arange(1.0, 4.0), 1.0)],
)
def test_scales_that_are_tensors(scale, common):
    def local() -> None:
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide() -> None:
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    both = [poutine.scale(part, scale=scale) for part in (local, guide)]
    assert common_scale(poutine.trace(both[1]).get_trace()) == pytest.approx(common)
    AdaAnnSVI(*both, pyro.optim.Adam({"lr": 0.01}), elbo()).step()
    with pytest.raises(ValueError, match="under one scale"):
        AdaAnnSVI(local, both[1], pyro.optim.Adam({"lr": 0.01}), elbo()).step()


def test_a_sub_sampled_plate_of_the_model_may_be_a_scale_of_the_guide():
    def local(data: torch.Tensor) -> None:
        pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 100, subsample=torch.arange(10)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data)

    def guide(data: torch.Tensor) -> None:
        pyro.sample("mean", dist.Normal(pyro.param("mean_loc", torch.tensor(0.0)), 1.0))
        with poutine.scale(scale=10.0), pyro.plate("data", 10):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    assert common_scale(poutine.trace(guide).get_trace(torch.zeros(10))) == 1
    AdaAnnSVI(local, guide, pyro.optim.Adam({"lr": 0.01}), elbo()).step(torch.zeros(10))


@pytest.mark.parametrize("make_guide", [lambda: scaled(guide, 0.1), lambda: scaled(AutoNormal(model), 0.1)])
def test_a_scale_of_the_guide_alone_is_refused(make_guide):
    scaled_guide = make_guide()
    with pytest.raises(
        ValueError, match=r"under one scale; got 0.1 in the guide and 1 in the model at site 'z'"
    ):
        AdaAnnSVI(model, scaled_guide, pyro.optim.Adam({"lr": 0.01}), elbo()).step()
    with pytest.raises(ValueError, match="under one scale"):
        diagnose((model, scaled_guide), num_samples=100)


def test_kl_warmup_takes_any_scale():
    svi = AdaAnnSVI(
        model,
        scaled(guide, 0.1),
        pyro.optim.Adam({"lr": 0.01}),
        elbo(),
        path="kl_warmup",
        schedule=LinearSchedule(3),
    )
    svi.step()
