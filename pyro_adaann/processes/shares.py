"""Work that is done row by row, divided over the processes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from pyro_adaann.processes.errors import raise_together
from pyro_adaann.processes.group import gather_equal, process_count, process_index

__all__ = ["are_worth_sending", "in_shares", "own_share"]

Item = TypeVar("Item")

#: Fewer numbers are made faster by every process than they are sent.
_MIN_NUMBERS = 250_000


def are_worth_sending(num_numbers: int) -> bool:
    """Whether work that makes so many numbers is to be divided."""
    return process_count() > 1 and num_numbers >= _MIN_NUMBERS


def own_share(items: Sequence[Item]) -> Sequence[Item]:
    """Return the items of this process, of about as much work as those of any other."""
    return items[process_index() :: process_count()]


def in_shares(run: Callable[..., Sequence[Tensor]], *values: Tensor) -> list[Tensor]:
    """Return the tensors that ``run`` makes of values, with a row for each of theirs.

    Every process runs it on its own rows and gets those of the others, so that all have the same numbers.

    :param run: a row of its results depends on the same row of the values alone.
    :param values: tensors of as many rows.
    :raises Exception: in all processes if it fails in one.
    """
    count, num_rows = process_count(), len(values[0])
    if num_rows < count:
        return list(run(*values))
    bounds = [num_rows * i // count for i in range(count + 1)]
    sizes = [stop - start for start, stop in itertools.pairwise(bounds)]
    index = process_index()
    own: Sequence[Tensor] = []
    failure: Exception | None = None
    try:
        own = run(*(value.narrow(0, bounds[index], sizes[index]) for value in values))
    except Exception as error:
        failure = error
    raise_together(failure)
    dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in own])
    parts = [tensor.reshape(sizes[index], -1).to(dtype) for tensor in own]
    message = parts[0].new_zeros(max(sizes), sum(part.shape[1] for part in parts))
    torch.cat(parts, 1, out=message[: sizes[index]])
    found = gather_equal(message)
    rows = torch.cat([theirs[:size] for theirs, size in zip(found, sizes, strict=True)])
    columns = rows.split([part.shape[1] for part in parts], 1)
    return [
        column.reshape(num_rows, *tensor.shape[1:]).to(tensor.dtype)
        for column, tensor in zip(columns, own, strict=True)
    ]
