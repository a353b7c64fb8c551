r"""A model in the coordinates in which it is fitted.

A site with a scale that is a latent variable itself, as in a hierarchy,

.. math:: \theta_i \sim N(\mu, \tau), \qquad \theta_i = \mu + \tau \epsilon_i, \quad \epsilon_i \sim N(0, 1),

has a funnel in :math:`(\tau, \theta)` where the data say little of :math:`\theta_i`, and one in
:math:`(\tau, \epsilon)` where they say much. A guide does not reach the end of a funnel; so every number is
fitted in the coordinate that has none. Draws of a result are of the model's own sites, with the densities

.. math:: \log p(\theta) = \log p(\epsilon) - \textstyle\sum_i \log \tau, \qquad q \text{ likewise}.

Of a log normal site the same holds of its logarithm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam, TransformReparam
from pyro.infer.reparam.reparam import Reparam
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import LogNormal

from pyro_adaann.diagnostics.guide_draws import GuideDraws
from pyro_adaann.diagnostics.importance import WeightedDraws
from pyro_adaann.fitting.predictions import run_at

__all__ = ["Coordinates", "Place", "location_family", "names_taken"]

#: What Pyro adds to the name of a site, and to that of the logarithm of a log normal one.
_DECENTERED, _BASE = "_decentered", "_base"
#: Draws at a time.
_BATCH_SIZE = 1000


class Place(NamedTuple):
    """Location and scale of a site at draws.

    :param loc: shape ``(num_draws,) + shape of the site``.
    :param scale: likewise.
    :param is_log: whether they are those of the logarithm.
    """

    loc: Tensor
    scale: Tensor
    is_log: bool

    def distance(self, values: Tensor, centered: Tensor | float = 0.0) -> Tensor:
        """Return how many scales values lie from the location; where they are centered, themselves."""
        line = values.log() if self.is_log else values
        return (line - self.loc) * self.scale.pow(centered - 1) + centered * self.loc

    def values(self, distance: Tensor, centered: Tensor) -> Tensor:
        """Return the values at a distance."""
        line = self.loc + self.scale.pow(1 - centered) * (distance - centered * self.loc)
        return line.exp() if self.is_log else line

    def log_slope(self, values: Tensor, centered: Tensor) -> Tensor:
        """Return by how much the log density of the distance of values is above theirs, ``(num_draws,)``."""
        terms = (1 - centered) * self.scale.log() + (values.log() if self.is_log else 0.0)
        return terms.reshape(len(terms), -1).double().sum(-1)


class Coordinates:
    """A model with its arguments, and which of its numbers are fitted decentered.

    :param model: the model.
    :param args: its arguments.
    :param kwargs: its keyword arguments.
    :param centered: for sites with location and scale a tensor of their shape: 0 where a number is fitted by
        its distance from the location in scales, 1 where it is fitted as it is.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        centered: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.own_model, self.args, self.kwargs = model, args, kwargs
        self.centered = dict(centered or {})

    @property
    def model(self) -> Callable[..., Any]:
        """The model whose latent sites are fitted."""
        return self._decentered(self.own_model)

    def restore(self, draws: WeightedDraws) -> WeightedDraws:
        """Return draws of the fitted sites as draws of the model's own, with the densities of these."""
        if not self.centered:
            return draws
        places = self.places(draws.samples, self._shapes(), self._decentered)
        own_names = {self.fitted_name(name, place): name for name, place in places.items()}
        samples, log_slopes = {}, torch.zeros_like(draws.log_p)
        for name, values in draws.samples.items():
            own = own_names.get(name, name)
            samples[own] = values
            if own in places:
                centered = self.centered[own].to(values)
                restored = places[own].values(values, centered)
                samples[own] = torch.where(torch.isfinite(restored), restored, values)
                log_slopes = log_slopes + places[own].log_slope(samples[own], centered)
        # Where the model breaks there is no place; such a draw has no weight, and keeps what it was.
        log_slopes = torch.where(torch.isfinite(log_slopes), log_slopes, 0.0)
        log_p, log_q = draws.log_p - log_slopes, draws.log_q - log_slopes
        return dataclasses.replace(draws, samples=samples, log_p=log_p, log_q=log_q)

    def enter(self, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Return values of the model's own sites as values of the fitted ones.

        :return: with them, by how much the log density of these is the larger one, shape ``(num_draws,)``.
        :raises ValueError: if a site is missing.
        """
        missing = [name for name in self.centered if name not in values]
        if missing:
            raise ValueError(f"Expected values of all latent variables; got none of {', '.join(missing)}.")
        found, log_slopes = dict(values), torch.zeros(())
        for name, place in self.places(values, self._shapes()).items():
            own, centered = found.pop(name), self.centered[name].to(place.loc)
            found[self.fitted_name(name, place)] = place.distance(own, centered)
            log_slopes = log_slopes.to(own.device) + place.log_slope(own, centered)
        return found, log_slopes

    @staticmethod
    def fitted_name(name: str, place: Place) -> str:
        """Return the name of the site that is fitted in place of another."""
        return name + (_BASE if place.is_log else "") + _DECENTERED

    def places(
        self,
        samples: Mapping[str, Tensor],
        shapes: Mapping[str, torch.Size],
        wrap: Callable[..., Callable[..., Any]] = lambda model: model,
    ) -> dict[str, Place]:
        """Return locations and scales of sites at draws.

        :param samples: draws of all latent sites of the wrapped model.
        :param shapes: of the sites whose locations and scales are wanted.
        :param wrap: what is put around the model.
        """
        parts: dict[str, list[Place]] = {name: [] for name in shapes}
        for batch in _batches(samples):
            look = _Look(shapes)
            run_at(wrap(look(self.own_model)), batch, self.args, self.kwargs)
            num_draws = len(next(iter(batch.values())))
            for name, shape in shapes.items():
                loc, scale, is_log = look.found[name]
                loc, scale = (GuideDraws.as_draws(name, each, shape, num_draws) for each in (loc, scale))
                parts[name].append(Place(loc, scale, is_log))
        return {
            name: Place(torch.cat([p.loc for p in own]), torch.cat([p.scale for p in own]), own[0].is_log)
            for name, own in parts.items()
        }

    def _shapes(self) -> dict[str, torch.Size]:
        return {name: centered.shape for name, centered in self.centered.items()}

    def _decentered(self, model: Callable[..., Any]) -> Callable[..., Any]:
        if not self.centered:
            return model

        def configure(msg: Any) -> Reparam | None:
            name, family = msg["name"], location_family(msg["fn"])
            if name in self.centered and isinstance(family, LogNormal):
                return TransformReparam()
            centered = self.centered.get(name, self.centered.get(name.removesuffix(_BASE)))
            return None if centered is None else LocScaleReparam(centered.to(family.loc))

        result: Callable[..., Any] = poutine.reparam(model, config=configure)
        return result


def names_taken(name: str) -> set[str]:
    """Return the names that sites have in whose place one of this name is fitted."""
    return {name + end for end in (_BASE, _DECENTERED, _BASE + _DECENTERED)}


def location_family(fn: Any) -> Any:
    """Return the distribution of single numbers behind one of vectors or matrices of them."""
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return fn


def _batches(samples: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    num_draws = len(next(iter(samples.values())))
    for start in range(0, num_draws, _BATCH_SIZE):
        yield {name: values[start : start + _BATCH_SIZE] for name, values in samples.items()}


class _Look(Messenger):
    """Keeps location and scale of sites as a run of the model has them.

    :param names: of the sites.
    """

    def __init__(self, names: Mapping[str, Any]) -> None:
        super().__init__()
        self._names = names
        self.found: dict[str, Place] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self._names:
            family = location_family(msg["fn"])
            loc, scale = torch.broadcast_tensors(family.loc, family.scale)
            self.found[msg["name"]] = Place(loc, scale, isinstance(family, LogNormal))
