"""Early warnings to a loop that may end before annealing does, and what they project."""

from __future__ import annotations

import re
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_adaann import (
    AdaAnnSchedule,
    AdaAnnSVI,
    AnnealingHistory,
    AnnealingStage,
    AutoPlanar,
    CESSSchedule,
    LinearSchedule,
)
from pyro_adaann.state.budget import Arrival, StepPlan, projected_arrival


def two_modes() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(z**2, 0.5), obs=torch.tensor(4.0))


def ten_normal() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 3.0).expand([10]).to_event(1))
    pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=torch.ones(10))


def weak_data() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("schools", 8, dim=-1):
        theta = pyro.sample("theta", dist.Normal(mu, 5.0))
        pyro.sample("y", dist.Normal(theta, 10.0), obs=torch.arange(8.0))


def far_away() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 100.0).expand([3]).to_event(1))
    pyro.sample("x", dist.Normal(z, 0.01).to_event(1), obs=200.0 * torch.ones(3))


def make(model=two_modes, guide=AutoPlanar, **options) -> AdaAnnSVI:
    elbo = Trace_ELBO(num_particles=20, vectorize_particles=True)
    made = AutoPlanar(model, 4) if guide is AutoPlanar else guide(model)
    return AdaAnnSVI(model, made, pyro.optim.Adam({"lr": 0.01}), elbo, **options)


def told(svi: AdaAnnSVI, num_steps: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(num_steps):
            svi.step()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (two_modes, {"num_initial_steps": 250}),  # told in the first stage
        (two_modes, {"num_initial_steps": 50}),
        (ten_normal, {"num_initial_steps": 250}),
        (ten_normal, {"num_initial_steps": 50, "guide": AutoNormal}),
        (weak_data, {"num_initial_steps": 250, "path": "likelihood"}),
    ],
)
def test_a_loop_is_told_once_how_many_steps_it_needs(model, options):
    svi = make(model, schedule=AdaAnnSchedule(0.1), **options)
    messages = told(svi, 200)
    assert len(messages) == 1
    projected = int(re.search(r"takes about ([\d,]+) steps to arrive at 1", messages[0])[1].replace(",", ""))
    assert "num_training_steps" in messages[0]
    num_steps = 200
    while svi.inverse_temperature < 1:
        svi.step()
        num_steps += 1
    # Over eight problems, two guides and two lengths of the first stage the largest factor was 2.3.
    assert num_steps / 3 < projected < num_steps * 3


def test_a_guide_far_from_its_target_gives_no_projection_of_millions():
    svi = make(far_away, AutoNormal, num_initial_steps=20)
    (message,) = told(svi, 120)
    # c = sqrt(3/2), tolerance .01: 564 stages of 5 steps after the stages so far.
    assert "at least about 2,900 steps" in message


def test_a_loop_that_knows_is_not_told():
    assert told(make(num_training_steps=250), 250) == []
    pyro.clear_param_store()
    svi = make()
    assert not svi.is_done
    assert told(svi, 210) == []
    pyro.clear_param_store()
    svi = make(schedule=LinearSchedule(2), num_initial_steps=1, num_steps_per_stage=1, num_final_steps=250)
    assert told(svi, 210) == []  # it is at 1
    pyro.clear_param_store()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(schedule=AdaAnnSchedule(0.1), num_initial_steps=205, num_final_steps=1).run(progress_bar=False)


def test_a_fixed_schedule_is_projected_exactly():
    svi = make(schedule=LinearSchedule(10), num_initial_steps=150, num_steps_per_stage=20)
    (message,) = told(svi, 210)
    assert "takes about 330 steps" in message
    assert svi.num_annealing_steps == 330
    pyro.clear_param_store()
    options = {"num_initial_steps": 150, "num_steps_per_stage": 20, "num_training_steps": 400}
    assert told(make(schedule=LinearSchedule(10), **options), 210) == []  # checked at construction


def test_projections_of_known_histories():
    plan, schedule = StepPlan(100, 5, 50), AdaAnnSchedule(0.1, initial_inverse_temperature=0.1)

    def arrival(*times: float, num_latents: int | None = 2, sd: float | None = None) -> Arrival | None:
        stages = [AnnealingStage(t, [0.0] * 5) for t in times]
        return projected_arrival(AnnealingHistory(stages), schedule, plan, num_latents, sd)

    # One stage: what is left of 100 steps and log(10) / .1 = 23.03 stages of 5, 215 in all.
    assert arrival(0.1) == Arrival(220)
    assert arrival(0.1, num_latents=None) is None
    # Two steps in log t of .01 each, ten times as many stages as expected: 15 + 230 * 5.
    assert arrival(0.1, 0.1 * 1.0101, 0.1 * 1.0203) == Arrival(1200)
    # Of .001 each: nothing is known but the least number.
    assert arrival(0.1, 0.1001, 0.1002) == Arrival(130, is_least=True)
    assert arrival(0.1, 0.1001, 0.1002, num_latents=None) == Arrival(12000)
    # An sd of 1 takes 9 stages of .1.
    assert arrival(0.1, sd=1.0) == Arrival(140)
    # Of another adaptive schedule the latest rate is the least one: log(10) / log(2) stages of 7.
    stages = [AnnealingStage(0.025, [0.0] * 7), AnnealingStage(0.05, [0.0] * 7), AnnealingStage(0.1)]
    expected = Arrival(37, is_least=True)
    assert projected_arrival(AnnealingHistory(stages), CESSSchedule(), StepPlan(1, 1, 1), 2) == expected
    budget = StepPlan(100, 5, 50, num_total=400)
    assert projected_arrival(AnnealingHistory([AnnealingStage(0.1)]), schedule, budget, 2) == Arrival(350)
