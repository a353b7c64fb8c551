"""The damped natural gradient, from the scores of weighted draws."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_adaann.steps.gram import DensePart, OuterPart, ScorePart, gram_matrix
from pyro_adaann.transforms.outer import OuterProducts
from pyro_adaann.weights import finite_or_no_weight, truncated_weights

__all__ = ["NaturalDirection", "residuals"]

#: Log weights this many nats below the mean, and lower, are clipped.
_MIN_RESIDUAL = -8.0
#: Damping of a parameter on which the density hardly depends, relative to the mean over all parameters.
_FLOOR = 0.01
#: How often damping is raised tenfold until the damped matrix is positive.
_MAX_RAISES = 20


class NaturalDirection:
    r"""The damped natural gradient for any damping.

    .. math:: \delta = (F + \lambda D)^{-1} \frac1n A^\top r, \qquad F = \frac1n A^\top A, \qquad
              D_{jj} = F_{jj} + \frac{0.01}{u_j^2} \operatorname{mean}_k u_k^2 F_{kk}

    with A the centered scores of the draws, r their :func:`residuals` and u the units of the parameters. The
    first term of D is Marquardt's, the second Levenberg's. Without the second, parameters on which the
    density does not depend yet would take arbitrarily large steps, such as those of the bends of a flow at
    the identity. The linear system solved has the size of the number of draws, not of the number of
    parameters.

    For a linear map the factors of outer products are enough (see :mod:`pyro_adaann.steps.gram`). D then has
    rank one, a factor for every row of the map and one for every column. With
    :math:`\hat F = \mu \rho_j \gamma_k` the matrix of rank one that has the row and column sums of F's
    diagonal, both factors of mean one, and f the second term of D, it is
    :math:`(\sqrt\mu \rho_j + \sqrt f)(\sqrt\mu \gamma_k + \sqrt f)`: never below f, and nearly
    :math:`\hat F` where that is much larger.

    :param scores: gradients of log q at fixed draws: a matrix of shape ``(num_draws, num_parameters)``; or
        for every parameter a tensor of shape ``(num_draws, *shape)`` or the outer products whose sum it is.
    :param log_weights: of the draws, shape ``(num_draws,)``.
    :param units: what counts as a large change of a parameter, shape ``(num_parameters,)``; 1 if not given.
    :param replayed: log weights of points that are a sample of the tempered density, on the scale of
        ``log_weights``; their rows of the scores follow those of the draws. With the weights w their r is
        1 - 1 / w where that is positive, else 0: where the guide has too little density, the gradient of the
        forward divergence, which vanishes where the densities agree.

    Example::

        >>> import torch
        >>> left, right, log_weights = torch.randn(50, 3), torch.randn(50, 4), torch.randn(50)
        >>> direction = NaturalDirection([[OuterProducts(left, right)]], log_weights)
        >>> step, kl = direction.solve(damping=0.1, max_kl=0.02)
        >>> step.shape, 0 < kl <= 0.02
        (torch.Size([12]), True)
    """

    def __init__(
        self,
        scores: Tensor | Sequence[Tensor | Sequence[OuterProducts]],
        log_weights: Tensor,
        units: Tensor | None = None,
        replayed: Tensor | None = None,
    ) -> None:
        self._parts = _parts([scores] if isinstance(scores, Tensor) else scores, units)
        # A draw whose score has overflowed is left out.
        square_norms = torch.stack([part.square_norms() for part in self._parts]).sum(0)
        is_lost = ~torch.isfinite(square_norms)
        if is_lost.any():
            for part in self._parts:
                part.forget(is_lost)
        variances = [part.variance() for part in self._parts]
        num_parameters = sum(part.num_parameters for part in self._parts)
        floor = _FLOOR * torch.stack([variance.sum() for variance in variances]).sum() / num_parameters
        for part, variance in zip(self._parts, variances, strict=True):
            part.set_scale(variance, floor)
        # Single precision rounds by 1e-7 of the mean of the diagonal, far below any damping. Solving the
        # system may lose more digits, and is done in double precision.
        self._residual = residuals(log_weights.double())
        if replayed is not None:
            log_mean = finite_or_no_weight(log_weights.double()).logsumexp(0) - math.log(len(log_weights))
            pull = 1 - (log_mean - replayed.double()).exp()
            self._residual = torch.cat([self._residual, pull.nan_to_num(nan=0.0).clamp(min=0.0)])
        self._gram = gram_matrix(self._parts, square_norms) / len(self._residual)

    def solve(self, damping: float, max_kl: float = math.inf) -> tuple[Tensor, float]:
        """Return the direction, shortened to a divergence of at most ``max_kl``, and its divergence."""
        # A factorization for each damping: eigenvalues, which hold for all dampings, cost more than six of
        # them.
        for _ in range(_MAX_RAISES):
            damped = self._gram.to(self._residual.dtype, copy=True)
            damped.diagonal().add_(damping)
            factor, info = torch.linalg.cholesky_ex(damped)
            solution = torch.cholesky_solve(self._residual.unsqueeze(1), factor).squeeze(1)
            # By the system itself, F along the direction is what damping leaves of the residual.
            divergence = 0.5 * (self._residual - damping * solution).square().mean()
            kl, failed = torch.stack([divergence, info.to(divergence)]).tolist()
            if not failed:
                break
            damping *= 10  # below the rounding of the matrix
        coefficients = ((solution - solution.mean()) / len(solution)).to(self._gram.dtype)
        direction = torch.cat([part.combine(coefficients) for part in self._parts])
        if kl <= max_kl:
            return direction, kl
        return direction * math.sqrt(max_kl / kl), max_kl

    def scale(self) -> Tensor:
        r"""Return :math:`D^{-1/2}`, the factor of every number, shape ``(num_parameters,)``."""
        return torch.cat([part.scale().reshape(-1) for part in self._parts])


def residuals(log_weights: Tensor) -> Tensor:
    """Return the desired relative change of the guide's density at its draws.

    With the truncated weights w of mean one: w - 1 where that is positive, else log w, at least -8. The
    forward divergence alone has w - 1 everywhere, about -1 however small w is, which is too weak to remove
    mass far outside the tempered density.
    """
    weights = len(log_weights) * truncated_weights(log_weights)
    return torch.where(weights < 1, weights.log().clamp(min=_MIN_RESIDUAL), weights - 1)


def _parts(scores: Sequence[Tensor | Sequence[OuterProducts]], units: Tensor | None) -> list[ScorePart]:
    """Return the scores of every parameter with its units."""
    parts: list[ScorePart] = []
    position = 0
    for score in scores:
        if isinstance(score, Tensor):
            shape, like = score.shape[1:], score
        else:
            like = score[0].left
            shape = torch.Size([*like.shape[1:], score[0].right.shape[-1]])
        size = shape.numel()
        unit = like.new_ones(shape) if units is None else units[position : position + size].reshape(shape)
        parts.append(DensePart(score, unit) if isinstance(score, Tensor) else OuterPart(score, unit))
        position += size
    return parts
