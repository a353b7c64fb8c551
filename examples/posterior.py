"""What the ODE examples do with posterior draws: a table beside the exact posterior, two figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
from torch import Tensor

from pyro_adaann import AnnealingHistory, plots, weighted_mean

REFERENCES = Path(__file__).resolve().parents[1] / "benchmarks" / "reference"

#: Mean and standard deviation of every parameter.
Moments = Mapping[str, tuple[float, float]]


def moments(draws: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Return the mean and the standard deviation of every parameter."""
    return {name: (float(x.double().mean()), float(x.double().std())) for name, x in draws.items()}


def weighted_moments(draws: Mapping[str, Tensor], log_weights: Tensor) -> dict[str, tuple[float, float]]:
    """Return the mean and the standard deviation of every parameter under importance weights."""
    means = {name: weighted_mean(x.double(), log_weights) for name, x in draws.items()}
    return {
        name: (float(means[name]), float(weighted_mean((x.double() - means[name]) ** 2, log_weights).sqrt()))
        for name, x in draws.items()
    }


def load_reference(name: str, key: str) -> dict[str, tuple[float, float]] | None:
    """Return the exact moments that ``ode_exact.py`` computed, or None where its file is not at
    hand.

    :param name: ``"lorenz"`` or ``"hiv"``.
    :param key: which posterior of that example.
    """
    path = REFERENCES / f"{name}.json"
    if not path.exists():
        return None
    entry = json.loads(path.read_text())["posteriors"][key]
    return dict(zip(entry["names"], zip(entry["mean"], entry["sd"], strict=True), strict=True))


def format_table(truth: Mapping[str, float], columns: Mapping[str, Moments | None]) -> str:
    """Return a table of ``mean (sd)``: a row for every parameter, the true values first.

    :param columns: moments by heading; None is left out.
    """
    shown = {heading: column for heading, column in columns.items() if column is not None}
    lines = ["".join(["parameter  truth  ", *(f"{heading:>20}" for heading in shown)])]
    for name, value in truth.items():
        cells = (f"{column[name][0]:10.4f} ({column[name][1]:.5f})" for column in shown.values())
        lines.append("".join([f"{name:9}{value:7.3f}  ", *(f"{cell:>20}" for cell in cells)]))
    return "\n".join(lines)


def plot_schedule(history: AnnealingHistory, path: Path) -> None:
    """Draw the inverse temperature over the optimizer steps."""
    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    plots.plot_schedule(history, ax=axes)
    axes.set_yscale("log")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_pairs(
    draws: Mapping[str, Tensor],
    path: Path,
    truth: Mapping[str, float] | None = None,
    bins: int = 50,
) -> None:
    """Draw the marginal of every parameter and the density of every pair, with the truth if given.

    :param bins: of every axis; more of them for narrow modes far from each other.
    """
    names = list(draws)
    size = len(names)
    width = 2.5 if size < 5 else 1.7
    figure, axes = plt.subplots(
        size, size, figsize=(width * size, width * size), layout="constrained", squeeze=False
    )
    for i, row in enumerate(names):
        for j, column in enumerate(names):
            panel = axes[i, j]
            if j > i:
                panel.axis("off")
            elif i == j:
                plots.plot_marginal(draws[row], ax=panel, bins=bins)
                panel.set(yticks=[], ylabel="")
            else:
                plots.plot_pair(draws[column], draws[row], ax=panel, bins=bins)
            if truth is not None and i == j:
                panel.axvline(truth[row], color="black", linewidth=0.8)
            elif truth is not None and j < i:
                panel.plot(truth[column], truth[row], "k+")
            if i == size - 1:
                panel.set_xlabel(column)
            if j == 0:
                panel.set_ylabel(row)
    figure.savefig(path, dpi=120)
    plt.close(figure)
