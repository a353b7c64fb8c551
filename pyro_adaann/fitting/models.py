"""Which models `fit` can take, and the door for the others."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace

from pyro_adaann.checks import check_callable
from pyro_adaann.diagnostics.guide_draws import GuideDraws
from pyro_adaann.diagnostics.model_and_guide import latent_names
from pyro_adaann.objectives.lenient import run_leniently
from pyro_adaann.objectives.one_by_one import one_by_one
from pyro_adaann.objectives.traces import subsampled_plate
from pyro_adaann.processes.group import process_count

__all__ = ["check_model", "for_many_draws"]

#: An odd number of draws, which no dimension of a model is likely to have.
_NUM_DRAWS = 11
#: Two changes of a log density are zero and something if their ratio is smaller.
_SAME = 1e-3


def check_model(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """Return the trace of one run of a model that `fit` can take.

    :raises ValueError: if it cannot be called, subsamples a plate, has parameters to learn, discrete sites
        that it does not enumerate, no continuous latent site, or one whose density repeats.
    """
    check_callable("model", model, "fit(Model(), ...)")
    with poutine.block(), torch.no_grad(), warnings.catch_warnings(), pyro.validation_enabled(False):
        warnings.simplefilter("ignore")
        trace = run_leniently(poutine.trace(model).get_trace, *args, **kwargs)
    frame = subsampled_plate(trace)
    if frame is not None:
        raise ValueError(
            f"Expected every plate in full; got {frame.size} of {frame.full_size} in plate {frame.name!r}. "
            f"`fit` weighs its draws against all data: call with the whole plate, or train in mini-batches "
            f"with AdaAnnSVI(model, guide, optim, loss)."
        )
    learned = [
        site["name"]
        for site in trace.nodes.values()
        if site["type"] == "param" and getattr(site["value"], "requires_grad", False)
    ]
    if learned:
        raise ValueError(
            f"Expected a model without parameters to learn; got {', '.join(map(repr, learned))}. `fit` "
            f"draws from a posterior, which has none: give them priors, or train them with AdaAnnSVI(model, "
            f"guide, optim, loss)."
        )
    names = latent_names(trace)
    discrete = [name for name in names if _is_discrete(trace.nodes[name]["fn"])]
    stray = [name for name in discrete if trace.nodes[name]["infer"].get("enumerate") != "parallel"]
    if stray:
        raise ValueError(
            f"Expected continuous latent variables, or discrete ones that are summed out; got "
            f"{', '.join(map(repr, stray))}. Mark them in the model with "
            f'infer={{"enumerate": "parallel"}}; where that is too many values, use AdaAnnSVI with a guide '
            f"of your own that draws them."
        )
    if len(names) == len(discrete):
        raise ValueError(
            "Expected a model with continuous latent variables; got none. Sample them without `obs`."
        )
    circular = [name for name in names if _is_periodic(trace.nodes[name])]
    if circular:
        raise ValueError(
            f"Expected densities that are normalized over their support; got "
            f"{', '.join(map(repr, circular))}, with a density on the real line that repeats every 2 pi. "
            f"Draw an angle between -pi and pi, and add its density: "
            f'a = pyro.sample("a", dist.Uniform(-math.pi, math.pi)); '
            f'pyro.factor("a_prior", dist.VonMises(loc, concentration).log_prob(a)).'
        )
    return trace


def for_many_draws(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[..., Any]:
    """Return the model if it runs for a few draws at once as for one of them alone, else one that does.

    A warning says so: a model that runs for one draw after the other takes far longer.

    :raises ValueError: if it runs neither way.
    """
    error = _error_at_once(model, guide, args, kwargs)
    if error is None:
        return model
    got = str(error).partition("; got ")[2].partition(". Pass ")[0]
    got = got.splitlines()[0].rstrip(".") if got else str(error)
    advice = (
        "Let it index and sum its dimensions from the right: (x * beta).sum(-1) in place of x @ beta, "
        "z[..., 0] in place of z[0], Vindex(z.unsqueeze(-2))[..., k] in place of z[k] for an enumerated k"
    )
    alone = one_by_one(model)
    if process_count() > 1 or _error_at_once(alone, guide, args, kwargs) is not None:
        raise ValueError(
            f"Expected a model that runs for many draws at once, under an outermost plate; got {got}. "
            f"{advice}. Where that cannot be, use AdaAnnSVI with a loss that is not vectorized."
        ) from error
    warnings.warn(
        f"The model does not run for many draws at once ({got}), and is run for one after the other, "
        f"which takes many times as long. {advice}, and it is fast.",
        stacklevel=3,
    )
    return alone


def _error_at_once(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ValueError | None:
    """Return why a model does not run for a few draws at once, None if it does."""
    try:
        next(GuideDraws((model, guide), args, kwargs, vectorize=True).batches(_NUM_DRAWS, _NUM_DRAWS))
    except ValueError as error:
        return error
    return None


def _is_discrete(fn: Any) -> bool:
    return bool(fn.support.is_discrete)


def _is_periodic(site: Any) -> bool:
    """Whether the density of a site repeats every 2 pi, as those of angles do, and varies between."""
    fn, value = site["fn"], site["value"]
    try:
        here = fn.log_prob(value)
        turns, parts = (
            max(float((fn.log_prob(value + shift) - here).abs().max()) for shift in shifts)
            for shifts in ((2 * math.pi, 4 * math.pi), (1.0, 2.0))
        )
    except Exception:  # a value outside of a support may do anything
        return False
    return turns <= _SAME * parts and parts > 0
