r"""The mode of a density in some of its coordinates, given the others, and its precision there.

Newton's method for many points at once, with the precision from differences of gradients,

.. math:: H_{ij} \approx -\frac{g_j(z + h_i e_i) - g_j(z - h_i e_i)}{2 h_i}, \qquad
          \log \int p(z) \, dy \approx \log p(y^*) - \tfrac12 \log |H| + \tfrac{k}{2} \log 2 \pi,

the Laplace approximation of the integral over the k inner coordinates y.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_adaann.nested.density import Density

__all__ = ["Modes", "find_modes"]

#: Newton's steps at most; the fall of the log density that is none, and the largest one of a mode.
_MAX_STEPS, _SMALL, _LARGEST = 10, 0.01, 0.2
#: Differences of gradients are over so many conditional sds to both sides.
_DIFFERENCE = 0.2
#: Parts of a step that are tried.
_PARTS = (1.0, 0.5, 0.2, 0.05, 0.01)
#: The smallest eigenvalue of a precision that is no saddle's, relative to the largest.
_SINGULAR = 1e-12


class Modes(NamedTuple):
    """Conditional modes of m points.

    :param points: the points with their inner coordinates at the mode, shape ``(m, d)``.
    :param covariance: of the inner coordinates there, ``(m, k, k)``.
    :param log_mass: log of the integral over them, ``(m,)``; minus infinity where no mode was found.
    """

    points: Tensor
    covariance: Tensor
    log_mass: Tensor

    @property
    def sd(self) -> Tensor:
        """Standard deviations of the inner coordinates, ``(m, k)``."""
        return self.covariance.diagonal(dim1=-2, dim2=-1).sqrt()

    def at(self, index: Tensor) -> Modes:
        """Return the modes of some of the points."""
        return Modes(*(field[index] for field in self))

    def join(self, other: Modes) -> Modes:
        """Return these modes and others."""
        return Modes(*(torch.cat(pair) for pair in zip(self, other, strict=True)))


def find_modes(density: Density, inner: Tensor, points: Tensor, scale: Tensor) -> Modes:
    """Return the modes of inner coordinates.

    :param density: the density.
    :param inner: indices of the k inner coordinates.
    :param points: with inner coordinates to start from, shape ``(m, d)``.
    :param scale: sds that the inner coordinates may have there, ``(m, k)``.
    """
    newton = _Newton(density, inner)
    for _ in range(_MAX_STEPS):
        state = newton.look(points, scale)
        is_going = state.decrement > _SMALL
        if not is_going.any():
            break
        points, is_better = newton.go(points, state, is_going)
        scale = state.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        if not is_better.any():
            break
    else:
        state = newton.look(points, scale)
    k = len(inner)
    log_mass = state.log_p - 0.5 * state.log_det + 0.5 * k * math.log(2 * math.pi)
    is_mode = state.is_peak & (state.decrement <= _LARGEST) & log_mass.isfinite()
    return Modes(points, state.covariance, torch.where(is_mode, log_mass, -torch.inf))


class _State(NamedTuple):
    """What Newton's method knows at m points.

    :param log_p: ``(m,)``.
    :param step: to the mode, ``(m, k)``.
    :param decrement: by how much the log density would rise, twice, ``(m,)``; nan where it is not finite.
    :param covariance: ``(m, k, k)``.
    :param log_det: of the precision, ``(m,)``.
    :param is_peak: whether the precision is one, ``(m,)``.
    """

    log_p: Tensor
    step: Tensor
    decrement: Tensor
    covariance: Tensor
    log_det: Tensor
    is_peak: Tensor


class _Newton:
    def __init__(self, density: Density, inner: Tensor) -> None:
        self._density, self._inner = density, inner

    def look(self, points: Tensor, scale: Tensor) -> _State:
        """Return value, gradient and curvature at points."""
        m, k = scale.shape
        h = _DIFFERENCE * scale
        moves = points.new_zeros(m, k, points.shape[1])
        moves[:, torch.arange(k), self._inner] = h
        at = points.unsqueeze(1)
        log_p, gradient = self._density.gradient(torch.cat([at, at + moves, at - moves], dim=1))
        gradient = gradient[..., self._inner]
        rise = (gradient[:, 1 : k + 1] - gradient[:, k + 1 :]) / (2 * h).unsqueeze(-1)
        precision = -0.5 * (rise + rise.mT)
        is_finite = precision.isfinite().all(-1).all(-1) & gradient[:, 0].isfinite().all(-1)
        precision = torch.where(is_finite[:, None, None], precision, torch.eye(k).to(precision))
        # In units of the sds, so that a neck beside wide coordinates is not lost in rounding.
        unit = precision.diagonal(dim1=-2, dim2=-1).abs().clamp(min=1e-30).rsqrt()
        values, vectors = torch.linalg.eigh(unit.unsqueeze(-1) * precision * unit.unsqueeze(-2))
        largest = values.abs().amax(-1, keepdim=True)
        is_peak = is_finite & (values > _SINGULAR * largest).all(-1)
        values = values.abs().maximum(1e-3 * largest).where(~is_peak.unsqueeze(-1), values)
        root = unit.unsqueeze(-1) * vectors * values.rsqrt().unsqueeze(-2)
        along = (root.mT @ gradient[:, 0].unsqueeze(-1)).squeeze(-1)
        decrement = torch.where(is_finite, along.square().sum(-1), torch.nan)
        step = (root @ along.unsqueeze(-1)).squeeze(-1)
        log_det = values.log().sum(-1) - 2 * unit.log().sum(-1)
        return _State(log_p[:, 0], step, decrement, root @ root.mT, log_det, is_peak)

    def go(self, points: Tensor, state: _State, is_going: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best points along the steps, and which of them are better than before."""
        moved = points[is_going]
        parts = points.new_tensor(_PARTS)
        trials = moved.unsqueeze(1).repeat(1, len(parts), 1)
        trials[..., self._inner] += parts[:, None] * state.step[is_going].unsqueeze(1)
        log_p = self._density.log_p(trials)
        best, index = log_p.max(1)
        is_better = best > state.log_p[is_going]
        new = trials[torch.arange(len(moved)), index]
        points = points.clone()
        points[is_going] = torch.where(is_better.unsqueeze(-1), new, moved)
        return points, is_better
