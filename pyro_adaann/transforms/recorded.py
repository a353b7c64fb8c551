"""Functions of points recorded once on a graphics card and replayed by one launch: CUDA graphs.

The map of a flow is hundreds of small operations, and a processor core takes longer to launch one than a card
to run it. The third time that a flow meets a batch of the same size its operations are recorded. From then
on a batch is copied to where the record reads, and all of them are launched at once. They are the same
operations on the same parameters, read where they are: an optimizer changes them in place. Whatever moves a
parameter (``.to``, another number type) makes another record.

``PYRO_ADAANN_GRAPHS=0`` in the environment switches it off, for debugging.
"""

from __future__ import annotations

import functools
import logging
import os
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from pyro_adaann.transforms.outer import OuterProducts

__all__ = ["RecordedCall", "Results", "can_record", "is_switched_on", "run_recorded"]

_SWITCH = "PYRO_ADAANN_GRAPHS"
#: Points from which a card, and not its launches, sets the time of a flow; a record keeps all that is
#: computed between.
_MAX_POINTS = 16_384
#: Runs of one size before it is recorded, which takes as long as some tens of them.
_NUM_PLAIN = 2
#: Records of one flow; the one that has been used least lately goes first.
_MAX_RECORDS = 12

_log = logging.getLogger(__name__)
#: What a function returns: numbers of points, or gradients of them, by name.
Results = Mapping[str, Tensor | OuterProducts]
_Function = Callable[..., Results]


class _Record(Protocol):
    """A function recorded on inputs of one size."""

    def replay(self, inputs: Sequence[Tensor]) -> Results:
        """Return the results for other inputs of that size."""


class _Graph:
    """A CUDA graph of a function, with the memory that it reads and writes."""

    def __init__(self, function: _Function, inputs: Sequence[Tensor]) -> None:
        device = inputs[0].device
        self._inputs = [value.detach().clone() for value in inputs]
        with torch.cuda.device(device), _spare_generator(device):
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=_stream(device)):
                self._outputs = function(*self._inputs)

    def replay(self, inputs: Sequence[Tensor]) -> Results:
        for place, value in zip(self._inputs, inputs, strict=True):
            place.copy_(value)
        self._graph.replay()
        return _each(torch.clone, self._outputs)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which functions of a card are recorded; torch's own is one of the first card."""
    return torch.cuda.Stream(device)


@contextmanager
def _spare_generator(device: torch.device) -> Iterator[None]:
    """Have another generator of random numbers recorded, which uses none: a failure leaves it useless."""
    generator = torch.cuda.default_generators[device.index or 0]
    state = generator.graphsafe_get_state()
    generator.graphsafe_set_state(generator.clone_state())
    try:
        yield
    finally:
        generator.graphsafe_set_state(state)


class _Records:
    """The records of one flow, by what they depend on, and how often each has been asked for."""

    def __init__(self) -> None:
        self._found: OrderedDict[Any, _Record | int] = OrderedDict()

    def is_due(self, key: Any) -> bool:
        """Whether a function has run plainly often enough to be recorded."""
        return self._found.get(key) == _NUM_PLAIN

    def record(self, key: Any, function: _Function, inputs: Sequence[Tensor]) -> None:
        """Record a function; one that cannot be recorded runs plainly and is never tried again."""
        self._found[key] = _record(function, inputs) or _NUM_PLAIN + 1

    def run(self, key: Any, function: _Function, inputs: Sequence[Tensor]) -> Results:
        """Run a function on inputs, by its record if there is one."""
        found = self._found.pop(key, 0)
        if isinstance(found, int):
            # Not one more once it is due, until it is recorded.
            self._found[key] = found if found >= _NUM_PLAIN else found + 1
            results = function(*inputs)
        else:
            self._found[key] = found
            results = found.replay(inputs)
        while len(self._found) > _MAX_RECORDS:
            self._found.popitem(last=False)
        return results


#: Outside of the flows, so that these can be copied and pickled.
_of_flows: WeakIdKeyDictionary = WeakIdKeyDictionary()


def is_switched_on() -> bool:
    """Whether the environment lets functions be recorded."""
    return os.environ.get(_SWITCH) != "0"


