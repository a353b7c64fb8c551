r"""An affine map, in units of a base: location, scales and correlations of all latents at once.

.. math:: y = m + s \odot \bigl(c + M (e^a \odot u)\bigr), \qquad u = (x - m) / s,

with M lower triangular and of unit diagonal, or the identity. M holds regressions of a coordinate on
the earlier ones, which stay as they are when the scales :math:`e^a` shrink along a path. A correlation of
.9999 is a scale of 1/70 behind a regression of 1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from pyro_adaann.transforms.base import FlowTransform
from pyro_adaann.transforms.outer import OuterProducts

__all__ = ["AffineKind", "AffineLayer"]

AffineKind = Literal["triangular", "diagonal"]


class AffineLayer(FlowTransform):
    r"""A trainable affine map, :math:`y = m + s (c + M e^a (x - m) / s)`, at first the identity.

    :param input_dim: dimension d of the points.
    :param kind: ``"triangular"`` for a lower triangular M of unit diagonal, ``"diagonal"`` for none.
    :param loc: location m of the base, a number or shape ``(d,)``; the unit of length starts here.
    :param scale: scale s > 0 of the base, likewise: the unit of length.
    :raises ValueError: if ``kind`` is another word.

    Parameters: ``shift`` (c) and ``log_scale`` (a) of shape ``(d,)``, ``factor`` of shape ``(d, d)``, whose
    part below the diagonal counts.

    Example::

        >>> import torch
        >>> layer = AffineLayer(3, "triangular", loc=5.0, scale=2.0)
        >>> x = torch.randn(4, 3)
        >>> torch.allclose(layer(x), x, atol=1e-6)
        True
    """

    has_closed_inverse = True
    is_recordable = True

    def __init__(
        self,
        input_dim: int,
        kind: AffineKind = "triangular",
        *,
        loc: Tensor | float = 0.0,
        scale: Tensor | float = 1.0,
    ) -> None:
        if kind not in ("triangular", "diagonal"):
            raise ValueError(f'Expected `kind` to be "triangular" or "diagonal"; got {kind!r}.')
        super().__init__(input_dim)
        self.kind = kind
        self.shift = nn.Parameter(torch.zeros(input_dim))
        self.log_scale = nn.Parameter(torch.zeros(input_dim))
        if self._is_triangular:
            self.factor = nn.Parameter(torch.zeros(input_dim, input_dim))
            self.register_buffer("below", torch.ones_like(self.factor).tril(-1), persistent=False)
        for name, value in (("loc", loc), ("scale", scale)):
            value = torch.as_tensor(value, dtype=self.shift.dtype, device=self.shift.device)
            self.register_buffer(name, value.expand(input_dim).clone())

    @property
    def _is_triangular(self) -> bool:
        # One coordinate has no other to depend on.
        return self.kind == "triangular" and self.input_dim > 1

    def _scaled(self, x: Tensor) -> Tensor:
        return (x - self.loc) / self.scale * self.log_scale.exp()

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # Two operations on the points, all others on matrices of size d: a planar stack costs little more.
        centered, offset = x - self.loc, torch.addcmul(self.loc, self.scale, self.shift)
        scales = self.log_scale.exp()
        if self._is_triangular:
            matrix = self._matrix() * (scales / self.scale) * self.scale.unsqueeze(-1)
            y = torch.addmm(offset, centered, matrix.t())
        else:
            y = torch.addcmul(offset, centered, scales)
        return y, self._log_det(x)

    def _backward_map(self, y: Tensor) -> Tensor:
        x = (y - self.loc) / self.scale - self.shift
        if self._is_triangular:
            x = torch.linalg.solve_triangular(self._matrix(), x.t(), upper=False, unitriangular=True).t()
        return self.loc + self.scale * x * torch.exp(-self.log_scale)

    def _backward_with_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._backward_map(y), self._log_det(y)

    def _log_det(self, points: Tensor) -> Tensor:
        return self.log_scale.sum().expand(points.shape[0])

    def _matrix(self) -> Tensor:
        return self.factor.tril(-1) + self._eye()

    def _eye(self) -> Tensor:
        return torch.eye(self.input_dim, dtype=self.shift.dtype, device=self.shift.device)

    @torch.no_grad()
    def _score(self, x: Tensor, base_score: Tensor) -> Tensor:
        score = base_score * self.scale * torch.exp(-self.log_scale)
        if self._is_triangular:
            transposed = self._matrix().t()
            score = torch.linalg.solve_triangular(transposed, score.t(), upper=True, unitriangular=True).t()
        return score / self.scale

    @torch.no_grad()
    def _point_gradients(
        self, x: Tensor, grad_y: Tensor, grad_log_det: float
    ) -> dict[str, Tensor | OuterProducts]:
        scaled, grad = self._scaled(x), grad_y * self.scale
        by_scaled = grad + grad @ self.factor.tril(-1) if self._is_triangular else grad
        found: dict[str, Tensor | OuterProducts] = {
            "shift": grad,
            "log_scale": scaled * by_scaled + grad_log_det,
        }
        if self._is_triangular:
            found["factor"] = OuterProducts(grad, scaled, self.get_buffer("below"))
        return found

    @torch.no_grad()
    def parameter_units(self) -> dict[Tensor, Tensor]:
        """Return what moves a coordinate by its sd given all others, as if x were the base; 1 for a."""
        scale = self.log_scale.exp()
        if not self._is_triangular:
            return {self.shift: scale, self.log_scale: torch.ones_like(scale)}
        # The precision is W^T W with W the inverse of M e^a, if x is standard normal.
        whitener = torch.linalg.solve_triangular(self._matrix() * scale, self._eye(), upper=False)
        conditional = whitener.square().sum(0).rsqrt()
        return {
            self.shift: conditional,
            self.log_scale: torch.ones_like(scale),
            self.factor: conditional.unsqueeze(-1) / scale,
        }
