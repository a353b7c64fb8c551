r"""A model run on a share of the draws in every process, with the log densities of all draws in its trace.

Pyro's losses run the model under an outermost plate of n particles, on the values that the guide has drawn.
Within that plate :func:`split` gives the model the rows :math:`a \le i < b` of the values. What follows from
them has b - a rows; the log densities of such sites are computed on these rows, and put together with those
of the other processes in the trace. In the backward pass every process computes the gradients in its rows,
and those are put together too. Gradients in the model's parameters are sums over the rows and are added up.

Zeros stand for the rows of other processes, and all processes add up: exact, for any number of rows.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_adaann.processes.errors import raise_together, sum_or_raise_together
from pyro_adaann.processes.group import ProcessError, process_count
from pyro_adaann.processes.rows import Rows, SplitDistribution, find_rows

__all__ = ["split"]


def split(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return a model that runs on this process's share of the particles, and has the trace of all.

    In one process that is the model itself. Under fewer than two particles for each process, or outside a
    plate of particles, every process runs the whole model. What the model returns is of its own rows.

    :raises ProcessError: when it runs, if the model draws a latent site by draws of the guide, or random
        numbers outside of sample sites, which would not be those of one process; or if processes differ.
    :raises Exception: what the model raises in one process is raised in all, as the same kind of error.
    """
    if process_count() == 1:
        return model

    def run(*args: Any, **kwargs: Any) -> Any:
        rows = find_rows()
        if rows is None:
            return model(*args, **kwargs)
        share, result, failure = _Share(rows), None, None
        try:
            with share:
                result = model(*args, **kwargs)
            share.score()
        except Exception as error:
            failure = error
        share.join(failure)
        return result

    return run


#: A tensor with a gradient, what the model gets in its place, and the dimension of its rows, None for none.
_Input: TypeAlias = tuple[Tensor, Tensor, int | None]


