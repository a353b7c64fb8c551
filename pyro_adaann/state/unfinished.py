"""Warn if training stops before annealing finishes.

A guide below an inverse temperature of 1 looks like any other. `run` goes on to 1; a user's own loop around
`step` may stop anywhere, and only the finalizer of the driver tells that no further step will come. The
finalizer writes to the log and raises no warning: it may run while Python shuts down or clears the frames of
an exception, where a warning that is turned into an error cannot be caught.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from typing import Any

from pyro_adaann.annealing.history import AnnealingHistory
from pyro_adaann.annealing.schedules import AnnealingSchedule
from pyro_adaann.state.budget import StepPlan, projected_arrival

__all__ = [
    "how_to_go_on",
    "warn_of_annealing_again",
    "warn_of_evaluation",
    "warn_of_short_training",
    "warn_of_unplanned_training",
    "watch_end",
]

_logger = logging.getLogger(__name__)

#: Fits of fewer steps are not reported, and at most this many lines are logged.
_MIN_STEPS, _MAX_LINES = 100, 5
_num_lines = 0


def warn_of_short_training(num_annealing_steps: int, num_training_steps: int) -> None:
    """Warn at the start that training ends before annealing does."""
    warnings.warn(
        f"The schedule takes {num_annealing_steps} steps to reach 1, and training ends after "
        f"{num_training_steps}: the guide will be one of a tempered posterior. Use fewer inverse "
        f"temperatures or a smaller num_steps_per_stage, or train for longer.",
        stacklevel=4,
    )


def warn_of_unplanned_training(what: str, num_training_steps: int) -> None:
    """Warn at the start that the number of steps up to 1 cannot be planned.

    :param what: the schedule or stage rule that decides it.
    """
    warnings.warn(
        f"With {what}, annealing cannot be planned for num_training_steps={num_training_steps}: how many "
        f"steps it takes to reach 1 depends on the fit. Train until AdaAnnSVI.is_done, or use AdaAnnSchedule "
        f"without a stage rule.",
        stacklevel=4,
    )


def warn_of_evaluation(inverse_temperature: float, num_steps: int) -> None:
    """Warn that a loss is one of the tempered posterior."""
    warnings.warn(
        f"The loss is that of inverse temperature {inverse_temperature:.3g}, after {num_steps} steps, and "
        f"not that of the posterior. Evaluate it when AdaAnnSVI.inverse_temperature is 1, or use "
        f"loss.loss(model, guide, *args).",
        stacklevel=3,
    )


def warn_of_annealing_again(reached: float, inverse_temperature: float) -> None:
    """Warn that a guide is annealed from the start, although another fit has brought it further."""
    own = (
        "ConstantSchedule()" if reached >= 1 else f"AdaAnnSchedule(initial_inverse_temperature={reached:.3g})"
    )
    warnings.warn(
        f"An earlier AdaAnnSVI has brought this guide to inverse temperature {reached:.3g}, and this one "
        f"begins at {inverse_temperature:.3g}: what the guide has learned since is lost. To go on from there "
        f"step the earlier AdaAnnSVI, or give this one schedule={own}. For a new fit call "
        f"pyro.clear_param_store() and make a new guide.",
        stacklevel=7,
    )


def how_to_go_on(
    history: AnnealingHistory, schedule: AnnealingSchedule, plan: StepPlan, num_latents: int | None
) -> str:
    """Return how far a fit has come, and how to bring it to inverse temperature 1, as a clause."""
    arrival = projected_arrival(history, schedule, plan, num_latents)
    takes = "" if arrival is None else f"; it takes {arrival} to arrive at 1"
    return (
        f"in stage {len(history.stages)}, after {history.num_steps:,} steps{takes}. Go on with "
        f"AdaAnnSVI.run, or step until AdaAnnSVI.is_done. A loop of a given length needs num_training_steps."
    )


def watch_end(svi: Any, history: AnnealingHistory, final_inverse_temperature: float) -> None:
    """Log a warning when ``svi`` is deleted after training that has not reached 1.

    The finalizer holds the history alone, no model and no guide.
    """
    weakref.finalize(svi, _announce_end, history, final_inverse_temperature)


def _announce_end(history: AnnealingHistory, final_inverse_temperature: float) -> None:
    global _num_lines
    reached = history.stages[-1].inverse_temperature
    if history.num_steps < _MIN_STEPS or reached >= final_inverse_temperature or _num_lines >= _MAX_LINES:
        return
    _num_lines += 1
    _logger.warning(
        "Training ended after %d steps at inverse temperature %.3g, before annealing finished: the guide is "
        "one of a tempered posterior. Train until AdaAnnSVI.inverse_temperature is 1.%s",
        history.num_steps,
        reached,
        " More fits like this are not reported." if _num_lines == _MAX_LINES else "",
    )
