"""The progress bar of a run: inverse temperature, loss, stage, rate and projected end."""

from __future__ import annotations

import itertools
import math
from typing import Any

from tqdm.auto import tqdm

from pyro_adaann.results import AnnealingHistory
from pyro_adaann.schedules import AnnealingSchedule

__all__ = ["ProgressBar"]

#: Steps between two updates of the text within a stage.
_SHOW_EVERY = 50


class ProgressBar:
    """A `tqdm` bar over the optimizer steps of an annealed fit.

    :param history: the history that the fit writes.
    :param schedule: its schedule.
    :param num_steps_per_stage: steps of a stage between the first and the last.
    :param num_final_steps: steps of the last stage.
    :param is_shown: whether anything is shown.
    """

    def __init__(
        self,
        history: AnnealingHistory,
        schedule: AnnealingSchedule,
        num_steps_per_stage: int,
        num_final_steps: int,
        is_shown: bool,
    ) -> None:
        self.history = history
        self.schedule = schedule
        self.num_steps_per_stage = num_steps_per_stage
        self.num_final_steps = num_final_steps
        self._num_stages = 0
        self._bar = tqdm(
            disable=not is_shown,
            unit="step",
            initial=history.num_steps,
            mininterval=0.5,
            dynamic_ncols=True,
        )

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: Any) -> None:
        if not self._bar.disable:
            self._show()
        self._bar.close()

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
        stage = self.history.stages[-1]
        if not stage.losses:  # the first step has failed
            return
        text = (
            f"inverse temperature {stage.inverse_temperature:.3g}, "
            f"stage {len(self.history.stages)}, loss {stage.losses[-1]:.4g}"
        )
        if stage.num_broken:
            text += f", {stage.broken_share:.1%} broken"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.total = self._projected_num_steps()

    def _projected_num_steps(self) -> int | None:
        stages = self.history.stages
        t, end = stages[-1].inverse_temperature, self.schedule.final_inverse_temperature
        if t >= end:
            return self.history.num_steps - stages[-1].num_steps + self.num_final_steps
        if len(stages) < 3:
            return None
        # AdaAnn's increments grow about in proportion to t, a linear schedule's not at all: let the
        # recent stages say which, through the growth of the increments.
        times = [stage.inverse_temperature for stage in stages[-21:]]
        if any(a >= b for a, b in itertools.pairwise(times)):  # it has been restarted
            return None
        growth = math.log((times[-1] - times[-2]) / (times[1] - times[0]))
        power = growth / math.log(times[-1] / times[0])
        rate = (times[-1] - times[0]) / (len(times) - 1)
        num_stages = (end - t) / rate
        if power > 0.5:
            num_stages = math.log(end / t) * (len(times) - 1) / math.log(times[-1] / times[0])
        return self.history.num_steps + int(num_stages * self.num_steps_per_stage + self.num_final_steps)
