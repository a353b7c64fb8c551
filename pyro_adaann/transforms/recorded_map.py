"""A flow recorded on a graphics card, as one node of the graph of autograd."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_adaann.transforms.recorded import RecordedCall, Results, run_recorded

__all__ = ["RecordedMap", "mapped"]


class RecordedMap(torch.autograd.Function):
    """A flow on a batch of points, ``(y, log_det)``, by records of its map and of its gradient.

    The gradient is that of the map, run again. It is recorded here and not in the backward pass, which runs
    in a thread of autograd's own.
    """

    @staticmethod
    def forward(ctx: Any, flow: Any, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        ctx.flow = flow
        ctx.save_for_backward(x, *parameters)
        y, log_det = mapped(flow, x)
        _gradients(flow, x, y, log_det).record_if_due()
        return y, log_det

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        x, *_ = ctx.saved_tensors  # which tells of parameters that have changed
        found = _gradients(ctx.flow, x, grad_y, grad_log_det).run()
        return None, *(cast(Tensor, value).detach() for value in found.values())


def _gradients(flow: Any, x: Tensor, grad_y: Tensor, grad_log_det: Tensor) -> RecordedCall:
    """Return the call of the gradient of a flow in its points and in the parameters that are trained."""

    def run(x: Tensor, grad_y: Tensor, grad_log_det: Tensor) -> Results:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            places = [x, *(parameter for parameter in flow.parameters() if parameter.requires_grad)]
            found = torch.autograd.grad(
                flow._forward(x), places, (grad_y, grad_log_det), materialize_grads=True
            )
        return dict(zip(map(str, range(len(found))), found, strict=True))

    return RecordedCall(flow, "gradients", run, (x, grad_y, grad_log_det))


def mapped(flow: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return images and log-determinants of points by the record of a flow, without a graph of autograd."""

    def run(x: Tensor) -> Results:
        with torch.no_grad():
            return dict(zip(("y", "log_det"), flow._forward(x), strict=True))

    found = run_recorded(flow, "map", run, (x,))
    return cast(Tensor, found["y"]), cast(Tensor, found["log_det"])
