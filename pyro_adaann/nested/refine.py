r"""A nested Laplace approximation that is moved to the moments of its own weighted draws.

In many dimensions the mode of a skewed density is not its mean. With the residuals
:math:`e_i = L(u_i)^{-1} (y_i - y(u_i))` of draws with weights :math:`W_i`,

.. math:: m = \sum_i W_i e_i, \quad S = \sum_i W_i (e_i - m)(e_i - m)^\top, \qquad
          y_g \leftarrow y_g + L_g m, \quad L_g \leftarrow L_g S^{1/2}

at every node. Both are shrunk to zero and one, the more the fewer draws count.

Source: Cappe et al., *Adaptive importance sampling in general mixture classes*, Statistics and Computing 18
(2008), for one component.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_adaann.nested.laplace import NestedLaplace
from pyro_adaann.weights import effective_sample_size

__all__ = ["refined"]

#: Of the covariance: tails of a proposal must not be too light.
_WIDER = 1.1


def refined(nested: NestedLaplace, z: Tensor, log_weights: Tensor) -> NestedLaplace | None:
    """Return the approximation with the moments of draws; None if too few of them count.

    :param nested: the approximation.
    :param z: draws from it, shape ``(n, d)``.
    :param log_weights: their log weights against the posterior.
    """
    kept = log_weights > -torch.inf
    e, log_weights = nested.residuals(z[kept]), log_weights[kept]
    weights, k = log_weights.softmax(0), e.shape[1]
    ess = effective_sample_size(log_weights)
    keep = ess / (ess + 2 * k)
    mean = weights @ e
    centered = e - mean
    scatter = (weights.unsqueeze(1) * centered).T @ centered
    factor, failed = torch.linalg.cholesky_ex(
        _WIDER * (keep * scatter + (1 - keep) * torch.eye(k).to(scatter))
    )
    if failed or not factor.isfinite().all():
        return None
    loc = nested.loc + nested.factor @ (keep * mean)
    return nested.with_conditionals(loc, nested.factor @ factor)
