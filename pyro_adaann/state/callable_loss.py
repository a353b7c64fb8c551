"""Whether a callable loss depends on the inverse temperature.

`AdaAnnSVI` tempers by the scales of sites. A loss that adds up ``site["fn"].log_prob(value)`` leaves them
out: the inverse temperature would rise while the loss stays the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import pyro.infer.util
import torch
from torch import Tensor

from pyro_adaann.annealing.paths import Path
from pyro_adaann.annealing.tempering import Tempering
from pyro_adaann.objectives.capabilities import elbo_of
from pyro_adaann.state.random_states import get_random_states, set_random_states
from pyro_adaann.steps.base import Call
from pyro_adaann.steps.gradient import GradientStep

__all__ = ["check_loss_is_tempered"]


def check_loss_is_tempered(
    step: Any, call: Call, parameters: Iterable[Tensor], path: Path, inverse_temperature: float
) -> None:
    """Raise a `ValueError` if a callable loss is the same at two inverse temperatures, for the same draws.

    Costs two evaluations of the loss, and no random number. An ELBO is not evaluated.

    :param step: the step of the fit.
    :param call: what it runs.
    :param parameters: their gradients are cleared with the error.
    :param path: the path of tempered densities.
    :param inverse_temperature: that of the first step.
    """
    is_callable = isinstance(step, GradientStep) and elbo_of(step.loss) is None
    if inverse_temperature >= 1 or not is_callable:
        return
    other = 0.5 * inverse_temperature if inverse_temperature > 0.25 else 0.5
    # Without the base, whose weight is part of its value and not a scale.
    path = dataclasses.replace(path, base=0.0)
    random, values = get_random_states(), []
    try:
        for t in (inverse_temperature, other):
            set_random_states(random)
            tempering = Tempering(call.model, call.guide, path, t)
            with torch.no_grad():
                value = step.evaluate(tempering.model, tempering.guide, *call.args, **call.kwargs)
            values.append(float(value))
    except (RuntimeError, TypeError, ValueError):
        return  # a loss that needs gradients, or is no number, is not judged
    finally:
        set_random_states(random)
    if values[0] == values[1] and math.isfinite(values[0]):
        pyro.infer.util.zero_grads(parameters)
        name = getattr(step.loss, "__name__", type(step.loss).__name__)
        raise ValueError(
            f"Expected a loss that depends on the scales of sites, by which AdaAnnSVI tempers model and "
            f"guide; got {name}, which is {values[0]:.6g} at inverse temperatures {inverse_temperature:.3g} "
            f"and {other:.3g}. Add up site['log_prob'] after trace.compute_log_prob() in place of "
            f"site['fn'].log_prob(site['value']), or use Trace_ELBO."
        )
