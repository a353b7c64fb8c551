r"""Which nested Laplace approximation of a posterior there is, if any: by draws that may lack its necks.

One is tried for the coordinate on which most widths depend, for the next one, and for both; where no width
depends on any, for the most skewed coordinate; then again by draws of the best one, which tell more. How good
each is as a proposal q of the posterior p is the share of its draws that counts,

.. math:: \frac{(\sum_i w_i)^2}{n \sum_i w_i^2}, \qquad w_i = \frac{p(z_i)}{q(z_i)}, \quad z_i \sim q .
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_adaann.nested.density import Density
from pyro_adaann.nested.laplace import NestedLaplace
from pyro_adaann.nested.lattice import spread
from pyro_adaann.nested.outer import find_outer, most_skewed
from pyro_adaann.nested.refine import refined
from pyro_adaann.weights import effective_sample_size, finite_or_no_weight, log_mean_weight

__all__ = ["GOOD", "NUM_TRIED", "Tried", "best_try", "is_missed", "try_out"]

#: Draws that tell how good an approximation is; the share of them that counts from which no other is tried,
#: and with less than which there is none.
NUM_TRIED, GOOD, _LEAST = 2000, 0.5, 0.01
#: Draws that choose coordinates and move an approximation, and share of the posterior that it may miss then.
_NUM_DRAWS, _MAX_MISSED = 8000, 0.2
#: How often one that is not good is moved to the moments of its draws.
_NUM_REFINED = 8
#: Below this part of the best share there is no more hope.
_HOPELESS = 0.3
#: Part of the posterior's density that an approximation has to have.
_MIN_COVER = -math.log(100)


class Tried(NamedTuple):
    """An approximation with draws of its own.

    :param density: the approximation.
    :param z: draws from it, shape ``(n, d)``.
    :param log_weights: of them, against the posterior.
    :param share: of them that counts.
    """

    density: NestedLaplace
    z: Tensor
    log_weights: Tensor
    share: float

    @property
    def log_evidence(self) -> float:
        """Log of the integral of what the approximation holds of the posterior."""
        return log_mean_weight(self.log_weights)

    def is_missed(self, z: Tensor, log_p: Tensor) -> Tensor:
        """Return at which points the approximation has less than a hundredth of the posterior's density.

        :param z: the points, shape ``(n, d)``.
        :param log_p: log of the posterior's density there.
        """
        return is_missed(self.density.log_prob(z) + self.log_evidence, log_p)


def is_missed(log_held: Tensor, log_p: Tensor) -> Tensor:
    """Return where a density is less than a hundredth of another, or no number."""
    return ~(log_held - log_p >= _MIN_COVER)


def try_out(density: Density, nested: NestedLaplace, num_draws: int = NUM_TRIED) -> Tried:
    """Return an approximation of a density with draws of its own, weighted."""
    z = nested.sample(torch.Size([num_draws]))
    log_weights = finite_or_no_weight(density.log_p(z) - nested.log_prob(z))
    return Tried(nested, z, log_weights, effective_sample_size(log_weights) / num_draws)


def best_try(
    density: Density, z: Tensor, log_weights: Tensor, goes_on: Callable[[], bool] = lambda: True
) -> Tried | None:
    """Return the best nested Laplace approximation with one or two outer coordinates, None if none is of use.

    :param density: the density.
    :param z: draws that tell where it is, shape ``(n, d)``.
    :param log_weights: of them.
    :param goes_on: whether there is time to go on.
    """
    search = _Search(density, goes_on)
    best = search.best(None, z, log_weights)
    if best is None or best.share > GOOD:
        return best
    missed = best.is_missed(z, density.log_p(z)).double()
    if float(log_weights.double().softmax(0) @ missed) > _MAX_MISSED:
        return best  # another mode, which no other coordinates bring
    best = try_out(density, best.density, _NUM_DRAWS)
    best = search.best(best, best.z, best.log_weights) or best
    latest = best
    for _ in range(_NUM_REFINED if best.share <= GOOD else 0):
        moved = refined(latest.density, latest.z, latest.log_weights)
        if moved is None or not goes_on():
            break
        # One that is not better by chance, or for once, is the way to others.
        latest = try_out(density, moved, _NUM_DRAWS)
        best = max(best, latest, key=lambda tried: tried.share)
        if latest.share > GOOD or latest.share < _HOPELESS * best.share:
            break
    return best


class _Search:
    """Approximations of a density, tried one after the other.

    :param density: the density.
    :param goes_on: whether there is time to go on.
    """

    def __init__(self, density: Density, goes_on: Callable[[], bool]) -> None:
        self._density, self._goes_on = density, goes_on
        self._seen: set[tuple[int, ...]] = set()

    def best(self, best: Tried | None, z: Tensor, log_weights: Tensor) -> Tried | None:
        """Return the best one with outer coordinates chosen by draws, or the best one so far."""
        for outer in _choices(z, log_weights):
            if outer in self._seen:
                continue
            self._seen.add(outer)
            nested = spread(self._density, list(outer), z, log_weights, self._goes_on)
            tried = None if nested is None else try_out(self._density, nested)
            if tried is not None and tried.share > (_LEAST if best is None else best.share):
                best = tried
            if best is not None and best.share > GOOD:
                break
        return best


def _choices(z: Tensor, log_weights: Tensor) -> list[tuple[int, ...]]:
    """Return the outer coordinates to try, by draws."""
    found = [outer.coordinate for outer in find_outer(z, log_weights)[:2]]
    found = found or [most_skewed(z, log_weights)]
    choices = [tuple(found[:1]), tuple(sorted(found)), tuple(found[1:])]
    return [outer for outer in choices if 0 < len(outer) < z.shape[-1]]
