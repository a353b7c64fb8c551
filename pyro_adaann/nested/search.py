r"""The nested Laplace approximation of a posterior, by draws that say where it is.

Where one leaves out a mode that the draws know, it becomes a mixture of such approximations, mode by mode:
of the modes to which draws belong that are left out, the one of largest mass is next. Left out are z with

.. math:: \hat Z_k \, q_k(z) < \tfrac{1}{100} \, p(z) \text{ for all } k, \qquad
          \hat Z_k = \frac1n \sum_i \frac{p(z_{ki})}{q_k(z_{ki})}, \quad z_{ki} \sim q_k .

How many draws a mode has may be far from its share: its Laplace approximation says what it is worth.
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
from pyro_adaann.nested.modes import Modes, find_modes
from pyro_adaann.nested.tries import GOOD, NUM_TRIED, Tried, best_try, is_missed
from pyro_adaann.weights import effective_sample_size, finite_or_no_weight, log_mean_weight

__all__ = ["MAX_MISSED", "Found", "find_nested_laplace"]

#: Coordinates up to which differences of gradients in all of them are cheap.
_MOST_LATENTS = 200
#: Seconds at most.
_MAX_SECONDS = 120.0
#: Share of the posterior that an approximation may leave out where it is to stand for all of it.
MAX_MISSED = 0.02
#: Modes at most. The search is given up once the parts hold less than this part of what as many of so many
#: equal modes would hold.
_MOST_MODES, _LEAST_PART = 16, 0.5
#: Share of its draws that counts with which a part is one of a mixture.
_LEAST_SHARE = 0.3
#: Draws that are left out from which modes are looked for at a time. Modes lighter than this share are none.
_NUM_STARTS, _LIGHT = 8, 1e-3
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
    return modes.all_of_it()


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

    def all_of_it(self) -> Found | None:
        """Return one approximation of all, or one of each mode, None if none is of use."""
        whole = best_try(self._density, self._z, self._log_weights, self._goes_on)
        if whole is None:
            return self._mode_by_mode()
        self._parts = [whole]
        found = self._found()
        if found.missed > MAX_MISSED:
            if whole.share > _LEAST_SHARE and not self._is_hopeful(found.missed):
                return found
            if whole.share <= GOOD:
                self._parts = []  # it may lie across modes
        return self._mode_by_mode() or found

    def _mode_by_mode(self) -> Found | None:
        """Return the parts with those of further modes, None if they do not come to all of them."""
        is_left = self._is_left()
        while bool(is_left.any()):
            before = self._share(is_left)
            mode = self._new_mode(is_left) if len(self._parts) < _MOST_MODES and self._goes_on() else None
            if mode is None:
                break
            part = self._part_at(mode)
            if part is None or part.share < _LEAST_SHARE:
                return None if before > MAX_MISSED else self._found()._replace(missed=self._share_of(mode))
            self._parts.append(part)
            is_left = self._is_left()
            if before > MAX_MISSED and not self._is_hopeful(self._share(is_left)):
                return None
        return None if self._share(is_left) > MAX_MISSED or not self._parts else self._found()

    def _is_hopeful(self, missed: float) -> bool:
        """Whether parts like those there are would come to all modes."""
        return 1 - missed > _LEAST_PART * len(self._parts) / _MOST_MODES

    def _share(self, is_left: Tensor) -> float:
        return float(self._weights @ is_left.double())

    def _is_left(self) -> Tensor:
        """Return which draws all parts leave out."""
        return self._is_missed(self._z, self._log_p)

    def _is_missed(self, z: Tensor, log_p: Tensor) -> Tensor:
        missed = torch.ones_like(log_p, dtype=torch.bool)
        for part in self._parts:
            missed &= part.is_missed(z, log_p)
        return missed

    @property
    def _log_shares(self) -> Tensor:
        return self._z.new_tensor([part.log_evidence for part in self._parts])

    def _share_of(self, mode: Modes) -> float:
        """Return the share of a mode, by its Laplace approximation, beside the parts."""
        return float((mode.log_mass[0] - self._log_shares.logsumexp(0)).sigmoid()) if self._parts else 1.0

    def _new_mode(self, is_left: Tensor) -> Modes | None:
        """Return the largest mode that draws that are left out lead to, None if there is none of weight."""
        left = is_left.nonzero().squeeze(-1)
        left = left[self._log_p[left].argsort(descending=True)]
        some = torch.linspace(0, len(left) - 1, min(_NUM_STARTS, len(left))).round().long()
        starts = self._z[left[some.to(left.device)]]
        scale = torch.stack([self._sds_around(start) for start in starts])
        everywhere = torch.arange(starts.shape[1], device=starts.device)
        modes = find_modes(self._density, everywhere, starts, scale)
        is_new = modes.log_mass.isfinite() & self._is_missed(modes.points, self._density.log_p(modes.points))
        if not is_new.any():
            return None
        best = torch.where(is_new, modes.log_mass, -torch.inf).argmax()
        mode = modes.at(best.unsqueeze(0))
        return mode if self._share_of(mode) > _LIGHT else None

    def _sds_around(self, start: Tensor) -> Tensor:
        """Return sds of the draws that are nearest to one."""
        distance = ((self._z - start) / self._sd).square().sum(-1)
        near = self._z[distance.topk(max(int(_NEAREST * len(self._z)), 2), largest=False).indices]
        return near.std(0).clamp(min=1e-6)

    def _part_at(self, mode: Modes) -> Tried | None:
        """Return an approximation that starts from draws of the normal density at a mode."""
        normal = torch.distributions.MultivariateNormal(
            mode.points[0], scale_tril=_WIDER * torch.linalg.cholesky(mode.covariance[0])
        )
        z = normal.sample(torch.Size([NUM_TRIED]))
        log_weights = finite_or_no_weight(self._density.log_p(z) - normal.log_prob(z))
        if effective_sample_size(log_weights) < _MIN_ESS:
            log_weights = torch.zeros_like(log_weights)
        return best_try(self._density, z, log_weights, self._goes_on)

    def _found(self) -> Found:
        """Return what the parts are together."""
        density = LaplaceMixture([part.density for part in self._parts], self._log_shares)
        z, log_weights = self._parts[0].z, self._parts[0].log_weights
        if len(self._parts) > 1:
            z = density.sample(torch.Size([NUM_TRIED]))
            log_weights = finite_or_no_weight(self._density.log_p(z) - density.log_prob(z))
        missed = is_missed(density.log_prob(self._z) + log_mean_weight(log_weights), self._log_p)
        return Found(density, effective_sample_size(log_weights) / len(z), self._share(missed))
