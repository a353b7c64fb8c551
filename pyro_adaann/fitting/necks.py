"""A nested Laplace approximation beside the fits: it reaches the ends of necks, and is a witness of the rest.

A flow loses the end of a funnel's neck without a sign: no draw comes there, wider bases miss it, and
particles that move do not enter it. Given the scales that make the funnel a posterior is nearly normal there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_adaann.diagnostics.diagnose import statistics
from pyro_adaann.diagnostics.numbers import labels, percent
from pyro_adaann.diagnostics.reach import measure_reach
from pyro_adaann.diagnostics.rules import Finding, Level
from pyro_adaann.diagnostics.verdict import Diagnosis
from pyro_adaann.fitting.attempts import BATCH_SIZE, Attempt
from pyro_adaann.fitting.coordinates import Coordinates
from pyro_adaann.fitting.mixture import Apart, Mixture, weigh_guides
from pyro_adaann.fitting.moments import Moments, measure_moments
from pyro_adaann.fitting.pilot import Watch
from pyro_adaann.guides.base import AutoFlow
from pyro_adaann.guides.latents import free_numbers
from pyro_adaann.nested.guide import NestedGuide
from pyro_adaann.nested.search import MAX_MISSED, find_nested_laplace
from pyro_adaann.objectives.one_by_one import is_one_by_one
from pyro_adaann.processes.group import process_count

__all__ = ["Completed", "Nested", "complete", "find_nested", "names_of", "search", "what_it_is"]

#: Effective draws of a fit from which on they tell where scales lie.
_MIN_ESS = 200.0
#: Share of its draws that counts from which on the approximation is a witness.
_WITNESS = 0.3
#: Share of the evidence that matters, in standard errors too; differences of means in sds and of logs of sds
#: that do.
_MIN_SHARE, _NUM_ERRORS, _NOTICEABLE = 0.003, 3.0, 0.03


class Nested(NamedTuple):
    """A nested Laplace approximation.

    :param guide: that draws from it.
    :param share: of its draws, under weights of their own, that counts.
    :param missed: share of the posterior, by the draws that it was made of, that it lacks.
    """

    guide: NestedGuide
    share: float
    missed: float

    @property
    def is_witness(self) -> bool:
        """Whether it is near to the posterior, and all of it: then it bears witness to a fit."""
        return self.share >= _WITNESS and self.missed <= MAX_MISSED


class Completed(NamedTuple):
    """Draws of fits and of a nested Laplace approximation.

    :param mixture: the draws of all, those of the approximation last.
    :param moments: of them.
    :param diagnosis: of the fits, with tail, effective draws and evidence of all.
    :param remark: what is said of it.
    """

    mixture: Mixture
    moments: Moments
    diagnosis: Diagnosis
    remark: Finding

    @property
    def is_usable(self) -> bool:
        """Whether the draws can be used."""
        return self.diagnosis.level <= Level.USABLE_WITH_WEIGHTS


def find_nested(coordinates: Coordinates, attempt: Attempt, watch: Watch) -> Nested | None:
    """Return the nested Laplace approximation that starts from the draws of a fit.

    None where nothing sets the widths of others, or given what does the others are far from normal; with
    several processes, and for models that run for one draw after the other.
    """
    found = attempt.diagnosis
    if not found.is_annealed or found.ess < _MIN_ESS:
        return None
    values: Mapping[str, Tensor] = attempt.draws.samples
    if coordinates.centered:
        values, _ = coordinates.enter(values)
    z = free_numbers(attempt.svi.guide, values)
    return search(coordinates, z, attempt.draws.log_weights, watch)


def search(
    coordinates: Coordinates, z: Tensor, log_weights: Tensor, watch: Watch | None = None
) -> Nested | None:
    """Return the nested Laplace approximation that starts from draws, None as of :func:`find_nested`.

    :param coordinates: in which the model is fitted.
    :param z: draws of its free numbers, shape ``(n, latent_dim)``.
    :param log_weights: their log weights.
    :param watch: progress, clock and Ctrl-C of the fit, which may end the search.
    """
    model, args, kwargs = coordinates.model, coordinates.args, coordinates.kwargs
    if process_count() > 1 or is_one_by_one(model):
        return None

    def goes_on() -> bool:
        return watch is None or (watch[1].has(0.0) and not watch[2].requested)

    try:
        found = find_nested_laplace(model, args, kwargs, z, log_weights, goes_on)
    except (ValueError, RuntimeError, TypeError):  # no gradient, or no double precision on this device
        return None
    if found is None:
        return None
    nested = NestedGuide(model, found.density)
    return Nested(nested.initialize(*args, **kwargs), found.share, found.missed)


def complete(
    coordinates: Coordinates,
    nested: Nested,
    guides: Sequence[AutoFlow],
    best: AutoFlow,
    moments: Moments,
    diagnosis: Diagnosis,
    num_samples: int,
) -> Completed | None:
    """Return the draws of fits with those of an approximation; None if these add nothing.

    :param coordinates: in which the guides fit the model.
    :param guides: of the fits.
    :param best: the one whose reach the diagnosis has.
    :param moments: of their draws.
    :param diagnosis: likewise.
    :param num_samples: draws of every guide.
    """
    model, args, kwargs = coordinates.model, coordinates.args, coordinates.kwargs
    mixture = weigh_guides(model, [*guides, nested.guide], args, kwargs, num_samples, BATCH_SIZE)
    mixture = mixture._replace(draws=coordinates.restore(mixture.draws))
    found = statistics(mixture.log_weights)
    share = -math.expm1(min(diagnosis.log_evidence - found["log_evidence"], 0.0))
    error = math.hypot(diagnosis.log_evidence_se, found["log_evidence_se"])
    more = measure_moments(mixture.draws.samples, mixture.draws.log_weights)
    has_more = share > max(_MIN_SHARE, _NUM_ERRORS * error) or bool(moments.lacks(more, _NOTICEABLE))
    if not (has_more or nested.is_witness):
        return None
    if nested.is_witness:
        diagnosis = replace(diagnosis, reach=_reach(coordinates, nested, best, diagnosis))
    if has_more:
        remark = Finding(
            Level.USABLE_WITH_WEIGHTS,
            f"The fits lack {percent(share)} of the posterior: {_what_it_adds(nested.guide)}. A "
            f"{what_it_is(nested.guide)} has it: the draws are of the fits and of it.",
        )
    else:
        text = f"A {what_it_is(nested.guide)} agrees: the draws are of the fits and of it."
        remark = Finding(Level.GOOD, text)
    return Completed(mixture, more, replace(diagnosis, **found), remark)


def _reach(coordinates: Coordinates, nested: Nested, guide: AutoFlow, diagnosis: Diagnosis) -> Any:
    """Return what neither a fit nor a witness reaches."""
    reach = diagnosis.reach
    if reach is None or (reach.is_known and not reach.is_short):
        return reach
    args, kwargs = coordinates.args, coordinates.kwargs

    @torch.no_grad()
    def also(values: dict[str, Tensor]) -> Tensor:
        return nested.guide.log_prob(values, *args, **kwargs)

    num = diagnosis.num_samples
    reach = measure_reach(coordinates.model, Apart(guide), args, kwargs, num, BATCH_SIZE, True, also)
    # A few draws of wider bases may have all of the weight: where the approximation holds these there is no
    # alarm, elsewhere there may be a mode of which it knows nothing.
    return None if reach is None or (reach.share <= _MIN_SHARE and not reach.is_known) else reach


def what_it_is(guide: NestedGuide) -> str:
    """Return what an approximation is, as a part of a sentence."""
    place = f"around {names_of(guide)}" if guide.num_modes == 1 else f"of {guide.num_modes} modes"
    return f"nested Laplace approximation {place}"


def _what_it_adds(guide: NestedGuide) -> str:
    """Return what fits may lack that an approximation has."""
    if guide.num_modes > 1:
        return "a mode, or the end of a neck"
    return f"the end of a neck or a narrow part, seen around {names_of(guide)}"


def names_of(guide: NestedGuide) -> str:
    """Return the names of the outer coordinates."""
    shapes = guide._unconstrained_shapes.items()
    names = [label for name, shape in shapes for label in labels(name, shape)]
    return " or ".join(names[index] for index in guide.outer)
