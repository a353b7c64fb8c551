"""`AdaAnnSVI` in a program that was written for `SVI`: arguments, loops of a given length, reports."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pyro
import pytest
import torch
from problems import conjugate_normal
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_adaann import AdaAnnSchedule, AdaAnnSVI, AutoPlanar, ConstantSchedule, LinearSchedule
from pyro_adaann.state import progress

PROBLEM = conjugate_normal()


def make(loss=None, *args, **kwargs) -> AdaAnnSVI:
    guide = AutoPlanar(PROBLEM.model, 2)
    elbo = Trace_ELBO(num_particles=10, vectorize_particles=True)
    return AdaAnnSVI(PROBLEM.model, guide, pyro.optim.Adam({"lr": 0.01}), loss or elbo, *args, **kwargs)


# --- the arguments of SVI ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SVI, AdaAnnSVI])
def test_the_fifth_positional_argument_gives_the_gradients(kind):
    calls = []

    def loss_and_grads(model, guide, *args):
        calls.append(1)
        loss = Trace_ELBO().differentiable_loss(model, guide, *args)
        loss.backward()
        return loss

    guide = AutoNormal(PROBLEM.model)
    optim = pyro.optim.Adam({"lr": 0.01})
    kind(PROBLEM.model, guide, optim, Trace_ELBO().differentiable_loss, loss_and_grads).step()
    assert calls == [1]


@pytest.mark.parametrize("name", ["num_samples", "num_steps"])
def test_deprecated_arguments_of_svi_warn_as_there(name):
    with pytest.warns(FutureWarning, match=f"`{name}` argument to SVI is deprecated"):
        svi = make(schedule=AdaAnnSchedule(0.5), **{name: 40})
    if name == "num_steps":
        assert svi.run(progress_bar=False).num_steps == 40


# --- a loop of a given length --------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [60, 300])
def test_a_loop_of_known_length_arrives_at_1_with_steps_left(num_steps):
    svi = make(num_training_steps=num_steps)
    for _ in range(num_steps):
        svi.step()
    stages = svi.history.stages
    assert svi.inverse_temperature == 1.0
    assert svi.is_done
    assert len(stages) >= 5
    # `plan_steps` leaves half of a tenth of 500 to 5,000 steps, 45 %, to the end; a fifth is a share, too.
    assert stages[-1].num_steps >= num_steps / 5


def test_it_is_the_plan_of_run():
    def temperatures(is_loop: bool) -> list[float]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = make(num_training_steps=80 if is_loop else None)
        if not is_loop:
            return svi.run(progress_bar=False, num_steps=80).inverse_temperatures
        for _ in range(80):
            svi.step()
        return svi.history.inverse_temperatures

    assert temperatures(True) == temperatures(False)


# --- a callable loss -----------------------------------------------------------------------------------


def blind_loss(model, guide, *args):
    """Minus the ELBO by the distributions' own densities, which have no scale."""
    guide_trace = poutine.trace(guide).get_trace(*args)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args)
    return sum(
        sign * site["fn"].log_prob(site["value"]).sum()
        for trace, sign in ((guide_trace, 1), (model_trace, -1))
        for site in trace.nodes.values()
        if site["type"] == "sample"
    )


@pytest.mark.parametrize("path", ["joint", "likelihood", "bridge"])
@pytest.mark.parametrize("t", [1e-8, 0.3, 0.99])
def test_a_callable_loss_that_does_not_see_scales_is_refused(path, t):
    svi = make(blind_loss, path=path, schedule=LinearSchedule(5, initial_inverse_temperature=t))
    with pytest.raises(ValueError, match=r"depends on the scales of sites.*got blind_loss"):
        svi.step()
    assert all(p.grad is None or not p.grad.any() for p in svi.guide.parameters())
    pyro.clear_param_store()
    make(blind_loss, schedule=ConstantSchedule()).step()


def test_a_callable_loss_that_sees_scales_is_checked_without_a_trace():
    def sighted_loss(model, guide, *args):
        sighted_loss.calls += 1
        return Trace_ELBO().differentiable_loss(model, guide, *args)

    sighted_loss.calls = 0
    svi = make(sighted_loss)
    losses = [svi.step() for _ in range(3)]
    assert sighted_loss.calls == 5  # two of them for the check
    # The same draws as of a fit that is not checked.
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = make(Trace_ELBO())
    assert [svi.step() for _ in range(3)] == pytest.approx(losses)


# --- reports -------------------------------------------------------------------------------------------


def test_a_loss_below_1_warns_once():
    svi = make(schedule=LinearSchedule(2), num_initial_steps=1, num_steps_per_stage=1, num_final_steps=1)
    with pytest.warns(UserWarning, match="that of inverse temperature 0.01, after 0 steps"):
        svi.evaluate_loss()
    svi.evaluate_loss()
    svi.run(progress_bar=False)
    svi.evaluate_loss()
    make(schedule=ConstantSchedule(0.3)).evaluate_loss()  # where it is meant to be


def test_a_fit_describes_itself():
    svi = make(schedule=LinearSchedule(2), num_initial_steps=1, num_steps_per_stage=1, num_final_steps=1)
    assert "inverse temperature 0.01, steps 0, stages 1" in repr(svi)
    svi.run(progress_bar=False)
    assert "is_done True" in repr(svi)
    assert "<th>schedule</th><td>LinearSchedule(" in svi._repr_html_()


def test_a_log_gets_a_line_every_thirty_seconds(capsys, monkeypatch):
    now = [0.0]

    def monotonic() -> float:
        now[0] += 2.5  # the clock is read once a step
        return now[0]

    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=monotonic))
    svi = make(schedule=LinearSchedule(2), num_initial_steps=10, num_steps_per_stage=10, num_final_steps=20)
    svi.run()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4  # 40 steps of 2.5 s, and one at the end
    assert all(line.startswith("step ") and "\r" not in line for line in lines)
    assert "inverse temperature 0.505" in lines[0]
    assert lines[-1].startswith("step 40/40, inverse temperature 1, stage 3")


def test_a_message_of_pyro_does_not_break_the_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("pyro")
    monkeypatch.setattr(logger, "handlers", [handler])
    svi = make(schedule=LinearSchedule(2), num_initial_steps=1, num_steps_per_stage=1, num_final_steps=1)
    svi.run()
    shown = capsys.readouterr().err
    # On a line of its own, without a bar before it.
    assert any(line.startswith("Guessed max_plate_nesting") for line in shown.replace("\r", "\n").split("\n"))
    assert "3/3" in shown
    assert logger.handlers == [handler]
    assert torch.is_grad_enabled()
