"""Figures of an annealed fit. Each function draws on `Axes` and returns them; nothing is shown or saved.

Without ``ax`` a function makes a figure of its own. matplotlib is loaded at the first call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_adaann.annealing.history import AnnealingHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_loss", "plot_marginal", "plot_pair", "plot_schedule", "plot_weights"]


def plot_schedule(history: AnnealingHistory, *, ax: Axes | None = None, **kwargs: Any) -> Axes:
    """Plot the inverse temperature over optimizer steps; call again with ``ax`` to compare fits.

    :param history: of a fit.
    :param ax: where to draw.
    :param kwargs: for ``Axes.step``, for example ``label``.

    Example::

        >>> from pyro_adaann import AnnealingStage
        >>> history = AnnealingHistory([AnnealingStage(0.1, [5.0, 4.0]), AnnealingStage(1.0, [7.0])])
        >>> ax = plot_schedule(history, label="adaptive")
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('optimizer step', 'inverse temperature')
    """
    ax = _axes(ax)
    starts = np.cumsum([0, *(stage.num_steps for stage in history.stages)])
    temperatures = history.inverse_temperatures
    ax.step(starts, [*temperatures, temperatures[-1]], where="post", **kwargs)
    ax.set(xlabel="optimizer step", ylabel="inverse temperature")
    return ax


def plot_loss(
    history: AnnealingHistory, *, ax: Axes | None = None, cmap: str = "viridis", **kwargs: Any
) -> Axes:
    """Plot the loss of every step, colored by inverse temperature.

    Losses of different inverse temperatures are of different densities, so a rise between stages is
    normal. The axis spans what lies between the 1st and 99th percentile.

    :param history: of a fit.
    :param ax: where to draw.
    :param cmap: colors from the first inverse temperature to 1.
    :param kwargs: for ``Axes.scatter``.

    Example::

        >>> from pyro_adaann import AnnealingStage
        >>> history = AnnealingHistory([AnnealingStage(0.1, [5.0, 4.0]), AnnealingStage(1.0, [7.0])])
        >>> plot_loss(history).get_ylabel()
        'loss'
    """
    ax = _axes(ax)
    losses = np.asarray(history.losses, dtype=float)
    counts = [stage.num_steps for stage in history.stages]
    temperatures = np.repeat(history.inverse_temperatures, counts)
    kept = np.isfinite(losses)
    steps = np.arange(len(losses))[kept]
    style = {"s": 3, "linewidths": 0, **kwargs}
    points = ax.scatter(steps, losses[kept], c=temperatures[kept], cmap=cmap, vmax=1.0, **style)
    if kept.any():
        low, high = np.percentile(losses[kept], [1, 99])
        margin = 0.1 * (high - low) or 1.0
        ax.set_ylim(low - margin, high + margin)
    ax.figure.colorbar(points, ax=ax, label="inverse temperature")
    ax.set(xlabel="optimizer step", ylabel="loss")
    return ax


def plot_marginal(
    draws: Tensor,
    reference: Tensor | tuple[Tensor, Tensor] | None = None,
    *,
    log_weights: Tensor | None = None,
    ax: Axes | None = None,
    bins: int = 80,
    **kwargs: Any,
) -> Axes:
    """Plot the density of draws of one coordinate, against other draws or a density on a grid.

    :param draws: of the guide, shape ``(n,)``.
    :param reference: draws of another method, shape ``(m,)``, or a pair of grid points and
        densities there, each of shape ``(m,)``.
    :param log_weights: log weights of the draws of the guide, shape ``(n,)``.
    :param ax: where to draw.
    :param bins: number of bins.
    :param kwargs: for ``Axes.hist`` of the guide's draws.

    Example::

        >>> grid = torch.linspace(-4, 4, 101)
        >>> density = torch.distributions.Normal(0.0, 1.0).log_prob(grid).exp()
        >>> plot_marginal(torch.randn(1000), (grid, density), bins=20).get_ylabel()
        'density'
    """
    ax = _axes(ax)
    values = _array(draws)
    style = {"histtype": "stepfilled", "alpha": 0.4, "label": "guide", **kwargs}
    ax.hist(values, bins=bins, density=True, weights=_weights(log_weights), **style)
    if isinstance(reference, tuple):
        grid, density = map(_array, reference)
        ax.plot(grid, density, color="black", label="density")
    elif reference is not None:
        ax.hist(_array(reference), bins=bins, density=True, histtype="step", color="black", label="reference")
    ax.set_ylabel("density")
    if reference is not None:
        ax.legend()
    return ax


def plot_pair(
    x: Tensor,
    y: Tensor,
    reference: tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    log_weights: Tensor | None = None,
    ax: Axes | None = None,
    bins: int = 80,
    **kwargs: Any,
) -> Axes:
    """Plot the joint density of draws of two coordinates, against other draws or a grid.

    :param x: draws of the first coordinate, shape ``(n,)``.
    :param y: draws of the second, likewise.
    :param reference: a pair of draws of another method, shown as points, or grid points in x, in y,
        and densities of shape ``(len(y), len(x))``, shown as contours.
    :param log_weights: log weights of the draws, shape ``(n,)``.
    :param ax: where to draw.
    :param bins: number of bins in either direction.
    :param kwargs: for ``Axes.hist2d``.
    :raises ValueError: if ``reference`` has neither 2 nor 3 entries.

    Example::

        >>> x, y = torch.randn(2, 1000)
        >>> ax = plot_pair(x, x + y, bins=20)
    """
    if reference is not None and len(reference) not in (2, 3):
        raise ValueError(
            f"Expected `reference` to be draws (x, y) or a grid (x, y, density); got {len(reference)} "
            f"entries."
        )
    ax = _axes(ax)
    style = {"cmap": "Blues", **kwargs}
    ax.hist2d(_array(x), _array(y), bins=bins, weights=_weights(log_weights), **style)
    if reference is not None and len(reference) == 3:
        ax.contour(*map(_array, reference), colors="black", linewidths=0.8)
    elif reference is not None:
        ax.plot(*map(_array, reference), ".", color="black", markersize=1, alpha=0.5)
    return ax


def plot_weights(log_weights: Tensor, *, ax: Axes | None = None, bins: int = 80, **kwargs: Any) -> Axes:
    """Plot the importance weights of draws over their mean, on logarithmic axes.

    For a good guide they are close to 1. A tail to the right, of weights ten times the mean and more, means
    that the guide has too little mass there.

    :param log_weights: log weights, shape ``(n,)``, up to a constant.
    :param ax: where to draw.
    :param bins: number of bins.
    :param kwargs: for ``Axes.hist``.
    :raises ValueError: if no weight is finite and positive.

    Example::

        >>> plot_weights(torch.randn(1000), bins=20).get_ylabel()
        'number of draws'
    """
    finite = log_weights[torch.isfinite(log_weights)].double()
    if not finite.numel():
        raise ValueError(f"Expected a finite log weight; got none of {log_weights.numel()}.")
    relative = _array((finite - finite.logsumexp(0)) / np.log(10) + np.log10(len(finite)))
    ax = _axes(ax)
    ax.hist(relative, bins=bins, **kwargs)
    ax.axvline(0.0, color="black", linewidth=0.8)
    ax.set_yscale("log")
    ax.set(xlabel="log10 (weight / mean weight)", ylabel="number of draws")
    return ax


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1]


def _array(values: Tensor | Sequence[float]) -> Any:
    return values.detach().cpu().numpy() if torch.is_tensor(values) else np.asarray(values)


def _weights(log_weights: Tensor | None) -> Any:
    return None if log_weights is None else _array(log_weights.double().softmax(0))
