"""The progress of a whole `fit`: one bar over its steps, with the name of the phase."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm

from pyro_adaann.processes.group import is_first
from pyro_adaann.svi import AdaAnnSVI

__all__ = ["FitProgress"]


class FitProgress:
    """A `tqdm` bar over all steps of all fits.

    :param is_shown: whether anything is shown.
    """

    def __init__(self, is_shown: bool) -> None:
        self._bar = tqdm(
            disable=not (is_shown and is_first()), unit="step", mininterval=0.5, dynamic_ncols=True
        )
        self._phase = ""

    def __enter__(self) -> FitProgress:
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.close()

    def phase(self, name: str) -> None:
        """Name what comes now."""
        self._phase = name
        self._bar.set_description_str(name)
        self._bar.set_postfix_str("")

    def update(self, svi: AdaAnnSVI) -> None:
        """Count one step."""
        if not self._bar.disable:
            stage = svi.history.stages[-1]
            text = f"inverse temperature {stage.inverse_temperature:.3g}"
            if stage.losses:
                text += f", loss {stage.losses[-1]:.4g}"
            self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()
