r"""The gradient of every single point, for modules made of linear maps, from one backward pass.

A linear map with input :math:`a_i` and output gradient :math:`g_i` at point i adds :math:`g_i a_i^\top` to
the gradient in its matrix. Hooks on the maps collect both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyro_adaann.transforms.outer import OuterProducts

__all__ = ["gradients_by_point", "is_linear"]

#: Backward passes that run together for parameters that are not of a linear map.
_ROWS_AT_ONCE = 100

Calls = dict[nn.Module, list[tuple[Tensor, Tensor]]]


def gradients_by_point(module: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor | OuterProducts]:
    """Return the gradients of every number that ``run`` returns in every parameter of a module.

    Of a matrix of an `nn.Linear`, masked or not, through which every point passes once, the factors; of any
    other parameter n backward passes, many at once.

    :param run: passes n points through the module in ordinary operations; returns a number for each.
    :return: by the parameter's name.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    with torch.enable_grad(), _recorded(module) as calls:
        totals = run()
    single = {part: made[0] for part, made in calls.items() if _is_plain(part, made, len(totals))}
    outputs = [output for _, output in single.values()]
    grads = torch.autograd.grad(totals.sum(), outputs, retain_graph=True) if outputs else ()
    found: dict[str, Tensor | OuterProducts] = {}
    for (part, (inputs, _)), grad in zip(single.items(), grads, strict=True):
        parameters, mask = dict(part.named_parameters(recurse=False)), getattr(part, "mask", None)
        mask = None if mask is None else mask.to(grad)
        found[names[parameters["weight"]]] = OuterProducts(grad, inputs.detach(), mask)
        if "bias" in parameters:
            found[names[parameters["bias"]]] = grad
    rest = {name: parameter for parameter, name in names.items() if name not in found}
    if rest:
        found.update(zip(rest, _row_by_row(totals, list(rest.values())), strict=True))
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map as `nn.Linear` has them; other libraries have classes of their own."""
    weight, *shape = (getattr(module, name, None) for name in ("weight", "out_features", "in_features"))
    return isinstance(weight, nn.Parameter) and tuple(weight.shape) == tuple(shape)


@contextmanager
def _recorded(module: nn.Module) -> Iterator[Calls]:
    """Record input and output of every call of every linear map in the module."""
    calls: Calls = {}

    def record(linear: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.setdefault(linear, []).append((inputs[0], output))

    handles = [part.register_forward_hook(record) for part in module.modules() if is_linear(part)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _is_plain(linear: nn.Module, made: list[tuple[Tensor, Tensor]], num_points: int) -> bool:
    """Whether every point passes through a map once, by nothing but a matrix and a bias."""
    inputs, output = made[0]
    is_once = len(made) == 1 and inputs.dim() == 2 and len(inputs) == num_points and output.requires_grad
    return is_once and {name for name, _ in linear.named_parameters()} <= {"weight", "bias"}


def _row_by_row(totals: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    seeds = torch.eye(len(totals), dtype=totals.dtype, device=totals.device)
    parts = [
        torch.autograd.grad(
            totals,
            parameters,
            rows,
            retain_graph=True,
            is_grads_batched=True,
            allow_unused=True,
            materialize_grads=True,
        )
        for rows in seeds.split(_ROWS_AT_ONCE)
    ]
    return [torch.cat(columns) for columns in zip(*parts, strict=True)]
