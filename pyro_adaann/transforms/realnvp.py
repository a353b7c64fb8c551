r"""RealNVP: a stack of affine coupling layers [1] with all their weights in a few tensors.

A layer copies one half of the coordinates and maps the other,
:math:`z_b \mapsto z_b e^{s(z_a)} + t(z_a)`; the next layer swaps the roles, so that after two layers
every output depends on every input. s and t are fully connected networks with hidden layers of ReLU
units, s with a final tanh [2]. The weights of all layers that copy the same half are stacked in one
tensor per matrix, s and t side by side: a network is one batched product per matrix, and an optimizer
sees 12 tensors (two hidden layers) whatever the number of layers.

[1] L. Dinh, J. Sohl-Dickstein and S. Bengio, *Density estimation using Real NVP*, ICLR 2017.
[2] E. R. Cobian et al., *AdaAnn*, arXiv 2202.00792, Eqs. 8 and 9, Section 4.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pyro_adaann.transforms.base import FlowTransform

__all__ = ["RealNVPStack"]


class _CouplingNetworks(nn.Module):
    """The networks (s, t) of ``num_layers`` coupling layers that copy the same half."""

    def __init__(self, num_layers: int, in_dim: int, hidden_dims: Sequence[int], out_dim: int):
        super().__init__()
        widths = [in_dim, *hidden_dims, out_dim]
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty(num_layers, 2, fan_in, fan_out))
            for fan_in, fan_out in zip(widths[:-1], widths[1:], strict=True)
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

    def by_layer(self) -> list[tuple[tuple[Tensor, Tensor], ...]]:
        """Return for every layer its (weight, bias) pairs, from the first matrix to the last."""
        matrices = [
            list(zip(weight.unbind(0), bias.unbind(0), strict=True))
            for weight, bias in zip(self.weights, self.biases, strict=True)
        ]
        return list(zip(*matrices, strict=True))


def _scale_and_shift(layer: tuple[tuple[Tensor, Tensor], ...], copied: Tensor) -> tuple[Tensor, Tensor]:
    (weight, bias), *rest = layer
    hidden = torch.baddbmm(bias, copied.expand(2, *copied.shape), weight)
    for weight, bias in rest:
        hidden = torch.baddbmm(bias, torch.relu(hidden), weight)
    log_scale, shift = hidden.unbind(0)
    return torch.tanh(log_scale), shift


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

    def _layers(self) -> list[tuple[tuple[Tensor, Tensor], ...]]:
        by_parity = [cast(_CouplingNetworks, networks).by_layer() for networks in self.networks]
        return [by_parity[i % 2][i // 2] for i in range(self.num_transforms)]

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        copied, mapped = x.split(self.split_sizes, dim=-1)
        log_det = x.new_zeros(x.shape[:-1])
        for layer in self._layers():
            log_scale, shift = _scale_and_shift(layer, copied)
            mapped = torch.addcmul(shift, mapped, log_scale.exp())
            log_det = log_det + log_scale.sum(-1)
            copied, mapped = mapped, copied
        # After an even number of layers the first half is the next to be copied again.
        halves = (copied, mapped) if self.num_transforms % 2 == 0 else (mapped, copied)
        return torch.cat(halves, dim=-1), log_det

    def _backward_map(self, y: Tensor) -> Tensor:
        halves = y.split(self.split_sizes, dim=-1)
        copied, mapped = halves if self.num_transforms % 2 == 0 else halves[::-1]
        for layer in reversed(self._layers()):
            copied, mapped = mapped, copied
            log_scale, shift = _scale_and_shift(layer, copied)
            mapped = (mapped - shift) * torch.exp(-log_scale)
        return torch.cat((copied, mapped), dim=-1)