class _Share(Messenger):
    """Gives a model the rows of this process, and keeps what it has made of them."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows
        self.sites: list[SplitDistribution] = []
        #: Whether the model has drawn random numbers outside of sample sites.
        self.has_drawn = False
        #: Distributions as the model has made them, and whether it has also given the value, by site.
        self._made: dict[str, tuple[Any, bool]] = {}
        self.inputs: list[_Input] = []
        self._random = _fingerprint()

    def _pyro_sample(self, msg: Any) -> None:
        self.has_drawn = self.has_drawn or _fingerprint() != self._random
        if site_is_subsample(msg) or not isinstance(msg["fn"], TorchDistributionMixin):
            return
        rows, fn, mask = self.rows, msg["fn"], msg["mask"]
        self._made[msg["name"]] = fn, msg["is_observed"]
        has_own_mask = torch.is_tensor(mask) and rows.are_in(mask.shape)
        has_own_value = msg["is_observed"] and rows.are_in(_batch_shape(msg["value"], fn.event_dim))
        if not (rows.are_in(fn.batch_shape) or has_own_mask or has_own_value):
            return
        if torch.is_tensor(msg["scale"]) and rows.are_in(msg["scale"].shape):
            raise ProcessError(
                f"Expected a scale that is the same for all draws, with several processes; got one of shape "
                f"{tuple(msg['scale'].shape)} at site {msg['name']!r}. Use one process."
            )
        shape = [1] * max(-rows.dim - len(fn.batch_shape), 0) + list(fn.batch_shape)
        shape[rows.dim] = rows.stop - rows.start
        fn = fn.expand(torch.Size(shape))
        if has_own_mask:
            fn, msg["mask"] = fn.mask(mask), None
        msg["fn"] = SplitDistribution(msg["name"], fn, rows)
        self.sites.append(msg["fn"])

    def _pyro_post_sample(self, msg: Any) -> None:
        self._random = _fingerprint()
        recorded = msg["fn"]
        if msg["name"] in self._made:
            # The trace already has value and distribution of all rows.
            msg["fn"], is_given = self._made[msg["name"]]
            if not is_given:
                msg["value"] = self._own(msg["value"], self.rows.dim - msg["fn"].event_dim)
        if isinstance(recorded, SplitDistribution):
            recorded.own_value = msg["value"]

    def _own(self, value: Tensor, dim: int) -> Tensor:
        """Return the rows of a value, off its graph."""
        own = self.rows.own(value, dim)
        if not (torch.is_grad_enabled() and value.requires_grad):
            return own.detach()
        own = own.detach().requires_grad_()
        self.inputs.append((value, own, None if own.shape == value.shape else dim))
        return own

    def _pyro_post_param(self, msg: Any) -> None:
        value = msg["value"].unconstrained() if hasattr(msg["value"], "unconstrained") else msg["value"]
        if value.requires_grad and value.is_leaf and all(value is not other for other, _, _ in self.inputs):
            self.inputs.append((value, value, None))

    def score(self) -> None:
        """Compute the log densities of the rows."""
        if self.has_drawn or _fingerprint() != self._random:
            raise ProcessError(
                f"Expected a model that draws sample sites only, with {process_count()} processes; got one "
                f"that uses up other random numbers, which would be the same for the draws of every process. "
                f"Make them before, as an argument of the model, or use one process."
            )
        for site in self.sites:
            site.score()

    def join(self, failure: Exception | None) -> None:
        """Put the log densities of all rows together, or raise the error of any process."""
        num_rows = self.rows.stop - self.rows.start
        size = sum(site.own_log_prob.numel() // num_rows for site in self.sites)
        numbers = raise_together(failure, _fingerprint(), float(size))
        if any(row != numbers[0] for row in numbers):
            raise ProcessError(
                f"Expected the same random numbers and sites in all {process_count()} processes; got "
                f"different ones after a run of the model. Seed all alike (pyro.set_rng_seed), let all call "
                f"the same functions with the same data, and draw nothing in one process alone."
            )
        if not self.sites:
            return
        own = [site.own_log_prob for site in self.sites]
        joined = _Joined.apply(self.rows, own, self.inputs, *(value for value, _, _ in self.inputs))
        for site, log_prob in zip(self.sites, joined, strict=True):
            site.full_log_prob = log_prob


class _Joined(torch.autograd.Function):
    """The log densities of all rows, as a function of the draws of all rows and of parameters."""

    @staticmethod
    def forward(
        ctx: Any, rows: Rows, own: list[Tensor], inputs: list[_Input], *values: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.rows, ctx.own, ctx.inputs = rows, own, [(given, dim) for _, given, dim in inputs]
        return tuple(_exchange(rows, [(log_prob.detach(), rows.dim) for log_prob in own]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows: Rows = ctx.rows
        pairs = [(o, rows.of(g, rows.dim)) for o, g in zip(ctx.own, grads, strict=True) if o.requires_grad]
        given = [tensor for tensor, _ in ctx.inputs]
        found: list[Tensor] = [torch.zeros_like(tensor) for tensor in given]
        failure = None
        try:
            if pairs:
                own, gradients = zip(*pairs, strict=True)
                some = torch.autograd.grad(own, given, gradients, allow_unused=True, retain_graph=True)
                found = [zero if grad is None else grad for grad, zero in zip(some, found, strict=True)]
        except Exception as error:
            failure = error
        dims = [dim for _, dim in ctx.inputs]
        return (None, None, None, *_exchange(rows, list(zip(found, dims, strict=True)), failure))


def _exchange(
    rows: Rows, parts: list[tuple[Tensor, int | None]], failure: Exception | None = None
) -> list[Tensor]:
    """Return tensors of all rows from the parts of every process, in one message.

    :param parts: tensors with the dimension of their rows; with None they are summed.
    :param failure: the error of this process, to be raised in all.
    """
    full = [values if dim is None else rows.among_all(values, dim) for values, dim in parts]
    # Whatever is in single precision stays so: half as much to send.
    dtype = functools.reduce(torch.promote_types, [values.dtype for values in full])
    message = torch.cat([values.to(dtype).reshape(-1) for values in full])
    flat = sum_or_raise_together(message, failure).split([values.numel() for values in full])
    pairs = zip(parts, full, flat, strict=True)
    return [values.reshape(whole.shape).to(part) for (part, _), whole, values in pairs]


def _batch_shape(value: Any, event_dim: int) -> torch.Size:
    shape: torch.Size = value.shape if torch.is_tensor(value) else torch.Size([])
    return shape[: len(shape) - event_dim]


def _fingerprint() -> float:
    """Return a number that tells apart the states of torch's random generators."""
    state = torch.get_rng_state().numpy().tobytes()
    if torch.cuda.is_initialized():
        state += torch.cuda.get_rng_state().numpy().tobytes()
    return float(zlib.crc32(state))
