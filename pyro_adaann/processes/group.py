"""The processes of `torch.distributed`'s default group, and what they tell each other.

Without such a group there is one process, and nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

__all__ = [
    "LostProcessError",
    "ProcessError",
    "all_objects",
    "anywhere",
    "equalize",
    "gather_equal",
    "is_first",
    "number_from_first",
    "numbers_of_all",
    "on_first",
    "process_count",
    "process_index",
    "sum_over_processes",
]

Result = TypeVar("Result")

#: Up to so many numbers are gathered and summed by every process.
_SMALL_MESSAGE = 20_000


class ProcessError(Exception):
    """Several processes cannot do what one process can, or do not do the same."""


class LostProcessError(ProcessError):
    """A process of the group has ended, or can no longer be reached."""


def process_count() -> int:
    """Return the number of processes."""
    is_grouped = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if is_grouped else 1


def process_index() -> int:
    """Return the place of this process among them, from 0."""
    return distributed.get_rank() if process_count() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that writes files and shows progress."""
    return process_index() == 0


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of the tensors that the processes give, all of one shape."""
    if process_count() == 1:
        return values
    if values.device.type == "cpu" and values.numel() * process_count() <= _SMALL_MESSAGE:
        # A third of the time of `all_reduce` with gloo, which sends small messages in several turns.
        return torch.stack(gather_equal(values)).sum(0)
    with _answered():
        distributed.all_reduce(values)
    return values


def numbers_of_all(*numbers: float) -> list[list[float]]:
    """Return the numbers of every process, in their order."""
    table = torch.zeros(process_count(), len(numbers), dtype=torch.float64, device=_device())
    table[process_index()] = torch.tensor(numbers, dtype=torch.float64)
    rows: list[list[float]] = sum_over_processes(table).tolist()
    return rows


def anywhere(is_true: bool) -> bool:
    """Whether something is true in any process."""
    if process_count() == 1:
        return is_true
    return any(number for (number,) in numbers_of_all(float(is_true)))


def number_from_first(number: float) -> float:
    """Return the number that the first process gives."""
    return number if process_count() == 1 else numbers_of_all(number)[0][0]


def on_first(run: Callable[[], Result]) -> Result:
    """Return what ``run`` returns in the first process, or raise what it raises there."""
    if process_count() == 1:
        return run()
    outcome: list[Any] = [None, None]
    if is_first():
        try:
            outcome[0] = run()
        except Exception as error:
            outcome[1] = error
    with _answered():
        distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: Result = outcome[0]
    return result


def all_objects(value: Any) -> list[Any]:
    """Return the objects that the processes give, in their order."""
    found: list[Any] = [value] * process_count()
    if process_count() > 1:
        with _answered():
            distributed.all_gather_object(found, value)
    return found


def gather_equal(values: Tensor) -> list[Tensor]:
    """Return the tensors that the processes give, all of one shape, in their order."""
    found = [torch.empty_like(values) for _ in range(process_count())]
    with _answered():
        distributed.all_gather(found, values)
    return found


def equalize(tensors: Sequence[Tensor], *numbers: float) -> list[float]:
    """Overwrite tensors by those of the first process, where they differ, and return its numbers.

    Processors of different kinds round differently, and some kernels of graphics cards add in any order.

    :param numbers: they go in the same message, a double as two singles.
    """
    if process_count() == 1:
        return list(numbers)
    extra = torch.tensor(numbers, dtype=torch.float64, device=_device()).view(torch.float32)
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in [*tensors, extra]:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
    for group in groups.values():
        own = torch.cat([tensor.reshape(-1) for tensor in group])
        theirs = own.clone()
        with _answered():
            distributed.broadcast(theirs, src=0)
        # A write that changes nothing would count as one: what is computed from a buffer is kept by version.
        if torch.equal(own, theirs):
            continue
        for tensor, values in zip(group, theirs.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(values.reshape(tensor.shape))
    found: list[float] = extra.view(torch.float64).tolist()
    return found


def _device() -> torch.device:
    """Return the device of small messages."""
    return torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")


@contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostProcessError(
            f"Expected an answer of all {process_count()} processes; got none of at least one, which has "
            f"ended or cannot be reached (process {process_index()}: {error}). Look for the first error, and "
            f"start the script again, with any number of processes: a run with a checkpoint goes on from its "
            f"file."
        ) from error
