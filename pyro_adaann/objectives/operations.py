"""A function of a tensor as the list of torch's operations that one run of it makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["CannotRecordError", "Operations", "first_line", "recorded"]

Operations = Callable[[Tensor], list[Tensor]]


class CannotRecordError(Exception):
    """A function cannot be recorded, or is not what was recorded; the text says why."""


def recorded(function: Operations, x: Tensor) -> Operations:
    """Return the operations of a function, made when it runs on ``x``, as a function of other tensors.

    What does not depend on the input is computed once, here.

    :raises CannotRecordError: if the function decides by numbers, draws random ones, or does not run.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # which takes a second to import

    try:
        module = make_fx(function)(x)
    except Exception as error:
        raise CannotRecordError(first_line(error)) from error
    for node in module.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise CannotRecordError(f"random numbers outside of the guide ({node.target})")
    _simplify(module)
    operations: Operations = module
    return operations


def first_line(error: BaseException) -> str:
    """Return kind and first line of an error, or of the one that has caused it."""
    while error.__cause__ is not None:  # Pyro raises anew, with the shapes of the trace
        error = error.__cause__
    line = next(iter(str(error).splitlines()), "")
    if "get value out of a tracing tensor" in line:
        return "a decision by the value of a tensor"
    return f"{type(error).__name__}: {line}"


def _simplify(module: Any) -> None:
    """Compute what does not depend on the input, and leave out what does nothing."""
    graph = module.graph
    changed = _changed_in_place(graph)
    known: dict[Any, Any] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr":
            known[node] = getattr(module, node.target)
        elif node.op == "call_function" and node not in changed:
            if all(source in known for source in node.all_input_nodes):
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = node.target(*args, **kwargs)
            elif node.target is torch.ops.aten.expand.default and _keeps_shape(node):
                node.replace_all_uses_with(node.all_input_nodes[0])
    for number, (node, value) in enumerate(known.items()):
        if node.op == "get_attr" or all(user in known for user in node.users):
            continue
        name = f"known_{number}"
        module.register_buffer(name, value)
        with graph.inserting_before(node):
            place = graph.get_attr(name)
        node.replace_all_uses_with(place, lambda user: user not in known)
    graph.eliminate_dead_code()
    module.recompile()


def _changed_in_place(graph: Any) -> set[Any]:
    """Return what operations in place write to, with all that it comes from, which may share its memory."""
    changed: set[Any] = set()
    for node in reversed(graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if node in changed or (schema is not None and schema.is_mutable):
            changed.update(node.all_input_nodes)
    return changed


def _keeps_shape(node: Any) -> bool:
    before, after = (each.meta.get("val") for each in (node.all_input_nodes[0], node))
    return before is not None and after is not None and before.shape == after.shape
