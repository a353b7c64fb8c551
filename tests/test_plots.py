"""Figures: axes in and out, the right numbers on them, nothing shown or saved."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
import torch

from pyro_adaann import AnnealingHistory, AnnealingStage
from pyro_adaann.export.plots import plot_loss, plot_marginal, plot_pair, plot_schedule, plot_weights

matplotlib.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def nothing_shown(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a figure was shown or saved")

    plt.close("all")  # whatever another file has left open
    monkeypatch.setattr(plt, "show", fail)
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", fail)
    yield
    plt.close("all")


def history() -> AnnealingHistory:
    return AnnealingHistory(
        [
            AnnealingStage(0.1, [9.0, 8.0, float("inf")]),
            AnnealingStage(0.4, [7.0]),
            AnnealingStage(1.0, [12.0, 11.0]),
        ]
    )


def draws(num: int = 500) -> torch.Tensor:
    return torch.randn(num)


CASES = {
    "schedule": lambda ax: plot_schedule(history(), ax=ax),
    "loss": lambda ax: plot_loss(history(), ax=ax),
    "marginal": lambda ax: plot_marginal(draws(), ax=ax),
    "marginal and draws": lambda ax: plot_marginal(draws(), draws(), ax=ax),
    "marginal and grid": lambda ax: plot_marginal(draws(), (torch.arange(5.0), torch.ones(5)), ax=ax),
    "pair": lambda ax: plot_pair(draws(), draws(), ax=ax),
    "pair and draws": lambda ax: plot_pair(draws(), draws(), (draws(9), draws(9)), ax=ax),
    "pair and grid": lambda ax: plot_pair(
        draws(), draws(), (torch.arange(4.0), torch.arange(3.0), torch.arange(12.0).reshape(3, 4)), ax=ax
    ),
    "weights": lambda ax: plot_weights(draws(), ax=ax),
}


@pytest.mark.parametrize("name", CASES)
def test_axes_in_and_out(name):
    figure, ax = plt.subplots()
    assert CASES[name](ax) is ax
    assert len(plt.get_fignums()) == 1
    figure.canvas.draw()
    own = CASES[name](None)
    assert own is not ax
    assert len(plt.get_fignums()) == 2
    own.figure.canvas.draw()


def test_schedule_steps_where_the_stages_begin():
    ax = plot_schedule(history(), label="a")
    plot_schedule(history(), ax=ax, label="b")
    assert len(ax.lines) == 2
    x, y = ax.lines[0].get_data()
    np.testing.assert_array_equal(x, [0, 3, 4, 6])
    np.testing.assert_array_equal(y, [0.1, 0.4, 1.0, 1.0])


def test_losses_that_are_not_finite_are_left_out():
    points = plot_loss(history()).collections[0]
    np.testing.assert_array_equal(points.get_offsets()[:, 0], [0, 1, 3, 4, 5])
    np.testing.assert_array_equal(points.get_array(), [0.1, 0.1, 0.4, 1.0, 1.0])


def test_a_fit_that_has_not_begun():
    empty = AnnealingHistory([AnnealingStage(0.1)])
    plot_loss(empty).figure.canvas.draw()
    plot_schedule(empty).figure.canvas.draw()


def test_weights_count():
    values = torch.tensor([0.0, 1.0, 1.0, 1.0])
    log_weights = torch.tensor([0.0, 0.0, -torch.inf, -torch.inf])
    ax = plot_marginal(values, log_weights=log_weights, bins=2)
    heights = ax.patches[0].get_xy()[:, 1]
    # Half of the weight on either side, on bins of width 1/2.
    assert heights.max() == pytest.approx(1.0)


def test_weights_over_their_mean():
    ax = plot_weights(torch.tensor([0.0, 0.0, -torch.inf]).double() + 300, bins=3)
    (patch,) = [p for p in ax.patches if p.get_height() > 0]
    assert patch.get_height() == 2
    assert patch.get_x() <= 0 <= patch.get_x() + patch.get_width()


def test_errors():
    with pytest.raises(ValueError, match=r"draws \(x, y\) or a grid"):
        plot_pair(draws(), draws(), (draws(),))
    with pytest.raises(ValueError, match="Expected a finite log weight; got none of 3"):
        plot_weights(torch.full((3,), -torch.inf))
