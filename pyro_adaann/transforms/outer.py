"""Gradients that are outer products: those of single points in the weight of a linear map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

__all__ = ["OuterProducts"]


@dataclass(frozen=True)
class OuterProducts:
    r"""The gradients of n points in one parameter of shape ``(*stack, rows, columns)``, never multiplied out.

    .. math:: g_i = (a_i b_i^\top) \odot M

    :param left: the a of every point, shape ``(n, *stack, rows)``.
    :param right: the b of every point, shape ``(n, *stack, columns)``.
    :param mask: M of zeros and ones, shape ``(rows, columns)``, None for ones.

    Example::

        >>> import torch
        >>> product = OuterProducts(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
        >>> product.dense()
        tensor([[[3., 4.],
                 [6., 8.]]])
    """

    left: Tensor
    right: Tensor
    mask: Tensor | None = None

    def dense(self) -> Tensor:
        """Return the gradients multiplied out, shape ``(n, *stack, rows, columns)``."""
        product = self.left.unsqueeze(-1) * self.right.unsqueeze(-2)
        return product if self.mask is None else product * self.mask

    def each(self, change: Callable[[Tensor], Tensor]) -> OuterProducts:
        """Return the products of changed factors, with the same mask."""
        return OuterProducts(change(self.left), change(self.right), self.mask)
