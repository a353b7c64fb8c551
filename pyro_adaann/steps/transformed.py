r"""The log density of transformed distributions at their own draws, held fixed, with no inverse on its graph.

With the base point x of a draw :math:`z = T_\phi(x)` held fixed, and the score
:math:`s = \nabla_z \log q_\phi(z)`,

.. math:: \frac{d}{d\phi} \bigl(\log q_0(x) - \log|\det J_\phi(x)|\bigr)
          = \partial_\phi \log q_\phi(z) \big|_z + s \cdot \frac{d T_\phi(x)}{d\phi},

so the gradient at fixed z is that of :math:`\log q_0(x) - \log|\det J_\phi(x)| - s \cdot T_\phi(x)`: one pass
in the cheap direction, where an autoregressive flow would take as many as it has coordinates.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributions.transforms import ComposeTransform

__all__ = ["base_point", "fixed_density_at", "is_transformed_vector"]

#: Numbers in the Jacobians that are inverted together, in double precision.
_JACOBIAN_SIZE = 2**24


def is_transformed_vector(fn: Any) -> bool:
    """Whether a distribution is that of a vector, made by bijections that keep its size."""
    if not getattr(fn, "transforms", ()) or len(fn.event_shape) != 1:
        return False
    transforms = _flat(fn.transforms)
    is_plain = all(t.bijective and t.domain.event_dim <= 1 and t.codomain.event_dim <= 1 for t in transforms)
    return is_plain and (*fn.base_dist.batch_shape, *fn.base_dist.event_shape)[-1:] == fn.event_shape


@torch.no_grad()
def base_point(fn: Any, value: Tensor) -> Tensor:
    """Return the point of the base that has been mapped to ``value``: remembered, or by the inverse."""
    for transform in reversed(fn.transforms):
        value = transform.inv(value)
    return value.detach().clone()


def fixed_density_at(fn: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return a number per draw with the gradient of :math:`\log q` at fixed draws, and where it is known.

    :param x: points of the base, shape ``(*batch_shape, d)``.
    :return: shape ``(*batch_shape)``, and booleans of that shape: false where the score is not finite.
    """
    score = _score(fn, x)
    is_known = torch.isfinite(score).all(-1)
    # A point whose derivatives have overflown would break the sum over all: another one stands in.
    flat, known = x.reshape(-1, x.shape[-1]), is_known.reshape(-1)
    if known.any():
        stand_in = flat[known.to(torch.uint8).argmax()]
        x = torch.where(is_known.unsqueeze(-1), x, stand_in)
    log_base, log_det, y = _evaluate(fn, x)
    score = torch.where(is_known.unsqueeze(-1), score, 0.0)
    return torch.where(is_known, log_base - log_det - (score * y).sum(-1), 0.0), is_known


def _score(fn: Any, x: Tensor) -> Tensor:
    r"""Return :math:`J^{-\top} \nabla_x (\log q_0(x) - \log|\det J(x)|)`, without a graph."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        log_base, log_det, y = _evaluate(fn, x)
        (slope,) = torch.autograd.grad((log_base - log_det).sum(), x, retain_graph=True)
        rows = [torch.autograd.grad(column.sum(), x, retain_graph=True)[0] for column in y.unbind(-1)]
    jacobian, slope = torch.stack(rows, dim=-2).flatten(0, -3), slope.flatten(0, -2).double()
    size = max(1, _JACOBIAN_SIZE // x.shape[-1] ** 2)
    solved = [
        torch.linalg.solve_ex(matrix.double().mT, right.unsqueeze(-1))[0].squeeze(-1)
        for matrix, right in zip(jacobian.split(size), slope.split(size), strict=True)
    ]
    return torch.cat(solved).to(x).reshape(x.shape)


def _evaluate(fn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log density of the base, the log-determinant and the image, one pass."""
    log_base = fn.base_dist.log_prob(x)
    log_base = log_base if len(fn.base_dist.event_shape) else log_base.sum(-1)
    total: Tensor | float = 0.0
    for transform in _flat(fn.transforms):
        y = transform(x)
        log_det = transform.log_abs_det_jacobian(x, y)
        is_of_vectors = max(transform.domain.event_dim, transform.codomain.event_dim) == 1
        total = total + (log_det if is_of_vectors else log_det.sum(-1))
        x = y
    return log_base, torch.as_tensor(total, device=x.device), x


def _flat(transforms: Iterable[Any]) -> list[Any]:
    result = []
    for transform in transforms:
        result += _flat(transform.parts) if isinstance(transform, ComposeTransform) else [transform]
    return result
