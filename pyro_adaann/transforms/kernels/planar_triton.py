r"""The recursions of a planar stack as one Triton kernel each, for graphics cards.

Layer by layer with torch operations they are hundreds of launches, each of which takes longer than its
arithmetic. Here a program follows a few points through all layers and keeps their position in registers. Both
recursions have one form: at layer l a number :math:`t_l` is made of the product of the position with one
vector, and the position moves by :math:`t_l` times another,

.. math::
    h_l = \tanh(b_l + w_l \cdot z), \quad z \leftarrow z + h_l u_l; \qquad
    d_l = \sigma_l (c_l + u_l \cdot g), \quad g \leftarrow g + d_l w_l.

The arithmetic is that of the definition, L d operations for each point and direction; the L x L matrix of
`planar_recursion` is not needed.

Triton's interpreter runs the kernels on a CPU: ``TRITON_INTERPRET=1`` before this module is imported.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["activations", "adjoint"]

#: Numbers of the positions that a program keeps: a few for each of its 32 threads, since a program waits for
#: one layer after the other and the card hides that by running many.
_NUMBERS = 128
#: Triton 3.10 changes the default of the second.
_OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}


def activations(columns: Tensor, u: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Return h of every layer and point, ``(layers, points)``.

    :param columns: the points, shape ``(d, points)``.
    """
    h = columns.new_empty(len(w), columns.shape[1])
    _launch(_activations, columns, (u, w, b), h)
    return h


def adjoint(c: Tensor, grad: Tensor, u: Tensor, w: Tensor, slope: Tensor) -> Tensor:
    """Return d of every layer and point, from the last layer to the first; shapes ``(layers, points)``.

    :param grad: g behind the last layer, shape ``(d, points)``.
    """
    d = c.new_empty(c.shape)
    _launch(_adjoint, grad, (u, w, c, slope), d)
    return d


def _launch(kernel: Any, points: Tensor, inputs: tuple[Tensor, ...], result: Tensor) -> None:
    dim, num_points = points.shape
    if not num_points:
        return
    width = triton.next_power_of_2(dim)
    block = max(_NUMBERS // width, 1)
    tensors = [tensor.contiguous() for tensor in (points, *inputs)]
    # Triton launches on the present device, which need not be that of the tensors.
    with torch.cuda.device_of(points):
        kernel[(triton.cdiv(num_points, block),)](
            *tensors, result, num_points, len(result), dim, block, width, **_OPTIONS
        )


_jit = triton.jit(do_not_specialize=["num_points", "num_layers", "dim"])


@_jit
def _activations(
    x: tl.tensor,
    u: tl.tensor,
    w: tl.tensor,
    b: tl.tensor,
    h: tl.tensor,
    num_points: tl.tensor,
    num_layers: tl.tensor,
    dim: tl.tensor,
    block: tl.constexpr,
    width: tl.constexpr,
) -> None:
    point = tl.program_id(0) * block + tl.arange(0, block)
    coordinate = tl.arange(0, width)
    is_point, is_coordinate = point < num_points, coordinate < dim
    place = x + coordinate.to(tl.int64) * num_points + point[:, None]
    z = tl.load(place, mask=is_point[:, None] & is_coordinate, other=0.0)
    # A pointer that moves on: a card's draws times layers may be more than 32 bits count.
    here = h + point
    for layer in range(num_layers):
        to_u = tl.load(u + layer * dim + coordinate, mask=is_coordinate, other=0.0)
        to_w = tl.load(w + layer * dim + coordinate, mask=is_coordinate, other=0.0)
        a = tl.sum(z * to_w, 1) + tl.load(b + layer)
        # The hyperbolic tangent, without overflow.
        decay = tl.exp(-2 * tl.abs(a))
        size = (1 - decay) / (1 + decay)
        t = tl.where(a < 0, -size, size)
        z += t[:, None] * to_u
        tl.store(here, t, mask=is_point)
        here += num_points


@_jit
def _adjoint(
    grad: tl.tensor,
    u: tl.tensor,
    w: tl.tensor,
    c: tl.tensor,
    slope: tl.tensor,
    d: tl.tensor,
    num_points: tl.tensor,
    num_layers: tl.tensor,
    dim: tl.tensor,
    block: tl.constexpr,
    width: tl.constexpr,
) -> None:
    point = tl.program_id(0) * block + tl.arange(0, block)
    coordinate = tl.arange(0, width)
    is_point, is_coordinate = point < num_points, coordinate < dim
    place = grad + coordinate.to(tl.int64) * num_points + point[:, None]
    g = tl.load(place, mask=is_point[:, None] & is_coordinate, other=0.0)
    here = tl.cast(num_layers - 1, tl.int64) * num_points + point
    for step in range(num_layers):
        layer = num_layers - 1 - step
        to_u = tl.load(u + layer * dim + coordinate, mask=is_coordinate, other=0.0)
        to_w = tl.load(w + layer * dim + coordinate, mask=is_coordinate, other=0.0)
        own = tl.load(c + here, mask=is_point, other=0.0)
        t = tl.load(slope + here, mask=is_point, other=0.0) * (own + tl.sum(g * to_u, 1))
        g += t[:, None] * to_w
        tl.store(d + here, t, mask=is_point)
        here -= num_points
