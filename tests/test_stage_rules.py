"""Stage rules, and what the driver makes of them."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import conjugate_normal
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_adaann import (
    AdaAnnSchedule,
    AdaAnnSVI,
    AutoPlanar,
    CESSSchedule,
    ConstantSchedule,
    ESSStageRule,
    LinearSchedule,
    StageRule,
    TraceMixedKL_ELBO,
)


def make_svi(**kwargs) -> AdaAnnSVI:
    problem = conjugate_normal()
    elbo = Trace_ELBO(num_particles=50, vectorize_particles=True)
    settings = {"schedule": LinearSchedule(4), "num_initial_steps": 3, "num_steps_per_stage": 2} | kwargs
    guide = AutoPlanar(problem.model, 4, base_scale=2.0)
    return AdaAnnSVI(problem.model, guide, pyro.optim.Adam({"lr": 0.01}), elbo, num_final_steps=4, **settings)


class After(StageRule):
    """A stage has so many steps, and what it sees is written down."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.seen: list[tuple[int, float]] = []

    def is_over(self, num_steps: int, ess: float) -> bool:
        self.seen.append((num_steps, ess))
        return num_steps >= self.num_steps

    def is_met(self, ess: float) -> bool:
        return False


def test_a_rule_decides_how_long_a_stage_is():
    rule = After(5)
    history = make_svi(stage_rule=rule).run(progress_bar=False)
    assert [stage.num_steps for stage in history.stages] == [5, 5, 5, 5, 4]
    # Asked from the planned number of steps on: 3 in the first stage, 2 in the others.
    assert [n for n, _ in rule.seen] == [3, 4, 5] + 3 * [2, 3, 4, 5]
    assert all(0 < ess <= 1 for _, ess in rule.seen)
    assert [stage.is_tracked for stage in history.stages] == 4 * [False] + [None]
    assert len(history.untracked) == 4


def test_a_guide_that_has_fallen_behind_has_fewer_steps_until_it_is_tracked():
    class Falls(ESSStageRule):
        """Met in the stages of the given numbers alone."""

        def is_met(self, ess: float) -> bool:
            return len(svi.history.stages) in (4,)

        def is_over(self, num_steps: int, ess: float) -> bool:
            return num_steps >= self.max_num_steps

    rule = Falls(0.9, max_num_steps=9, max_num_untracked=2)
    svi = make_svi(stage_rule=rule, schedule=LinearSchedule(8))
    history = svi.run(progress_bar=False)
    # Two in a row ran out of nine steps; the fourth is tracked, so that two more have nine.
    assert [stage.num_steps for stage in history.stages] == [9, 9, 3, 3, 9, 9, 3, 3, 4]
    assert [stage.is_tracked for stage in history.stages][:4] == [False, False, False, True]
    assert rule.max_num_steps == 9
    assert ESSStageRule(0.5).after(1000).max_num_steps == 200


