r"""Values that are missing from the data: sites with an ``obs_mask``.

Of ``pyro.sample("y", fn, obs=y, obs_mask=mask)`` Pyro makes an observed site and a latent one,
``y_unobserved``, with numbers at all places. Those at which y is known have no density: a posterior with them
has no integral. Where nothing else in the model depends on the missing values, they integrate to one,

.. math:: p(y_{known}, z) = \int p(y_{known}, y_{missing}, z) \, d y_{missing},

and the site is no latent variable. Otherwise the numbers that nobody uses have the density that the site
would have without data, which also integrates to one. Whatever the data hold at missing places, nan too, is
passed over.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger

from pyro_adaann.objectives.lenient import run_leniently
from pyro_adaann.state.random_states import get_random_states, set_random_states

__all__ = ["without_missing"]

_MISSING, _KNOWN = "_unobserved", "_observed"
#: Other values that are tried: a model may use them in a part of their range alone.
_NUM_TRIED = 10


def without_missing(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[..., Any]:
    """Return a model of the same posterior of all other sites, in which missing values are proper.

    That is the model itself where nothing is missing. Random generators are as before afterwards.

    Example::

        >>> import pyro.distributions as dist
        >>> def model(y, mask):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", 3):
        ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y, obs_mask=mask)
        >>> data = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([True, True, False])
        >>> list(poutine.trace(model).get_trace(*data).stochastic_nodes)
        ['z', 'data', 'y_unobserved']
        >>> list(poutine.trace(without_missing(model, data, {})).get_trace(*data).stochastic_nodes)
        ['z', 'data']
    """

    def run(model: Callable[..., Any]) -> Trace:
        return run_leniently(poutine.trace(model).get_trace, *args, **kwargs)

    random = get_random_states()
    with poutine.block(), torch.no_grad(), warnings.catch_warnings(), pyro.validation_enabled(False):
        warnings.simplefilter("ignore")
        try:
            trace = run(model)
            names = [name for name in trace.stochastic_nodes if _is_of_mask(name, trace)]
            used = {name for name in names if _is_used(name, trace, lambda t: run(poutine.replay(model, t)))}
        except Exception:  # said where the model is checked
            return model
        finally:
            set_random_states(random)
    return _Missing(names, used)(model) if names else model


def _is_of_mask(name: str, trace: Trace) -> bool:
    """Whether a latent site holds what is missing from an observed one, and Pyro has joined both."""
    whole = name.removesuffix(_MISSING)
    if not (name.endswith(_MISSING) and {whole, whole + _KNOWN} <= set(trace.nodes)):
        return False
    is_joined = trace.nodes[whole].get("infer", {}).get("_deterministic", False)
    return bool(is_joined and trace.nodes[whole + _KNOWN]["is_observed"])


def _is_used(name: str, trace: Trace, run: Callable[[Trace], Trace]) -> bool:
    """Whether the density of another site changes with the missing values.

    :param run: runs the model with the values of a trace.
    """
    other, fn = trace.copy(), trace.nodes[name]["fn"]
    try:
        densities = _densities(run(trace), name)
        for _ in range(_NUM_TRIED):
            other.nodes[name] = {**trace.nodes[name], "value": fn.sample()}
            if _densities(run(other), name) != densities:
                return True
    except Exception:  # a value that the model cannot take
        return True
    return False


def _densities(trace: Trace, name: str) -> dict[str, float]:
    trace.compute_log_prob()
    return {
        other: float(site["log_prob"].double().sum().nan_to_num())
        for other, site in trace.nodes.items()
        if site["type"] == "sample" and other != name
    }


class _Missing(Messenger):
    """Lets the model draw some sites by itself, and gives others a density everywhere.

    :param names: of the latent sites.
    :param used: those whose values the model uses.
    """

    def __init__(self, names: list[str], used: set[str]) -> None:
        super().__init__()
        self._used, self._unused = used, set(names) - used
        self._known = {name.removesuffix(_MISSING) + _KNOWN for name in names}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self._unused:
            msg["value"] = msg["fn"].sample()
            msg["stop"] = True
        elif msg["name"] in self._used:
            msg["mask"] = None
        elif msg["name"] in self._known and torch.is_tensor(msg["mask"]):
            value, mask = msg["value"], msg["mask"]
            hole = ~mask.reshape(mask.shape + (1,) * msg["fn"].event_dim) & value.isnan()
            if hole.any():
                msg["value"] = torch.where(hole, msg["fn"].sample(), value)
