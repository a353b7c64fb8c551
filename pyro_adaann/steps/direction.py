"""The damped natural gradient, from the scores of weighted draws."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_adaann.weights import truncated_weights

__all__ = ["NaturalDirection", "residuals"]

#: A draw whose weight is below the mean by so many nats is a stray one, and all strays count alike.
_MIN_RESIDUAL = -8.0
#: Damping of a parameter on which the density hardly depends, as a share of the mean over all.
_FLOOR = 0.01


class NaturalDirection:
    r"""The damped natural gradient for any damping.

    .. math:: \delta = (F + \lambda D)^{-1} \frac1n A^\top r, \qquad F = \frac1n A^\top A, \qquad
              D_{jj} = F_{jj} + \frac{0.01}{u_j^2} \operatorname{mean}_k u_k^2 F_{kk}

    with A the centered scores of the draws, r their :func:`residuals` and u the units of the parameters. The
    second term of D is Levenberg's, the first one Marquardt's, which alone would let a parameter
    on which the density does not depend yet run away: at the start of a flow, where the layers do nothing,
    that is where their bends are. What is solved is the system of the size of the number of draws, and not of
    parameters.

    :param scores: gradients of log q at fixed draws, shape ``(num_draws, num_parameters)``.
    :param log_weights: of the draws, shape ``(num_draws,)``.
    :param units: what counts as a large change of a parameter, shape ``(num_parameters,)``; 1 if not given.
    """

    def __init__(self, scores: Tensor, log_weights: Tensor, units: Tensor | None = None) -> None:
        # A draw whose score has overflown says nothing.
        scores = torch.where(torch.isfinite(scores).all(1, keepdim=True), scores, 0.0)
        self._scores = scores.sub_(scores.mean(0))
        units = torch.ones_like(scores[0]) if units is None else units
        square = (torch.linalg.vector_norm(scores, dim=0) * units).square() / len(scores)
        self._scale = units * (square + _FLOOR * square.mean() + torch.finfo(square.dtype).tiny).rsqrt()
        scores *= self._scale
        # The product is the cost of a flow with many parameters. Its rounding, in single precision 1e-6 of
        # the mean of the diagonal, is far below any damping; that of a solution with it might not be.
        self._gram = (scores @ scores.T).double() / len(scores)
        self._residual = residuals(log_weights.double())

    def solve(self, damping: float, max_kl: float = math.inf) -> tuple[Tensor, float]:
        """Return the direction, no longer than ``max_kl`` allows, and its divergence in nats."""
        num_draws = len(self._gram)
        damped = self._gram + damping * torch.eye(num_draws, dtype=self._gram.dtype, device=self._gram.device)
        solution = torch.linalg.solve(damped, self._residual)
        kl = 0.5 * float((self._gram @ solution).square().mean())
        direction = self._scale * (solution.to(self._scores.dtype) @ self._scores) / num_draws
        if kl <= max_kl:
            return direction, kl
        return direction * math.sqrt(max_kl / kl), max_kl


def residuals(log_weights: Tensor) -> Tensor:
    """Return how much more density the guide should have at its draws, relative to what it has.

    With w the weights, truncated, and of mean one: w - 1 where that is positive, else log w, at least -8. At
    a stray draw the forward divergence alone asks for -1 whatever w is, and strays stay.
    """
    weights = len(log_weights) * truncated_weights(log_weights)
    return torch.where(weights < 1, weights.log().clamp(min=_MIN_RESIDUAL), weights - 1)
