"""RealNVP as a module; its mathematics is in `transforms/kernels/coupling.py`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pyro_adaann.transforms.base import FlowTransform
from pyro_adaann.transforms.kernels.coupling import (
    CouplingFunction,
    Layer,
    by_layer,
    couple,
    layer_gradients,
    score,
    uncouple,
)
from pyro_adaann.transforms.outer import OuterProducts

__all__ = ["RealNVPStack"]


class _CouplingNetworks(nn.Module):
    """The networks (s, t) of ``num_layers`` coupling layers that copy the same half."""

    def __init__(self, num_layers: int, in_dim: int, hidden_dims: Sequence[int], out_dim: int):
        super().__init__()
        widths = [in_dim, *hidden_dims, out_dim]
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty(num_layers, 2, fan_in, fan_out))
            for fan_in, fan_out in itertools.pairwise(widths)
        )
        self.biases = nn.ParameterList(
            nn.Parameter(torch.empty(num_layers, 2, 1, fan_out)) for fan_out in widths[1:]
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # torch's initialization of a linear layer, but for the last matrix: the stack starts near
        # the identity.
        with torch.no_grad():
            for weight, bias in zip(self.weights, self.biases, strict=True):
                bound = 1 / math.sqrt(weight.shape[-2])
                weight.uniform_(-bound, bound)
                bias.uniform_(-bound, bound)
            self.weights[-1].normal_(0, 0.01)
            self.biases[-1].zero_()

    def matrices(self) -> list[Tensor]:
        """Return the parameters in pairs (weight, bias), from the first matrix to the last."""
        pairs = zip(self.weights, self.biases, strict=True)
        return [parameter for pair in pairs for parameter in pair]


class RealNVPStack(FlowTransform):
    r"""A composition of affine coupling layers, :math:`z_b \mapsto z_b e^{s(z_a)} + t(z_a)`.

    Layers 0, 2, ... copy the first ``input_dim // 2`` coordinates, the others the rest. The inverse
    is exact and costs as much as the map itself.

    :param input_dim: dimension d of the points, at least 2.
    :param num_transforms: number of coupling layers.
    :param hidden_dims: widths of the hidden layers of s and of t.
    :raises ValueError: if ``input_dim`` is 1: then no coordinate is left to copy.

    Source: Dinh et al. (2017), Eqs. 4-8; Cobian et al., *AdaAnn*, Eqs. 8 and 9.

    Example::

        >>> import torch
        >>> stack = RealNVPStack(input_dim=3, num_transforms=2, hidden_dims=[10, 10])
        >>> x = torch.zeros(5, 3)
        >>> torch.allclose(stack.inv(stack(x).clone()), x, atol=1e-6)
        True
    """

    has_closed_inverse = True
    is_recordable = True

    def __init__(self, input_dim: int, num_transforms: int, hidden_dims: Sequence[int]) -> None:
        if input_dim < 2:
            raise ValueError(
                f"Expected `input_dim` >= 2 for RealNVP, which maps one part of the coordinates "
                f"given the others; got {input_dim}. Use a planar flow (AutoPlanar) instead."
            )
        super().__init__(input_dim)
        self.num_transforms = num_transforms
        first = input_dim // 2
        self.split_sizes = (first, input_dim - first)
        num_odd = num_transforms // 2
        self.networks = nn.ModuleList(
            _CouplingNetworks(num_layers, in_dim, hidden_dims, out_dim)
            for num_layers, in_dim, out_dim in (
                (num_transforms - num_odd, first, input_dim - first),
                (num_odd, input_dim - first, first),
            )
            if num_layers > 0
        )

    def _matrices(self) -> list[Tensor]:
        return [m for networks in self.networks for m in cast(_CouplingNetworks, networks).matrices()]

    def _layers(self) -> list[Layer]:
        return by_layer(self._matrices(), len(self.networks))

    def _join(self, halves: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
        """Put the halves into the order of the coordinates, as the last layer leaves them."""
        return torch.cat(halves if self.num_transforms % 2 == 0 else halves[::-1], dim=-1)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if torch._C._get_tracing_state():
            return self._define(x)
        first, second = x.split(self.split_sizes, dim=-1)
        *halves, log_det = CouplingFunction.apply(first, second, len(self.networks), *self._matrices())
        return self._join(halves), log_det

    def _define(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x.split(self.split_sizes, dim=-1)
        *halves, log_det = couple(first, second, self._layers())
        return self._join(halves), log_det

    @torch.no_grad()
    def _point_gradients(
        self, x: Tensor, grad_y: Tensor, grad_log_det: float
    ) -> dict[str, Tensor | OuterProducts]:
        x_halves, grad_halves = (part.split(self.split_sizes, dim=-1) for part in (x, grad_y))
        found = layer_gradients(self._layers(), x_halves, grad_halves, grad_log_det)
        gradients: dict[str, Tensor | OuterProducts] = {}
        for kind in range(len(self.networks)):
            # Of every layer of a kind the (inputs, output gradients) of its matrices, from first to last.
            for k, pairs in enumerate(zip(*found[kind :: len(self.networks)], strict=True)):
                # From (2, n, width) of every layer to (n, num_layers, 2, width).
                left, right = (torch.stack(parts).permute(2, 0, 1, 3) for parts in zip(*pairs, strict=True))
                gradients[f"networks.{kind}.weights.{k}"] = OuterProducts(left, right)
                gradients[f"networks.{kind}.biases.{k}"] = right.unsqueeze(-2)
        return gradients

    @torch.no_grad()
    def _score(self, x: Tensor, base_score: Tensor) -> Tensor:
        x_halves, score_halves = (part.split(self.split_sizes, dim=-1) for part in (x, base_score))
        return self._join(score(self._layers(), x_halves, score_halves))

    def _backward_map(self, y: Tensor) -> Tensor:
        halves = y.split(self.split_sizes, dim=-1)
        copied, mapped = halves if self.num_transforms % 2 == 0 else halves[::-1]
        return torch.cat(uncouple(copied, mapped, self._layers()), dim=-1)
