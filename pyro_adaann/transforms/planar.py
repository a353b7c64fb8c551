"""A stack of planar layers as a module; its mathematics is in `transforms/kernels/planar.py`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pyro_adaann.transforms.base import FlowTransform
from pyro_adaann.transforms.kernels.planar import (
    PlanarFunction,
    constrain,
    invert,
    layer_by_layer,
    point_gradients,
    score,
)
from pyro_adaann.transforms.outer import OuterProducts

__all__ = ["PlanarStack"]


class PlanarStack(FlowTransform):
    r"""A composition of planar layers, :math:`z \mapsto z + u_l \tanh(w_l \cdot z + b_l)`.

    The inverse is numerical, to the accuracy of double precision: along w each layer is a monotone
    scalar equation, which Newton's method solves. Hence densities exist at any point.

    :param input_dim: dimension d of the points.
    :param num_transforms: number of layers L.

    Parameters: ``u`` and ``w`` of shape ``(L, d)``, ``b`` of shape ``(L,)``.

    Source: Rezende & Mohamed (2015), Eqs. 10-13; Cobian et al., *AdaAnn*, Eqs. 4-7.

    Example::

        >>> import torch
        >>> stack = PlanarStack(input_dim=2, num_transforms=3)
        >>> x = torch.zeros(5, 2, dtype=torch.float64)
        >>> y = stack.double()(x)
        >>> torch.allclose(stack.inv(y.clone()), x)
        True
    """

    is_recordable = True

    def __init__(self, input_dim: int, num_transforms: int) -> None:
        super().__init__(input_dim)
        self.num_transforms = num_transforms
        self.u = nn.Parameter(torch.empty(num_transforms, input_dim))
        self.w = nn.Parameter(torch.empty(num_transforms, input_dim))
        self.b = nn.Parameter(torch.empty(num_transforms))
        self.reset_parameters()

    def reset_parameters(self, loc: Tensor | float = 0.0, scale: Tensor | float = 1.0) -> None:
        """Start near the identity, with the bends of the layers spread over N(loc, scale^2).

        A layer acts where ``|w . z + b|`` is of order one. Away from there its tanh is flat, and so
        is its gradient: on a base far from the origin, b = 0 would be a stack that cannot learn.
        """
        loc, scale = (
            torch.as_tensor(value, dtype=self.w.dtype, device=self.w.device) for value in (loc, scale)
        )
        with torch.no_grad():
            self.u.normal_(0, 0.01)
            self.w.normal_(0, 1 / math.sqrt(self.input_dim)).div_(scale)
            center = loc + scale * torch.randn_like(self.w)
            self.b.copy_(-(self.w * center).sum(-1))

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if torch._C._get_tracing_state():
            return self._define(x)
        return PlanarFunction.apply(x, self.u, self.w, self.b)

    def _define(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return layer_by_layer(x, self.u, self.w, self.b)

    @torch.no_grad()
    def _point_gradients(
        self, x: Tensor, grad_y: Tensor, grad_log_det: float
    ) -> dict[str, Tensor | OuterProducts]:
        return point_gradients(x, self.u, self.w, self.b, grad_y, grad_log_det)

    @torch.no_grad()
    def parameter_units(self) -> dict[Tensor, Tensor]:
        """Return the width of every layer's bend, 1 / |w|, for u, its inverse for w, and 1 for b."""
        size = self.w.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(self.w.dtype).tiny)
        ones = torch.ones_like(self.w)
        return {self.u: ones / size, self.w: ones * size, self.b: torch.ones_like(self.b)}

    @torch.no_grad()
    def _score(self, x: Tensor, base_score: Tensor) -> Tensor:
        return score(x, base_score, constrain(self.u, self.w), self.w, self.b)

    def _backward_map(self, y: Tensor) -> Tensor:
        u = constrain(self.u, self.w)
        return invert(y.double(), u.double(), self.w.double(), self.b.double()).to(y.dtype)