def can_record(x: Tensor) -> bool:
    """Whether a function of these points can be recorded: on a card, unless something else transforms it."""
    return (
        x.device.type == "cuda"
        and 0 < len(x) <= _MAX_POINTS
        and is_switched_on()
        and hasattr(torch.Generator, "graphsafe_get_state")
        and not torch._C._get_tracing_state()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch.is_autocast_enabled()
        and not torch.cuda.is_current_stream_capturing()
    )


def run_recorded(
    module: nn.Module, name: str, function: _Function, inputs: Sequence[Tensor], *, by_row: bool = False
) -> Results:
    """Return what a function of a module returns for inputs on a card, without a graph of autograd.

    :param name: of the function, with whatever else it depends on.
    :param function: one whose operations depend on the sizes of its inputs alone, and on parameters and
        buffers of the module.
    :param inputs: tensors of n rows.
    :param by_row: whether a row of the results depends on that row of the inputs alone. Then the inputs are
        filled up to a power of two, so that few sizes are recorded.
    """
    num_rows = len(inputs[0])
    call = RecordedCall(module, name, function, inputs, by_row=by_row)
    call.record_if_due()
    results = call.run()
    return _each(lambda value: value.detach()[:num_rows] if by_row else value.detach(), results)


class RecordedCall:
    """A call of a function of a module, with the records of that."""

    def __init__(
        self,
        module: nn.Module,
        name: str,
        function: _Function,
        inputs: Sequence[Tensor],
        *,
        by_row: bool = False,
    ) -> None:
        self._inputs = [(_filled_up(value) if by_row else value).detach() for value in inputs]
        self._run = _WithAliases(module, function)
        self._key = (name, *_places(module), *_sizes(self._inputs))
        if module not in _of_flows:
            _of_flows[module] = _Records()
        self._records: _Records = _of_flows[module]

    def record_if_due(self) -> None:
        if self._records.is_due(self._key):
            self._records.record(self._key, self._run, self._inputs)

    def run(self) -> Results:
        return self._records.run(self._key, self._run, self._inputs)


class _WithAliases:
    """A function of a module that sees other tensors in the memory of its parameters.

    The parameters themselves may hang on other graphs of autograd, on other streams of the card.
    """

    def __init__(self, module: nn.Module, function: _Function) -> None:
        self._module = module
        self._function = function

    def __call__(self, *inputs: Tensor) -> Results:
        aliases = {
            f"module.{name}": parameter.detach().requires_grad_(parameter.requires_grad)
            for name, parameter in self._module.named_parameters()
        }
        found: Results = torch.func.functional_call(_Wrapped(self._module, self._function), aliases, inputs)
        return found


class _Wrapped(nn.Module):
    """A function of a module as a module."""

    def __init__(self, module: nn.Module, function: _Function) -> None:
        super().__init__()
        self.module = module
        self.function = function

    def forward(self, *inputs: Tensor) -> Results:
        return self.function(*inputs)


def _each(change: Callable[[Tensor], Tensor], results: Results) -> Results:
    """Return results with every tensor changed."""
    return {
        name: value.each(change) if isinstance(value, OuterProducts) else change(value)
        for name, value in results.items()
    }


def _filled_up(value: Tensor) -> Tensor:
    size = max(64, 1 << (len(value) - 1).bit_length())
    return torch.cat([value, value[:1].expand(size - len(value), *value.shape[1:])])


def _places(module: nn.Module) -> list[Any]:
    """Return where parameters and buffers are: a record reads them there."""
    values = [*module.parameters(), *module.buffers()]
    return [(value.data_ptr(), value.dtype, value.requires_grad) for value in values]


def _sizes(inputs: Sequence[Tensor]) -> list[Any]:
    return [(value.shape, value.dtype, value.device) for value in inputs]


def _record(function: _Function, inputs: Sequence[Tensor]) -> _Record | None:
    """Return a record, None if something in the function cannot be recorded."""
    start = time.perf_counter()
    try:
        record = _Graph(function, inputs)
    except RuntimeError as error:
        warnings.warn(
            f"Expected a flow that can be recorded as a CUDA graph; got {str(error).splitlines()[0]} It is "
            f"computed operation by operation, which takes longer; so {_SWITCH}=0 in the environment does.",
            stacklevel=2,
        )
        return None
    _log.debug("Recorded a CUDA graph for %d points in %.2f s.", len(inputs[0]), time.perf_counter() - start)
    return record
