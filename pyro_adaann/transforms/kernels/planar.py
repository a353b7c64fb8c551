r"""A stack of planar layers, computed as one triangular recursion.

A planar layer [1, Eq. 10] is :math:`f(z) = z + u \tanh(w \cdot z + b)`. In a stack of L layers, let
:math:`h_l` be the activation of layer l. The point that enters it is :math:`z_0 + \sum_{k<l} h_k u_k`,
so with :math:`G = W U^\top` and :math:`A = W z_0 + b`

.. math::
    h_l = \tanh\Bigl(A_l + \sum_{k<l} G_{lk} h_k\Bigr), \qquad z_L = z_0 + \sum_l h_l u_l, \qquad
    \log|\det J| = \sum_l \log\bigl(1 + G_{ll} (1 - h_l^2)\bigr).

The only sequential part is the recursion for h on an (L, num_points) matrix; all the rest are matrix
products. Its gradient is the transposed recursion, from the last layer to the first. How both run is in
`planar_recursion`.

A layer is invertible if :math:`u \cdot w > -1`. The free parameter u is therefore moved along w so that
:math:`u \cdot w` becomes :math:`m(u \cdot w)` with :math:`m(x) = (1 - \epsilon)
(\mathrm{softplus}(x + \log(e - 1)) - 1)`. It has :math:`m(0) = 0`: small parameters are a stack near
the identity. The textbook :math:`\mathrm{softplus}(x) - 1` maps 0 to -0.31, so that a deep stack
starts as a strong contraction and collapses onto one mode. The margin :math:`\epsilon` keeps the
Jacobian of a layer above :math:`\epsilon`, hence the inverse well conditioned.

[1] D. J. Rezende and S. Mohamed, *Variational Inference with Normalizing Flows*, ICML 2015.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_adaann.transforms.kernels.planar_recursion import activations, adjoint
from pyro_adaann.transforms.outer import OuterProducts

__all__ = ["PlanarFunction", "constrain", "invert", "layer_by_layer", "point_gradients", "score"]

#: Smallest Jacobian determinant of one layer.
_MARGIN = 1e-3
_SOFTPLUS_SHIFT = math.log(math.e - 1)  # softplus of it is 1
#: Newton's steps of the inverse at most; if u . w < 5,000, 12 reach 1e-9, and one or two more all digits.
_MAX_ITERATIONS, _TRACED_ITERATIONS = 200, 16
#: Rows of a block of a product of which only the lower triangle is used.
_BLOCK = 64


def constrain(u: Tensor, w: Tensor) -> Tensor:
    """Move ``u`` along ``w`` so that ``u . w`` becomes ``m(u . w) > -1``; shapes ``(layers, d)``."""
    return torch.addcmul(u, _shift(u, w)[0], w)


def _shift(u: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return how far ``u`` moves in units of ``w``, and ``u . w`` and ``w . w``: each ``(layers, 1)``."""
    product = (u * w).sum(-1, keepdim=True)
    norm = (w * w).sum(-1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
    target = (1 - _MARGIN) * (F.softplus(product + _SOFTPLUS_SHIFT) - 1)
    return (target - product) / norm, product, norm


def _constrain_backward(grad: Tensor, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `constrain` in ``u`` and ``w``.

    With p = u . w, n = w . w and the shift k = (m(p) - p) / n: dk/dp = (m'(p) - 1) / n, dk/dn = -k / n.
    """
    shift, product, norm = _shift(u, w)
    slope = ((1 - _MARGIN) * torch.sigmoid(product + _SOFTPLUS_SHIFT) - 1) / norm
    along = (grad * w).sum(-1, keepdim=True)
    grad_u = torch.addcmul(grad, along * slope, w)
    grad_w = shift * grad + along * (slope * u - 2 * shift / norm * w)
    return grad_u, grad_w


def layer_by_layer(x: Tensor, u: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, in torch operations alone, which a JIT tracer can record."""
    u = constrain(u, w)
    log_det = x.new_zeros(x.shape[:-1])
    for u_l, w_l, b_l in zip(u.unbind(0), w.unbind(0), b.unbind(0), strict=True):
        h = torch.tanh(x @ w_l + b_l)
        log_det = log_det + torch.log1p((u_l * w_l).sum() * (1 - h * h))
        x = x + h.unsqueeze(-1) * u_l
    return x, log_det


class PlanarFunction(torch.autograd.Function):
    """The stack on ``(num_points, d)`` with its hand-written gradient (see the module's text).

    Points are columns here. Matrices of shape (layers, points) are overwritten where that is possible: for a
    thousand points, fresh memory costs more than what is computed in it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, free_u: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        u = constrain(free_u, w)
        columns = x.t().contiguous()
        gram = w @ u.t()
        h = activations(columns, u, w, b, gram)
        ctx.save_for_backward(columns, free_u, u, w, gram, h)
        return torch.addmm(columns, u.t(), h).t(), _sum_of_logs(_jacobian(gram, h))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_log_det: Tensor) -> tuple[Tensor, ...]:
        columns, free_u, u, w, gram, h = ctx.saved_tensors
        grad_y = grad_y.t().contiguous()
        # d log_det / d h_l = -2 G_ll h_l / J_l and d log_det / d G_ll = (1 - h_l^2) / J_l.
        ratio = _jacobian(gram, h).reciprocal_().mul_(grad_log_det)
        own = (ratio * h).mul_(-2 * gram.diagonal().unsqueeze(-1))
        slope = (h * h).neg_().add_(1)
        grad_diagonal = ratio.mul_(slope).sum(-1)
        grad_a = adjoint(own, grad_y, u, w, gram, slope)
        grad_gram = _strictly_lower_product(grad_a, h)
        grad_gram.diagonal().copy_(grad_diagonal)
        grad_x = torch.addmm(grad_y, w.t(), grad_a).t()
        grad_u = torch.addmm(h @ grad_y.t(), grad_gram.t(), w)
        grad_w = torch.addmm(grad_a @ columns.t(), grad_gram, u)
        grad_free_u, grad_w_of_u = _constrain_backward(grad_u, free_u, w)
        return grad_x, grad_free_u, grad_w.add_(grad_w_of_u), grad_a.sum(-1)


def _jacobian(gram: Tensor, h: Tensor) -> Tensor:
    """Return ``1 + G_ll (1 - h_l^2)`` of every layer and point."""
    diagonal = gram.diagonal().unsqueeze(-1)
    return (h * h).mul_(-diagonal).add_(1 + diagonal)


def _sum_of_logs(jacobian: Tensor) -> Tensor:
    """Return the sum over layers of the logarithms, that is, of the logarithms of products of four.

    Four factors between the margin and 1e9 neither overflow nor underflow in single precision.
    """
    num_layers, num_points = jacobian.shape
    full = num_layers - num_layers % 4
    products = jacobian[:full].view(full // 4, 4, num_points).prod(1)
    return products.log_().sum(0) + jacobian[full:].prod(0).log_()


def _strictly_lower_product(a: Tensor, h: Tensor) -> Tensor:
    """Return the part of ``a @ h.T`` below the diagonal, which is all that the recursion has used."""
    product = a.new_zeros(len(a), len(a))
    for start in range(0, len(a), _BLOCK):
        stop = start + _BLOCK
        torch.mm(a[start:stop], h[:stop].t(), out=product[start:stop, :stop])
    return product.tril_(-1)


def score(x: Tensor, base_score: Tensor, u: Tensor, w: Tensor, b: Tensor) -> Tensor:
    r"""Follow :math:`s = \nabla_z \log q` through the layers, from the base to the images of ``x``.

    The Jacobian of a layer, :math:`I + h' u w^\top` with :math:`h' = 1 - h^2`, is the identity plus a term
    of rank one, and so is its inverse. With :math:`c = u \cdot w` and :math:`j = 1 + c h'`,

    .. math:: s_l = J^{-\top} (s_{l-1} - \nabla \log j) = s_{l-1} + \beta_l w_l, \qquad
              \beta_l = \frac{h'}{j} \Bigl(\frac{2 c h}{j} - u_l \cdot s_{l-1}\Bigr),

    and :math:`u_l \cdot s_{l-1} = u_l \cdot s_0 + \sum_{k<l} G_{kl} \beta_k`: the recursion of the
    gradient, with the layers in reverse order.
    """
    gram = w @ u.t()
    h = activations(x.t(), u, w, b, gram)
    jacobian = _jacobian(gram, h)
    slope = (h * h).sub_(1).div_(jacobian)  # -h' / j
    own = -2 * gram.diagonal().unsqueeze(-1) * h / jacobian
    own, u, from_last, slope = (t.flip(0) for t in (own, u, w, slope))
    beta = adjoint(own, base_score.t(), u, from_last, gram.flip((0, 1)), slope)
    return base_score + beta.flip(0).t() @ w


def point_gradients(
    x: Tensor, free_u: Tensor, w: Tensor, b: Tensor, grad_y: Tensor, grad_log_det: float
) -> dict[str, Tensor | OuterProducts]:
    """Return what `PlanarFunction.backward` sums over points, for every point by itself, points first.

    With d_l the derivative in the pre-activation of layer l, those in u_l, w_l and b_l are h_l times that in
    the layer's output, d_l times its input, and d_l, with the log-determinant's own part in u and w.
    """
    u = constrain(free_u, w)
    gram = w @ u.t()
    h = activations(x.t(), u, w, b, gram)
    ratio = grad_log_det / _jacobian(gram, h)
    slope = 1 - h * h
    own = -2 * gram.diagonal().unsqueeze(-1) * ratio * h
    grad_a = adjoint(own, grad_y.t(), u, w, gram, slope)
    h, grad_a, grad_diagonal = (t.t().unsqueeze(-1) for t in (h, grad_a, ratio * slope))
    added, taken = h * u, grad_a * w
    inputs = x.unsqueeze(1) + added.cumsum(1) - added
    # What the layers after this one ask of its output.
    grad_outputs = grad_y.unsqueeze(1) + taken.flip(1).cumsum(1).flip(1) - taken
    grad_u = h * grad_outputs + grad_diagonal * w
    grad_w = grad_a * inputs + grad_diagonal * u
    grad_free_u, grad_w_of_u = _constrain_backward(grad_u, free_u, w)
    return {"u": grad_free_u, "w": grad_w + grad_w_of_u, "b": grad_a.squeeze(-1)}


def invert(y: Tensor, u: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Invert the stack layer by layer, differentiably in all arguments.

    Along w a layer maps the pre-activation v = w . z + b to v + c tanh(v) = w . y + b with c = u . w.
    The root is found without a graph; one more Newton step with a fixed denominator then leaves its
    value and gives it the derivative of the implicit function.
    """
    needs_graph = torch.is_grad_enabled() and any(t.requires_grad for t in (y, u, w, b))
    layers = zip(*(parameter.unbind(0)[::-1] for parameter in (u, w, b)), strict=True)
    for u_l, w_l, b_l in layers:
        c = u_l @ w_l
        target = y @ w_l + b_l
        with torch.no_grad():
            v = _solve_monotone(target, c)
        if needs_graph:
            h = torch.tanh(v)
            v = v - (v + c * h - target) / (1 + c.detach() * (1 - h * h))
        y = y - torch.tanh(v).unsqueeze(-1) * u_l
    return y


def _solve_monotone(target: Tensor, c: Tensor) -> Tensor:
    """Solve ``v + c tanh(v) = target`` for v, elementwise, with c > -1.

    The function is odd, and for v > 0 convex if c < 0 and concave if c > 0. Newton's method from
    above (c < 0) or below (c > 0) the root therefore never leaves its side and needs no safeguard.
    """
    is_traced = torch._C._get_tracing_state() is not None
    sign, size = target.sign(), target.abs()
    v = torch.where(c < 0, size - c, size / (1 + c))
    for i in range(_TRACED_ITERATIONS if is_traced else _MAX_ITERATIONS):
        h = torch.tanh(v)
        change = (v + c * h - size) / (1 + c * (1 - h * h))
        v = v - change
        # A look at the numbers makes a graphics card wait, and a tracer cannot record it.
        if not is_traced and i % 4 == 3 and not (change.abs() > 1e-15 * (1 + v)).any():
            break
    return sign * v
