"""The rows of a matrix of zeros and ones, grouped so that sums over its ones become few matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["MaskGroup", "mask_groups"]

#: Groups computed before, with the version of the mask: networks keep their masks from step to step.
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()

#: Cost of one more group in rows, for its passes over the block of products.
_GROUP_COST = 8


@dataclass(frozen=True)
class MaskGroup:
    """Rows with the same ones, and the columns of these.

    :param rows: indices of the rows; a slice where they follow each other, which takes no copy.
    :param columns: likewise of the columns, without those of the group before if that one is contained.
    :param is_nested: whether the ones of the group before are all among those of this one.
    """

    rows: Tensor | slice
    columns: Tensor | slice
    is_nested: bool


def mask_groups(mask: Tensor) -> tuple[list[MaskGroup], bool]:
    """Return groups that cover every one of ``mask`` once, and whether they are those of its transpose.

    Rows are sorted by the number of their ones. The masks of an autoregressive network, which compare
    degrees, are nested: every group then adds the columns of one degree to those of the group before. Of rows
    and columns the cheaper side is taken.

    :param mask: zeros and ones, shape ``(rows, columns)``.

    Example::

        >>> import torch
        >>> groups, is_transposed = mask_groups(torch.ones(3, 2).tril())
        >>> [(group.rows, group.columns) for group in groups]
        [(slice(0, 1, None), slice(0, 1, None)), (slice(1, 3, None), slice(1, 2, None))]
    """
    version, result = _known.get(mask, (None, None))
    if version != mask._version:
        result = _cheaper_groups(mask)
        _known[mask] = (mask._version, result)
    found: tuple[list[MaskGroup], bool] = result
    return found


def _cheaper_groups(mask: Tensor) -> tuple[list[MaskGroup], bool]:
    sides = [_row_groups(mask != 0), _row_groups(mask.T != 0)]
    costs = [_cost(groups) for groups in sides]
    is_transposed = costs[1] < costs[0]
    return sides[is_transposed], is_transposed


def _cost(groups: Sequence[MaskGroup]) -> int:
    return sum(_count(group.rows) + _count(group.columns) + _GROUP_COST for group in groups)


def _count(indices: Tensor | slice) -> int:
    return len(indices) if isinstance(indices, Tensor) else indices.stop - indices.start


def _indices(chosen: Tensor) -> Tensor | slice:
    """Return where a vector is true."""
    indices = chosen.nonzero().squeeze(1)
    if not len(indices):
        return slice(0, 0)
    first, last = indices[[0, -1]].tolist()
    return slice(first, last + 1) if last - first + 1 == len(indices) else indices


def _row_groups(mask: Tensor) -> list[MaskGroup]:
    patterns, which = torch.unique(mask, dim=0, return_inverse=True)
    groups = []
    before = torch.zeros_like(patterns[0])
    for index in patterns.sum(1).argsort(stable=True).tolist():
        pattern = patterns[index]
        if not pattern.any():
            continue
        is_nested = bool((pattern | ~before).all())
        columns = pattern & ~before if is_nested else pattern
        groups.append(MaskGroup(_indices(which == index), _indices(columns), is_nested))
        before = pattern
    return groups
