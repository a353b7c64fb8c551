r"""Which nested Laplace approximation of a posterior there is, if any: by draws that may lack its necks.

One is tried for the coordinate on which most widths depend, for the next one, and for both; where no width
depends on any, for the most skewed coordinate; then again by draws of the best one, which tell more. How good
each is as a proposal q of the posterior p is the share of its draws that counts,

.. math:: \frac{(\sum_i w_i)^2}{n \sum_i w_i^2}, \qquad w_i = \frac{p(z_i)}{q(z_i)}, \quad z_i \sim q .
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_adaann.nested.density import Density
from pyro_adaann.nested.laplace import NestedLaplace
from pyro_adaann.nested.lattice import spread
from pyro_adaann.nested.outer import find_outer, most_skewed
from pyro_adaann.nested.refine import refined
from pyro_adaann.weights import effective_sample_size, finite_or_no_weight, log_mean_weight

__all__ = ["Found", "find_nested_laplace"]

#: Coordinates up to which differences of gradients in all of them are cheap.
_MOST_LATENTS = 200
#: Draws that tell how good an approximation is; the share of them that counts from which no other is tried,
#: and with less than which there is none.
_NUM_TRIED, _GOOD, _LEAST = 2000, 0.5, 0.01
#: Draws that choose coordinates and move an approximation, and share of the posterior that it may miss then.
_NUM_DRAWS, _MAX_MISSED = 8000, 0.2
#: Seconds at most.
_MAX_SECONDS = 120.0
#: How often one that is not good is moved to the moments of its draws.
_NUM_REFINED = 8
#: Below this part of the best share there is no more hope.
_HOPELESS = 0.3
#: Part of the posterior's density that an approximation has to have.
_MIN_COVER = 1 / 100


class Found(NamedTuple):
    """An approximation.

    :param density: the approximation.
    :param share: of its draws that counts.
    :param missed: share of the posterior, by the draws that it started from, at which it has less than a
        hundredth of the posterior's density.
    """

    density: NestedLaplace
    share: float
    missed: float = 1.0


def find_nested_laplace(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    z: Tensor,
    log_weights: Tensor,
    goes_on: Callable[[], bool] = lambda: True,
) -> Found | None:
    """Return the best nested Laplace approximation of a posterior, None if none is of use.

    :param model: a Pyro model that runs for many draws at once.
    :param args: its arguments, with ``kwargs``.
    :param z: draws of its unconstrained coordinates, shape ``(n, d)``.
    :param log_weights: their log weights.
    :param goes_on: whether there is time to go on; it has two minutes in any case at most.
    """
    if not 2 <= z.shape[-1] <= _MOST_LATENTS:
        return None
    deadline = time.monotonic() + _MAX_SECONDS
    search = _Search(Density(model, args, kwargs), lambda: goes_on() and time.monotonic() < deadline)
    best = search.best(None, z, log_weights)
    if best is None:
        return None
    if best.share <= _GOOD:
        missed = search.missed(best, z, log_weights)
        if missed > _MAX_MISSED:  # another mode, which no other coordinates bring
            return Found(best.density, best.share, missed)
        best = search.try_out(best.density, _NUM_DRAWS)
        best = search.best(best, best.z, best.log_weights) or best
    latest = best
    for _ in range(_NUM_REFINED if best.share <= _GOOD else 0):
        moved = refined(latest.density, latest.z, latest.log_weights)
        if moved is None or not search.goes_on():
            break
        # One that is not better by chance, or for once, is the way to others.
        latest = search.try_out(moved, _NUM_DRAWS)
        best = max(best, latest, key=lambda tried: tried.share)
        if latest.share > _GOOD or latest.share < _HOPELESS * best.share:
            break
    return Found(best.density, best.share, search.missed(best, z, log_weights))


class _Tried(NamedTuple):
    """An approximation with draws of its own, their log weights, and the share of them that counts."""

    density: NestedLaplace
    z: Tensor
    log_weights: Tensor
    share: float


class _Search:
    """Approximations of a density, tried one after the other.

    :param density: the density.
    :param goes_on: whether there is time to go on.
    """

    def __init__(self, density: Density, goes_on: Callable[[], bool]) -> None:
        self._density, self.goes_on = density, goes_on
        self._seen: set[tuple[int, ...]] = set()

    def best(self, best: _Tried | None, z: Tensor, log_weights: Tensor) -> _Tried | None:
        """Return the best one with outer coordinates chosen by draws, or the best one so far."""
        for outer in _choices(z, log_weights):
            if outer in self._seen:
                continue
            self._seen.add(outer)
            nested = spread(self._density, list(outer), z, log_weights, self.goes_on)
            tried = None if nested is None else self.try_out(nested)
            if tried is not None and tried.share > (_LEAST if best is None else best.share):
                best = tried
            if best is not None and best.share > _GOOD:
                break
        return best

    def try_out(self, nested: NestedLaplace, num_draws: int = _NUM_TRIED) -> _Tried:
        """Return draws of an approximation, weighted."""
        z = nested.sample(torch.Size([num_draws]))
        log_weights = finite_or_no_weight(self._density.log_p(z) - nested.log_prob(z))
        return _Tried(nested, z, log_weights, effective_sample_size(log_weights) / num_draws)

    def missed(self, found: _Tried, z: Tensor, log_weights: Tensor) -> float:
        """Return the share of weighted draws at which an approximation lacks the posterior's density."""
        log_cover = found.density.log_prob(z) + log_mean_weight(found.log_weights) - self._density.log_p(z)
        is_missed = ~(log_cover >= math.log(_MIN_COVER))
        return float(log_weights.double().softmax(0) @ is_missed.double())


def _choices(z: Tensor, log_weights: Tensor) -> list[tuple[int, ...]]:
    """Return the outer coordinates to try, by draws."""
    found = [outer.coordinate for outer in find_outer(z, log_weights)[:2]]
    found = found or [most_skewed(z, log_weights)]
    choices = [tuple(found[:1]), tuple(sorted(found)), tuple(found[1:])]
    return [outer for outer in choices if 0 < len(outer) < z.shape[-1]]
