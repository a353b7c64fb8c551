r"""The nested Laplace approximation of a posterior, by draws that say where it is.

Where one leaves out a mode that the draws have, it becomes a mixture of such approximations, mode by mode:
each starts from a normal density at the mode that the heaviest draw among those left out belongs to. What is
left out are the draws z with

.. math:: \sum_k \hat Z_k \, q_k(z) < \tfrac{1}{100} \, p(z), \qquad
          \hat Z_k = \frac1n \sum_i \frac{p(z_{ki})}{q_k(z_{ki})}, \quad z_{ki} \sim q_k .
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_adaann.nested.density import Density
from pyro_adaann.nested.lattice import moments_of
from pyro_adaann.nested.mixture import LaplaceMixture
from pyro_adaann.nested.modes import find_modes
from pyro_adaann.nested.tries import GOOD, NUM_TRIED, Tried, best_try
from pyro_adaann.weights import effective_sample_size, finite_or_no_weight, log_mean_weight

__all__ = ["MAX_MISSED", "Found", "find_nested_laplace"]

#: Coordinates up to which differences of gradients in all of them are cheap.
_MOST_LATENTS = 200
#: Seconds at most.
_MAX_SECONDS = 120.0
#: Share of the posterior that one of all of it may leave out: a mode of its own is no small part.
MAX_MISSED = 0.02
#: Modes at most. A mixture whose parts have less than this part of what as many equal ones would have of them
#: is given up.
_MOST_MODES, _LEAST_PART = 16, 0.5
#: Share of its draws that counts with which a part is one of a mixture.
_LEAST_SHARE = 0.3
#: Of the draws, those nearest to one that tell how wide its mode may be.
_NEAREST = 0.05
#: Of the normal density at a mode: its sds, and effective draws with which its weights tell anything.
_WIDER, _MIN_ESS = 1.1, 200.0


class Found(NamedTuple):
    """An approximation.

    :param density: the approximation.
    :param share: of its draws that counts.
    :param missed: share of the posterior, by the draws that it started from, at which it has less than a
        hundredth of the posterior's density.
    """

    density: LaplaceMixture
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
    modes = _Modes(
        Density(model, args, kwargs), z, log_weights, lambda: goes_on() and time.monotonic() < deadline
    )
    whole = modes.whole()
    if whole is not None and whole.missed <= MAX_MISSED:
        return whole
    return modes.one_by_one(whole) or whole


class _Modes:
    """Approximations of a density, of all of it or mode by mode.

    :param density: the density.
    :param z: draws that tell where it is, shape ``(n, d)``.
    :param log_weights: of them.
    :param goes_on: whether there is time to go on.
    """

    def __init__(self, density: Density, z: Tensor, log_weights: Tensor, goes_on: Callable[[], bool]) -> None:
        self._density, self._goes_on = density, goes_on
        weights = log_weights.double().softmax(0)
        kept = weights > 0  # others may have values that are not finite
        self._z, self._log_weights, self._weights = (
            z[kept].double(),
            log_weights[kept].double(),
            weights[kept],
        )
        self._sd = moments_of(self._z, self._log_weights)[1].clamp(min=1e-30)
        self._log_p = density.log_p(self._z)
        self._parts: list[Tried] = []

    def whole(self) -> Found | None:
        """Return one approximation of all."""
        best = best_try(self._density, self._z, self._log_weights, self._goes_on)
        if best is None:
            return None
        self._parts = [best]
        return self._found(self._is_left())

    def one_by_one(self, whole: Found | None) -> Found | None:
        """Return a mixture of approximations of single modes, None if it does not come to all of them.

        :param whole: the approximation of all, which is a part if it is good where it is.
        """
        if whole is not None and whole.share > _LEAST_SHARE and not self._is_hopeful(whole.missed):
            return None
        if whole is None or whole.share <= GOOD:
            self._parts = []
        is_left = self._is_left()
        while self._share(is_left) > MAX_MISSED:
            part = self._next(is_left) if len(self._parts) < _MOST_MODES and self._goes_on() else None
            if part is None or part.share < _LEAST_SHARE:
                return None
            self._parts.append(part)
            before, is_left = self._share(is_left), self._is_left()
            if not (self._share(is_left) < before and self._is_hopeful(self._share(is_left))):
                return None
        return self._found(is_left)

    def _is_hopeful(self, missed: float) -> bool:
        """Whether parts like those there are would come to all modes."""
        return 1 - missed > _LEAST_PART * len(self._parts) / _MOST_MODES

    def _share(self, is_left: Tensor) -> float:
        return float(self._weights @ is_left.double())

    def _is_left(self) -> Tensor:
        """Return which draws all parts leave out."""
        is_left = torch.ones_like(self._weights, dtype=torch.bool)
        for part in self._parts:
            is_left &= part.is_missed(self._z, self._log_p)
        return is_left

    def _next(self, is_left: Tensor) -> Tried | None:
        """Return an approximation of the mode that the heaviest draw of those left out belongs to."""
        height = torch.where(is_left, self._log_p, -torch.inf)
        if not height.max() > -torch.inf:
            return None
        start = self._z[height.argmax()]
        distance = ((self._z - start) / self._sd).square().sum(-1)
        near = self._z[distance.topk(max(int(_NEAREST * len(self._z)), 2), largest=False).indices]
        everywhere = torch.arange(len(start), device=start.device)
        mode = find_modes(
            self._density, everywhere, start.unsqueeze(0), near.std(0, keepdim=True).clamp(1e-6)
        )
        if not mode.log_mass.isfinite().all():
            return None
        normal = torch.distributions.MultivariateNormal(
            mode.points[0], scale_tril=_WIDER * torch.linalg.cholesky(mode.covariance[0])
        )
        z = normal.sample((NUM_TRIED,))
        log_weights = finite_or_no_weight(self._density.log_p(z) - normal.log_prob(z))
        if effective_sample_size(log_weights) < _MIN_ESS:
            log_weights = torch.zeros_like(log_weights)
        return best_try(self._density, z, log_weights, self._goes_on)

    def _found(self, is_left: Tensor) -> Found:
        """Return what the parts are together."""
        log_shares = torch.tensor([log_mean_weight(part.log_weights) for part in self._parts])
        density = LaplaceMixture([part.density for part in self._parts], log_shares)
        if len(self._parts) == 1:
            return Found(density, self._parts[0].share, self._share(is_left))
        z = density.sample(torch.Size([NUM_TRIED]))
        log_weights = finite_or_no_weight(self._density.log_p(z) - density.log_prob(z))
        return Found(density, effective_sample_size(log_weights) / NUM_TRIED, self._share(is_left))
