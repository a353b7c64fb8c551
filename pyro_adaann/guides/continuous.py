"""The part of a model that a flow guide draws: all but the discrete sites, which the model sums out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample

__all__ = ["check_whole_plates", "continuous_part", "no_latents_in_loops"]


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


def check_whole_plates(trace: Trace, guide_name: str) -> None:
    """Raise a `ValueError` if a latent site is in a plate of which a part alone is drawn.

    A flow would learn one value for each place of the sub-sample, and use it for other rows at the next step.
    """
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site["is_observed"] or site_is_subsample(site):
            continue
        for frame in site["cond_indep_stack"]:
            if frame.full_size is not None and frame.size != frame.full_size:
                raise ValueError(
                    f"Expected latent sites outside of sub-sampled plates; got {name!r} in plate "
                    f"{frame.name!r}, of which {frame.size} of {frame.full_size} are drawn. {guide_name} has "
                    f"one value for each latent: take the whole plate, AutoNormal, which sub-samples too, or "
                    f"a guide of your own that depends on the rows."
                )


@contextmanager
def no_latents_in_loops(name: str) -> Iterator[None]:
    """Say what to write where Pyro's autoguides refuse latent sites in a plate that is a loop."""
    try:
        yield
    except NotImplementedError as error:
        if "sequential pyro.plate" not in str(error):
            raise
        raise ValueError(
            f"Expected latent sites outside of loops over a plate; got one in `for ... in pyro.plate(...)`, "
            f"which {name} does not take, nor do Pyro's autoguides. Write `with pyro.plate(...):` and one "
            f"site for all, or a loop over `range(...)`."
        ) from error
