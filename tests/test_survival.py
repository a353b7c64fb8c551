"""Faults injected into a fit: what it does about them, and that nothing of them reaches the posterior."""

from __future__ import annotations

import itertools
import math
import os
import signal

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import conjugate_normal
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoNormal
from torch import Tensor

from pyro_adaann import (
    AdaAnnSchedule,
    AdaAnnSVI,
    AutoPlanar,
    ConstantSchedule,
    Ladder,
    LinearSchedule,
    SequenceSchedule,
)

PROBLEM = conjugate_normal()


class FaultyAdam(torch.optim.Adam):
    """Adam that puts ``fault`` into the parameter or its own memory at the steps ``at``."""

    def __init__(self, params: object, lr: float, where: str, fault: float, at: set[int]) -> None:
        super().__init__(params, lr=lr)
        self.where, self.fault, self.at, self.count = where, fault, at, 0

    def step(self, closure: None = None) -> None:
        super().step()
        self.count += 1
        if self.count in self.at:
            for parameter, memory in self.state.items():
                target = parameter if self.where == "parameter" else memory[self.where]
                with torch.no_grad():
                    target.view(-1)[0] = self.fault


def faulty(where: str, fault: float, at: set[int]) -> pyro.optim.PyroOptim:
    return pyro.optim.PyroOptim(FaultyAdam, {"lr": 0.01, "where": where, "fault": fault, "at": at})


def learning_rates(svi: AdaAnnSVI) -> set[float]:
    return {group["lr"] for o in svi.optim.optim_objs.values() for group in o.param_groups}


def take_steps(svi: AdaAnnSVI, num_steps: int) -> None:
    for _ in range(num_steps):
        svi.step()


def make(optim: pyro.optim.PyroOptim | None = None, **kwargs: object) -> AdaAnnSVI:
    pyro.clear_param_store()
    options = {
        "schedule": AdaAnnSchedule(1.0, initial_inverse_temperature=0.1),
        "num_initial_steps": 20,
        "num_steps_per_stage": 5,
        "num_final_steps": 40,
    }
    elbo = Trace_ELBO(num_particles=10, vectorize_particles=True)
    optim = optim or pyro.optim.Adam({"lr": 0.01})
    guide = AutoPlanar(PROBLEM.model, 3)
    return AdaAnnSVI(PROBLEM.model, guide, optim, elbo, **{**options, **kwargs})


