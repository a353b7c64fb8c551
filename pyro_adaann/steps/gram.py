r"""Products of the scores of draws, from scores that are kept as the factors of outer products.

A linear map :math:`W` with input :math:`a_i` and output gradient :math:`g_i` at draw i has the score
:math:`g_i a_i^\top`, as many numbers as W has, but the product of the scores of two draws is

.. math:: \langle g_i a_i^\top, g_k a_k^\top \rangle = (g_i \cdot g_k) (a_i \cdot a_k).

The Gram matrix is therefore :math:`(G G^\top) \odot (A A^\top)`, a combination of scores with coefficients
:math:`\alpha` is :math:`G^\top \mathrm{diag}(\alpha) A`, and their mean square is
:math:`(G \odot G)^\top (A \odot A) / n`: nothing has the size of draws times parameters. The scale of
the parameters must then have rank one, a factor for each row of W and one for each column; it is fitted to
the mean squares so that its row and column sums are theirs, as in Adafactor [1].

[1] N. Shazeer and M. Stern, *Adafactor: adaptive learning rates with sublinear memory cost*, ICML 2018.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_adaann.processes.group import process_count, sum_over_processes
from pyro_adaann.processes.shares import are_worth_sending, own_share
from pyro_adaann.steps.mask_groups import mask_groups
from pyro_adaann.transforms.outer import OuterProducts

__all__ = ["DensePart", "OuterPart", "ScorePart", "gram_matrix"]

#: Draws whose products are formed together, rows and columns: on a CPU two such blocks fit its cache; on
#: other devices fewer kernels are faster.
_BLOCK, _BLOCK_ELSEWHERE = 256, 4096
#: Rounds of the fit of a scale of rank one under a mask; without a mask the first one is exact.
_NUM_ROUNDS = 4


class ScorePart(ABC):
    """The scores of n draws in one parameter, and the scale of that.

    The scores are not copied: the scale is applied to a block of draws at a time, and centering is done in
    the Gram matrix and in the coefficients.

    :param units: of the parameter, in its shape.
    """

    def __init__(self, units: Tensor) -> None:
        self.num_parameters = units.numel()
        self._units = units

    @abstractmethod
    def square_norms(self) -> Tensor:
        """Return the squared length of every draw's score or a bound on it, shape ``(n,)``."""

    @abstractmethod
    def forget(self, is_lost: Tensor) -> None:
        """Set the scores of some draws to zero."""

    @abstractmethod
    def variance(self) -> Tensor:
        """Return the variance of the scores in units of the parameter, in its shape."""

    @abstractmethod
    def set_scale(self, variance: Tensor, floor: Tensor) -> None:
        """Scale by the root of variance and floor, in units of the parameter."""

    @abstractmethod
    def scale(self) -> Tensor:
        """Return the factor of every number of the parameter, in its shape."""

    @abstractmethod
    def add_products(self, block: Tensor, rows: slice, columns: slice) -> None:
        """Add the products of the scaled scores of some draws with those of others."""

    @abstractmethod
    def combine(self, coefficients: Tensor) -> Tensor:
        """Return the sum of the scaled scores with a coefficient for each, times the scale, flat."""


class DensePart(ScorePart):
    """Scores stored as full tensors.

    :param scores: shape ``(n, *shape)``.
    :param units: of the parameter, shape ``shape``.
    """

    def __init__(self, scores: Tensor, units: Tensor) -> None:
        super().__init__(units)
        self._scores = scores.reshape(len(scores), -1)

    def square_norms(self) -> Tensor:
        return torch.linalg.vector_norm(self._scores, dim=1).square()

    def forget(self, is_lost: Tensor) -> None:
        self._scores = self._scores.masked_fill(is_lost.unsqueeze(1), 0.0)

    def variance(self) -> Tensor:
        mean, square = self._scores.mean(0), self._scores.square().mean(0)
        variance = square.sub_(mean.square_()).clamp_(min=0.0).reshape(self._units.shape)
        return variance * self._units.square()

    def set_scale(self, variance: Tensor, floor: Tensor) -> None:
        tiny = torch.finfo(variance.dtype).tiny
        self._square = (self._units.square() / (variance + floor + tiny)).reshape(-1)

    def scale(self) -> Tensor:
        return self._square.sqrt().reshape(self._units.shape)

    def add_products(self, block: Tensor, rows: slice, columns: slice) -> None:
        block.addmm_(self._scores[rows] * self._square, self._scores[columns].T)

    def combine(self, coefficients: Tensor) -> Tensor:
        return self._square * (coefficients @ self._scores)


