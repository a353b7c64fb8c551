"""Whatever hands out draws of a guide below inverse temperature 1 warns, once, and nothing else does."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import conjugate_normal
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.nn import PyroModule
from torch import nn

from pyro_adaann import (
    AdaAnnSchedule,
    AdaAnnSVI,
    AutoPlanar,
    ConstantSchedule,
    Ladder,
    LinearSchedule,
    NaturalStep,
    diagnose,
    find_lost_parts,
    importance_draws,
    plots,
    to_arviz,
)

PROBLEM = conjugate_normal()
#: Three stages of one step, at .01, .505 and 1.
THREE = {
    "schedule": LinearSchedule(2),
    "num_initial_steps": 1,
    "num_steps_per_stage": 1,
    "num_final_steps": 1,
}
#: What hands out draws, with the words that the warning begins with.
DOORS = {
    "sample_posterior": (lambda guide: guide.sample_posterior(3), "A draw of sample_posterior"),
    "call": (lambda guide: guide(), "A draw by a call of the guide"),
    "Predictive": (lambda guide: Predictive(PROBLEM.model, guide=guide, num_samples=2)(), "A draw by a call"),
    "quantiles": (lambda guide: guide.quantiles([0.5]), "A quantile"),
    "median": (lambda guide: guide.median(), "A median"),
}


def make(guide=None, *parts, **options) -> AdaAnnSVI:
    guide = AutoPlanar(PROBLEM.model, 2) if guide is None else guide
    elbo = Trace_ELBO(num_particles=10, vectorize_particles=True)
    parts = parts or (pyro.optim.Adam({"lr": 0.01}), elbo)
    return AdaAnnSVI(PROBLEM.model, guide, *parts, **{**THREE, **options})


def messages(run) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("door", list(DOORS))
def test_draws_below_1_warn_once_for_every_door(door):
    svi = make()
    run, words = DOORS[door]
    assert messages(lambda: run(svi.guide)) == []  # no fit has changed it
    svi.step()
    (message,) = messages(lambda: run(svi.guide))
    assert message.startswith(words)
    assert "inverse temperature 0.01, in stage 1, after 1 steps; it takes about 2 to arrive at 1" in message
    assert messages(lambda: run(svi.guide)) == []
    svi.step()
    svi.step()
    assert svi.inverse_temperature == 1
    pyro.clear_param_store()
    other = make()
    other.run(progress_bar=False)
    assert messages(lambda: run(other.guide)) == []
    assert not other.guide._forward_pre_hooks


@pytest.mark.parametrize("kind", ["AutoNormal", "list", "module", "method", "scaled"])
def test_guides_of_others_warn_when_they_are_called(kind):
    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(2))

        def draw(self) -> None:
            pyro.module("own", self)
            pyro.sample("z", dist.Normal(self.loc, 1.0).to_event(1))

        def forward(self) -> None:
            self.draw()

    guide = Guide() if kind in ("module", "method") else AutoNormal(PROBLEM.model)
    part = AutoPlanar(PROBLEM.model, 2)
    if kind == "list":
        guide = AutoGuideList(PROBLEM.model)
        guide.append(part)
    given = {"method": lambda: guide.draw, "scaled": lambda: poutine.mask(guide, mask=True)}
    svi = make(given.get(kind, lambda: guide)())
    svi.step()
    (message,) = messages(guide)
    assert message.startswith("A draw by a call of the guide")
    assert len(messages(lambda: part.sample_posterior(2))) == (kind == "list")


def test_a_model_that_has_its_guide_as_a_method_is_called_without_a_warning():
    class Both(PyroModule):
        def forward(self) -> None:
            pyro.sample("z", dist.Normal(0.0, 1.0))

        def guide(self) -> None:
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))

    both = Both()
    AdaAnnSVI(both, both.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step()
    assert messages(Predictive(both, num_samples=2)) == []  # draws of the prior


def test_training_diagnostics_and_exports_expect_it():
    svi = make(ladder=Ladder(), num_steps_per_stage=20, num_variance_samples=20)
    for _ in range(3):
        svi.step()
    assert svi.inverse_temperature < 1

    def use() -> None:
        diagnose(svi, num_samples=100)
        importance_draws(svi, num_samples=100)
        find_lost_parts(svi, num_samples=100)
        plots.plot_schedule(svi.history)
        svi.step()

    # Their own messages name the inverse temperature; none is that of the guide.
    assert not [m for m in messages(use) if "posterior: the guide is at" in m]
    pytest.importorskip("arviz")
    assert not [m for m in messages(lambda: to_arviz(svi, num_samples=100)) if "A draw" in m]


def test_the_warning_points_to_the_users_line():
    svi = make()
    svi.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for run, _ in DOORS.values():
            run(svi.guide)
    assert [warning.filename for warning in caught] == [__file__] * 4


def test_a_natural_step_warns_too():
    svi = make(None, NaturalStep(50))
    svi.step()
    assert len(messages(svi.guide)) == 1


def test_a_copy_has_no_status():
    svi = make()
    svi.step()
    for other in (copy.deepcopy(svi.guide), pickle.loads(pickle.dumps(svi.guide))):
        assert messages(other) == []
        assert messages(partial(other.sample_posterior, 2)) == []
    assert len(messages(svi.guide)) == 1


def test_a_resumed_fit_warns(tmp_path):
    svi = make()
    svi.step()
    svi.save_checkpoint(tmp_path / "x")
    pyro.clear_param_store()
    other = make()
    other.load_checkpoint(tmp_path / "x")
    assert len(messages(other.guide)) == 1
    other.run(progress_bar=False)
    assert messages(other.guide) == []


def test_a_restart_warns_again_and_the_end_of_the_driver_changes_nothing():
    svi = make()
    svi.run(progress_bar=False)
    svi.restart()
    svi.step()
    guide = svi.guide
    del svi
    gc.collect()
    assert len(messages(guide)) == 1
    watch = weakref.ref(guide)
    del guide
    pyro.clear_param_store()
    gc.collect()
    assert watch() is None


def test_a_schedule_that_ends_below_1_is_meant_to():
    svi = make(schedule=ConstantSchedule(0.3))
    svi.step()
    assert messages(svi.guide) == []


# --- other ways to stay below 1 ------------------------------------------------------------------------


@pytest.mark.parametrize("is_function", [False, True])
def test_a_second_fit_that_anneals_a_guide_away_says_so(is_function):
    def function() -> None:
        loc = pyro.param("loc", torch.zeros(2))
        pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    guide = function if is_function else AutoPlanar(PROBLEM.model, 2)
    make(guide).run(progress_bar=False)
    assert messages(make(guide, schedule=ConstantSchedule()).step) == []
    second = make(guide)
    (message,) = messages(second.step)
    assert "brought this guide to inverse temperature 1, and this one begins at 0.01" in message
    assert "schedule=ConstantSchedule()" in message
    assert messages(second.step) == []
    pyro.clear_param_store()
    if is_function:  # its parameters are new
        assert messages(make(guide).step) == []


def test_a_fit_that_goes_on_where_the_first_stopped_is_left_alone():
    svi = make(schedule=AdaAnnSchedule(0.1))
    svi.step()
    assert messages(make(svi.guide, schedule=AdaAnnSchedule(0.1)).step) == []
    svi = make(svi.guide, schedule=ConstantSchedule(0.3))
    svi.step()
    (message,) = messages(make(svi.guide).step)
    assert "AdaAnnSchedule(initial_inverse_temperature=0.3)" in message


def test_a_loop_over_the_gradients_says_that_it_stays_there():
    svi = make()

    def loop() -> None:
        for _ in range(3):
            with poutine.trace(param_only=True) as capture:
                svi.loss_and_grads(svi.model, svi.guide)
            svi.optim({site["value"].unconstrained() for site in capture.trace.nodes.values()})
            svi.loss(svi.model, svi.guide)

    (message,) = messages(loop)
    assert "`loss_and_grads` of an AdaAnnSVI is called at inverse temperature 0.01" in message
    svi.run(progress_bar=False)
    assert messages(lambda: svi.loss(svi.model, svi.guide)) == []


def test_a_driver_that_was_never_stepped_says_so():
    guide = AutoPlanar(PROBLEM.model, 2)
    trained = SVI(PROBLEM.model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    trained.step()
    (message,) = messages(make(guide).evaluate_loss)
    assert "inverse temperature 0.01, after 0 steps" in message
