"""Draws made before as a guide, for exports that run the model on them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

from pyro_adaann.diagnostics.importance import WeightedDraws
from pyro_adaann.fitting.coordinates import Coordinates
from pyro_adaann.fitting.storage import Guide
from pyro_adaann.objectives.lenient import run_leniently

__all__ = ["StoredDraws", "draws_by_guide"]


class StoredDraws:
    """A guide that draws from draws, with the log densities they had.

    :param model: the model whose draws they are.
    :param draws: the draws.
    :param args: arguments of the model.
    :param kwargs: its keyword arguments.
    """

    __name__ = "FitResult"

    def __init__(
        self,
        model: Callable[..., Any],
        draws: WeightedDraws,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self._draws = draws
        with poutine.block(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._sites = run_leniently(poutine.trace(model).get_trace, *args, **kwargs).nodes

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        log_q = self._draws.log_q
        uniform = torch.zeros(len(log_q), device=log_q.device)
        # The choice adds nothing to the density; that of the draw is the second site's.
        chosen = dist.Categorical(logits=uniform).mask(False)
        index = pyro.sample("_fit_draw", chosen, infer={"is_auxiliary": True})
        density = dist.Delta(torch.zeros_like(log_q[index]), log_density=log_q[index])
        pyro.sample("_fit_density", density, infer={"is_auxiliary": True})
        for name, values in self._draws.samples.items():
            site = self._sites[name]
            event_dim = site["fn"].event_dim
            with ExitStack() as stack:
                frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
                for frame in frames:
                    stack.enter_context(pyro.plate(frame.name, frame.size, dim=frame.dim))
                shape = values.shape[1:]
                # Particles lie to the left of all plates, those of this site and those of others.
                free = index.dim() - (len(shape) - event_dim)
                value = values[index.reshape(-1)].reshape(index.shape[: max(free, 0)] + shape)
                pyro.sample(name, dist.Delta(value, event_dim=event_dim))


def draws_by_guide(
    coordinates: Coordinates, guides: Sequence[Guide], draws: WeightedDraws
) -> list[StoredDraws]:
    """Return what draws the sites of a model as each of the guides does that fit it in other coordinates.

    :param draws: those of all guides, as many of each, one guide after the other.
    """
    values, log_scales = coordinates.enter(draws.samples)
    num, stored = len(draws.log_p) // len(guides), []
    for i, guide in enumerate(guides):
        rows = slice(i * num, (i + 1) * num)
        log_q = guide.log_prob(
            {name: value[rows] for name, value in values.items()}, *coordinates.args, **coordinates.kwargs
        )
        own = dataclasses.replace(
            draws,
            samples={name: value[rows] for name, value in draws.samples.items()},
            log_p=draws.log_p[rows],
            log_q=log_q - log_scales[rows],
        )
        stored.append(StoredDraws(coordinates.own_model, own, coordinates.args, coordinates.kwargs))
    return stored
