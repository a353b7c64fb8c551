"""Observed sites of a model, drawn."""

from __future__ import annotations

from typing import Any

from pyro.poutine.uncondition_messenger import UnconditionMessenger

__all__ = ["DrawObserved"]


class DrawObserved(UnconditionMessenger):
    """Draw observed sites, and leave deterministic and auxiliary ones, which Pyro takes for observed."""

    def _pyro_sample(self, msg: Any) -> None:
        if not (msg["infer"].get("_deterministic") or msg["infer"].get("is_auxiliary")):
            super()._pyro_sample(msg)
