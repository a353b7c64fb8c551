"""State has one owner: settings are shared without coupling, and whatever changes belongs to one fit."""

from __future__ import annotations

import gc
import logging
import math
import os
import signal
import warnings
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import conjugate_normal
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO

from pyro_adaann import (
    AdaAnnSchedule,
    AdaAnnSVI,
    AnnealingHistory,
    AnnealingStage,
    AutoPlanar,
    CESSSchedule,
    ConstantSchedule,
    CosineSchedule,
    ESSStageRule,
    Ladder,
    LinearSchedule,
    NaturalStep,
    SequenceSchedule,
    TraceMixedKL_ELBO,
)
from pyro_adaann.guide_status import expects_tempered

PROBLEM = conjugate_normal()

#: Fixed schedules, each with the number of its stages.
FIXED = {
    "linear": (LinearSchedule(20, initial_inverse_temperature=0.05), 21),
    "cosine": (CosineSchedule(20, initial_inverse_temperature=0.05), 21),
    "sequence": (SequenceSchedule([0.05 * k for k in range(1, 20)] + [1.0]), 20),
}
ADAPTIVE = {
    "adaann": AdaAnnSchedule(1.0, initial_inverse_temperature=0.05),
    "weighted": AdaAnnSchedule(1.0, initial_inverse_temperature=0.05, weighted=True),
    "cess": CESSSchedule(0.5, initial_inverse_temperature=0.05),
}
#: What a fit is made with after model and guide.
OBJECTIVES = {
    "trace": lambda: (adam(), Trace_ELBO(num_particles=20, vectorize_particles=True)),
    "mixed": lambda: (adam(), TraceMixedKL_ELBO(0.5, num_particles=20)),
    "graph": lambda: (adam(), TraceGraph_ELBO(num_particles=3)),
    "natural": lambda: (NaturalStep(50),),
}


def adam(lr: float = 0.01) -> pyro.optim.PyroOptim:
    return pyro.optim.Adam({"lr": lr})


def make(objective: str = "trace", **kwargs: object) -> AdaAnnSVI:
    pyro.clear_param_store()
    options = {
        "schedule": ADAPTIVE["adaann"],
        "num_initial_steps": 6,
        "num_steps_per_stage": 2,
        "num_final_steps": 6,
    }
    return AdaAnnSVI(
        PROBLEM.model, AutoPlanar(PROBLEM.model, 3), *OBJECTIVES[objective](), **{**options, **kwargs}
    )


# Restarting


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_every_rung_can_be_restarted_from(objective):
    svi = make(objective, ladder=Ladder(0.3))
    svi.run(progress_bar=False)
    rungs = list(svi.ladder.rungs)
    assert len(rungs) > 3
    for rung in reversed(rungs):
        svi.restart(rung)
        assert svi.ladder.rungs[-1] is rung
        assert svi.inverse_temperature == rung.inverse_temperature
        for name, value in rung.values.items():
            assert torch.equal(svi._fit.parameters.tensors[name], value)
        assert not svi._fit.objective.memory  # draws of a guide that is gone
        assert not svi.is_done
        svi.step()
    svi.run(progress_bar=False)
    assert svi.is_done


def test_a_rung_of_another_fit_is_refused(tmp_path):
    svi = make(ladder=Ladder())
    svi.step()
    own = svi.ladder.rungs[0]
    other = make(ladder=Ladder())
    other.step()
    without = make()
    for fit, rung in ((svi, other.ladder.rungs[0]), (without, own)):
        with pytest.raises(ValueError, match="Expected a rung of this fit's ladder"):
            fit.restart(rung)
    svi.save_checkpoint(tmp_path / "x")
    svi.load_checkpoint(tmp_path / "x")
    with pytest.raises(ValueError, match="Expected a rung of this fit's ladder"):
        svi.restart(own)  # the rungs of the file are others
    svi.restart(svi.ladder.rungs[0])


@pytest.mark.parametrize("restart", [lambda svi: svi.restart(), lambda svi: svi.restart(svi.ladder.rungs[0])])
def test_a_run_after_a_restart_takes_its_steps_whatever_the_budget_was(restart):
    svi = make(ladder=Ladder())
    svi.run(progress_bar=False, num_steps=40)
    assert svi.history.num_steps == 40
    restart(svi)
    assert not svi.is_done
    history = svi.run(progress_bar=False)
    assert history.num_steps > 50
    assert svi.inverse_temperature == 1.0
    restart(svi)
    with pytest.warns(UserWarning, match=r"used its steps, 10 with those before.*0.05.*larger `num_steps`"):
        svi.run(progress_bar=False, num_steps=10)


# Recoveries


