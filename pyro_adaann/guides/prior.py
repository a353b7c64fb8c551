r"""The base of a flow from the prior: location and scale of prior draws in unconstrained coordinates.

A coordinate has the median of its draws as location and half the distance between their quantiles of 16 %
and 84 % as scale, which is the standard deviation of a normal prior and finite for any other one. A site
whose density is masked has no prior; its draws say where the user looks for it, and count as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor
from torch.distributions import biject_to

__all__ = ["prior_base"]

#: Draws of a model that vectorizes, and of one that does not.
_NUM_DRAWS, _NUM_SINGLE_DRAWS = 2000, 200
#: The quantiles one standard deviation below and above the median of a normal distribution.
_LEVELS = (0.15865525, 0.5, 0.84134475)


def prior_base(
    model: Callable[..., Any], prototype: Trace, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return location and scale of prior draws, each of shape ``(latent_dim,)``.

    The same in every call: the draws have a seed of their own, and random states are left as they are. A
    model that does not run for many draws at once is run for one after the other. Where no draw is finite
    the location is 0, and where draws do not vary the scale is 1.

    :param model: a Pyro model.
    :param prototype: a trace of its latent sites, in the order of the coordinates.
    :param args: positional arguments of the model.
    :param kwargs: keyword arguments.

    Example::

        >>> import pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("z", dist.HalfCauchy(1.0))
        >>> prototype = poutine.trace(model).get_trace()
        >>> loc, scale = prior_base(model, prototype, (), {})  # of log z: exactly 0 and 1.38
        >>> bool(loc.abs() < 0.2), bool((scale - 1.38).abs() < 0.2)
        (True, True)
    """

    def run() -> Any:
        return model(*args, **kwargs)

    with torch.no_grad(), poutine.block(), _own_seed(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pyro.validation_enabled(False):
            draws = _draw_at_once(run, prototype)
            if draws is None:
                draws = _draw_one_by_one(run, prototype)
    levels = torch.tensor(_LEVELS, dtype=draws.dtype, device=draws.device)
    low, middle, high = torch.where(draws.isfinite(), draws, torch.nan).nanquantile(levels, 0)
    scale = (high - low) / 2
    # A coordinate that does not vary, or so little that rounding makes it.
    is_usable = scale.isfinite() & (scale > 1e-6 * middle.abs().clamp(min=1e-6))
    return torch.where(middle.isfinite(), middle, 0.0), torch.where(is_usable, scale, 1.0)


def _draw_at_once(run: Callable[[], Any], prototype: Trace) -> Tensor | None:
    """Run the model once under a plate of draws; None if it does not run, or not for all of them."""
    try:
        # Plates of observed sites count: the draws lie to the left of all.
        sites = [site for site in poutine.trace(run).get_trace().nodes.values() if site["type"] == "sample"]
        frames = [frame for site in sites for frame in site["cond_indep_stack"] if frame.vectorized]
        nesting = max((-frame.dim for frame in frames), default=0)
        with pyro.plate("_prior_draws", _NUM_DRAWS, dim=-1 - nesting):
            return _unconstrained(poutine.trace(run).get_trace(), prototype, _NUM_DRAWS)
    except Exception:  # whatever the code of a user raises that is written for one draw
        return None


def _draw_one_by_one(run: Callable[[], Any], prototype: Trace) -> Tensor:
    """Run the model for one draw after the other, and leave out those at which it fails."""
    rows = []
    for _ in range(_NUM_SINGLE_DRAWS):
        try:
            row = _unconstrained(poutine.trace(run).get_trace(), prototype, 1)
        except Exception:  # no solution of the model there, whatever its solver raises
            continue
        if row is not None:
            rows.append(row)
    if rows:
        return torch.cat(rows)
    own = _unconstrained(prototype, prototype, 1)
    if own is None:
        raise ValueError("Expected a prototype with its own latent sites; got one without. Please report it.")
    return own


def _unconstrained(trace: Trace, prototype: Trace, num_draws: int) -> Tensor | None:
    """Return the draws of a trace, ``(num_draws, latent_dim)``; None if a site has another number."""
    columns = []
    for name, site in prototype.iter_stochastic_nodes():
        if name not in trace or trace.nodes[name]["value"].numel() != num_draws * site["value"].numel():
            return None
        values = trace.nodes[name]["value"].reshape(num_draws, *site["value"].shape)
        columns.append(biject_to(site["fn"].support).inv(values).reshape(num_draws, -1))
    return torch.cat(columns, dim=-1)


@contextmanager
def _own_seed() -> Iterator[None]:
    """Seed all generators for the block, and leave them as they were."""
    state = get_rng_state()
    with torch.random.fork_rng():
        pyro.set_rng_seed(0)
        try:
            yield
        finally:
            set_rng_state(state)
