"""Faults put into a fit at given steps; ``benchmarks/fault_injection.py`` counts many more of them."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
from faults import (
    WRITE_PLACES,
    Fault,
    disk_with_room_for,
    faulty_fit,
    kill_while_writing,
    quiet,
    survives,
)
from test_checkpoint import DATA, make

from pyro_adaann.state.checkpoint import read_checkpoint

#: Some of them in the fast tests.
FAULTS = [
    Fault("density", "one", math.nan, frozenset({0, 70, 130})),
    Fault("density", "all", math.nan, frozenset({1, 65})),
    Fault("density", "one", -1e30, frozenset({40, 90})),
    Fault("gradient", "one", math.nan, frozenset({0, 70, 130})),
    Fault("variance", "all", math.nan, frozenset({1, 2, 5})),
]
MORE_FAULTS = [
    Fault("density", "one", -math.inf, frozenset(range(30, 300))),
    Fault("density", "one", 1e30, frozenset({40, 90})),
    Fault("gradient", "all", math.inf, frozenset({1, 65})),
    Fault("gradient", "all", 1e30, frozenset({40, 90})),
    Fault("variance", "one", math.nan, frozenset({1, 2, 5})),
    Fault("variance", "one", 1e30, frozenset({1, 2, 5})),
]


# `survives` asks for means within 0.35 sd and sds within 25 %. Without a fault 300 of 300 seeds do.
@pytest.mark.parametrize(
    "fault",
    [*FAULTS, *(pytest.param(fault, marks=pytest.mark.slow) for fault in MORE_FAULTS)],
    ids=lambda fault: f"{fault.where}-{fault.share}-{fault.value}",
)
def test_a_fault_at_a_given_step_costs_no_fit(fault):
    assert survives(fault, seed=0)


def test_a_variance_that_is_not_finite_does_not_end_the_annealing():
    fault = Fault("variance", "all", math.nan, frozenset({1}))
    svi = faulty_fit(fault, seed=0)
    with quiet():
        history = svi.run(progress_bar=False)
    first, second = history.inverse_temperatures[:2]
    assert history.stages[0].num_nonfinite_draws == 100
    assert first < second <= 1.1 * first + 1e-12


def losses_from(path: Path, seed: int) -> list[float]:
    """Return the losses of a whole fit that goes on from a file."""
    return make("planar", seed).run(DATA, progress_bar=False, checkpoint=path).losses


def some_fast(values: Sequence[object], fast: set[object]) -> list[object]:
    """Return the values as parameters, those that are not among ``fast`` for the slow tests."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("place", some_fast(WRITE_PLACES, {0.3, "replace", "_sync_folder"}))
def test_killed_at_any_place_of_a_write(place, tmp_path):
    path = tmp_path / "fit.ckpt"
    svi = make("planar", 0)
    for num_steps in range(1, 7):
        svi.step(DATA)
        if num_steps == 5:
            svi.save_checkpoint(path)
    with warnings.catch_warnings():
        # Of threads, of which this process has none that matter.
        warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
        kill_while_writing(lambda: svi.save_checkpoint(path), place)
    num_steps = sum(len(stage["losses"]) for stage in read_checkpoint(path)["history"]["stages"])
    assert num_steps == (6 if place == "_sync_folder" else 5)
    assert losses_from(path, 3) == make("planar", 0).run(DATA, progress_bar=False).losses


@pytest.mark.parametrize("share", some_fast([0.0, 0.4, 0.99], {0.4}))
def test_a_disk_that_is_full_in_the_middle_of_a_write(share, tmp_path):
    path = tmp_path / "fit.ckpt"
    whole = make("planar", 0).run(DATA, progress_bar=False).losses
    svi = make("planar", 0)
    for _ in range(5):
        svi.step(DATA)
    svi.save_checkpoint(path)
    content = path.read_bytes()
    with (
        disk_with_room_for(int(share * len(content))),
        pytest.warns(UserWarning, match="could not be written.*goes on"),
    ):
        losses = svi.run(DATA, progress_bar=False, checkpoint=path, checkpoint_every=3).losses
    assert losses == whole
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["fit.ckpt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's device that is always full")
def test_no_space_left_and_then_space_again(tmp_path):
    path = tmp_path / "fit.ckpt"
    # The first write goes to the full device; when it fails, the name is free for the next.
    (tmp_path / "fit.ckpt.tmp").symlink_to("/dev/full")
    svi = make("planar", 0)
    with pytest.warns(UserWarning, match="could not be written .*No space left.*goes on"):
        losses = svi.run(DATA, progress_bar=False, checkpoint=path, checkpoint_every=4).losses
    assert [file.name for file in tmp_path.iterdir()] == ["fit.ckpt"]
    assert losses_from(path, 3) == losses
