r"""Which coordinates set the widths of others, by weighted draws.

With :math:`e_i` the residuals of standardized coordinates after their regression on coordinate j, in sds,

.. math:: r_{ij} = \mathrm{corr}\bigl(z_j, \min(e_i^2, 9)\bigr)

is zero where the width of i does not depend on :math:`z_j`. In the neck of a funnel many of them have the
same sign.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pyro_adaann.weights import effective_sample_size

__all__ = ["Outer", "find_outer", "most_skewed"]

#: Correlation from which one width depends on a coordinate, sum of correlations from which many widths do so
#: a little, and how many standard errors either has to be.
_LEAST, _LEAST_SUM, _NUM_ERRORS = 0.15, 0.5, 4.0
#: Squares of residuals in sds, at most: outliers say nothing of widths.
_MAX_SQUARE = 9.0


class Outer(NamedTuple):
    """A coordinate that sets widths.

    :param coordinate: its index.
    :param strength: sum of the correlations with the squares of the residuals of others, without its sign.
    """

    coordinate: int
    strength: float


def find_outer(z: Tensor, log_weights: Tensor) -> list[Outer]:
    """Return the coordinates on which widths of others depend, the strongest first.

    :param z: draws, shape ``(n, d)``.
    :param log_weights: of them.

    Example::

        >>> import torch
        >>> neck = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
        >>> leaves = neck.exp() * torch.randn(4000, 3, generator=torch.Generator().manual_seed(1))
        >>> [outer.coordinate for outer in find_outer(torch.cat([leaves, neck], 1), torch.zeros(4000))][0]
        3
    """
    weights = log_weights.double().softmax(0)
    kept = weights > 0  # other draws may have values that are not finite
    weights, x = weights[kept], z[kept].double()
    x = x - weights @ x
    x = x / (weights @ x.square()).sqrt().clamp(min=1e-30)
    correlation = (weights.unsqueeze(1) * x).T @ x
    error = effective_sample_size(weights.log()) ** -0.5
    least = max(_LEAST, _NUM_ERRORS * error)
    least_sum = max(_LEAST_SUM, _NUM_ERRORS * error * (x.shape[1] - 1) ** 0.5)
    found = []
    for j in range(x.shape[1]):
        squares = (x - correlation[j] * x[:, j : j + 1]).square().clamp(max=_MAX_SQUARE)
        squares = squares - weights @ squares
        sd = (weights @ squares.square()).sqrt().clamp(min=1e-30)
        depends = (weights * x[:, j]) @ squares / sd
        depends[j] = 0.0
        strength = abs(float(depends.sum()))
        if float(depends.abs().max()) >= least or strength >= least_sum:
            found.append(Outer(j, strength))
    return sorted(found, key=lambda outer: -outer.strength)


def most_skewed(z: Tensor, log_weights: Tensor) -> int:
    """Return the coordinate whose distribution is the most skewed one."""
    weights = log_weights.double().softmax(0)
    kept = weights > 0
    weights, x = weights[kept], z[kept].double()
    x = x - weights @ x
    cubes = weights @ (x / (weights @ x.square()).sqrt().clamp(min=1e-30)).pow(3)
    return int(cubes.abs().argmax())
