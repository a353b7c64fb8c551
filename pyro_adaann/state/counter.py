"""Counts what a long run has done: a bar where it can be drawn, elsewhere a line every 30 seconds."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm.auto import tqdm

from pyro_adaann.processes.group import is_first
from pyro_adaann.state.progress import SECONDS_PER_LINE, can_draw_bar

__all__ = ["Counter"]


class Counter:
    """The progress of anything that is counted; use it as a context.

    Of several processes the first one shows it.

    :param unit: what is counted.
    :param is_shown: whether anything is shown.
    :param total: how many there will be, where that is known.
    :param initial: how many there are already.
    """

    def __init__(self, unit: str, is_shown: bool, *, total: int | None = None, initial: int = 0) -> None:
        is_shown = is_shown and is_first()
        self._has_lines = is_shown and not can_draw_bar()
        self._unit, self._total, self._count = unit, total, initial
        self._bar = tqdm(
            disable=not is_shown or self._has_lines,
            unit=unit,
            total=total,
            initial=initial,
            mininterval=0.5,
            dynamic_ncols=True,
        )
        self._name = ""
        self._latest = time.monotonic()

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.close()

    @property
    def is_shown(self) -> bool:
        """Whether somebody sees it, so that a text is worth its making."""
        return self._has_lines or not self._bar.disable

    def name(self, name: str) -> None:
        """Name what is counted from now on."""
        self._name = name
        self._bar.set_description_str(name)
        self._bar.set_postfix_str("")

    def update(self, text: str = "") -> None:
        """Count one, and say how things are."""
        self._count += 1
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()
        self._print(text)

    def say(self, text: str) -> None:
        """Say how things are without counting."""
        self._bar.set_postfix_str(text)
        self._print(text)

    def _print(self, text: str) -> None:
        """Print a line where there is no bar and the last one is long ago."""
        now = time.monotonic()
        if not self._has_lines or now - self._latest < SECONDS_PER_LINE:
            return
        self._latest = now
        count = f"{self._unit} {self._count}" + ("" if self._total is None else f"/{self._total}")
        parts = [self._name, f"{count}, {text}" if text else count]
        print(": ".join(part for part in parts if part), file=sys.stderr, flush=True)
