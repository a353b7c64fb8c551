"""Steps at inverse temperature 1 that go on while the loss falls."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_adaann import AdaAnnSVI, ConstantSchedule, natural_svi
from pyro_adaann.state.budget import StepPlan, is_falling, projected_num_steps


def model() -> None:
    pyro.sample("z", dist.Normal(3.0, 0.5))


def pointed() -> None:
    """What a normal guide cannot follow: its losses stay noisy."""
    pyro.sample("z", dist.Laplace(3.0, 0.5))


def make_svi(lr: float, model=model, **kwargs) -> AdaAnnSVI:
    elbo = Trace_ELBO(num_particles=20, vectorize_particles=True)
    adam = pyro.optim.Adam({"lr": lr})
    return AdaAnnSVI(model, AutoNormal(model), adam, elbo, schedule=ConstantSchedule(), **kwargs)


def test_noise_seems_to_fall_one_time_in_44():
    """Of 4,000 sequences of noise 91 +- 9.4, whatever its tails."""
    torch.manual_seed(0)
    noise = torch.distributions.StudentT(1.5).sample((4000, 40))
    count = sum(is_falling(losses, 20) for losses in noise.tolist())
    assert 60 < count < 122  # fails wrongly one time in 1,000
    noise[:, 20:] -= 2.5
    assert sum(is_falling(losses, 20) for losses in noise.tolist()) > 3600
    assert not is_falling([3.0, 2.0, 1.0], 2)  # too few


def test_steps_go_on_while_the_loss_falls():
    svi = make_svi(0.01, num_final_steps=40, max_num_final_steps=120)
    svi.run(progress_bar=False)
    assert len(svi.history.stages[-1].losses) == 120  # it needs 300 steps from 0 to 3
    assert svi.is_done
    # What a progress bar shows as all steps is never less than those taken.
    assert projected_num_steps(svi.history, svi.schedule, StepPlan(1, 1, 40, max_num_final=120)) == 120


def test_steps_end_when_the_loss_does_not_fall():
    ends = []
    for seed in range(5):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        svi = make_svi(0.05, pointed, num_final_steps=200, max_num_final_steps=2000)
        svi.run(progress_bar=False)
        ends.append(svi.history.num_steps)
    # Converged by step 150: what noise adds are a few steps.
    assert all(200 <= end < 600 for end in ends)


def test_losses_that_are_not_finite_do_not_count():
    plan = StepPlan(1, 1, 8, max_num_final=20)
    falling = [8.0, math.nan, *range(7, 3, -1), math.inf, *range(3, 0, -1)]
    assert not plan.is_over(8, falling, 1)
    assert plan.is_over(20, falling, 1)
    assert plan.is_over(8, [4.0, 3.9, math.nan, 4.1, 4.0, 3.9, 4.1, 4.0, 3.9], 1)
    assert not plan.is_over(7, falling, 1)


def test_draws_of_equal_weight_need_no_more_steps():
    """An sd of the log weights of .05: losses of 100 draws have one of .005."""
    equal = [2.0, 1.0, *(3.0, 3.004, 2.996, 3.003, 2.997) * 4]
    plan = StepPlan(1, 1, 30, max_num_final=90)
    assert plan.is_over(10, equal, 100)
    assert not plan.is_over(9, equal, 100)  # a third of 30 at least
    assert not plan.is_over(10, equal, 400)  # an sd of .07 or so
    assert not plan.is_over(10, [*equal, math.nan, 2.0], 100)
    assert not StepPlan(1, 1, 30).is_over(10, equal, 100)  # a given number is a given number


def test_a_guide_that_is_exact_ends_early():
    svi = natural_svi(model)
    svi.run(progress_bar=False)
    assert svi.num_final_steps / 3 <= svi.history.stages[-1].num_steps < svi.num_final_steps


def test_a_given_number_is_kept():
    assert natural_svi(model, num_final_steps=7).max_num_final_steps is None
    svi = natural_svi(model)
    assert svi.num_final_steps < svi.max_num_final_steps
    svi = natural_svi(model, num_particles=100, num_final_steps=7)
    svi.run(progress_bar=False)
    assert svi.history.stages[-1].num_steps == 7


def test_a_largest_number_below_the_number_is_refused():
    with pytest.raises(ValueError, match=r"max_num_final_steps.*40.*30"):
        make_svi(0.1, num_final_steps=40, max_num_final_steps=30)