class OuterPart(ScorePart):
    """Scores that are sums of outer products, for a stack of matrices.

    :param terms: whose sum the scores are; all of the same shape and with the same mask.
    :param units: of the parameter, shape ``(*stack, rows, columns)``, of rank one.
    """

    def __init__(self, terms: Sequence[OuterProducts], units: Tensor) -> None:
        super().__init__(units)
        # Factors of every term, shape (n, stack, rows) and (n, stack, columns).
        self._terms = [(_with_one_stack(term.left), _with_one_stack(term.right)) for term in terms]
        mask = terms[0].mask
        self._mask = None if mask is None else mask.to(units)
        self._groups = None if mask is None else mask_groups(mask)

    def square_norms(self) -> Tensor:
        lengths = [
            torch.linalg.vector_norm(left, dim=-1) * torch.linalg.vector_norm(right, dim=-1)
            for left, right in self._terms
        ]
        return torch.stack(lengths).sum(0).square().sum(1)

    def forget(self, is_lost: Tensor) -> None:
        where = is_lost[:, None, None]
        self._terms = [(a.masked_fill(where, 0.0), b.masked_fill(where, 0.0)) for a, b in self._terms]

    def variance(self) -> Tensor:
        mean, square = (torch.zeros_like(self._stacked(self._units)) for _ in range(2))
        num = len(self._terms[0][0])
        for left, right in self._terms:
            _add_sums(mean, left, right)
            for other_left, other_right in self._terms:
                _add_sums(square, left * other_left, right * other_right)
        variance = square.div_(num).sub_(mean.div_(num).square_()).clamp_(min=0.0)
        if self._mask is not None:
            variance *= self._mask
        return variance.reshape(self._units.shape).mul_(self._units.square())

    def set_scale(self, variance: Tensor, floor: Tensor) -> None:
        row, column = _rank_one(self._stacked(variance), self._mask)
        # The root of the floor to each factor, so that no product is below it.
        root = floor.sqrt() + torch.finfo(floor.dtype).tiny ** 0.25
        units = self._stacked(self._units)
        mean = units.mean((1, 2)).unsqueeze(1)
        self._row_square = units.mean(2).square() / (row + root)
        self._column_square = (units.mean(1) / mean).square() / (column + root)

    def scale(self) -> Tensor:
        return self._square().sqrt().reshape(self._units.shape)

    def add_products(self, block: Tensor, rows: slice, columns: slice) -> None:
        for left, right in self._terms:
            scaled = left[rows] * self._row_square, right[rows] * self._column_square
            for other_left, other_right in self._terms:
                # One matrix of the stack at a time: the products of all would not fit a cache.
                for index in range(len(self._row_square)):
                    mine = scaled[0][:, index], scaled[1][:, index]
                    self._add_products(block, mine, (other_left[columns, index], other_right[columns, index]))

    def combine(self, coefficients: Tensor) -> Tensor:
        total = torch.zeros_like(self._stacked(self._units))
        for left, right in self._terms:
            _add_sums(total, left, coefficients[:, None, None] * right)
        total *= self._square()
        if self._mask is not None:
            total *= self._mask
        return total.reshape(-1)

    def _add_products(
        self, block: Tensor, mine: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]
    ) -> None:
        """Add the products of outer products, given the two factors of some draws and those of others."""
        if self._groups is None:
            block.addcmul_(mine[0] @ theirs[0].T, mine[1] @ theirs[1].T)
            return
        groups, is_transposed = self._groups
        if is_transposed:
            mine, theirs = mine[::-1], theirs[::-1]
        inner = torch.zeros_like(block)
        for group in groups:
            inner.addmm_(
                mine[1][:, group.columns], theirs[1][:, group.columns].T, beta=float(group.is_nested)
            )
            block.addcmul_(mine[0][:, group.rows] @ theirs[0][:, group.rows].T, inner)

    def _square(self) -> Tensor:
        return self._row_square.unsqueeze(2) * self._column_square.unsqueeze(1)

    def _stacked(self, values: Tensor) -> Tensor:
        return values.reshape(-1, *values.shape[-2:])


def gram_matrix(parts: Sequence[ScorePart], like: Tensor) -> Tensor:
    """Return the products of the scaled scores of all pairs of draws, centered, shape ``(n, n)``.

    Each process computes some of the blocks.

    :param like: a number for each draw, of the scores' type and device.
    """
    num_draws = len(like)
    gram = like.new_zeros(num_draws, num_draws)
    size = _BLOCK if like.device.type == "cpu" else _BLOCK_ELSEWHERE
    is_divided = are_worth_sending(num_draws * sum(part.num_parameters for part in parts))
    if is_divided:
        size = min(size, math.ceil(num_draws / process_count()))
    slices = [slice(i, min(i + size, num_draws)) for i in range(0, num_draws, size)]
    blocks = [(rows, columns) for i, rows in enumerate(slices) for columns in slices[: i + 1]]
    for rows, columns in own_share(blocks) if is_divided else blocks:
        block = like.new_zeros(rows.stop - rows.start, columns.stop - columns.start)
        for part in parts:
            part.add_products(block, rows, columns)
        gram[rows, columns] = block
        if rows != columns:
            gram[columns, rows] = block.T
    if is_divided:
        gram = sum_over_processes(gram)
    mean = gram.mean(0)
    # Equal to the products of centered scores: with H = I - 11'/n that is H K H.
    return gram.sub_(mean).sub_(mean.unsqueeze(1)).add_(mean.mean())


def _add_sums(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the sum over draws of outer products, for every matrix of a stack."""
    total.baddbmm_(left.permute(1, 2, 0), right.transpose(0, 1))


def _with_one_stack(factor: Tensor) -> Tensor:
    return factor.reshape(len(factor), -1, factor.shape[-1])


def _rank_one(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return factors for rows and columns, of equal mean, whose products have the sums of ``values``.

    Proportional fitting: the rank-one matrix with these row and column sums over the ones of the mask.
    Without a mask that is row mean times column mean by mean.

    :param values: not negative, shape ``(stack, rows, columns)``, zero where the mask is.
    """
    tiny = torch.finfo(values.dtype).tiny
    row_sums, column_sums = values.sum(2), values.sum(1)
    column = torch.ones_like(column_sums)
    ones = torch.ones_like(values[0]) if mask is None else mask
    for _ in range(1 if mask is None else _NUM_ROUNDS):
        row = row_sums / (column @ ones.T).clamp(min=tiny)
        column = column_sums / (row @ ones).clamp(min=tiny)
    balance = ((column.mean(1) + tiny) / (row.mean(1) + tiny)).sqrt().unsqueeze(1)
    return row * balance, column / balance
