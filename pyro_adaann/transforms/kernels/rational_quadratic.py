r"""Monotone rational-quadratic splines [1], one per number, with a free affine part behind each.

A spline maps the interval [-B, B] onto itself by K bins. With :math:`\xi` the place of x in its bin of
width w and height h, :math:`s = h / w`, and slopes :math:`\delta_0, \delta_1` at its ends,

.. math::
    y = y_k + h \, \frac{s \xi^2 + \delta_0 \xi (1 - \xi)}{N}, \qquad N = s + (\delta_1 + \delta_0 - 2 s) \xi
    (1 - \xi), \qquad \frac{dy}{dx} = \frac{s^2 (\delta_1 \xi^2 + 2 s \xi (1 - \xi) + \delta_0
    (1 - \xi)^2)}{N^2}.

Beyond the interval y = x. Then comes :math:`y \mapsto c + e^a y`. All parameters at zero are the identity.

A number has ``3 K + 1`` parameters: K logits of widths, K of heights, K - 1 free slopes, a and c. Only one
bin of them matters for a point, so that the gradient of the K-sized part is written out: it is three
operations of that size, where autograd takes thirty.

[1] C. Durkan et al., *Neural Spline Flows*, NeurIPS 2019, Eqs. 4-8.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["apply_spline", "invert_spline", "num_parameters"]

#: Half the length B of the interval, in standard deviations of the base.
_REACH = 5.0
#: Smallest width and height of a bin, as a share of the interval, and smallest slope at a knot. Between two
#: separate modes a spline climbs through a gap in the narrowest bin; what is left there is this share.
_MIN_SHARE = 1e-4
_MIN_SLOPE = 1e-4
_SLOPE_SHIFT = math.log(math.expm1(1 - _MIN_SLOPE))  # a free slope of zero is a slope of one
#: Bound of the log scale a: e^8 is a posterior 3,000 times as narrow as the base.
_MAX_LOG_SCALE = 8.0


class Bin(NamedTuple):
    """What a point needs to know of its spline, each of the shape of the points."""

    left: Tensor
    width: Tensor
    bottom: Tensor
    height: Tensor
    free_slope_left: Tensor
    free_slope_right: Tensor
    free_log_scale: Tensor
    shift: Tensor


def num_parameters(num_bins: int) -> int:
    """Return how many parameters a spline of ``num_bins`` bins has."""
    return 3 * num_bins + 1


def apply_spline(x: Tensor, raw: Tensor, num_bins: int, *, plain: bool = False) -> tuple[Tensor, Tensor]:
    """Return image and log slope of every number, differentiably in both arguments.

    :param x: any shape.
    :param raw: the parameters, shape ``x.shape + (3 K + 1,)``.
    :param num_bins: K.
    :param plain: whether to use ordinary operations alone, which function transforms of torch see through.
    """
    spline = _locate(x, raw.movedim(-1, 0), num_bins)[0] if plain else Bin(*_Locate.apply(x, raw, num_bins))
    inside = x.clamp(-_REACH, _REACH)
    slopes = _slopes(spline)
    xi = (inside - spline.left) / spline.width
    rest, denominator, log_slope = _bend(xi, slopes)
    y = spline.bottom + spline.height * (slopes[0] * xi * xi + slopes[1] * rest) / denominator
    log_scale = _log_scale(spline)
    return spline.shift + log_scale.exp() * (y + (x - inside)), log_slope + log_scale


def invert_spline(y: Tensor, raw: Tensor, num_bins: int) -> tuple[Tensor, Tensor]:
    """Return the numbers whose images are ``y``, and the log slopes there, differentiably in both arguments.

    :param y: any shape.
    :param raw: the parameters, shape ``(3 K + 1,) + y.shape``: those of many numbers lie side by side.
    :param num_bins: K.
    """
    y = (y - raw[-1]) * torch.exp(-_MAX_LOG_SCALE * torch.tanh(raw[-2] / _MAX_LOG_SCALE))
    spline = _locate(y, raw, num_bins, by_height=True)[0]
    inside = y.clamp(-_REACH, _REACH)
    slopes = slope, left, right = _slopes(spline)
    above = inside - spline.bottom
    bend = above * (right + left - 2 * slope)
    # The root in [0, 1] of a xi^2 + b xi = c, in the form that does not cancel.
    a, b, c = spline.height * (slope - left) + bend, spline.height * left - bend, slope * above
    root = (b * b + 4 * a * c).clamp(min=torch.finfo(y.dtype).tiny).sqrt()
    is_falling = b < 0  # then a > 0
    xi = torch.where(is_falling, root - b, 2 * c) / torch.where(is_falling, 2 * a, root + b)
    x = spline.left + spline.width * xi + (y - inside)
    return x, _bend(xi, slopes)[2] + _log_scale(spline)


def _slopes(spline: Bin) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean slope of the bin and those at its ends."""
    ends = (spline.free_slope_left, spline.free_slope_right)
    left, right = (_MIN_SLOPE + F.softplus(free + _SLOPE_SHIFT) for free in ends)
    return spline.height / spline.width, left, right


