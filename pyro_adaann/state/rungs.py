r"""The guide at a few inverse temperatures, kept while it is annealed.

A rung is the guide as it was at the end of a stage. Rungs are kept at equal distances in the length that
annealing covers,

.. math:: \int \mathrm{sd}_{p_t}\Bigl[\frac{d}{dt} \log p_t\Bigr]\, dt,

which is what AdaAnn's stages are equal in: over a short distance x the divergence is :math:`x^2 / 2`.
Neighbors then overlap, in any dimension: each can be weighed against the tempered density of the next.
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

__all__ = ["Ladder", "Rung"]

#: How far a schedule without draws goes when the inverse temperature doubles: as for one latent variable.
_DISTANCE_PER_LOG = math.sqrt(0.5)


@dataclass(frozen=True)
class Rung:
    """A guide at one inverse temperature.

    :param inverse_temperature: that of the stage at whose end it was kept.
    :param values: its unconstrained parameters by name.
    :param state: all parameters of the fit and their optimizers, to go on from.

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


class Ladder:
    """Keeps the guide at inverse temperatures a given distance apart, the lowest rung before training.

    Give one to `AdaAnnSVI` (``ladder=Ladder()``). After the fit :func:`diagnose` compares every rung with
    the next ones and says where a mode was lost; :func:`mixture_draws` weighs draws of all rungs against the
    posterior; ``svi.restart(rung)`` anneals again from a rung. A rung costs as much memory as the
    parameters and their optimizers.

    :param distance: between two rungs; 1 is a divergence of about half a nat.
    :raises ValueError: if it is not positive.

    Example::

        >>> ladder = Ladder(distance=0.5)
        >>> ladder.rungs
        []
    """

    def __init__(self, distance: float = 1.0) -> None:
        if not 0 < distance < math.inf:
            raise ValueError(f"Expected `distance` > 0; got {distance}.")
        self.distance = float(distance)
        #: From the lowest inverse temperature to the highest.
        self.rungs: list[Rung] = []
        self._covered = 0.0

    def start(self, inverse_temperature: float, state: dict[str, Any], names: list[str]) -> None:
        """Keep the fit as it is before training.

        :param state: parameters and optimizers of the fit by name.
        :param names: of the guide's parameters.
        """
        self.rungs.clear()
        self.climb(inverse_temperature, state, names)
        self._covered = math.inf  # the first stage ends with a rung

    def is_due(self, stage: AnnealingStage, following: float) -> bool:
        """Whether to :meth:`climb` at the end of a stage: the next one goes too far from the latest rung.

        :param stage: the stage that ends.
        :param following: the inverse temperature that follows.
        """
        t = stage.inverse_temperature
        while len(self.rungs) > 1 and self.rungs[-1].inverse_temperature >= t:  # it has gone back
            self.rungs.pop()
        sd = stage.weighted_log_factor_sd
        step = _DISTANCE_PER_LOG * math.log(following / t) if sd is None else sd * (following - t)
        self._covered += step
        if self._covered <= self.distance:
            return False
        self._covered = step
        return True

    def climb(self, inverse_temperature: float, state: dict[str, Any], names: list[str]) -> None:
        """Keep the fit as it is; the arguments are those of :meth:`start`."""
        values = {name: state["values"][name] for name in names}
        self.rungs.append(Rung(inverse_temperature, values, state))

    def __repr__(self) -> str:
        return f"Ladder(distance={self.distance!r})"

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

    def cut(self, rung: Rung) -> None:
        """Forget the rungs above one of them."""
        self.rungs[self.rungs.index(rung) + 1 :] = []
        self._covered = 0.0


def rungs_and_guide(ladder: Ladder | None) -> list[Rung | None]:
    """Return the rungs of a fit and, as None, the guide as it is.

    :raises ValueError: if there are no rungs.
    """
    if ladder is None or not ladder.rungs:
        raise ValueError(
            "Expected a fit that has kept a ladder; got none. Give AdaAnnSVI `ladder=Ladder()`, and train "
            "before you ask."
        )
    return [*ladder.rungs, None]


@contextmanager
def guide_at(rung: Rung | None, parameters: dict[str, Tensor]) -> Iterator[None]:
    """Give the guide the parameters of a rung for a while; of None, its own."""
    own = {name: parameters[name].detach().clone() for name in (rung.values if rung else ())}
    try:
        if rung is not None:
            put(rung.values, parameters)
        yield
    finally:
        put(own, parameters)


def put(values: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
    """Write values into parameters by name."""
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
