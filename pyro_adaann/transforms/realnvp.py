r"""RealNVP: a stack of affine coupling layers [1] with all their weights in a few tensors.

A layer copies one half of the coordinates and maps the other,
:math:`z_b \mapsto z_b e^{s(z_a)} + t(z_a)`; the next layer swaps the roles, so that after two layers
every output depends on every input. s and t are fully connected networks with hidden layers of ReLU
units, s with a final tanh [2]. The weights of all layers that copy the same half are stacked in one
tensor per matrix, s and t side by side: a network is one batched product per matrix, and an optimizer
sees 12 tensors (two hidden layers) whatever the number of layers.

With networks this small, half of the time of a step would be autograd's own. The stack is therefore one
node of the graph, with the gradient of a fully connected network written out.

[1] L. Dinh, J. Sohl-Dickstein and S. Bengio, *Density estimation using Real NVP*, ICLR 2017.
[2] E. R. Cobian et al., *AdaAnn*, arXiv 2202.00792, Eqs. 8 and 9, Section 4.3.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pyro_adaann.transforms.base import FlowTransform
from pyro_adaann.transforms.outer import OuterProducts

__all__ = ["RealNVPStack"]


#: The (weight, bias) pairs of one layer's networks, from the first matrix to the last; the weights of
#: shape ``(2, fan_in, fan_out)``, the biases ``(2, 1, fan_out)``, s first and t second.
Layer = tuple[tuple[Tensor, Tensor], ...]


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


def _by_layer(matrices: Sequence[Tensor], num_networks: int) -> list[Layer]:
    """Sort the stacked parameters of both kinds of layers by layer, in the order of application."""
    size = len(matrices) // num_networks
    kinds = []
    for start in range(0, len(matrices), size):
        unbound = [matrix.unbind(0) for matrix in matrices[start : start + size]]
        pairs = [list(zip(w, b, strict=True)) for w, b in zip(unbound[::2], unbound[1::2], strict=True)]
        kinds.append(list(zip(*pairs, strict=True)))
    num_layers = sum(map(len, kinds))
    return [kinds[i % num_networks][i // num_networks] for i in range(num_layers)]


def _scale_and_shift(layer: Layer, copied: Tensor) -> tuple[Tensor, Tensor]:
    (weight, bias), *rest = layer
    hidden = torch.baddbmm(bias, copied.expand(2, *copied.shape), weight)
    for weight, bias in rest:
        hidden = torch.baddbmm(bias, torch.relu(hidden), weight)
    log_scale, shift = hidden.unbind(0)
    return torch.tanh(log_scale), shift


def _couple(copied: Tensor, mapped: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, with autograd's gradient: the two halves and the log-determinant.

    After an even number of layers the first half comes first, else the second.
    """
    log_det = mapped.new_zeros(mapped.shape[:-1])
    for layer in layers:
        log_scale, shift = _scale_and_shift(layer, copied)
        mapped = torch.addcmul(shift, mapped, log_scale.exp())
        log_det = log_det + log_scale.sum(-1)
        copied, mapped = mapped, copied
    return copied, mapped, log_det


def _layer_gradients(
    layers: Sequence[Layer], x: Sequence[Tensor], grad_y: Sequence[Tensor], grad_log_det: float
) -> list[list[tuple[Tensor, Tensor]]]:
    """Return for every matrix of every layer its inputs and its outputs' gradients, ``(2, n, width)``."""
    copied, mapped = x
    saved = []
    for layer in layers:
        inputs = [copied.expand(2, *copied.shape)]
        for weight, bias in layer[:-1]:
            inputs.append(torch.baddbmm(bias, inputs[-1], weight).relu_())
        log_scale, shift = torch.baddbmm(layer[-1][1], inputs[-1], layer[-1][0]).unbind(0)
        log_scale = torch.tanh(log_scale)
        saved.append((inputs, mapped, log_scale))
        copied, mapped = torch.addcmul(shift, mapped, log_scale.exp()), copied
    # As the last layer leaves the halves: what it has mapped comes first.
    grad_copied, grad_mapped = grad_y if len(layers) % 2 == 0 else grad_y[::-1]
    found = []
    for layer, (inputs, mapped, log_scale) in zip(reversed(layers), reversed(saved), strict=True):
        grad_mapped, grad_copied = grad_copied, grad_mapped
        scale = log_scale.exp()
        by_log_scale = grad_log_det + grad_mapped * scale * mapped
        grad = torch.stack([by_log_scale * (1 - log_scale * log_scale), grad_mapped])
        pairs = []
        for k in range(len(inputs) - 1, -1, -1):
            pairs.append((inputs[k], grad))
            grad = torch.bmm(grad, layer[k][0].transpose(1, 2))
            if k:
                grad = torch.ops.aten.threshold_backward(grad, inputs[k], 0)
        grad_copied, grad_mapped = grad_copied + grad.sum(0), grad_mapped * scale
        found.append(pairs[::-1])
    return found[::-1]


