"""The progress bar of a run: inverse temperature, loss, stage, rate and projected end."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm

from pyro_adaann.annealing.history import AnnealingHistory
from pyro_adaann.annealing.schedules import AnnealingSchedule
from pyro_adaann.state.budget import StepPlan, projected_num_steps

__all__ = ["ProgressBar"]

#: Steps between two updates of the text within a stage.
_SHOW_EVERY = 50


class ProgressBar:
    """A `tqdm` bar over the optimizer steps of an annealed fit.

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
        self._bar.total = projected_num_steps(self.history, self.schedule, self.plan)
