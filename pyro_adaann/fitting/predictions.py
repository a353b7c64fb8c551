"""Posterior predictive draws of a model from draws of its latent sites."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.poutine import Trace
from torch import Tensor

from pyro_adaann.diagnostics.model_and_guide import plate_nesting
from pyro_adaann.objectives.lenient import run_leniently
from pyro_adaann.objectives.observed import DrawObserved
from pyro_adaann.objectives.one_by_one import is_one_by_one
from pyro_adaann.objectives.traces import PARTICLE_PLATE, sites_of

__all__ = ["predict", "run_at"]


def predict(
    model: Callable[..., Any], samples: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """Return what a model draws and computes given draws of its latent sites, all draws at once.

    :param model: the model.
    :param samples: draws of its latent sites along a first dimension.
    :param args: its arguments.
    :param kwargs: its keyword arguments.
    """
    with torch.no_grad(), pyro.get_param_store().scope():
        with poutine.block(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trace = run_leniently(poutine.trace(model).get_trace, *args, **kwargs)
        # One that sums sites out for one draw after the other has observations outside of a batch alone.
        is_alone = is_one_by_one(model) and any(site["infer"].get("enumerate") for site in sites_of(trace))
        places = dict(samples) if is_alone else _in_place(trace, samples)
        predictive = Predictive(DrawObserved()(model), places, parallel=not is_alone)
        found: dict[str, Tensor] = predictive(*args, **kwargs)
    return found


def run_at(
    model: Callable[..., Any], samples: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Run a model on its data at draws of all its latent sites, all at once, for what handlers see of it.

    :param model: the model with its handlers.
    :param samples: draws of its latent sites along a first dimension.
    :param args: its arguments.
    :param kwargs: its keyword arguments.
    """
    num_draws = len(next(iter(samples.values())))
    with ExitStack() as stack:
        for context in (torch.no_grad(), pyro.get_param_store().scope(), poutine.block()):
            stack.enter_context(context)
        stack.enter_context(pyro.validation_enabled(False))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        trace = run_leniently(poutine.trace(model).get_trace, *args, **kwargs)
        conditioned = poutine.condition(model, data=_in_place(trace, samples))
        with pyro.plate(PARTICLE_PLATE, num_draws, dim=-1 - plate_nesting(trace)):
            run_leniently(conditioned, *args, **kwargs)


def _in_place(trace: Trace, samples: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return draws with their first dimension to the left of all plates.

    Pyro would count the dimensions of an event, such as those of a matrix, as plates.
    """
    nesting = plate_nesting(trace)
    places = {}
    for name, values in samples.items():
        ones = (1,) * (nesting - len(trace.nodes[name]["fn"].batch_shape))
        places[name] = values.reshape(values.shape[:1] + ones + values.shape[1:])
    return places