def test_a_rule_that_is_met_at_once_changes_nothing():
    class Always(After):
        def is_met(self, ess: float) -> bool:
            return True

    losses = []
    for rule in (None, Always(0)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        losses.append(make_svi(stage_rule=rule).run(progress_bar=False).losses)
    assert losses[0] == losses[1]


def test_the_effective_sample_size_is_that_against_the_tempered_density():
    """q = N(0, s^2) against p_t = N(0, 1/t): E_q[w]^2 / E_q[w^2] in closed form."""
    t, s = 0.25, 3.0

    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    rule = After(1)
    elbo = Trace_ELBO(num_particles=100_000, vectorize_particles=True)
    guide = AutoPlanar(model, 1, base_loc=0.0, base_scale=s, affine=None)
    guide.initialize()
    with torch.no_grad():
        guide.transform.u.zero_()
    schedule = LinearSchedule(2, initial_inverse_temperature=t)
    svi = AdaAnnSVI(
        model,
        guide,
        pyro.optim.SGD({"lr": 0.0}),
        elbo,
        schedule=schedule,
        stage_rule=rule,
        num_initial_steps=1,
    )
    svi.step()
    svi.step()
    # With precisions a = t and b = 1 / s^2: E_q[w] and E_q[w^2] are Gaussian integrals.
    a, b = t, s**-2
    expected = math.sqrt(b * (2 * a - b)) / a
    # The relative error of n draws is about 1 / sqrt(n) = 0.3 %; 3 % is ten of those.
    assert rule.seen[0][1] == pytest.approx(expected, rel=0.03)


def test_ess_rule():
    rule = ESSStageRule(0.4, max_num_steps=7)
    assert [rule.is_over(*seen) for seen in ((6, 0.39), (7, 0.39), (1, 0.4))] == [False, True, True]
    assert [rule.is_met(ess) for ess in (0.39, 0.4)] == [False, True]
    wrong = [{"target": 0.0}, {"target": 1.0}, {"max_num_steps": 0}, {"patience": 0, "least": 0.1}]
    wrong += [{"patience": 3}, {"least": 0.1}, {"patience": 3, "least": 0.31}, {"patience": 3, "least": 0.0}]
    for arguments in wrong:
        with pytest.raises(ValueError, match="Expected"):
            ESSStageRule(**arguments)


def test_a_rule_with_patience_takes_less_after_some_steps():
    rule = ESSStageRule(0.8, max_num_steps=20, patience=4, least=0.5)
    assert [rule.is_over(3, ess) for ess in (0.79, 0.8)] == [False, True]
    assert [rule.is_over(4, ess) for ess in (0.49, 0.5)] == [False, True]
    assert rule.is_over(20, 0.1)
    # A stage that ends by either is tracked.
    assert [rule.is_met(ess) for ess in (0.49, 0.5)] == [False, True]


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match="StageRule"):
        make_svi(stage_rule=0.3)
    with pytest.raises(ValueError, match="kl_warmup"):
        make_svi(stage_rule=ESSStageRule(), path="kl_warmup")
    with pytest.raises(ValueError, match="num_steps"):
        make_svi(stage_rule=ESSStageRule()).run(num_steps=100, progress_bar=False)
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True)
    with pytest.raises(ValueError, match="one of `final_loss` and `num_final_particles`"):
        make_svi(final_loss=elbo, num_final_particles=3)
    with pytest.raises(ValueError, match="final_loss"):
        make_svi(final_loss=3)


def test_the_final_loss_is_used_at_one():
    class Counted(TraceMixedKL_ELBO):
        num_calls = 0

        def loss_and_grads(self, *args, **kwargs):
            type(self).num_calls += 1
            return super().loss_and_grads(*args, **kwargs)

    svi = make_svi(final_loss=Counted(0.5, num_particles=20))
    history = svi.run(progress_bar=False)
    assert Counted.num_calls == history.stages[-1].num_steps == 4


def test_any_elbo_has_weights_for_a_rule():
    problem = conjugate_normal()
    elbo = TraceGraph_ELBO(num_particles=20, vectorize_particles=True)
    rule = ESSStageRule(0.5, max_num_steps=30)
    svi = AdaAnnSVI(
        problem.model,
        AutoNormal(problem.model),
        pyro.optim.Adam({"lr": 0.05}),
        elbo,
        schedule=AdaAnnSchedule(0.5, weighted=True),
        stage_rule=rule,
        num_initial_steps=5,
        num_final_steps=5,
    )
    history = svi.run(progress_bar=False)
    assert svi.inverse_temperature == 1
    assert all(s.is_tracked or s.num_steps == 30 for s in history.stages[:-1])


def test_nothing_to_wait_for_without_annealing():
    svi = make_svi(stage_rule=ESSStageRule(), schedule=ConstantSchedule())
    svi.run(progress_bar=False)
    assert svi.history.stages[0].is_tracked is None


def test_cess_and_the_weighted_rule_need_no_fresh_draws():
    for schedule in (CESSSchedule(0.8), AdaAnnSchedule(0.5, weighted=True)):
        pyro.clear_param_store()
        history = make_svi(schedule=schedule, stage_rule=ESSStageRule(max_num_steps=20)).run(
            progress_bar=False
        )
        times = history.inverse_temperatures
        assert times[-1] == 1
        assert all(b <= 2 * a for a, b in itertools.pairwise(times))
