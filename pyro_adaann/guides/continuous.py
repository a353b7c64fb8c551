"""The part of a model that a flow guide draws: all but the discrete sites, which the model sums out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro import poutine
from pyro.poutine.util import site_is_subsample

__all__ = ["continuous_part"]


def continuous_part(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return the model with its latent discrete sites hidden, as an autoguide wants it.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> def model():
        ...     k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        ...     pyro.sample("z", dist.Normal(k, 1.0))
        >>> list(poutine.trace(continuous_part(model)).get_trace().stochastic_nodes)
        ['z']
    """
    hidden: Callable[..., Any] = poutine.block(model, hide_fn=_is_latent_discrete)
    return hidden


def _is_latent_discrete(site: Any) -> bool:
    if site["type"] != "sample" or site["is_observed"] or site_is_subsample(site):
        return False
    return bool(site["fn"].support.is_discrete)
