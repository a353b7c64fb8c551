r"""The two recursions of a planar stack, over layers: in NumPy, in torch, or in Triton.

.. math::
    h_l = \tanh\Bigl(A_l + \sum_{k<l} G_{lk} h_k\Bigr), \qquad
    d_l = \sigma_l \Bigl(C_l + \sum_{k>l} G_{kl} d_k\Bigr),

with :math:`A = W z_0 + b` and :math:`C = c + U g`. On a CPU they run in NumPy, whose call overhead is a third
of torch's: with 250 layers that overhead is the cost. On a graphics card each is one Triton kernel, if Triton
is installed there and works; `PYRO_ADAANN_TRITON=0` in the environment switches it off, for debugging.
Elsewhere a layer is three torch operations.

Points are columns: products with the few rows of ``(d, num_points)`` are several times faster than with its
transpose, and a card reads neighbors together.
"""

from __future__ import annotations

import functools
import os
import warnings
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

__all__ = ["activations", "adjoint"]

#: Layers between two matrix products of the recursion: long blocks call NumPy more often on more
#: rows, short ones call the matrix product more often.
_BLOCK = 32
_SWITCH = "PYRO_ADAANN_TRITON"


def activations(columns: Tensor, u: Tensor, w: Tensor, b: Tensor, gram: Tensor) -> Tensor:
    """Return h, shape ``(layers, points)``.

    :param columns: the points, shape ``(d, points)``.
    :param gram: ``w @ u.T``.
    """
    kernels = _kernels_for(columns)
    if kernels is not None:
        found: Tensor = kernels.activations(columns, u, w, b)
        return found
    h = torch.addmm(b.unsqueeze(-1), w, columns)
    if _on_numpy(h):
        _fill_activations(h.numpy(), gram.numpy())
        return h
    for layer in range(len(h)):
        h[layer].addmv_(h[:layer].t(), gram[layer, :layer]).tanh_()
    return h


def adjoint(c: Tensor, grad: Tensor, u: Tensor, w: Tensor, gram: Tensor, slope: Tensor) -> Tensor:
    """Return d, shape ``(layers, points)``, in the memory of ``c`` or other.

    :param grad: g, the gradient behind the last layer, shape ``(d, points)``.
    :param gram: ``w @ u.T``.
    """
    kernels = _kernels_for(grad)
    if kernels is not None:
        found: Tensor = kernels.adjoint(c, grad, u, w, slope)
        return found
    d = c.addmm_(u, grad)
    transposed = gram.t().contiguous()
    if _on_numpy(d):
        _fill_adjoint(d.numpy(), transposed.numpy(), slope.numpy())
        return d
    for layer in range(len(d) - 1, -1, -1):
        d[layer].addmv_(d[layer + 1 :].t(), transposed[layer, layer + 1 :]).mul_(slope[layer])
    return d


def _kernels_for(points: Tensor) -> ModuleType | None:
    """Return the Triton kernels if these points are on a graphics card where they work."""
    is_for_cards = points.device.type == "cuda" and points.dtype in (torch.float32, torch.float64)
    return _kernels(points.device) if is_for_cards else None


@functools.cache
def _kernels(device: torch.device) -> ModuleType | None:
    """Return the Triton kernels if Triton is installed, not switched off, and can compile them here."""
    if os.environ.get(_SWITCH) == "0":
        return None
    try:
        from pyro_adaann.transforms.kernels import planar_triton
    except ImportError:
        return None
    try:
        ones = torch.ones(1, 1, device=device)
        planar_triton.activations(ones, ones, ones, ones[0])
    except Exception as error:
        # Most often there is no C compiler, which Triton needs at run time.
        warnings.warn(
            f"Expected Triton to compile the kernels of planar layers; got {type(error).__name__}: {error}. "
            f"Layers are computed one by one, which takes longer. Mend Triton, or set {_SWITCH}=0.",
            stacklevel=2,
        )
        return None
    return planar_triton


def _on_numpy(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64)


@np.errstate(all="ignore")  # what is not finite is dealt with where densities are weighed
def _fill_activations(h: np.ndarray, gram: np.ndarray) -> None:
    """Overwrite A by h."""
    for start in range(0, len(h), _BLOCK):
        block = h[start : start + _BLOCK]
        within = gram[start : start + _BLOCK, start : start + _BLOCK]
        if start:
            block += gram[start : start + _BLOCK, :start] @ h[:start]
        for i, row in enumerate(block):
            if i:
                row += np.dot(within[i, :i], block[:i])
            np.tanh(row, row)


@np.errstate(all="ignore")  # what is not finite is dealt with where densities are weighed
def _fill_adjoint(d: np.ndarray, transposed: np.ndarray, slope: np.ndarray) -> None:
    """Overwrite C by d, given the transpose of G."""
    for stop in range(len(d), 0, -_BLOCK):
        start = max(stop - _BLOCK, 0)
        block, slopes = d[start:stop], slope[start:stop]
        within = transposed[start:stop, start:stop]
        if stop < len(d):
            block += transposed[start:stop, stop:] @ d[stop:]
        for i in range(stop - start - 1, -1, -1):
            row = block[i]
            if i + 1 < len(block):
                row += np.dot(within[i, i + 1 :], block[i + 1 :])
            row *= slopes[i]
