"""The progress of a whole `fit`: its steps, with the name of the phase."""

from __future__ import annotations

import time
from typing import Any

from pyro_adaann.sampling.result import SMCStage
from pyro_adaann.state.counter import Counter
from pyro_adaann.state.progress import time_left
from pyro_adaann.svi import AdaAnnSVI

__all__ = ["FitProgress"]


class FitProgress:
    """All steps of all fits, counted.

    :param is_shown: whether anything is shown.
    """

    def __init__(self, is_shown: bool) -> None:
        self._counter = Counter("step", is_shown)
        self._phase_start = time.monotonic()

    def __enter__(self) -> FitProgress:
        return self

    def __exit__(self, *error: Any) -> None:
        self._counter.__exit__(*error)

    def phase(self, name: str) -> None:
        """Name what comes now."""
        self._counter.name(name)
        self._phase_start = time.monotonic()

    def update(self, svi: AdaAnnSVI) -> None:
        """Count one step."""
        self._counter.update(self._describe(svi) if self._counter.is_shown else "")

    def particles(self, stage: SMCStage) -> None:
        """Say where the particles stand from which the base comes."""
        self._counter.say(stage.describe())

    def _describe(self, svi: AdaAnnSVI) -> str:
        """Return where a fit stands, and how long the rest of its steps will take."""
        stage, stages = svi.history.stages[-1], svi._fit.stages
        text = f"inverse temperature {stage.inverse_temperature:.3g}"
        if stage.losses:
            text += f", loss {stage.losses[-1]:.4g}"
        rate = svi.history.num_steps / max(time.monotonic() - self._phase_start, 1e-9)
        return text + time_left(svi.history, svi.schedule, stages.plan, rate)