def _split(tensors: Sequence[Tensor], index: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    return tensors[:index], tensors[index:]


class _Stack(torch.autograd.Function):
    """:func:`_couple` with its gradient written out; the parameters as lists them `matrices`."""

    @staticmethod
    def forward(
        ctx: Any, copied: Tensor, mapped: Tensor, num_networks: int, *matrices: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        log_det = mapped.new_zeros(mapped.shape[:-1])
        saved: list[Tensor] = []
        for layer in _by_layer(matrices, num_networks):
            inputs = [copied.expand(2, *copied.shape)]
            for weight, bias in layer[:-1]:
                inputs.append(torch.baddbmm(bias, inputs[-1], weight).relu_())
            log_scale, shift = torch.baddbmm(layer[-1][1], inputs[-1], layer[-1][0]).unbind(0)
            log_scale = torch.tanh(log_scale)
            scale = log_scale.exp()
            log_det += log_scale.sum(-1)
            saved += [*inputs, mapped, log_scale, scale]
            copied, mapped = torch.addcmul(shift, mapped, scale), copied
        ctx.num_networks, ctx.num_matrices = num_networks, len(matrices)
        ctx.save_for_backward(*matrices, *saved)
        return copied, mapped, log_det

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_copied: Tensor, grad_mapped: Tensor, grad_log_det: Tensor
    ) -> tuple[Tensor | None, ...]:
        matrices, saved = _split(ctx.saved_tensors, ctx.num_matrices)
        grads = [torch.empty_like(matrix) for matrix in matrices]
        layers = _by_layer(matrices, ctx.num_networks)
        layer_grads = _by_layer(grads, ctx.num_networks)
        grad_log_det = grad_log_det.unsqueeze(-1)
        for i in range(len(layers) - 1, -1, -1):
            saved, (*inputs, mapped, log_scale, scale) = _split(saved, -len(layers[i]) - 3)
            # The halves as this layer leaves them: what it has mapped is copied next.
            grad_mapped, grad_copied = grad_copied, grad_mapped
            grad_log_scale = torch.addcmul(grad_log_det, grad_mapped * scale, mapped)
            grad = torch.stack([grad_log_scale * (1 - log_scale * log_scale), grad_mapped])
            for k in range(len(inputs) - 1, -1, -1):
                weight, _ = layers[i][k]
                grad_weight, grad_bias = layer_grads[i][k]
                torch.bmm(inputs[k].transpose(1, 2), grad, out=grad_weight)
                torch.sum(grad, 1, keepdim=True, out=grad_bias)
                grad = torch.bmm(grad, weight.transpose(1, 2))
                if k:  # the gradient of ReLU, fused
                    grad = torch.ops.aten.threshold_backward(grad, inputs[k], 0)
            grad_copied = grad_copied + grad.sum(0)
            grad_mapped = grad_mapped * scale
        return grad_copied, grad_mapped, None, *grads


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

    def _matrices(self) -> list[Tensor]:
        return [m for networks in self.networks for m in cast(_CouplingNetworks, networks).matrices()]

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if torch._C._get_tracing_state():
            return self._define(x)
        first, second = x.split(self.split_sizes, dim=-1)
        *halves, log_det = _Stack.apply(first, second, len(self.networks), *self._matrices())
        return torch.cat(halves if self.num_transforms % 2 == 0 else halves[::-1], dim=-1), log_det

    def _define(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x.split(self.split_sizes, dim=-1)
        *halves, log_det = _couple(first, second, _by_layer(self._matrices(), len(self.networks)))
        return torch.cat(halves if self.num_transforms % 2 == 0 else halves[::-1], dim=-1), log_det

    @torch.no_grad()
    def _point_gradients(
        self, x: Tensor, grad_y: Tensor, grad_log_det: float
    ) -> dict[str, Tensor | OuterProducts]:
        layers = _by_layer(self._matrices(), len(self.networks))
        halves = x.split(self.split_sizes, dim=-1)
        found = _layer_gradients(layers, halves, grad_y.split(self.split_sizes, dim=-1), grad_log_det)
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
        r"""Follow :math:`\nabla \log q` through the layers, from the base to the images of ``x``.

        A layer's inverse is :math:`x_b = (y_b - t(y_a)) e^{-s(y_a)}`, so the score of the mapped half
        becomes :math:`g_b e^{-s}` and that of the copied half gains what goes through the networks.
        """
        copied, mapped = x.split(self.split_sizes, dim=-1)
        score_copied, score_mapped = base_score.split(self.split_sizes, dim=-1)
        for layer in _by_layer(self._matrices(), len(self.networks)):
            inputs = [copied.expand(2, *copied.shape)]
            for weight, bias in layer[:-1]:
                inputs.append(torch.baddbmm(bias, inputs[-1], weight).relu_())
            log_scale, shift = torch.baddbmm(layer[-1][1], inputs[-1], layer[-1][0]).unbind(0)
            log_scale = torch.tanh(log_scale)
            by_log_scale = -(1 + mapped * score_mapped) * (1 - log_scale * log_scale)
            score_mapped = score_mapped * torch.exp(-log_scale)
            grad = torch.stack([by_log_scale, -score_mapped])
            for k in range(len(inputs) - 1, -1, -1):
                grad = torch.bmm(grad, layer[k][0].transpose(1, 2))
                if k:
                    grad = torch.ops.aten.threshold_backward(grad, inputs[k], 0)
            score_copied, score_mapped = score_mapped, score_copied + grad.sum(0)
            copied, mapped = torch.addcmul(shift, mapped, log_scale.exp()), copied
        scores = (score_copied, score_mapped)
        return torch.cat(scores if self.num_transforms % 2 == 0 else scores[::-1], dim=-1)

    def _backward_map(self, y: Tensor) -> Tensor:
        halves = y.split(self.split_sizes, dim=-1)
        copied, mapped = halves if self.num_transforms % 2 == 0 else halves[::-1]
        for layer in reversed(_by_layer(self._matrices(), len(self.networks))):
            copied, mapped = mapped, copied
            log_scale, shift = _scale_and_shift(layer, copied)
            mapped = (mapped - shift) * torch.exp(-log_scale)
        return torch.cat((copied, mapped), dim=-1)
