"""An error of one process, raised in all of them."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from pyro_adaann.processes.group import (
    ProcessError,
    all_objects,
    numbers_of_all,
    process_count,
    sum_over_processes,
)

__all__ = ["is_elsewhere", "raise_together", "sum_or_raise_together", "true_of_all_errors"]

#: The kinds of errors that are told apart, the first one that an error is of.
_KINDS = (ProcessError, ValueError, torch.linalg.LinAlgError, NotImplementedError, RuntimeError)
_MARK = "_pyro_adaann_elsewhere"


def raise_together(failure: Exception | None, *numbers: float) -> list[list[float]]:
    """Raise the error of this process, or one of the same kind if another process has one.

    To be called by all processes.

    :param failure: the error of this process, None if it has none.
    :param numbers: of this process.
    :return: the numbers of all processes, if none has an error.
    """
    found = numbers_of_all(float(failure is not None), *numbers)
    if any(has_failed for has_failed, *_ in found):
        _raise_first(failure)
    return [own for _, *own in found]


def sum_or_raise_together(values: Tensor, failure: Exception | None) -> Tensor:
    """Return the sum of the tensors that the processes give, or raise as :func:`raise_together` does.

    :param values: of one shape in all processes, also in one with an error.
    """
    message = torch.cat([values, values.new_tensor([float(failure is not None)])])
    *total, num_failures = sum_over_processes(message).split([len(values), 1])
    if num_failures:
        _raise_first(failure)
    return total[0]


def _raise_first(failure: Exception | None) -> NoReturn:
    """Raise the error of this process, or that of the first process that has one."""
    own = None
    if failure is not None:
        kind = next((i for i, kind in enumerate(_KINDS) if isinstance(failure, kind)), len(_KINDS) - 1)
        own = (kind, f"{type(failure).__name__}: {failure}")
    failures = all_objects(own)
    if failure is not None:
        raise failure
    index, (kind, text) = next((i, given) for i, given in enumerate(failures) if given is not None)
    error = _KINDS[kind](f"Process {index} raised {text}")
    setattr(error, _MARK, True)
    raise error


def is_elsewhere(error: BaseException) -> bool:
    """Whether an error is that of another process."""
    while error.__cause__ is not None:  # Pyro raises anew, with the shapes of the trace
        error = error.__cause__
    return hasattr(error, _MARK)


def true_of_all_errors(error: BaseException, is_true: bool) -> bool:
    """Whether something is true of the errors of all processes that have one of their own.

    :param error: the error of this process.
    :param is_true: whether it is true of this one.
    """
    if process_count() == 1:
        return is_true
    return not any(number for (number,) in numbers_of_all(float(not is_true and not is_elsewhere(error))))
