"""Flows one after the other, as one flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pyro_adaann.transforms.base import FlowTransform
from pyro_adaann.transforms.outer import OuterProducts

__all__ = ["ComposedFlow"]


class ComposedFlow(FlowTransform):
    r"""The composition :math:`T_k \circ \dots \circ T_1` of flows, itself a flow.

    Scores, inverses and gradients by point use the methods of the parts.

    :param parts: the flows, the first to act first, all of one dimension.
    :raises ValueError: if there are none or their dimensions differ.

    Example::

        >>> import torch
        >>> from pyro_adaann.transforms import AffineLayer, PlanarStack
        >>> flow = ComposedFlow([PlanarStack(2, 8), AffineLayer(2)]).double()
        >>> x = torch.randn(5, 2).double()
        >>> torch.allclose(flow.inv(flow(x).clone()), x)
        True
    """

    def __init__(self, parts: Sequence[FlowTransform]) -> None:
        dims = {part.input_dim for part in parts}
        if len(dims) != 1:
            raise ValueError(f"Expected flows of one dimension; got {sorted(dims) or 'no flow'}.")
        super().__init__(dims.pop())
        self.parts = nn.ModuleList(parts)
        self.has_closed_inverse = all(part.has_closed_inverse for part in parts)
        self.is_recordable = all(part.is_recordable for part in parts)

    def _flows(self) -> list[FlowTransform]:
        return [cast(FlowTransform, part) for part in self.parts]

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_dets = []
        for part in self._flows():
            x, log_det = part._forward(x)
            log_dets.append(log_det)
        return x, torch.stack(log_dets).sum(0)

    def _define(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_dets = []
        for part in self._flows():
            x, log_det = part._define(x)
            log_dets.append(log_det)
        return x, torch.stack(log_dets).sum(0)

    def _backward_map(self, y: Tensor) -> Tensor:
        for part in reversed(self._flows()):
            y = part._backward_map(y)
        return y

    def _backward_with_log_det(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        log_dets = []
        for part in reversed(self._flows()):
            y, log_det = part._backward_with_log_det(y)
            log_dets.append(log_det)
        known = [log_det for log_det in log_dets if log_det is not None]
        return y, torch.stack(known).sum(0) if len(known) == len(log_dets) else None

    def _score(self, x: Tensor, base_score: Tensor) -> Tensor:
        for number, part in enumerate(self._flows(), start=1):
            base_score = part._score(x, base_score)
            if number < len(self.parts):
                with torch.no_grad():
                    x = part._forward(x)[0]
        return base_score

    def _density_gradients(
        self, x: Tensor, base_score: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor | OuterProducts]]:
        # At the images of a part, what flows back from the later parts is the score of the density there.
        found: dict[str, Tensor | OuterProducts] = {}
        for number, part in enumerate(self._flows()):
            x, base_score, gradients = part._density_gradients(x, base_score)
            found.update((f"parts.{number}.{name}", gradient) for name, gradient in gradients.items())
        return x, base_score, found

    def parameter_units(self) -> dict[Tensor, Tensor]:
        """Return the units of the parts."""
        return {
            parameter: unit for part in self._flows() for parameter, unit in part.parameter_units().items()
        }
