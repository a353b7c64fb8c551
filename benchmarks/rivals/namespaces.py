"""The few array functions that the targets' formulas use, from each library.

A formula is written once, as a function of a namespace and a point, and serves a system of any library. Every
function acts as NumPy's of the same name; `scan` is a loop whose result is the sequence of states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["NAMESPACES", "Namespace"]

Function = Callable[..., Any]


@dataclass(frozen=True)
class Namespace:
    """Array functions of one library.

    :param array: a constant, from a NumPy array, a list or a number, of the library's floating-point type.
    :param sum: over the last dimension.
    :param logsumexp: over the last dimension.
    :param stack: a list of arrays along a new last dimension.
    :param where: a condition, and what to take where it holds and where it does not.
    :param scan: ``scan(step, state, num_steps)`` applies ``step`` to a tuple of arrays that many times, and
        returns every state, stacked along a new first dimension.
    """

    array: Function
    exp: Function
    log: Function
    log1p: Function
    sqrt: Function
    tanh: Function
    abs: Function
    softplus: Function
    logaddexp: Function
    where: Function
    sum: Function
    logsumexp: Function
    stack: Function
    scan: Function


def _loop(stack_first: Function) -> Function:
    def scan(step: Function, state: tuple[Any, ...], num_steps: int) -> tuple[Any, ...]:
        states = []
        for _ in range(num_steps):
            state = step(state)
            states.append(state)
        return tuple(stack_first(list(parts)) for parts in zip(*states, strict=True))

    return scan


def _numpy() -> Namespace:
    import numpy as np
    from scipy.special import log_expit, logsumexp

    return Namespace(
        array=lambda x: np.asarray(x, dtype=np.float64),
        exp=np.exp,
        log=np.log,
        log1p=np.log1p,
        sqrt=np.sqrt,
        tanh=np.tanh,
        abs=np.abs,
        softplus=lambda x: -log_expit(-x),
        logaddexp=np.logaddexp,
        where=np.where,
        sum=lambda x: x.sum(-1),
        logsumexp=lambda x: logsumexp(x, axis=-1),
        stack=lambda parts: np.stack(np.broadcast_arrays(*parts), axis=-1),
        scan=_loop(np.stack),
    )


def _torch() -> Namespace:
    import torch

    return Namespace(
        array=lambda x: torch.as_tensor(x, dtype=torch.get_default_dtype()),
        exp=torch.exp,
        log=torch.log,
        log1p=torch.log1p,
        sqrt=torch.sqrt,
        tanh=torch.tanh,
        abs=torch.abs,
        softplus=lambda x: -torch.nn.functional.logsigmoid(-x),
        logaddexp=torch.logaddexp,
        where=torch.where,
        sum=lambda x: x.sum(-1),
        logsumexp=lambda x: x.logsumexp(-1),
        stack=lambda parts: torch.stack(torch.broadcast_tensors(*parts), dim=-1),
        scan=_loop(torch.stack),
    )


def _jax() -> Namespace:
    import jax
    import jax.numpy as jnp

    def scan(step: Function, state: tuple[Any, ...], num_steps: int) -> Any:
        def body(state: Any, _: None) -> tuple[Any, Any]:
            state = step(state)
            return state, state

        return jax.lax.scan(body, state, None, length=num_steps)[1]

    return Namespace(
        array=lambda x: jnp.asarray(x, dtype=jnp.result_type(float)),
        exp=jnp.exp,
        log=jnp.log,
        log1p=jnp.log1p,
        sqrt=jnp.sqrt,
        tanh=jnp.tanh,
        abs=jnp.abs,
        softplus=jax.nn.softplus,
        logaddexp=jnp.logaddexp,
        where=jnp.where,
        sum=lambda x: x.sum(-1),
        logsumexp=lambda x: jax.scipy.special.logsumexp(x, axis=-1),
        stack=lambda parts: jnp.stack(jnp.broadcast_arrays(*parts), axis=-1),
        scan=scan,
    )


def _pytensor() -> Namespace:
    import numpy as np
    import pytensor
    import pytensor.tensor as pt

    def scan(step: Function, state: tuple[Any, ...], num_steps: int) -> Any:
        return pytensor.scan(
            lambda *parts: list(step(parts)),
            outputs_info=list(state),
            n_steps=num_steps,
            return_updates=False,
        )

    return Namespace(
        array=lambda x: pt.as_tensor_variable(np.asarray(x, dtype=np.float64)),
        exp=pt.exp,
        log=pt.log,
        log1p=pt.log1p,
        sqrt=pt.sqrt,
        tanh=pt.tanh,
        abs=pt.abs,
        softplus=pt.softplus,
        logaddexp=pt.logaddexp,
        where=pt.switch,
        sum=lambda x: x.sum(axis=-1),
        logsumexp=lambda x: pt.logsumexp(x, axis=-1),
        stack=lambda parts: pt.stack(parts, axis=-1),
        scan=scan,
    )


#: Makers of namespaces by the library's name; each imports its library.
NAMESPACES: dict[str, Callable[[], Namespace]] = {
    "numpy": _numpy,
    "torch": _torch,
    "jax": _jax,
    "pytensor": _pytensor,
}