@pytest.mark.parametrize("objective", ["trace", "mixed", "natural"])
@pytest.mark.parametrize("name", list(FIXED))
def test_a_recovery_leaves_a_fixed_schedule_on_its_grid(name, objective):
    schedule, num_stages = FIXED[name]
    svi = make(objective, schedule=schedule)
    grid = [schedule.initial_inverse_temperature]
    while grid[-1] < 1:
        grid.append(schedule.next(grid[-1]))
    for _ in range(20):
        svi.step()
    svi._fit._recover(False, None, None)  # as after a parameter that is not finite
    assert len(svi.history.recoveries) == 1
    svi.run(progress_bar=False)
    assert [stage.inverse_temperature for stage in svi.history.present_pass] == grid
    assert len(grid) == num_stages == schedule.num_stages


@pytest.mark.parametrize("name", list(ADAPTIVE))
def test_a_recovery_halves_increments_of_adaptive_schedules_until_a_restart(name):
    svi = make(schedule=ADAPTIVE[name], num_variance_samples=100)

    def increment() -> float:
        pyro.set_rng_seed(3)
        t = svi.inverse_temperature
        with expects_tempered():
            return svi._fit.stages._following(svi_call(svi)) - t

    for _ in range(3):
        svi.step()
    whole = increment()
    svi._fit._recover(False, None, None)
    svi._fit.parameters.go_back(svi._fit.net._last_good[0], 1.0)
    assert svi._fit.net.increment_factor == 0.5
    state = svi._fit.net._last_good
    svi.restart()
    assert svi._fit.net.increment_factor == 1.0
    svi._fit.parameters.go_back(state[0], 1.0)
    assert increment() > 0
    assert whole > 0


def svi_call(svi: AdaAnnSVI) -> object:
    from pyro_adaann.steps.base import Call

    return Call(svi.model, svi.guide, (), {}, svi.loss_and_grads, svi.optim)


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_a_recovery_forgets_the_draws_of_the_guide_that_is_gone(objective):
    svi = make(objective)
    for _ in range(4):
        svi.step()
    assert svi._fit.objective.memory
    svi._fit._recover(False, None, None)
    assert not svi._fit.objective.memory
    svi.run(progress_bar=False)
    assert svi.inverse_temperature == 1.0


