"""What the ODE examples do with a fitted guide: draws and their weights, a table, two figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pyro.infer.importance import vectorized_importance_weights
from torch import Tensor

from pyro_adaann import AnnealingHistory

REFERENCES = Path(__file__).resolve().parents[1] / "benchmarks" / "reference"

#: Mean and standard deviation of every parameter.
Moments = Mapping[str, tuple[float, float]]


def draw(
    model: Callable[..., Any], guide: Callable[..., Any], num_draws: int, *args: Any
) -> tuple[dict[str, Tensor], Tensor]:
    """Draw from the guide.

    :return: the draws by name and their log importance weights log p(x, z) - log q(z), each of
        shape ``(num_draws,)``.
    """
    with torch.no_grad():
        log_weights, model_trace, _ = vectorized_importance_weights(
            model, guide, *args, num_samples=num_draws, max_plate_nesting=0, normalized=False
        )
    draws = {name: model_trace.nodes[name]["value"] for name in model_trace.stochastic_nodes}
    return draws, log_weights


def ess_share(log_weights: Tensor) -> float:
    """Return the effective sample size of importance weights, (sum w)^2 / sum w^2, per draw."""
    finite = log_weights[torch.isfinite(log_weights)].double()
    log_ess = 2 * finite.logsumexp(0) - (2 * finite).logsumexp(0)
    return float(log_ess.exp()) / log_weights.numel()


def moments(draws: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Return the mean and the standard deviation of every parameter."""
    return {name: (float(x.double().mean()), float(x.double().std())) for name, x in draws.items()}


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
    """Draw the inverse temperature over the stages."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    axes.semilogy(history.inverse_temperatures)
    axes.set(xlabel="stage", ylabel="inverse temperature")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_pairs(draws: Mapping[str, Tensor], truth: Mapping[str, float], path: Path) -> None:
    """Draw the histogram of every parameter and the scatter of every pair, with the truth."""
    import matplotlib.pyplot as plt

    names = list(truth)
    size = len(names)
    figure, axes = plt.subplots(size, size, figsize=(2.5 * size, 2.5 * size), layout="constrained")
    for i, row in enumerate(names):
        for j, column in enumerate(names):
            panel = axes[i, j]
            if j > i:
                panel.axis("off")
            elif i == j:
                panel.hist(draws[row].numpy(), bins=60, density=True, histtype="stepfilled", alpha=0.6)
                panel.axvline(truth[row], color="black", linewidth=0.8)
                panel.set_yticks([])
            else:
                panel.plot(draws[column].numpy(), draws[row].numpy(), ".", markersize=1, alpha=0.3)
                panel.plot(truth[column], truth[row], "k+")
            if i == size - 1:
                panel.set_xlabel(column)
            if j == 0 and i > 0:
                panel.set_ylabel(row)
    figure.savefig(path, dpi=150)
    plt.close(figure)
