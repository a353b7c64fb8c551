"""The progress of a run: inverse temperature, loss, stage, rate and projected end.

A `tqdm` bar on a terminal and in a notebook; one line every 30 seconds elsewhere, as in a log file.
"""

from __future__ import annotations

import logging
import sys
import time
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from pyro_adaann.annealing.history import AnnealingHistory
from pyro_adaann.annealing.schedules import AnnealingSchedule
from pyro_adaann.processes.group import is_first
from pyro_adaann.state.budget import StepPlan, projected_num_steps

__all__ = ["SECONDS_PER_LINE", "ProgressBar", "ProgressLines", "can_draw_bar", "show_progress", "time_left"]

#: Steps between two updates of the text of a bar within a stage.
_SHOW_EVERY = 50
#: Seconds between two lines of a log.
SECONDS_PER_LINE = 30.0


class ProgressBar:
    """A `tqdm` bar over the steps of an annealed fit.

    :param history: the history that the fit writes.
    :param schedule: its schedule.
    :param plan: how the steps are shared out.
    :param is_shown: whether anything is shown.
    """

    def __init__(
        self,
        history: AnnealingHistory,
        schedule: AnnealingSchedule,
        plan: StepPlan,
        is_shown: bool,
    ) -> None:
        self.history = history
        self.schedule = schedule
        self.plan = plan
        self._num_stages = 0
        self._stack = ExitStack()
        self._bar = tqdm(
            disable=not is_shown,
            unit="step",
            initial=history.num_steps,
            mininterval=0.5,
            dynamic_ncols=True,
        )

    def __enter__(self) -> ProgressBar:
        if not self._bar.disable:
            # A message of Pyro's, such as its guess of the nesting of plates, is written above the bar.
            self._stack.enter_context(logging_redirect_tqdm(_loggers_on_console(), tqdm_class=tqdm))
        return self

    def __exit__(self, *error: Any) -> None:
        if not self._bar.disable:
            self._show()
        self._bar.close()
        self._stack.close()

    def update(self) -> None:
        """Count one step."""
        self._bar.update()
        if self._bar.disable:
            return
        stage = self.history.stages[-1]
        if len(self.history.stages) > self._num_stages or stage.num_steps % _SHOW_EVERY == 0:
            self._num_stages = len(self.history.stages)
            self._show()

    def _show(self) -> None:
        if not self.history.stages[-1].losses:  # the first step has failed
            return
        self._bar.set_postfix_str(_describe(self.history), refresh=False)
        self._bar.total = projected_num_steps(self.history, self.schedule, self.plan)


class ProgressLines:
    """A line of text every 30 seconds and at the end, on the standard error.

    :param history: the history that the fit writes.
    :param schedule: its schedule.
    :param plan: how the steps are shared out.
    """

    def __init__(self, history: AnnealingHistory, schedule: AnnealingSchedule, plan: StepPlan) -> None:
        self.history = history
        self.schedule = schedule
        self.plan = plan
        self._num_steps_before = history.num_steps
        self._start = self._latest = time.monotonic()

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.history.stages[-1].losses:
            self._show(time.monotonic())

    def update(self) -> None:
        """Count one step."""
        now = time.monotonic()
        if now - self._latest >= SECONDS_PER_LINE:
            self._show(now)

    def _show(self, now: float) -> None:
        self._latest = now
        num_steps, seconds = self.history.num_steps, now - self._start
        rate = (num_steps - self._num_steps_before) / max(seconds, 1e-9)
        total = projected_num_steps(self.history, self.schedule, self.plan)
        text = f"step {num_steps}" + ("" if total is None else f"/{total}")
        text += f", {_describe(self.history)}, {_duration(seconds)} so far, {rate:.3g} steps/s"
        text += time_left(self.history, self.schedule, self.plan, rate)
        print(text, file=sys.stderr, flush=True)


def show_progress(
    history: AnnealingHistory, schedule: AnnealingSchedule, plan: StepPlan, is_shown: bool
) -> ProgressBar | ProgressLines:
    """Return a bar where it can be drawn, lines elsewhere; to be used as a context.

    Of several processes the first one shows it.
    """
    is_shown = is_shown and is_first()
    if not is_shown or can_draw_bar():
        return ProgressBar(history, schedule, plan, is_shown)
    return ProgressLines(history, schedule, plan)


def can_draw_bar() -> bool:
    """Whether the output is a terminal or a notebook, and not a file."""
    return _is_widget() or sys.stderr.isatty()


def time_left(history: AnnealingHistory, schedule: AnnealingSchedule, plan: StepPlan, rate: float) -> str:
    """Return how long the rest of a fit will take, as a clause; nothing where that cannot be told yet.

    :param rate: steps a second.
    """
    total = projected_num_steps(history, schedule, plan)
    if total is None or total <= history.num_steps or not rate:
        return ""
    return f", about {_duration((total - history.num_steps) / rate)} left"


def _describe(history: AnnealingHistory) -> str:
    stage = history.stages[-1]
    text = (
        f"inverse temperature {stage.inverse_temperature:.3g}, "
        f"stage {len(history.stages)}, loss {stage.losses[-1]:.4g}"
    )
    return text + (f", {stage.broken_share:.1%} broken" if stage.num_broken else "")


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _is_widget() -> bool:
    """Whether the bar is a widget of a notebook."""
    return any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)


def _loggers_on_console() -> list[logging.Logger]:
    """Return the loggers that write to the terminal: Pyro's own and the root."""
    streams = (sys.stdout, sys.stderr)
    return [
        logger
        for logger in (logging.getLogger("pyro"), logging.getLogger())
        if any(isinstance(h, logging.StreamHandler) and h.stream in streams for h in logger.handlers)
    ]
