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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["CouplingFunction", "Layer", "by_layer", "couple", "layer_gradients", "score", "uncouple"]

#: The (weight, bias) pairs of one layer's networks, from the first matrix to the last; the weights of
#: shape ``(2, fan_in, fan_out)``, the biases ``(2, 1, fan_out)``, s first and t second.
Layer = tuple[tuple[Tensor, Tensor], ...]


def by_layer(matrices: Sequence[Tensor], num_networks: int) -> list[Layer]:
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


def couple(copied: Tensor, mapped: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, Tensor, Tensor]:
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


def layer_gradients(
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


class CouplingFunction(torch.autograd.Function):
    """:func:`couple` with its gradient written out; the parameters as lists them `matrices`."""

    @staticmethod
    def forward(
        ctx: Any, copied: Tensor, mapped: Tensor, num_networks: int, *matrices: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        log_det = mapped.new_zeros(mapped.shape[:-1])
        saved: list[Tensor] = []
        for layer in by_layer(matrices, num_networks):
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
        layers = by_layer(matrices, ctx.num_networks)
        layer_grads = by_layer(grads, ctx.num_networks)
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


def score(
    layers: Sequence[Layer], x: Sequence[Tensor], base_score: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    r"""Follow :math:`\nabla \log q` through the layers, from the base to the images of ``x``; both in halves.

    A layer's inverse is :math:`x_b = (y_b - t(y_a)) e^{-s(y_a)}`, so the score of the mapped half
    becomes :math:`g_b e^{-s}` and that of the copied half gains what goes through the networks.
    """
    copied, mapped = x
    score_copied, score_mapped = base_score
    for layer in layers:
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
    return score_copied, score_mapped


def uncouple(copied: Tensor, mapped: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, Tensor]:
    """Return the halves that :func:`couple` maps to these, differentiably."""
    for layer in reversed(layers):
        copied, mapped = mapped, copied
        log_scale, shift = _scale_and_shift(layer, copied)
        mapped = (mapped - shift) * torch.exp(-log_scale)
    return copied, mapped
