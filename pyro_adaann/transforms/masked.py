"""Masked networks: parameters of every coordinate as a function of the coordinates before it.

The units of a hidden layer are sorted by degree: one of degree m sees the first m coordinates [1]. The
matrices are therefore block triangular, and whatever runs over the coordinates in order, the inverse of an
autoregressive flow or the gradient of its density, uses every block once: it costs one pass through the
network, not one for each coordinate.

[1] M. Germain et al., *MADE: Masked Autoencoder for Distribution Estimation*, ICML 2015.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["MaskedNetwork", "Tape", "activate", "slope"]


class Tape(NamedTuple):
    """Inputs and outputs of the matrices in one pass, from the first to the last."""

    inputs: list[Tensor]
    outputs: list[Tensor]


class MaskedNetwork(nn.Module):
    """A function of points ``(n, d)`` with ``(n, d, num_outputs)`` values, those of coordinate i from x_<i.

    The values of the first coordinate are plain biases, and so is all that there is if d = 1.

    :param input_dim: d.
    :param hidden_dims: widths of the hidden layers.
    :param num_outputs: how many values a coordinate has.
    :param sharpness: factor of the weights of the inputs, which come in standard deviations of the base: the
        larger, the narrower the bends of the hidden units.
    """

    def __init__(
        self, input_dim: int, hidden_dims: Sequence[int], num_outputs: int, sharpness: float = 1.0
    ) -> None:
        super().__init__()
        self.input_dim, self.num_outputs = input_dim, num_outputs
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        self.table = nn.Parameter(torch.zeros(input_dim, num_outputs))
        #: Degrees of the units of all layers, from the inputs to the outputs.
        self.degrees: list[list[int]] = []
        if input_dim > 1:
            self._make_layers(hidden_dims, sharpness)

    def _make_layers(self, hidden_dims: Sequence[int], sharpness: float) -> None:
        last = self.input_dim - 1
        self.degrees = [
            list(range(1, last + 1)),
            *([1 + unit * last // width for unit in range(width)] for width in hidden_dims),
            [degree for degree in range(1, last + 1) for _ in range(self.num_outputs)],
        ]
        for number, (ins, outs) in enumerate(itertools.pairwise(self.degrees)):
            mask = (torch.tensor(ins).unsqueeze(-1) <= torch.tensor(outs)).to(self.table)
            self.register_buffer(f"mask_{number}", mask, persistent=False)
            is_last = number == len(hidden_dims)
            bound = 0.01 if is_last else 1.0
            bounds = bound / mask.sum(0).clamp(min=1).sqrt()
            weight = (2 * torch.rand_like(mask) - 1) * bounds * mask
            bias = 2 * torch.rand_like(bounds) - 1
            if number == 0:  # every unit bends at a point of the base
                weight = sharpness * weight
                bias = -(weight * torch.randn_like(weight)).sum(0)
            self.weights.append(nn.Parameter(weight))
            if not is_last:
                self.biases.append(nn.Parameter(bias))

    def mask(self, number: int) -> Tensor:
        """Return the mask of a matrix, shape ``(fan_in, fan_out)``."""
        return self.get_buffer(f"mask_{number}")

    def masked_weights(self) -> list[Tensor]:
        """Return the matrices times their masks."""
        return [weight * self.mask(i) for i, weight in enumerate(self.weights)]

    def forward(self, x: Tensor) -> tuple[Tensor, Tape]:
        """Return the values of every coordinate, and the inputs and outputs of the matrices."""
        tape = Tape([], [])
        first = self.table[:1].expand(x.shape[0], 1, self.num_outputs)
        if self.input_dim == 1:
            return first, tape
        hidden = x[:, :-1]
        for i, weight in enumerate(self.masked_weights()):
            bias = self.biases[i] if i < len(self.biases) else self.table[1:].flatten()
            tape.inputs.append(hidden)
            tape.outputs.append(torch.addmm(bias, hidden, weight))
            hidden = activate(tape.outputs[-1])
        rest = tape.outputs[-1].view(x.shape[0], self.input_dim - 1, self.num_outputs)
        return torch.cat([first, rest], 1), tape


def activate(x: Tensor) -> Tensor:
    """Return the hidden units: SiLU, which is smooth and goes on linearly."""
    return nn.functional.silu(x)


def slope(x: Tensor) -> Tensor:
    """Return the derivative of :func:`activate`."""
    gate = torch.sigmoid(x)
    return gate * (1 + x * (1 - gate))
