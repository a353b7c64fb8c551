"""A fit in several processes, which stays the same in all of them.

Every process computes the same numbers, up to rounding where processors differ. What the first process has
replaces that of the others at the start and after every step, and what it decides is done in all.
"""

from __future__ import annotations

import warnings
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_adaann.objectives.base import Objective
from pyro_adaann.processes.group import equalize, is_first, on_first, process_count
from pyro_adaann.state.random_states import get_random_states, set_random_states

__all__ = ["begin_together"]


def begin_together(model: Any, guide: Any, objective: Objective) -> None:
    """Give all processes the random states and the parameters of the first one; in one, do nothing.

    Parameters that a guide makes when it first runs are then the same, too.

    Warns if a loss does not vectorize its particles, since every process then runs the model on all.
    """
    if process_count() == 1:
        return
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    states, device = on_first(lambda: (get_random_states(), device))
    set_random_states(states)
    if states["cuda"]:  # of the device that the first process works on
        torch.cuda.set_rng_state(states["cuda"][device])
    equalize(_tensors_of(model, guide))
    if is_first() and not objective.is_vectorized:
        warnings.warn(
            f"Expected vectorize_particles=True, which lets {process_count()} processes share the particles; "
            f"got False: every process runs the model on all of them, and nothing is gained.",
            stacklevel=4,
        )


def _tensors_of(model: Any, guide: Any) -> list[Tensor]:
    """Return parameters and buffers, those in Pyro's store included, each once."""
    found = [value for _, value in pyro.get_param_store().named_parameters()]
    for part in (model, guide):
        owner = getattr(part, "__self__", part)
        if isinstance(owner, nn.Module):
            found += [*owner.parameters(), *owner.buffers()]
    return list({id(value): value for value in found}.values())