@pytest.mark.parametrize("fault", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["parameter", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("at", [{1}, {12, 31}])
def test_a_parameter_or_memory_that_is_not_finite_costs_no_run(where, fault, at):
    svi = make(faulty(where, fault, at), schedule=LinearSchedule(4, initial_inverse_temperature=0.1))
    history = svi.run(progress_bar=False)
    assert svi.is_done
    assert len(history.recoveries) == len(at)
    assert [recovery.num_steps for recovery in history.recoveries] == sorted(at)
    assert all("memory" in recovery.cause for recovery in history.recoveries)
    assert learning_rates(svi) == {0.01 * 0.5 ** len(at)}
    assert all(map(math.isfinite, history.losses))
    assert svi._fit.parameters.is_finite()


def test_after_a_recovery_the_increments_are_smaller():
    plain = make().run(progress_bar=False)
    history = make(faulty("parameter", math.nan, {22})).run(progress_bar=False)
    assert history.recoveries[0].back_to == 0.1
    assert len(history.stages) > 1.5 * len(plain.stages)
    assert history.inverse_temperatures[-1] == 1.0


def test_a_parameter_with_two_names_gets_half_the_rate_and_not_a_quarter():
    guide = AutoIAFNormal(PROBLEM.model)
    optim = pyro.optim.Adam({"lr": 0.01})
    svi = AdaAnnSVI(PROBLEM.model, guide, optim, Trace_ELBO(), ladder=Ladder())
    svi.step()
    tensors = svi._fit.parameters.tensors
    assert len(set(tensors.values())) < len(tensors)
    svi._fit.net.go_back(1, "a test")
    assert learning_rates(svi) == {0.005}
    svi.restart(svi.ladder.rungs[0])
    assert learning_rates(svi) == {0.005}  # half of that of then


def test_recoveries_are_bounded_and_the_good_state_is_kept():
    svi = make(faulty("parameter", math.nan, set(range(15, 1000))))
    with pytest.raises(ValueError, match=r"spite of 10 returns.*stage \d+ \(sites.*last good ones"):
        svi.run(progress_bar=False)
    assert len(svi.history.recoveries) == 10
    assert svi._fit.parameters.is_finite()


@pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")
@pytest.mark.parametrize("num_faults", [1, 19, 20, 45])
def test_losses_that_are_not_finite_for_a_while(num_faults):
    state = {"run": 0}

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        state["run"] += 1
        # One more: the first step at fault runs twice, again without validation.
        is_faulty = 30 < state["run"] <= 31 + num_faults
        pyro.factor("f", z.sum(-1) * (math.nan if is_faulty else 1.0))

    guide = AutoPlanar(model, 3)
    schedule = SequenceSchedule([0.3, 0.6, 1.0])
    optim = pyro.optim.Adam({"lr": 0.01})
    svi = AdaAnnSVI(
        model, guide, optim, TraceGraph_ELBO(), schedule=schedule, num_initial_steps=20, num_final_steps=80
    )
    history = svi.run(progress_bar=False)
    assert sum(stage.num_rejected for stage in history.stages) == num_faults
    assert len(history.recoveries) == num_faults // 20
    assert svi._fit.parameters.is_finite()
    assert svi.inverse_temperature == 1.0


def test_a_gradient_whose_square_overflows_does_not_freeze_the_optimizer():
    state = {"slope": 1.0}

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("f", -state["slope"] * (z - 3).abs().sum(-1))

    def run(svi_type: type[SVI], **kwargs: object) -> tuple[SVI, Tensor]:
        pyro.clear_param_store()
        guide = AutoNormal(model)
        svi = svi_type(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), **kwargs)
        for i in range(40):
            state["slope"] = 1e25 if i == 10 else 1.0
            svi.step()
            if i == 20:
                before = guide.locs.z.detach().clone()
        return svi, (guide.locs.z.detach() - before).abs().min()

    # Plain SVI stands still from then on.
    assert run(SVI)[1] == 0
    svi, moved = run(AdaAnnSVI, schedule=ConstantSchedule())
    assert moved > 0.05
    assert svi.history.stages[0].num_rejected == 1


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_after_the_step_and_run_goes_on():
    whole = make().run(progress_bar=False).losses
    pyro.set_rng_seed(0)
    svi = make()
    plain = svi.loss_and_grads

    def interrupted(*args: object) -> float:
        if svi.history.num_steps == 33:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*args)

    svi.loss_and_grads = interrupted
    handler = signal.getsignal(signal.SIGINT)
    with pytest.warns(
        UserWarning, match=r"interrupted at inverse temperature .* after 34 steps.*`run` again"
    ):
        history = svi.run(progress_bar=False)
    assert signal.getsignal(signal.SIGINT) is handler
    assert history.num_steps == 34
    assert history.interrupted
    assert history is svi.history
    svi.run(progress_bar=False)
    pyro.set_rng_seed(0)
    assert svi.history.losses == make().run(progress_bar=False).losses
    assert len(whole) > 50


@pytest.mark.usefixtures("interruptible")
def test_a_second_ctrl_c_ends_a_step_that_hangs(tmp_path):
    svi = make()
    plain = svi.loss_and_grads

    def interrupted(*args: object) -> float:
        if svi.history.num_steps == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*args)

    svi.loss_and_grads = interrupted
    with pytest.warns(UserWarning, match="after 5 steps"):
        svi.run(progress_bar=False, checkpoint=tmp_path / "x")
    assert (tmp_path / "x").exists()
    svi.loss_and_grads = plain
    svi.run(progress_bar=False)
    assert svi.is_done