def _bend(xi: Tensor, slopes: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return xi (1 - xi), the denominator N and the log slope of a place in a bin."""
    slope, left, right = slopes
    rest = xi * (1 - xi)
    denominator = slope + (right + left - 2 * slope) * rest
    numerator = right * xi * xi + 2 * slope * rest + left * (1 - xi).square()
    return rest, denominator, 2 * (slope / denominator).log() + numerator.log()


def _log_scale(spline: Bin) -> Tensor:
    return _MAX_LOG_SCALE * torch.tanh(spline.free_log_scale / _MAX_LOG_SCALE)


def _locate(
    x: Tensor, raw: Tensor, num_bins: int, *, by_height: bool = False
) -> tuple[Bin, tuple[Tensor, ...]]:
    """Return the bin of every number, found among its knots or among their images; and what led there.

    :param raw: the parameters, shape ``(3 K + 1,) + x.shape``. torch's softmax of a few entries is several
        times as fast along the first dimension as along the last.
    """
    shares = raw[: 2 * num_bins].unflatten(0, (2, num_bins)).softmax(1)
    sizes = 2 * _REACH * (_MIN_SHARE + (1 - num_bins * _MIN_SHARE) * shares)
    # Knots from the first to the last but one; the outermost are -B and B, whatever the rounding.
    first = torch.full_like(sizes[:, :1], -_REACH)
    starts = torch.cat([first, sizes[:, :-1].cumsum(1) - _REACH], 1)
    index = (starts[int(by_height), 1:] <= x).sum(0, keepdim=True)
    both = index.expand(2, 1, *x.shape)
    (left, bottom), (width, height) = (part.gather(1, both).squeeze(1).unbind(0) for part in (starts, sizes))
    end = torch.zeros_like(raw[:1])
    slopes = torch.cat([end, raw[2 * num_bins : -2], end])
    slope_left, slope_right = (slopes.gather(0, index + i).squeeze(0) for i in range(2))
    return Bin(left, width, bottom, height, slope_left, slope_right, raw[-2], raw[-1]), (index, shares)


class _Locate(torch.autograd.Function):
    """:func:`_locate` with its gradient written out.

    With p the shares, k the bin and g, g' the gradients in its start and its size, the gradient in logit j is
    :math:`p_j (g [j < k] + g' [j = k] - \\bar g)`, up to a factor, :math:`\\bar g` its mean over p.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, raw: Tensor, num_bins: int) -> tuple[Tensor, ...]:
        spline, (index, shares) = _locate(x, raw.movedim(-1, 0), num_bins)
        ctx.save_for_backward(index, shares)
        return tuple(part.clone() for part in spline)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        index, shares = ctx.saved_tensors
        num_bins = shares.shape[1]
        g = Bin(*grads)
        factor = 2 * _REACH * (1 - num_bins * _MIN_SHARE)
        start = (factor * torch.stack([g.left, g.bottom])).unsqueeze(1)
        size = (factor * torch.stack([g.width, g.height])).unsqueeze(1)
        place = torch.arange(num_bins, device=index.device).view(-1, *[1] * (index.dim() - 1))
        terms = torch.where(place < index, start, torch.where(place == index, size, 0.0)).mul_(shares)
        logits = torch.addcmul(terms, shares, terms.sum(1, keepdim=True), value=-1).flatten(0, 1)
        slopes = shares.new_zeros(num_bins + 1, *index.shape[1:])
        # Out of place, which the function transforms of torch see through.
        slopes = slopes.scatter(0, index, g.free_slope_left.unsqueeze(0))
        slopes = slopes.scatter(0, index + 1, g.free_slope_right.unsqueeze(0))
        raw = torch.cat([logits, slopes[1:-1], torch.stack([g.free_log_scale, g.shift])])
        return None, raw.movedim(0, -1).contiguous(), None
