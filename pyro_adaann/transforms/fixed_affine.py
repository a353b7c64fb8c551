r"""An affine map that is not trained: where a flow starts.

.. math:: y = m + L x

with L lower triangular. At the end of a flow that starts near the identity it makes of a standard normal base
the normal distribution with mean m and covariance :math:`L L^\top`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_adaann.transforms.base import FlowTransform
from pyro_adaann.transforms.outer import OuterProducts

__all__ = ["FixedAffine"]


class FixedAffine(FlowTransform):
    r"""The map :math:`y = m + L x`, without parameters.

    :param loc: m, shape ``(d,)``.
    :param factor: L, lower triangular with a positive diagonal, shape ``(d, d)``.
    :raises ValueError: if they are not of these shapes.

    Example::

        >>> import torch
        >>> start = FixedAffine(torch.zeros(2), torch.tensor([[2.0, 0.0], [1.0, 3.0]]))
        >>> start(torch.ones(1, 2))
        tensor([[2., 4.]])
    """

    has_closed_inverse = True
    is_recordable = True

    def __init__(self, loc: Tensor, factor: Tensor) -> None:
        dim = len(loc)
        is_triangular = factor.shape == (dim, dim) and bool((factor.tril() == factor).all())
        if not (is_triangular and bool((factor.diagonal() > 0).all())):
            raise ValueError(
                f"Expected a lower triangular matrix of {dim} rows with a positive diagonal; got shape "
                f"{tuple(factor.shape)}. Pass torch.linalg.cholesky(covariance)."
            )
        super().__init__(dim)
        self.register_buffer("start_loc", loc)
        self.register_buffer("start_factor", factor)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.addmm(self.start_loc, x, self.start_factor.t())
        return y, self._log_det(x)

    def _backward_map(self, y: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.start_factor, (y - self.start_loc).t(), upper=False).t()

    def _backward_with_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._backward_map(y), self._log_det(y)

    def _log_det(self, points: Tensor) -> Tensor:
        return self.start_factor.diagonal().log().sum().expand(points.shape[0])

    @torch.no_grad()
    def _score(self, x: Tensor, base_score: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.start_factor.t(), base_score.t(), upper=True).t()

    def _point_gradients(
        self, x: Tensor, grad_y: Tensor, grad_log_det: float
    ) -> dict[str, Tensor | OuterProducts]:
        return {}
