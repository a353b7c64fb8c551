"""Which entries of a batch of distributions are valid, and a distribution without a density in the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import is_dependent
from torch.distributions.utils import lazy_property

__all__ = ["PartlyValid", "describe_violation", "valid_entries", "values_inside"]


class PartlyValid(TorchDistribution):
    """A distribution whose log density is NaN where its parameters are not valid."""

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, fn: Any, is_valid: Tensor) -> None:
        self.base_dist = fn
        self.is_valid = is_valid
        self.has_rsample = fn.has_rsample
        super().__init__(fn.batch_shape, fn.event_shape, validate_args=False)

    @property
    def has_enumerate_support(self) -> bool:
        return bool(self.base_dist.has_enumerate_support)

    @property
    def support(self) -> Any:
        return self.base_dist.support

    def log_prob(self, value: Tensor) -> Tensor:
        log_prob = self.base_dist.log_prob(value)
        return torch.where(self.is_valid.to(log_prob.device), log_prob, torch.nan)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        draws: Tensor = self.base_dist.sample(sample_shape)
        return draws


def valid_entries(fn: Any) -> Tensor | None:
    """Return which entries of a batch have valid parameters, None if nothing is known."""
    if isinstance(fn, dist.Independent):
        inner = valid_entries(fn.base_dist)
        dims = tuple(range(-fn.reinterpreted_batch_ndims, 0))
        if inner is None or not dims:
            return inner
        return inner.expand(fn.base_dist.batch_shape).flatten(dims[0]).all(-1)
    if isinstance(fn, dist.MaskedDistribution | dist.ExpandedDistribution):
        inner = valid_entries(fn.base_dist)
        return inner if inner is None else inner.expand(fn.batch_shape)
    result = None
    for _, constraint, value in _given_parameters(fn):
        is_valid = constraint.check(value)
        while is_valid.dim() > len(fn.batch_shape):
            is_valid = is_valid.all(-1)
        result = is_valid if result is None else result & is_valid
    return None if result is None else result.expand(fn.batch_shape)


def values_inside(fn: Any, value: Tensor) -> Tensor | None:
    """Return which values are in the support; None where all are, or that depends on parameters."""
    try:
        support = inner = fn.support
    except (AttributeError, NotImplementedError):  # a distribution of a user's that has none
        return None
    while isinstance(inner, constraints.independent):
        inner = inner.base_constraint
    if is_dependent(support) or inner is constraints.real:
        return None
    is_inside: Tensor = support.check(value)
    return is_inside


def _given_parameters(fn: Any) -> Iterator[tuple[str, Any, Tensor]]:
    """Yield name, constraint and value of the parameters that torch's own validation looks at."""
    try:
        given = fn.arg_constraints
    except (AttributeError, NotImplementedError):  # torch's base class raises
        return
    for name, constraint in given.items() if isinstance(given, dict) else ():
        is_derived = name not in vars(fn) and isinstance(getattr(type(fn), name, None), lazy_property)
        if is_dependent(constraint) or is_derived:
            continue
        value = getattr(fn, name)
        if isinstance(value, Tensor):  # a number is the same for all draws
            yield name, constraint, value


def describe_violation(fn: Any, value: Tensor | None) -> str:
    """Return which parameter violates which constraint, or that the value is outside of its support."""
    is_inside = None if value is None else values_inside(fn, value)
    if is_inside is not None and not bool(is_inside.all()):
        return f"a value is not {fn.support}"
    while isinstance(fn, dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution):
        fn = fn.base_dist
    bad = [f"{name} is not {c}" for name, c, value in _given_parameters(fn) if not bool(c.check(value).all())]
    return f"{' and '.join(bad)} in the {type(fn).__name__}"