@pytest.mark.parametrize("num_steps", [60, 150, 400])
@pytest.mark.parametrize("tolerance", [1e-4, 0.1, 10.0])
def test_a_budget_is_kept_whatever_the_tolerance(num_steps, tolerance):
    schedule = AdaAnnSchedule(tolerance, initial_inverse_temperature=0.01)
    svi = make(schedule=schedule, num_steps_per_stage=2)
    history = svi.run(progress_bar=False, num_steps=num_steps)
    assert history.num_steps == num_steps
    assert svi.is_done
    assert svi.inverse_temperature == 1.0
    share = min(1.0, num_steps / 2 / 60)  # both ends are shortened to half of all steps
    expected = 40 * share
    # Exact but for the rounding to whole stages.
    assert abs(history.stages[-1].num_steps - expected) <= 2
    assert history.stages[0].num_steps == int(20 * share)
    # No jump at the end: the last increments are like those before.
    if num_steps >= 400:
        times = history.inverse_temperatures
        increments = [math.log(b / a) for a, b in itertools.pairwise(times)]
        assert max(increments[-10:]) < 4 * sorted(increments)[len(increments) // 2]


def test_a_budget_counts_the_steps_before_it_and_can_be_raised():
    svi = make()
    for _ in range(10):
        svi.step()
    assert svi.run(progress_bar=False, num_steps=200).num_steps == 200
    assert svi.run(progress_bar=False, num_steps=200).num_steps == 200
    assert svi.run(progress_bar=False, num_steps=230).num_steps == 230
    assert svi.run(progress_bar=False, num_steps=100).num_steps == 230


def test_a_budget_for_schedules_that_do_not_adapt():
    schedule = LinearSchedule(10, initial_inverse_temperature=0.1)
    history = make(schedule=schedule).run(progress_bar=False, num_steps=100)
    assert history.num_steps == 100
    assert [s.num_steps for s in history.stages] == [20] + 9 * [5] + [35]
    with pytest.raises(ValueError, match=r"`num_steps` >= 66.*got 65"):
        make(schedule=schedule).run(progress_bar=False, num_steps=65)
    assert make(schedule=ConstantSchedule()).run(progress_bar=False, num_steps=7).num_steps == 7
    for bad in (0, 1.5, True):
        with pytest.raises(ValueError, match="num_steps"):
            make().run(progress_bar=False, num_steps=bad)


def test_the_bar_shows_the_budget(capsys):
    make().run(num_steps=120)
    assert "120/120" in capsys.readouterr().err


def test_a_schedule_without_end_says_so_early():
    svi = make(schedule=AdaAnnSchedule(1e-6, initial_inverse_temperature=0.01), num_initial_steps=1)
    with pytest.warns(UserWarning, match=r"takes about [\d,]+ steps.*num_steps.*larger tolerance") as warned:
        take_steps(svi, 100)
    assert len(warned) == 1
    take_steps(svi, 200)  # once


def test_two_guides_of_one_class_do_not_share_parameters():
    make().step()
    guide = AutoPlanar(PROBLEM.model, 3)
    second = AdaAnnSVI(PROBLEM.model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    with pytest.raises(ValueError, match=r"parameters of its own.*clear_param_store.*module_local_params"):
        second.step()


def test_two_normal_guides_do_not_share_parameters():
    # Pyro's own guides take over what they find in the store, both living guides then are one.
    guides = [AutoNormal(PROBLEM.model) for _ in range(2)]
    fits = [AdaAnnSVI(PROBLEM.model, g, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()) for g in guides]
    fits[0].step()
    before = guides[0].locs.z.clone()
    with pytest.raises(ValueError, match="parameters of its own"):
        fits[1].step()
    assert torch.equal(guides[0].locs.z, before)


@pytest.mark.parametrize("make_guide", [AutoNormal, lambda model: AutoPlanar(model, 3)])
@pytest.mark.parametrize("how", ["local", "scope"])
def test_two_fits_side_by_side_are_two_fits_one_after_the_other(make_guide, how):
    def fit() -> AdaAnnSVI:
        elbo = Trace_ELBO(num_particles=2)
        guide = make_guide(PROBLEM.model)
        schedule = SequenceSchedule([0.2, 1.0])
        return AdaAnnSVI(PROBLEM.model, guide, pyro.optim.Adam({"lr": 0.01}), elbo, schedule=schedule)

    store = pyro.get_param_store()

    def losses(side_by_side: bool) -> list[list[float]]:
        fits, scopes, results = [], [None, None], [[], []]
        for seed in range(2):
            pyro.set_rng_seed(seed)
            fits.append(fit())
        order = [0, 1] * 10 if side_by_side else [0] * 10 + [1] * 10
        for k in order:
            pyro.set_rng_seed(100 * k + len(results[k]))
            if how == "local":
                results[k].append(fits[k].step())
            else:
                with store.scope(scopes[k]) as scopes[k]:
                    results[k].append(fits[k].step())
        return results

    with pyro.settings.context(module_local_params=how == "local"):
        assert losses(True) == losses(False)
    assert not len(store)


def test_a_second_fit_of_a_guide_goes_on_from_its_parameters():
    first = make()
    first.run(progress_bar=False)
    before = {name: value.detach().clone() for name, value in first.guide.named_parameters()}
    second = AdaAnnSVI(
        PROBLEM.model, first.guide, pyro.optim.Adam({"lr": 1e-9}), Trace_ELBO(), schedule=ConstantSchedule()
    )
    second.step()
    for name, value in first.guide.named_parameters():
        torch.testing.assert_close(value, before[name], atol=1e-7, rtol=0)
