"""Early warnings of a fit that will not, or may not, arrive at inverse temperature 1."""

from __future__ import annotations

import warnings

from pyro_adaann.objectives.memory import spread_within_steps
from pyro_adaann.state.budget import Arrival, projected_arrival, projected_num_steps
from pyro_adaann.state.stages import StageControl
from pyro_adaann.weights import standard_deviation

__all__ = ["LoopWatch"]

#: When a loop is warned, whichever comes first; and the stage at which a fit without end is.
_NUM_STEPS, _NUM_STAGES = 200, 20
#: A projected number of stages above this one is reported (the paper's longest run has 4,645).
_MAX_STAGES = 50_000


class LoopWatch:
    """Warns once, early in a fit, of a loop around `step` that may end below 1, and of a fit without end.

    A loop that is planned, or that asks for the inverse temperature, sees to the end by itself.

    :param stages: the stages of the fit.
    """

    def __init__(self, stages: StageControl) -> None:
        self._stages = stages
        self._is_asked = False
        self._is_over = False

    def is_asked(self) -> None:
        """Record that the user has asked how far the fit is."""
        self._is_asked = True

    def after_step(self) -> None:
        """Warn if it is time to."""
        if self._is_over:
            return
        stages, history = self._stages, self._stages.history
        if stages.plan.num_total is not None or stages.objective.is_final:
            self._is_over = True
        elif len(history.stages) >= _NUM_STAGES and self._is_endless():
            self._warn_of_no_end()
        elif not self._is_asked and (history.num_steps >= _NUM_STEPS or len(history.stages) >= _NUM_STAGES):
            self._warn_of_loop()
        elif len(history.stages) >= _NUM_STAGES:
            self._is_over = True

    def _is_endless(self) -> bool:
        stages = self._stages
        projected = projected_num_steps(stages.history, stages.schedule, stages.plan)
        limit = _MAX_STAGES * stages.plan.num_per_stage + stages.plan.num_final
        return projected is not None and projected > limit

    def _arrival(self) -> Arrival | None:
        stages = self._stages
        steps = stages.objective.memory.steps(stages.present.inverse_temperature)
        sd = standard_deviation(spread_within_steps([factors for factors, _ in steps])) if steps else None
        return projected_arrival(
            stages.history, stages.schedule, stages.plan, stages.objective.num_latents, sd
        )

    def _warn_of_no_end(self) -> None:
        self._is_over = True
        arrival = self._arrival()
        warnings.warn(
            f"After {self._stages.history.num_steps:,} steps the inverse temperature is "
            f"{self._stages.present.inverse_temperature:.3g}. It takes {arrival or 'a great many'} steps to "
            f"arrive at 1. Give `run` a number of steps (num_steps) or the schedule a larger tolerance; if "
            f"the guide is far from the posterior, start it nearer (base_loc, base_scale) or learn faster.",
            stacklevel=4,
        )

    def _warn_of_loop(self) -> None:
        self._is_over = True
        arrival = self._arrival()
        takes = f"It takes {arrival} steps to arrive at 1. " if arrival is not None else ""
        warnings.warn(
            f"After {self._stages.history.num_steps:,} steps the inverse temperature is "
            f"{self._stages.present.inverse_temperature:.3g}. {takes}A loop that ends before has a guide of "
            f"a tempered posterior: pass num_training_steps with the length of the loop, which plans the "
            f"annealing, or loop until AdaAnnSVI.is_done.",
            stacklevel=4,
        )
