"""A fit in a few words, for `repr` and notebooks."""

from __future__ import annotations

from html import escape

from pyro_adaann.state.fit import Fit

__all__ = ["html_table", "summary_of"]


def summary_of(fit: Fit) -> dict[str, str]:
    """Return inverse temperature, counts and settings of a fit as text, by name."""
    history, stages = fit.history, fit.stages
    return {
        "inverse temperature": f"{stages.present.inverse_temperature:.3g}",
        "steps": str(history.num_steps),
        "stages": str(len(history.stages)),
        "recoveries": str(len(history.recoveries)),
        "is_done": str(stages.is_done),
        "path": fit.settings.path.name,
        "schedule": str(fit.settings.schedule),
    }


def html_table(title: str, rows: dict[str, str]) -> str:
    """Return names and values as a table in HTML."""
    cells = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows.items()
    )
    return f"<table><caption>{escape(title)}</caption>{cells}</table>"
