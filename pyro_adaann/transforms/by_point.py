"""What every point adds to a gradient in the parameters of a module, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyro_adaann.transforms.linear_maps import calls_of_linear_maps, gradients_of_calls, gradients_row_by_row
from pyro_adaann.transforms.outer import OuterProducts

__all__ = ["gradients_by_point"]


def gradients_by_point(
    module: nn.Module, run: Callable[[], Tensor], num_points: int
) -> dict[str, Tensor | OuterProducts]:
    """Return the gradients of every number that ``run`` returns in every parameter of a module.

    Of the matrix of a linear map through which every point passes once, the factors; of any other parameter
    n backward passes, many at once.

    :param run: passes n points through the module in ordinary operations; returns a number for each.
    :param num_points: n.
    :return: by the parameter's name.
    """
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    with torch.enable_grad(), calls_of_linear_maps(torch.Size([num_points])) as calls:
        totals = run()
    terms, _ = gradients_of_calls(totals, calls, list(trained.values()))
    found = {name: terms[id(p)][0] for name, p in trained.items() if len(terms.get(id(p), ())) == 1}
    rest = {name: parameter for name, parameter in trained.items() if name not in found}
    if rest:
        gradients = gradients_row_by_row(totals, list(rest.values()))
        for (name, parameter), gradient in zip(rest.items(), gradients, strict=True):
            if gradient is None:
                gradient = parameter.new_zeros(num_points, *parameter.shape)
            found[name] = gradient
    return found
