r"""The guide at a few inverse temperatures, kept while it is annealed.

A rung is the guide as it was at the end of a stage. Rungs are kept at equal distances in the length that
annealing travels,

.. math:: \int \mathrm{sd}_{p_t}\Bigl[\frac{d}{dt} \log p_t\Bigr]\, dt,

in which AdaAnn's stages are equal: over a short distance x the divergence is :math:`x^2 / 2`. Neighboring
rungs therefore overlap in any dimension, so that draws of each can be weighted against the tempered density
of the next.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_adaann.annealing.history import AnnealingStage
from pyro_adaann.annealing.ladder import Ladder

__all__ = ["Rung", "Rungs", "guide_at", "rungs_and_guide"]

#: Distance per unit of log t assumed for a schedule without draws: that of one normal latent variable.
_DISTANCE_PER_LOG = math.sqrt(0.5)


@dataclass(frozen=True, eq=False)
class Rung:
    """A guide at one inverse temperature; two rungs are equal if they are the same object.

    :param inverse_temperature: that of the stage at whose end it was kept.
    :param values: its unconstrained parameters, and its buffers, by name.
    :param state: the state to restart from: parameters, optimizers, the state of the steps.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import Trace_ELBO
        >>> from pyro_adaann import AdaAnnSchedule, AdaAnnSVI, AutoPlanar, Ladder
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> pyro.clear_param_store()  # a new fit
        >>> svi = AdaAnnSVI(model, AutoPlanar(model, 4), pyro.optim.Adam({"lr": 0.01}),
        ...                 Trace_ELBO(num_particles=20, vectorize_particles=True), ladder=Ladder())
        >>> loss = svi.step()
        >>> svi.ladder.rungs[0].inverse_temperature
        0.01
    """

    inverse_temperature: float
    values: dict[str, Tensor]
    state: dict[str, Any] = field(repr=False)


class Rungs:
    """The rungs of one fit.

    :param ladder: how far apart they are.
    """

    def __init__(self, ladder: Ladder) -> None:
        self.ladder = ladder
        #: From the lowest inverse temperature to the highest.
        self.rungs: list[Rung] = []
        self._covered = 0.0

    @property
    def distance(self) -> float:
        """The distance between two rungs."""
        return self.ladder.distance

    def start(self, inverse_temperature: float, state: dict[str, Any], names: list[str]) -> None:
        """Record the fit before training, as the lowest rung.

        :param state: parameters and optimizers of the fit by name.
        :param names: of the guide's parameters and buffers.
        """
        self.rungs.clear()
        self.climb(inverse_temperature, state, names)
        self._covered = math.inf  # the first stage ends with a rung

    def cover(self, stage: AnnealingStage, following: float) -> bool:
        """Add the distance to the next stage; return whether a rung is due (:meth:`climb`).

        :param stage: the stage that ends.
        :param following: the inverse temperature that follows.
        """
        t = stage.inverse_temperature
        while len(self.rungs) > 1 and self.rungs[-1].inverse_temperature >= t:  # it has gone back
            self.rungs.pop()
        sd = stage.weighted_log_factor_sd
        way = _DISTANCE_PER_LOG * math.log(following / t) if sd is None else sd * (following - t)
        self._covered += way
        if self._covered <= self.distance:
            return False
        self._covered = way
        return True

    def climb(self, inverse_temperature: float, state: dict[str, Any], names: list[str]) -> None:
        """Record the present fit as a rung; the arguments are those of :meth:`start`."""
        values = {name: state["values"][name] for name in names}
        self.rungs.append(Rung(inverse_temperature, values, state))

    def cut(self, rung: Rung) -> None:
        """Delete the rungs above one of them."""
        self.rungs[self.rungs.index(rung) + 1 :] = []
        self._covered = 0.0

    def __repr__(self) -> str:
        return f"{self.ladder!r} with {len(self.rungs)} rungs"

    def state(self) -> dict[str, Any]:
        """Return the rungs as plain data; :meth:`restore` takes it."""
        rungs = [[rung.inverse_temperature, rung.state, list(rung.values)] for rung in self.rungs]
        return {"rungs": rungs, "covered": self._covered}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state that :meth:`state` has returned."""
        self.rungs.clear()
        for rung in state["rungs"]:
            self.climb(*rung)
        self._covered = state["covered"]


def rungs_and_guide(rungs: Rungs | None) -> list[Rung | None]:
    """Return the rungs of a fit, followed by None for the present guide.

    :raises ValueError: if there are no rungs.
    """
    if rungs is None or not rungs.rungs:
        raise ValueError(
            "Expected a fit that has kept a ladder; got none. Give AdaAnnSVI `ladder=Ladder()`, and train "
            "first."
        )
    return [*rungs.rungs, None]


@contextmanager
def guide_at(rung: Rung | None, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Set the guide to the parameters and buffers of a rung within the block; None changes nothing.

    :param tensors: parameters and buffers of the fit by name.
    """
    own = {name: tensors[name].detach().clone() for name in (rung.values if rung else ())}
    try:
        if rung is not None:
            put(rung.values, tensors)
        yield
    finally:
        put(own, tensors)


def put(values: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Write values into tensors by name."""
    with torch.no_grad():
        for name, value in values.items():
            tensors[name].copy_(value)
