"""Flows of the library zuko [1] as flows of this package.

zuko writes a flow from latents to base, the direction in which a density is cheap. A guide draws, that is, it
runs the other way: one pass for a coupling flow, d passes for an autoregressive one of d coordinates, with
gradient through them all.

[1] F. Rozet et al., *Zuko: Normalizing flows in PyTorch*, 2022.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_adaann.transforms.base import FlowTransform
from pyro_adaann.transforms.by_point import gradients_by_point
from pyro_adaann.transforms.linear_maps import is_linear
from pyro_adaann.transforms.outer import OuterProducts

__all__ = ["ZukoFlow", "import_zuko"]

#: What is left of the last matrix of a network: the flow starts near the identity.
_START = 0.01


def import_zuko() -> Any:
    """Return the module `zuko`, with torch's validation of distributions as it was before.

    :raises ImportError: with the way to install it.
    """
    validates = Distribution._validate_args
    try:
        zuko = importlib.import_module("zuko")
    except ImportError as error:
        raise ImportError("Expected zuko to be installed; it is not. Do `pip install zuko`.") from error
    finally:
        # zuko switches it off for the whole process.
        Distribution.set_default_validate_args(validates)
    return zuko


class ZukoFlow(FlowTransform):
    r"""A flow of zuko from base to latents: :math:`y = m + s T^{-1}((x - m) / s)`.

    :param flow: a `zuko.lazy.Flow` without context, whose base is not used, or a `zuko.lazy.LazyTransform`.
    :param input_dim: dimension d of the points.
    :param loc: location m of the base, a number or shape ``(d,)``.
    :param scale: scale s > 0 of the base, likewise; zuko's splines bend within five times as much.
    """

    def __init__(
        self, flow: nn.Module, input_dim: int, *, loc: Tensor | float = 0.0, scale: Tensor | float = 1.0
    ) -> None:
        super().__init__(input_dim)
        zuko = import_zuko()
        self.flow = getattr(flow, "transform", flow)
        if not isinstance(self.flow, zuko.lazy.LazyTransform):
            raise ValueError(f"Expected a flow of zuko (`zuko.flows`); got {type(flow).__name__}.")
        first = next(self.flow.parameters())
        for name, value in (("loc", loc), ("scale", scale)):
            value = torch.as_tensor(value, dtype=first.dtype, device=first.device)
            self.register_buffer(name, value.expand(input_dim).clone())
        with torch.no_grad():
            for network in self.flow.modules():
                if type(network) in (zuko.nn.MLP, zuko.nn.MaskedMLP):
                    last = [part for part in network.modules() if is_linear(part)][-1]
                    for parameter in last.parameters():
                        parameter.mul_(_START)

    def _standard(self, x: Tensor) -> Tensor:
        return (x - self.loc) / self.scale

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[0] == 0:  # zuko needs a point to know its shapes
            return x, x.sum(-1)
        y, log_det = self.flow().inv.call_and_ladj(self._standard(x))
        return self.loc + self.scale * y, log_det.expand(x.shape[0])

    def _backward_map(self, y: Tensor) -> Tensor:
        return self.loc + self.scale * self.flow()(self._standard(y))

    def _score(self, x: Tensor, base_score: Tensor) -> Tensor:
        with torch.no_grad():
            y = self._standard(self._forward(x)[0])
        with torch.enable_grad():
            y.requires_grad_()
            image, log_det = self.flow().call_and_ladj(y)
            total = (self.scale * base_score * image).sum() + log_det.sum()
            return torch.autograd.grad(total, y)[0] / self.scale

    def _point_gradients(
        self, x: Tensor, grad_y: Tensor, grad_log_det: float
    ) -> dict[str, Tensor | OuterProducts]:
        r"""Return them by one pass in zuko's direction, at the images y of the points.

        With T the map from y to x and l its log-determinant, what moves y at fixed x is
        :math:`-J_T^{-1} \partial_\phi T`. The gradient is therefore :math:`-v \cdot \partial_\phi T - c \,
        \partial_\phi l` at fixed y, with :math:`J_T^\top v = g - c \nabla_y l`.
        """
        with torch.enable_grad():
            point = self._standard(x).detach().requires_grad_()
            image = self.flow().inv(point)
            y = image.detach().requires_grad_()
            by_y = torch.autograd.grad(self.flow().call_and_ladj(y)[1].sum(), y)[0]
            by_y = self.scale * grad_y - grad_log_det * by_y
            v = torch.autograd.grad(image, point, by_y)[0]

        def run() -> Tensor:
            x, log_det = self.flow().call_and_ladj(y.detach())
            return -(v * x).sum(-1) - grad_log_det * log_det.expand(len(x))

        found = gradients_by_point(self.flow, run, len(x))
        return {f"flow.{name}": gradient for name, gradient in found.items()}
