"""Saying so when training ends before annealing does.

A guide that was left below an inverse temperature of 1 looks like any other. `run` goes on to the end;
a user's own loop around `step` may stop anywhere, and only Python knows when the driver of a
loop is used no more: hence a finalizer, which sees every kind of guide and loop. It writes to the log
and raises no warning: it may run while Python shuts down or clears away an exception's frames, where
a warning that is turned into an error cannot be caught by anybody.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from typing import Any

from pyro_adaann.annealing.schedules import AnnealingSchedule

__all__ = ["announce_short_training", "count_annealing_steps", "watch_end"]

_logger = logging.getLogger(__name__)


def count_annealing_steps(
    schedule: AnnealingSchedule, num_initial_steps: int, num_steps_per_stage: int
) -> int | None:
    """Return the number of optimizer steps before the first one at 1; None where draws decide."""
    num_stages = schedule.num_stages
    if num_stages is None:
        return None
    return num_initial_steps + (num_stages - 2) * num_steps_per_stage if num_stages > 1 else 0


def announce_short_training(num_annealing_steps: int | None, num_training_steps: int | None) -> None:
    """Warn at the start if the training is known to end before annealing does."""
    if num_annealing_steps is None or num_training_steps is None:
        return
    if num_training_steps <= num_annealing_steps:
        warnings.warn(
            f"The schedule takes {num_annealing_steps} steps to reach 1, and training ends after "
            f"{num_training_steps}: the guide will be one of a tempered posterior. Use fewer inverse "
            f"temperatures or a smaller num_steps_per_stage, or train for longer.",
            stacklevel=3,
        )


def watch_end(svi: Any) -> None:
    """Log a warning when ``svi`` is used no more and has taken steps, none of the latest at 1."""
    # Its attributes outlive it as long as the finalizer holds them, and are the present ones.
    weakref.finalize(svi, _announce_end, vars(svi))


def _announce_end(attributes: dict[str, Any]) -> None:
    history, schedule = attributes["history"], attributes["schedule"]
    reached = history.stages[-1].inverse_temperature
    if history.num_steps and reached < schedule.final_inverse_temperature:
        _logger.warning(
            "Training ended after %d steps at inverse temperature %.3g, before annealing did: the guide is "
            "one of a tempered posterior. Train until AdaAnnSVI.inverse_temperature is 1.",
            history.num_steps,
            reached,
        )