def test_steps_that_diverge_are_no_progress():
    state = {"is_broken": False}

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("f", z.sum(-1) * (math.nan if state["is_broken"] else 1.0))

    guide, schedule = AutoPlanar(model, 3), SequenceSchedule([0.3, 0.6, 1.0])
    svi = AdaAnnSVI(
        model, guide, adam(), TraceGraph_ELBO(), schedule=schedule, num_initial_steps=3, num_final_steps=3
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pyro's, of what is tested here
        for _ in range(3):
            svi.step()
        state["is_broken"] = True
        for _ in range(10):
            svi.step()
        assert svi.inverse_temperature == 0.6
        state["is_broken"] = False
        svi.run(progress_bar=False)
    stages = svi.history.stages
    assert [stage.num_diverged for stage in stages] == [0, 10, 0]
    assert [stage.num_effective_steps for stage in stages] == [3, 5, 3]


# Records


def test_stages_that_were_gone_back_over_are_not_counted():
    times = [(0.1, True), (0.2, False), (0.5, False), (0.1, True), (0.3, False), (1.0, None)]
    history = AnnealingHistory([AnnealingStage(t, [1.0], is_tracked=tracked) for t, tracked in times])
    assert [stage.inverse_temperature for stage in history.present_pass] == [0.1, 0.3, 1.0]
    assert [stage.inverse_temperature for stage in history.untracked] == [0.3]
    history.stages[4].num_rejected = 1
    assert [stage.inverse_temperature for stage in history.stalled] == [0.3]
    assert history.num_steps == 6
    history.stages[-1].losses.append(2.0)
    assert history.num_steps == 7


def test_the_number_of_stages_of_a_fixed_schedule_is_known_without_counting(monkeypatch):
    monkeypatch.setattr(LinearSchedule, "next", None)
    monkeypatch.setattr(CosineSchedule, "next", None)
    for kind in (LinearSchedule, CosineSchedule):
        assert make(schedule=kind(10**6)).num_annealing_steps == 6 + (10**6 - 1) * 2


# Sharing settings


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_settings_shared_by_two_fits_do_not_couple_them(objective):
    ladder, rule = Ladder(0.3), ESSStageRule(0.3, max_num_steps=5)
    shared = {"schedule": ADAPTIVE["adaann"], "stage_rule": rule if objective != "graph" else None}
    options = {"ladder": ladder, "num_initial_steps": 3, "num_steps_per_stage": 2, "num_final_steps": 4}

    def fit(parts: tuple) -> AdaAnnSVI:
        # Optimizers hold the state of their parameters, as in Pyro: each fit has its own.
        own = parts if objective == "natural" else (adam(), parts[1])
        return AdaAnnSVI(PROBLEM.model, AutoPlanar(PROBLEM.model, 3), *own, **shared, **options)

    def losses(is_side_by_side: bool) -> tuple[list[list[float]], list[list[float]]]:
        fits, results, parts = [], [[], []], OBJECTIVES[objective]()
        for seed in range(2):
            pyro.set_rng_seed(seed)
            fits.append(fit(parts))
        order = [0, 1] * 12 if is_side_by_side else [0] * 12 + [1] * 12
        for k in order:
            pyro.set_rng_seed(100 * k + len(results[k]))
            results[k].append(fits[k].step())
        return results, [[rung.inverse_temperature for rung in f.ladder.rungs] for f in fits]

    with pyro.settings.context(module_local_params=True):
        assert losses(True) == losses(False)
    assert (ladder, rule.target) == (Ladder(0.3), 0.3)


def test_the_users_own_elbo_is_the_one_that_counts():
    elbo = Trace_ELBO(num_particles=5, vectorize_particles=True)
    pyro.clear_param_store()
    svi = AdaAnnSVI(PROBLEM.model, AutoPlanar(PROBLEM.model, 3), adam(), elbo, schedule=FIXED["linear"][0])
    svi.step()
    assert elbo.max_plate_nesting == 2  # the plate of data and that of particles, as after a step of SVI
    assert svi.history.stages[0].num_particles == 5
    elbo.num_particles = 7
    svi.step()
    assert svi.history.stages[0].num_particles == 12
    assert "_get_traces" not in vars(elbo)


# Subclasses and optimizers


class MyTrace(Trace_ELBO):
    """A subclass with nothing of its own."""


class MyMixed(TraceMixedKL_ELBO):
    """Another one."""


class MyEnum(TraceEnum_ELBO):
    """And another."""


@pytest.mark.parametrize(
    ("parent", "child"), [(Trace_ELBO, MyTrace), (TraceMixedKL_ELBO, MyMixed), (TraceEnum_ELBO, MyEnum)]
)
def test_a_subclass_of_a_loss_is_treated_like_its_parent(parent, child):
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        k = (
            pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            if "Enum" in parent.__name__
            else 0
        )
        extra = torch.where(z[..., 0] > 1.0, math.nan, 0.0)
        loc = z[..., 1] + extra + k
        pyro.sample("x", dist.Normal(loc, 1.0, validate_args=False), obs=torch.tensor(0.3))

    results = []
    for kind in (parent, child):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoPlanar(pyro.poutine.block(model, hide=["k"]), 3)
        elbo = kind(num_particles=30, vectorize_particles=True, max_plate_nesting=0)
        svi = AdaAnnSVI(model, guide, adam(), elbo, schedule=SequenceSchedule([0.5, 1.0]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses = [svi.step() for _ in range(3)]
        results.append((str(losses), svi.history.stages[0].num_broken))
    assert results[0] == results[1]
    if parent is not TraceEnum_ELBO:
        assert results[0][1] > 0


def test_sparse_gradients():
    class Guide(pyro.nn.PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(10, 2, sparse=True)

        def forward(self) -> None:
            loc = self.table(torch.tensor([3])).squeeze(0)
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    optim = pyro.optim.PyroOptim(torch.optim.SparseAdam, {"lr": 0.1})
    guide = Guide()
    svi = AdaAnnSVI(
        PROBLEM.model,
        guide,
        optim,
        Trace_ELBO(),
        schedule=SequenceSchedule([0.5, 1.0]),
        num_initial_steps=2,
        num_final_steps=2,
    )
    before = guide.table.weight.detach().clone()
    svi.run(progress_bar=False)
    moved = (guide.table.weight != before).any(1)
    assert moved.nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize(
    "name",
    [
        "Adam",
        "AdamW",
        "Adadelta",
        "Adagrad",
        "Adamax",
        "ASGD",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Rprop",
        "SGD",
        "ClippedAdam",
        "DCTAdam",
        "AdagradRMSProp",
    ],
)
def test_every_optimizer_of_pyro_goes_through_a_fit_a_recovery_and_a_checkpoint(name, tmp_path):
    def fit() -> AdaAnnSVI:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        optim = getattr(pyro.optim, name)({} if name == "AdagradRMSProp" else {"lr": 1e-3})
        guide = AutoPlanar(PROBLEM.model, 3)
        elbo = Trace_ELBO(num_particles=5, vectorize_particles=True)
        return AdaAnnSVI(
            PROBLEM.model,
            guide,
            optim,
            elbo,
            schedule=SequenceSchedule([0.5, 1.0]),
            num_initial_steps=3,
            num_final_steps=6,
        )

    svi = fit()
    for _ in range(5):
        svi.step()
    svi._fit._recover(False, None, None)
    svi.save_checkpoint(tmp_path / "x")
    expected = svi.run(progress_bar=False).losses
    again = fit()
    again.load_checkpoint(tmp_path / "x")
    assert again.run(progress_bar=False).losses == expected


# Buffers


class Normed(pyro.nn.PyroModule):
    """A guide with a running mean, a buffer that every run changes."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(2))
        self.register_buffer("mean", torch.zeros(2))

    def forward(self) -> None:
        z = pyro.sample("z", dist.Normal(self.loc + 0.1 * self.mean, 1.0).to_event(1))
        self.mean = 0.9 * self.mean + 0.1 * z.detach().reshape(-1, 2).mean(0)


def test_buffers_of_a_guide_belong_to_rungs_recoveries_and_checkpoints(tmp_path):
    def fit() -> AdaAnnSVI:
        pyro.clear_param_store()
        elbo = Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1)
        return AdaAnnSVI(
            PROBLEM.model,
            Normed(),
            adam(),
            elbo,
            schedule=SequenceSchedule([0.1, 0.4, 1.0]),
            ladder=Ladder(0.1),
            num_initial_steps=4,
            num_steps_per_stage=2,
            num_final_steps=6,
        )

    svi = fit()
    for _ in range(7):
        svi.step()
    first, second = svi.ladder.rungs[:2]
    means = [rung.values["guide buffer mean"] for rung in (first, second)]
    assert not torch.equal(*means)
    svi.save_checkpoint(tmp_path / "x")
    expected = [svi.step() for _ in range(4)]
    other = fit()
    other.load_checkpoint(tmp_path / "x")
    assert [other.step() for _ in range(4)] == expected
    svi._fit._recover(False, None, None)
    assert torch.equal(svi.guide.mean, svi._fit.net._last_good[0]["values"]["guide buffer mean"])
    svi.restart(second)
    assert torch.equal(svi.guide.mean, means[1])


# The end of a driver


def test_a_driver_that_is_gone_holds_neither_model_nor_guide():
    class Analysis:
        def __init__(self) -> None:
            guide = AutoPlanar(PROBLEM.model, 3)
            elbo = Trace_ELBO(num_particles=5, vectorize_particles=True)
            self.svi = AdaAnnSVI(self.model, guide, adam(), elbo)

        def model(self) -> None:
            PROBLEM.model()

    pyro.clear_param_store()
    analysis = Analysis()
    analysis.svi.step()
    watch = weakref.ref(analysis)
    del analysis
    gc.collect()
    assert watch() is None


def test_few_steps_are_no_training_and_many_fits_are_a_few_lines(caplog, monkeypatch):
    from pyro_adaann.state import unfinished

    gc.collect()
    monkeypatch.setattr(unfinished, "_num_lines", 0)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="pyro_adaann"):
        for num_steps in [5] * 3 + [100] * 8:
            svi = make(num_initial_steps=500)
            svi._fit.history.stages[0].losses += [1.0] * num_steps
            del svi
            gc.collect()
    assert len(caplog.records) == 5
    assert "not reported" in caplog.records[-1].getMessage()


# Ctrl-C


@pytest.mark.usefixtures("interruptible")
def test_a_second_ctrl_c_within_an_update_waits_for_its_end(tmp_path):
    class Interrupted(torch.optim.SGD):
        def step(self, closure: None = None) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            super().step()

    optim = pyro.optim.PyroOptim(Interrupted, {"lr": 1.0})
    pyro.clear_param_store()
    guide = AutoPlanar(PROBLEM.model, 3)
    elbo = Trace_ELBO(num_particles=5, vectorize_particles=True)
    svi = AdaAnnSVI(PROBLEM.model, guide, optim, elbo, schedule=ConstantSchedule())
    guide()
    before = [parameter.detach().clone() for parameter in guide.parameters()]
    with pytest.warns(UserWarning, match="interrupted"):
        svi.run(progress_bar=False, checkpoint=tmp_path / "x")
    assert all(not torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))
    assert svi.history.interrupted


def test_masks_of_guide_sites_count_in_the_fixed_density():
    from pyro_adaann.objectives.fixed_density import fixed_log_density

    mask = torch.tensor([True, False, True])

    def guide() -> None:
        loc = pyro.param("loc", torch.zeros(3))
        with pyro.plate("rows", 3), pyro.poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(loc, 1.0))

    trace = pyro.poutine.trace(guide).get_trace()
    trace.compute_log_prob()
    (grad,) = torch.autograd.grad(fixed_log_density(trace).sum(), pyro.param("loc").unconstrained())
    assert grad[1] == 0
    assert (grad[mask] != 0).all()
