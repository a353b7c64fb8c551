"""Inputs and output gradients of a network's linear maps for every draw, from one evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_adaann.transforms.outer import OuterProducts

__all__ = ["Call", "calls_of_linear_maps", "gradients_of_calls", "gradients_row_by_row", "is_linear"]

#: Backward passes that run together for parameters that are not those of linear maps.
_ROWS_AT_ONCE = 100
#: Tolerated difference between the sum of the draws' gradients and autograd's, relative to their lengths.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass(frozen=True)
class Call:
    """One use of a linear map: its input, detached, and its output, on the graph."""

    weight: Tensor
    bias: Tensor | None
    mask: Tensor | None
    inputs: Tensor
    output: Tensor


@contextmanager
def calls_of_linear_maps(batch_shape: torch.Size) -> Iterator[list[Call]]:
    """Yield a list that gains the calls of linear and masked linear modules on points of one batch."""
    calls: list[Call] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if is_linear(module) and output.requires_grad and output.shape[:-1] == batch_shape:
            weight, bias, mask = (getattr(module, name, None) for name in ("weight", "bias", "mask"))
            calls.append(Call(_leaf(weight), _leaf(bias), _like(mask, weight), inputs[0].detach(), output))

    handle = nn.modules.module.register_module_forward_hook(look)
    try:
        yield calls
    finally:
        handle.remove()


def gradients_of_calls(
    values: Tensor, calls: Sequence[Call], parameters: Sequence[Tensor]
) -> tuple[dict[int, list[Tensor | OuterProducts]], set[int]]:
    r"""Return the gradient of every entry of ``values`` in the weights and biases of linear maps.

    One backward pass of the sum of ``values`` gives the output gradients of every draw, provided that no draw
    influences the value of another one and that no weight is used elsewhere. A second pass checks this: with
    coefficients c the draws' gradients must add up to the gradient of :math:`\sum_i c_i v_i`. A parameter
    that fails the check is left out.

    :param values: one for each point of the batch, with the batch's shape.
    :return: by ``id`` of the parameter the terms of its gradient, points flat in the first dimension; and the
        ``id`` of every parameter on the graph.
    """
    outputs = [call.output for call in calls]
    asked = torch.autograd.grad(values.sum(), outputs, retain_graph=True, allow_unused=True) if calls else ()
    found: dict[int, list[Tensor | OuterProducts]] = {}
    for call, gradient in zip(calls, asked, strict=True):
        if gradient is None:
            continue
        left = gradient.reshape(-1, gradient.shape[-1])
        right = call.inputs.reshape(len(left), -1)
        found.setdefault(id(call.weight), []).append(OuterProducts(left, right, call.mask))
        if call.bias is not None:
            found.setdefault(id(call.bias), []).append(left)
    # Arbitrary numbers; random ones would change the user's random state.
    coefficients = torch.arange(1, values.numel() + 1, device=values.device).to(values).square().cos()
    total = (coefficients * values.reshape(-1)).sum()
    exact = torch.autograd.grad(total, list(parameters), retain_graph=True, allow_unused=True)
    on_graph = {id(p): g for p, g in zip(parameters, exact, strict=True) if g is not None}
    return _explained(found, on_graph, coefficients), set(on_graph)


def gradients_row_by_row(values: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the gradient of every entry of ``values``, shape ``(n,)``, in any parameters: n backward passes.

    :return: for every parameter shape ``(n, *its shape)``, None if it is not on the graph.
    """
    seeds = torch.eye(len(values), dtype=values.dtype, device=values.device)
    parts = [
        torch.autograd.grad(
            values, parameters, rows, retain_graph=True, is_grads_batched=True, allow_unused=True
        )
        for rows in seeds.split(_ROWS_AT_ONCE)
    ]
    columns = zip(*parts, strict=True)
    return [None if column[0] is None else torch.cat(column) for column in columns]


def _explained(
    found: Mapping[int, list[Tensor | OuterProducts]], exact: Mapping[int, Tensor], coefficients: Tensor
) -> dict[int, list[Tensor | OuterProducts]]:
    """Return the parameters for which the terms add up to the exact gradient."""
    result = {}
    for key, terms in found.items():
        if key not in exact or any(isinstance(t, Tensor) != isinstance(terms[0], Tensor) for t in terms):
            continue
        error, size = exact[key].clone(), coefficients.new_zeros(())
        for term in terms:
            if isinstance(term, Tensor):
                part, lengths = coefficients @ term, term.norm(dim=1)
            else:
                part = term.left.T @ (coefficients.unsqueeze(1) * term.right)
                part = part if term.mask is None else part * term.mask
                lengths = term.left.norm(dim=1) * term.right.norm(dim=1)
            if part.shape != error.shape:
                break
            error, size = error - part, size + lengths.sum()
        else:
            if error.norm() <= _TOLERANCE.get(error.dtype, 1e-2) * size:
                result[key] = terms
    return result


def is_linear(module: nn.Module) -> bool:
    """Whether a module has a matrix as `nn.Linear` has one; masked maps of other libraries do."""
    weight, *shape = (getattr(module, name, None) for name in ("weight", "out_features", "in_features"))
    return isinstance(weight, Tensor) and list(weight.shape) == shape


def _leaf(parameter: Any) -> Any:
    """Return the parameter itself where Pyro hands out a view of it."""
    return parameter.unconstrained() if hasattr(parameter, "unconstrained") else parameter


def _like(mask: Any, weight: Any) -> Tensor | None:
    return mask.to(weight) if isinstance(mask, Tensor) and mask.shape == weight.shape else None
