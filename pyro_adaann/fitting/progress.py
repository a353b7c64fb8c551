"""The progress of a whole `fit`: a bar over its steps, or lines in a log, with the name of the phase."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm.auto import tqdm

from pyro_adaann.processes.group import is_first
from pyro_adaann.state.progress import SECONDS_PER_LINE, can_draw_bar, time_left
from pyro_adaann.svi import AdaAnnSVI

__all__ = ["FitProgress"]


class FitProgress:
    """All steps of all fits: a `tqdm` bar where it can be drawn, elsewhere a line every 30 seconds.

    :param is_shown: whether anything is shown.
    """

    def __init__(self, is_shown: bool) -> None:
        is_shown = is_shown and is_first()
        self._has_lines = is_shown and not can_draw_bar()
        self._bar = tqdm(
            disable=not is_shown or self._has_lines, unit="step", mininterval=0.5, dynamic_ncols=True
        )
        self._phase = ""
        self._phase_start = self._latest_line = time.monotonic()

    def __enter__(self) -> FitProgress:
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.close()

    def phase(self, name: str) -> None:
        """Name what comes now."""
        self._phase = name
        self._phase_start = time.monotonic()
        self._bar.set_description_str(name)
        self._bar.set_postfix_str("")

    def update(self, svi: AdaAnnSVI) -> None:
        """Count one step."""
        now = time.monotonic()
        if self._has_lines and now - self._latest_line >= SECONDS_PER_LINE:
            self._latest_line = now
            print(f"{self._phase}: {self._describe(svi, now)}", file=sys.stderr, flush=True)
        if not self._bar.disable:
            self._bar.set_postfix_str(self._describe(svi, now), refresh=False)
        self._bar.update()

    def _describe(self, svi: AdaAnnSVI, now: float) -> str:
        """Return where a fit stands, and how long the rest of its steps will take."""
        stage, stages = svi.history.stages[-1], svi._fit.stages
        text = f"inverse temperature {stage.inverse_temperature:.3g}"
        if stage.losses:
            text += f", loss {stage.losses[-1]:.4g}"
        rate = svi.history.num_steps / max(now - self._phase_start, 1e-9)
        return text + time_left(svi.history, svi.schedule, stages.plan, rate)
