r"""An autoregressive flow of splines that maps base to latents in one pass.

In a layer, coordinate i goes through a spline and an affine map of its own whose parameters are a function
of the coordinates before it, as they enter the layer,

.. math:: y_i = c_i + e^{a_i} S_i(x_i), \qquad (S_i, a_i, c_i) = N_i(x_1, \dots, x_{i-1}).

The Jacobian is triangular. The next layer takes the coordinates in reverse order. All of it happens in units
of the base, :math:`(x - m) / s`, since a spline bends between fixed ends.

The score :math:`\nabla_y \log q(y) = J^{-\top} \nabla_x (\log q_0(x) - \log|\det J|)` needs no inverse.
It is what makes the gradient of :math:`\sum_i s_i y_i + \log|\det J|` in x, s held fixed, equal to that of
:math:`\log q_0`. Coordinate j gives :math:`s_j` by one division as soon as what reaches :math:`x_j` through
the networks of the later coordinates is known: one backward pass, in descending order of coordinates.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pyro_adaann.transforms.base import FlowTransform
from pyro_adaann.transforms.kernels.rational_quadratic import apply_spline, invert_spline, num_parameters
from pyro_adaann.transforms.masked import MaskedNetwork, activate, slope
from pyro_adaann.transforms.outer import OuterProducts

__all__ = ["SplineStack"]

#: In two dimensions, where many bins are cheap, posteriors may have tens of modes: bends are narrow, so
#: that a coordinate can follow what changes over a few tenths of the other, and knots at the start at
#: B sinh(c u) / sinh(c), u equally spaced in [-1, 1]: of 24 bins 12 instead of 6 are within 1.15 standard
#: deviations. From three on both cost steps: conditions of many coordinates are rough, far bins are coarse.
_SHARPNESS, _CROWDING = 4.0, 3.0


class SplineStack(FlowTransform):
    r"""A composition of autoregressive spline layers, :math:`y_i = c_i + e^{a_i} S_i(x_i)` given x_<i.

    Flexible enough for separate modes, funnels and bends in tens of dimensions. In one dimension it is a
    spline. The inverse is exact, and costs about as much as the map itself.

    :param input_dim: dimension d of the points.
    :param num_transforms: number of layers.
    :param num_bins: bins of every spline.
    :param hidden_dims: widths of the hidden layers of the masked networks.
    :param loc: location of the base, a number or shape ``(d,)``: where the splines have their middle.
    :param scale: scale of the base, likewise; they bend within five times as much.

    Source: Durkan et al., *Neural Spline Flows*, NeurIPS 2019; Kingma et al., *Improved Variational Inference
    with Inverse Autoregressive Flow*, NeurIPS 2016, for the direction.

    Example::

        >>> import torch
        >>> stack = SplineStack(input_dim=3, num_transforms=2, num_bins=8, hidden_dims=[32, 32]).double()
        >>> x = torch.randn(5, 3).double()
        >>> torch.allclose(stack.inv(stack(x).clone()), x)
        True
    """

    has_closed_inverse = True
    is_recordable = True

    def __init__(
        self,
        input_dim: int,
        num_transforms: int,
        num_bins: int,
        hidden_dims: Sequence[int],
        *,
        loc: Tensor | float = 0.0,
        scale: Tensor | float = 1.0,
    ) -> None:
        super().__init__(input_dim)
        self.num_transforms = num_transforms
        self.num_bins = num_bins
        num_outputs = num_parameters(num_bins)
        is_plane = input_dim == 2
        sharpness = _SHARPNESS if is_plane else 1.0
        self.networks = nn.ModuleList(
            MaskedNetwork(input_dim, hidden_dims, num_outputs, sharpness) for _ in range(num_transforms)
        )
        if is_plane:
            for network in self._layers():
                _crowd(network.table, num_bins)
        like = cast(MaskedNetwork, self.networks[0]).table
        for name, value in (("loc", loc), ("scale", scale)):
            value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
            self.register_buffer(name, value.expand(input_dim).clone())

    def _layers(self) -> list[MaskedNetwork]:
        return [cast(MaskedNetwork, network) for network in self.networks]

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(x, plain=torch._C._get_tracing_state() is not None)

    def _define(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(x, plain=True)

    def _run(self, x: Tensor, *, plain: bool) -> tuple[Tensor, Tensor]:
        x = (x - self.loc) / self.scale
        log_det = x.new_zeros(x.shape[0])
        for network in self._layers():
            x, log_slopes = apply_spline(x, network(x)[0], self.num_bins, plain=plain)
            x, log_det = x.flip(-1), log_det + log_slopes.sum(-1)
        return self._leave(x), log_det

    def _leave(self, x: Tensor) -> Tensor:
        """Return to the order and the units of the latents."""
        x = x.flip(-1) if self.num_transforms % 2 else x
        return self.loc + self.scale * x

    def _backward_map(self, y: Tensor) -> Tensor:
        return self._backward_with_log_det(y)[0]

    def _backward_with_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        y = (y - self.loc) / self.scale
        y = y.flip(-1) if self.num_transforms % 2 else y
        log_det = y.new_zeros(y.shape[0])
        for network in reversed(self._layers()):
            y, log_slopes = _invert(network, y.flip(-1), self.num_bins)
            log_det = log_det + log_slopes.sum(-1)
        return self.loc + self.scale * y, log_det

    @torch.no_grad()
    def _score(self, x: Tensor, base_score: Tensor) -> Tensor:
        return self._density_gradients(x, base_score)[1]

    @torch.no_grad()
    def _density_gradients(
        self, x: Tensor, base_score: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor | OuterProducts]]:
        x, score = (x - self.loc) / self.scale, base_score * self.scale
        gradients: dict[str, Tensor | OuterProducts] = {}
        for number, network in enumerate(self._layers()):
            x, score, found = _score(network, x, score, self.num_bins)
            x, score = x.flip(-1), score.flip(-1)
            gradients.update((f"networks.{number}.{name}", gradient) for name, gradient in found.items())
        score = score.flip(-1) if self.num_transforms % 2 else score
        return self._leave(x), score / self.scale, gradients


@torch.no_grad()
def _crowd(table: Tensor, num_bins: int) -> None:
    """Set the widths of bins, and with them the heights, to a start that crowds the middle."""
    u = torch.linspace(-_CROWDING, _CROWDING, num_bins + 1, dtype=table.dtype, device=table.device)
    table[:, : 2 * num_bins] = u.sinh().diff().log().repeat(2)


def _blocks(network: MaskedNetwork) -> list[list[slice]]:
    """Return for every coordinate but the last the units of that degree, one slice for each layer."""
    starts = [
        [0, *itertools.accumulate(degrees.count(m) for m in range(network.input_dim))]
        for degrees in network.degrees
    ]
    return [[slice(s[m], s[m + 1]) for s in starts] for m in range(1, network.input_dim)]


def _invert(network: MaskedNetwork, y: Tensor, num_bins: int) -> tuple[Tensor, Tensor]:
    """Return the points that a layer maps to ``y``, coordinate by coordinate in one pass, and log slopes.

    Units and parameters lie in rows, those of all points side by side.
    """
    weights = [weight.t() for weight in network.masked_weights()]
    biases = [bias.unsqueeze(1) for bias in (*network.biases, network.table[1:].flatten())]
    y = y.t().contiguous()
    found = [invert_spline(y[0], network.table[0].unsqueeze(1).expand(-1, y.shape[1]), num_bins)]
    known: list[list[Tensor]] = [[] for _ in weights]
    for m, block in enumerate(_blocks(network), start=1):
        value = found[-1][0].unsqueeze(0)
        for layer, weight in enumerate(weights):
            known[layer].append(value)
            rows, columns = block[layer], block[layer + 1]
            value = torch.addmm(biases[layer][columns], weight[columns, : rows.stop], torch.cat(known[layer]))
            if layer < len(weights) - 1:
                value = activate(value)
        found.append(invert_spline(y[m], value, num_bins))
    x, log_slopes = (torch.stack(parts, -1) for parts in zip(*found, strict=True))
    return x, log_slopes


def _score(
    network: MaskedNetwork, x: Tensor, score: Tensor, num_bins: int
) -> tuple[Tensor, Tensor, dict[str, Tensor | OuterProducts]]:
    """Return the images of ``x`` under a layer, the score there, and the gradients of log q at these images
    in the parameters; see the module's text.
    """
    values, tape = network(x)
    with torch.enable_grad():
        leaves = (x.detach().requires_grad_(), values.detach().requires_grad_())
        y, log_slopes = apply_spline(*leaves, num_bins)
        by_x, by_values = torch.autograd.grad(log_slopes.sum(), leaves, retain_graph=True)
        slopes, direct = torch.autograd.grad(y.sum(), leaves)
    new = (score - by_x) / slopes
    found: dict[str, Tensor | OuterProducts] = {}
    first, rest = by_values[:, :1], by_values[:, 1:].flatten(1)
    if network.input_dim > 1:
        weights = network.masked_weights()
        bends = [slope(output) for output in tape.outputs[:-1]]
        # Gradients in the outputs of every matrix, of the coordinates that are done.
        deltas = [*(torch.zeros_like(output) for output in tape.outputs[:-1]), rest]
        outputs = rest.view(x.shape[0], network.input_dim - 1, network.num_outputs)
        for m, block in reversed(list(enumerate(_blocks(network)))):
            outputs[:, m].addcmul_(new[:, m + 1 : m + 2], direct[:, m + 1])
            for layer in range(len(weights) - 1, -1, -1):
                rows, later = block[layer], block[layer + 1]
                grad = deltas[layer][:, later.start :] @ weights[layer][rows, later.start :].t()
                if layer:
                    deltas[layer - 1][:, rows] = grad * bends[layer - 1][:, rows]
                else:
                    new[:, m] -= grad.squeeze(-1) / slopes[:, m]
        for i, (left, delta) in enumerate(zip(tape.inputs, deltas, strict=True)):
            found[f"weights.{i}"] = OuterProducts(left, -delta, network.mask(i))
        found.update((f"biases.{i}", -delta) for i, delta in enumerate(deltas[:-1]))
    first = torch.addcmul(first, new[:, :1].unsqueeze(-1), direct[:, :1])
    table = torch.cat([first, rest.view(x.shape[0], -1, network.num_outputs)], 1)
    return y.detach(), new, {"table": -table, **found}
