"""The log density of a model at many points, a few at a time, in double precision around the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_adaann.objectives.lenient import run_leniently
from pyro_adaann.objectives.rows import most_draws, numbers_per_draw
from pyro_adaann.sampling.density import UnconstrainedModel

__all__ = ["Density"]


class Density:
    """A model's log joint density in unconstrained coordinates.

    :param model: a Pyro model.
    :param args: its arguments, with ``kwargs``.
    :raises ValueError: if a plate is subsampled.
    """

    def __init__(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._model = UnconstrainedModel(model, args, kwargs)
        with torch.no_grad(), torch.random.fork_rng():
            trace = run_leniently(poutine.block(poutine.trace(model).get_trace), *args, **kwargs)
        self._rows = most_draws(numbers_per_draw(trace), self._model.example.device)
        self.dim = self._model.dim

    @torch.no_grad()
    def log_p(self, points: Tensor) -> Tensor:
        """Return the log density of points ``(..., d)``; minus infinity where it is not finite."""
        rows = points.reshape(-1, self.dim).to(self._model.example)
        values = torch.cat([self._joint(part) for part in rows.split(self._rows)])
        values = values.double().reshape(points.shape[:-1]).to(points.device)
        return torch.where(values.isfinite(), values, -torch.inf)

    def gradient(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log density of points ``(..., d)`` and its gradient, of their shape."""
        values, gradients = [], []
        for part in points.reshape(-1, self.dim).to(self._model.example).split(self._rows):
            leaf = part.detach().requires_grad_()
            with torch.enable_grad():
                value = self._joint(leaf)
            gradients += torch.autograd.grad(value.sum(), leaf)
            values.append(value.detach())
        value, gradient = torch.cat(values).double(), torch.cat(gradients).double()
        return value.reshape(points.shape[:-1]).to(points.device), gradient.reshape(points.shape).to(points)

    def _joint(self, points: Tensor) -> Tensor:
        prior, likelihood = self._model.log_densities(points)
        return prior + likelihood
