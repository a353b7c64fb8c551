"""Cosine, restarts and epochs; a training that ends before annealing does is announced."""

from __future__ import annotations

import gc
import itertools
import logging
import math

import pyro
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import conjugate_normal
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_adaann import (
    AdaAnnSchedule,
    AdaAnnSVI,
    AnnealingSchedule,
    CESSSchedule,
    ConstantSchedule,
    CosineSchedule,
    ESSStageRule,
    LinearSchedule,
    SequenceSchedule,
)
from pyro_adaann.state import unfinished


def visited(schedule: AnnealingSchedule) -> list[float]:
    values = [schedule.initial_inverse_temperature]
    while values[-1] < 1:
        values.append(schedule.next(values[-1]))
    return values


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.floats(1e-4, 0.99), st.sampled_from([LinearSchedule, CosineSchedule]))
def test_fixed_schedules_take_as_many_increments_as_asked(num_increments, start, kind):
    schedule = kind(num_increments, initial_inverse_temperature=start)
    values = visited(schedule)
    assert len(values) == schedule.num_stages == num_increments + 1
    assert values[-1] == 1.0
    assert all(a < b for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("num_increments", [1, 7, 10_000])
def test_cosine_schedule_has_its_formula(num_increments):
    actual = visited(CosineSchedule(num_increments, initial_inverse_temperature=0.2))
    angles = [math.pi * j / num_increments for j in range(num_increments + 1)]
    assert actual == pytest.approx([0.2 + 0.8 * (1 - math.cos(a)) / 2 for a in angles], abs=1e-12)


def test_number_of_stages():
    assert SequenceSchedule([0.1, 0.4, 1.0]).num_stages == 3
    assert ConstantSchedule(0.3).num_stages == ConstantSchedule().num_stages == 1
    assert LinearSchedule(5, initial_inverse_temperature=1.0).num_stages == 1
    assert AdaAnnSchedule().num_stages is None


def test_a_cosine_schedule_has_at_least_one_increment():
    with pytest.raises(ValueError, match="`num_increments` to be an integer >= 1; got 0"):
        CosineSchedule(0)


def make(**kwargs) -> AdaAnnSVI:
    model = conjugate_normal().model
    options = {
        "schedule": SequenceSchedule([0.1, 0.4, 0.7, 1.0]),
        "num_initial_steps": 3,
        "num_steps_per_stage": 2,
        "num_final_steps": 2,
        **kwargs,
    }
    return AdaAnnSVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), **options)


def test_number_of_annealing_steps_is_that_of_the_steps_below_one():
    svi = make()
    svi.run(progress_bar=False)
    assert svi.num_annealing_steps == 7
    assert sum(stage.num_steps for stage in svi.history.stages[:-1]) == 7
    assert make(schedule=ConstantSchedule()).num_annealing_steps == 0
    assert make(schedule=AdaAnnSchedule()).num_annealing_steps is None


def test_restart_makes_cycles():
    svi = make(schedule=SequenceSchedule([0.5, 0.7, 1.0]))
    steps = []
    for _ in range(20):
        if svi.is_done:
            svi.restart()
        svi.step()
        steps.append(svi.inverse_temperature)
    cycle = [0.5] * 3 + [0.7] * 2 + [1.0] * 2
    assert steps == (cycle * 3)[:20]


def test_restart_with_an_adaptive_schedule_and_a_progress_bar(capsys):
    svi = make(schedule=AdaAnnSchedule(0.5, initial_inverse_temperature=0.3))
    for cycle in range(2):
        if cycle:
            svi.restart()
        svi.run()
    values = svi.history.inverse_temperatures
    assert values.count(0.3) == values.count(1.0) == 2
    assert "inverse temperature 1" in capsys.readouterr().err


def test_a_training_known_to_be_too_short_is_announced_at_the_start():
    with pytest.warns(UserWarning, match="takes 7 steps to reach 1, and training ends after 7"):
        make(num_training_steps=7)
    make(num_training_steps=8)
    with pytest.warns(UserWarning, match="cannot be planned for num_training_steps=50"):
        make(num_training_steps=50, schedule=CESSSchedule(0.9))
    with pytest.warns(UserWarning, match="With ESSStageRule.*cannot be planned"):
        make(num_training_steps=50, schedule=AdaAnnSchedule(), stage_rule=ESSStageRule(0.5))
    with pytest.raises(ValueError, match="num_training_steps"):
        make(num_training_steps=0)


@pytest.mark.filterwarnings("ignore:After .* steps the inverse temperature")  # the early warning
@pytest.mark.parametrize(
    ("num_steps", "is_announced", "kwargs"),
    [
        (100, True, {"num_initial_steps": 200}),
        (99, False, {"num_initial_steps": 200}),  # no training that anybody expects to have ended
        (110, False, {"num_initial_steps": 98}),
        (0, False, {}),
        (120, True, {"schedule": AdaAnnSchedule()}),
        (120, False, {"schedule": ConstantSchedule(0.3)}),
    ],
)
def test_a_training_that_ends_below_one_is_announced_at_its_end(
    num_steps, is_announced, kwargs, caplog, monkeypatch
):
    gc.collect()
    monkeypatch.setattr(unfinished, "_num_lines", 0)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="pyro_adaann"):
        svi = make(**kwargs)
        for _ in range(num_steps):
            svi.step()
        assert not caplog.records
        del svi
        gc.collect()
    messages = [record.getMessage() for record in caplog.records]
    assert ["tempered posterior" in message for message in messages] == [True] * is_announced
    assert not is_announced or f"after {num_steps} steps at inverse temperature" in messages[0]
