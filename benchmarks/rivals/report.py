"""Make the tables and the picture of the page from the result file.

    python -m benchmarks.rivals.report

A cell is *right* if every error that can be judged is within the limits of `measures.LIMITS`. Of several
seeds a table has the median, and the worst in brackets.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .measures import score
from .picture import draw
from .results import RESULTS, read
from .systems import OURS, SYSTEMS
from .targets import TARGETS

__all__ = ["Cells", "beaten", "cells_of", "main", "one_percent", "outcome", "summary", "tables"]

HERE = Path(__file__).resolve().parent
FIGURES = HERE.parents[1] / "docs" / "figures" / "rivals"
#: Why ours is not the best of a target, in words, by target; written by hand.
REASONS = HERE / "reasons.json"
#: Whose evidence has an error that falls with the work; how many seeds show its size, and up to which one.
SAMPLERS = ("AnnealedSMC", "blackjax SMC", "PyMC SMC", "pocoMC")
MIN_SEEDS, MAX_ERROR = 3, 0.5
Row = dict[str, Any]
#: The rows of every target and system, one a seed.
Cells = dict[tuple[str, str], list[Row]]

HEADER = (
    "| system | log Z off (stated) | shares off | means, sds off | sds off, % | Wasserstein / floor "
    "| evaluations / 1000 | CPU s | told | |\n|---|---|---|---|---|---|---|---|---|---|"
)


def cells_of(rows: list[Row]) -> Cells:
    """Return the rows by target and system."""
    cells: Cells = {}
    for row in rows:
        cells.setdefault((row["target"], row["system"]), []).append(row)
    return cells


def worst_score(rows: list[Row]) -> float | None:
    """Return the largest score over seeds, None if a seed has no draws."""
    scores = [score(row) for row in rows]
    known = [value for value in scores if value is not None]
    return max(known) if len(known) == len(scores) else None


def outcome(rows: list[Row]) -> str:
    """Return what became of a cell: right, wrong and told, wrong and not told, or nothing."""
    value = worst_score(rows)
    if value is None:
        return "none"
    if value <= 1:
        return "right"
    wrong = [row for row in rows if (score(row) or 0.0) > 1]
    return "told" if all(row["told"] or is_covered(row) for row in wrong) else "quiet"


def is_covered(row: Row) -> bool:
    """Return whether the evidence alone is wrong, by at most twice the error that the system states."""
    stated = row.get("log_evidence_error")
    if stated is None or (score(row) or 0.0) <= 1 or (score({**row, "evidence": None}) or 0.0) > 1:
        return False
    return bool(abs(row["evidence"]) <= 2 * stated)


def seconds(rows: list[Row]) -> float:
    """Return the median of the processor's seconds, divided by its pace at that time where it is known."""
    return statistics.median(row["seconds"] / row.get("pace", 1.0) for row in rows)


def beaten(target: str, cells: Cells) -> tuple[list[str], list[str]]:
    """Return the rivals that are more accurate than ours, and those that are right in less time.

    Ours is the fastest of this package's systems that are right, or the most accurate one if none is.
    Accuracy is the worst error as a multiple of its limit.
    """
    here = {system: rows for (name, system), rows in cells.items() if name == target}
    scores = {system: value for system, rows in here.items() if (value := worst_score(rows)) is not None}
    ours = {system: value for system, value in scores.items() if system in OURS}
    rivals = {system: value for system, value in scores.items() if system not in OURS}
    if not ours:
        return list(rivals), []
    right = [system for system, value in ours.items() if value <= 1]
    if right:
        best = min(right, key=lambda system: seconds(here[system]))
    else:
        best = min(ours, key=lambda system: ours[system])
    more_accurate = [system for system, value in rivals.items() if value < ours[best]]
    faster = [s for s, value in rivals.items() if value <= 1 and seconds(here[s]) < seconds(here[best])]
    return more_accurate, faster


def _figures(rows: list[Row], name: str, form: str, change: Callable[[float], float] = abs) -> str:
    values = [change(row[name]) for row in rows if row.get(name) is not None]
    if not values:
        return ""
    middle = format(statistics.median(values), form)
    return middle if len(values) == 1 else f"{middle} ({format(max(values), form)})"


def _evaluations(rows: list[Row], factor: float = 1.0, digits: int = 0) -> str:
    known = [
        (row["num_densities"] or 0) + (row["num_gradients"] or 0)
        for row in rows
        if row["num_densities"] is not None or row["num_gradients"] is not None
    ]
    return f"{factor * statistics.median(known) / 1000:,.{digits}f}" if known else ""


def _line(system: str, rows: list[Row]) -> str:
    done = [row for row in rows if "cannot" not in row]
    name = f"**{system}**" if system in OURS else system
    if not done:
        return f"| {name} | {rows[0]['cannot'].replace('|', '/')} | | | | | | | | |"
    stated = statistics.median([row["log_evidence_error"] or 0.0 for row in done])
    evidence = _figures(done, "evidence", ".3f")
    said = {row["told"] or ("its error covers it" if is_covered(row) else "") for row in done}
    told = "; ".join(sorted(said - {""}))
    marks = {
        "right": "right, but warns" if told else "right",
        "told": "wrong, says so",
        "quiet": "**wrong, does not say so**",
        "none": f"{len(done)} of {len(rows)} ended",
    }
    parts = [
        name,
        f"{evidence} ({stated:.3f})" if evidence and stated else evidence,
        _figures(done, "share", ".3f"),
        _figures(done, "mean", ".3f"),
        _figures(done, "sd", ".1f", lambda x: 100 * x),
        _figures(done, "wasserstein", ".1f"),
        _evaluations(done),
        f"{seconds(done):.0f}" if seconds(done) >= 10 else f"{seconds(done):.1f}",
        told,
        marks[outcome(rows)],
    ]
    return "| " + " | ".join(parts) + " |"


def _standing(target: str, cells: Cells, reasons: dict[str, str]) -> str:
    if not any(name == target and system not in OURS for name, system in cells):
        return "No other system was run here yet."
    accurate, faster = beaten(target, cells)
    is_right = any(
        outcome(rows) == "right" for (name, s), rows in cells.items() if name == target and s in OURS
    )
    if is_right and not accurate and not faster:
        return "Ours is the best here, in accuracy and in time."
    told = [] if is_right else ["none of ours is right"]
    if accurate:
        told.append(f"more accurate: {', '.join(accurate)}")
    if faster:
        told.append(f"right in less time: {', '.join(faster)}")
    return f"▼ Ours is not the best here ({'; '.join(told)}). {reasons[target]}"


def tables(cells: Cells, reasons: dict[str, str], intros: dict[str, str]) -> str:
    """Return a section for every target, in Markdown; the rows are sorted by outcome and by time.

    :param reasons: why ours is not the best, by target.
    :param intros: what stands above the table, by target.
    """
    order = {"right": 0, "told": 1, "quiet": 2, "none": 3}
    parts = []
    for target in TARGETS:
        here = {system: rows for (name, system), rows in cells.items() if name == target}
        if not here:
            continue

        def rank(item: tuple[str, list[Row]]) -> tuple[int, float]:
            done = [row for row in item[1] if "cannot" not in row]
            return order[outcome(item[1])], seconds(done) if done else 0.0

        lines = [_line(system, rows) for system, rows in sorted(here.items(), key=rank)]
        missing = [system for system in SYSTEMS if system not in here]
        parts += [
            f"### {target}",
            intros[target],
            f"{HEADER}\n" + "\n".join(lines),
            _standing(target, cells, reasons),
        ]
        if missing:
            parts.append(f"Not run here: {'; '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


def summary(cells: Cells) -> str:
    """Return how many targets every system has run, and with what outcome, as a table."""
    lines = [
        "| system | targets | right | wrong, says so | wrong, does not say so | not ended, or cannot |",
        "|---|---|---|---|---|---|",
    ]
    for system in sorted(SYSTEMS, key=lambda name: name not in OURS):
        outcomes = [outcome(rows) for (_, name), rows in cells.items() if name == system]
        if outcomes:
            name = f"**{system}**" if system in OURS else system
            counts = [outcomes.count(kind) for kind in ("right", "told", "quiet", "none")]
            lines.append(f"| {name} | {len(outcomes)} | " + " | ".join(map(str, counts)) + " |")
    return "\n".join(lines) + "\n"


def one_percent(cells: Cells) -> str:
    """Return what an error of 1 % in the evidence takes, by target and sampler, as a table.

    The seconds of a run times the square of the rms error over .01, of cells with three seeds and more and no
    error above a half: larger ones do not fall with the work. A system that did not end says so.
    """
    found: dict[str, dict[str, str]] = {}
    for (target, system), all_rows in cells.items():
        rows = [row for row in all_rows if row.get("evidence") is not None]
        errors = [row["evidence"] for row in rows]
        if system not in SAMPLERS or len(errors) < MIN_SEEDS or max(map(abs, errors)) > MAX_ERROR:
            continue
        factor = statistics.fmean(error**2 for error in errors) / 0.01**2
        text = f"{factor * seconds(rows):,.0f} s"
        if evaluations := _evaluations(rows, factor / 1000, 1):
            text += f", {evaluations} million".replace(" 0.0 million", " less than 50,000")
        found.setdefault(target, {})[system] = f"{text} ({len(errors)} seeds)"
    lines = [f"| posterior | {' | '.join(SAMPLERS)} |", "|---|" + "---|" * len(SAMPLERS)]
    for target in TARGETS:
        if len(found.get(target, {})) > 1 and SAMPLERS[0] in found[target]:
            texts = [found[target].get(s) or _cannot(cells.get((target, s), [])) for s in SAMPLERS]
            lines.append(f"| {target} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def _cannot(rows: list[Row]) -> str:
    """Return why there is no result of any seed."""
    reasons: list[str] = [row.get("cannot", "") for row in rows]
    return reasons[0] if reasons and all(reasons) else ""


def introduction(target: str) -> str:
    """Return where a target is published, and how its truth is known."""
    made = TARGETS[target]()
    return f"{made.source}. Truth: {made.truth().how}."


def main() -> None:
    """Write tables and picture."""
    cells = cells_of(read(RESULTS))
    reasons = json.loads(REASONS.read_text())
    FIGURES.mkdir(parents=True, exist_ok=True)
    intros = {target: introduction(target) for target in {target for target, _ in cells}}
    (FIGURES / "summary.md").write_text(summary(cells))
    (FIGURES / "one_percent.md").write_text(one_percent(cells))
    (FIGURES / "tables.md").write_text(tables(cells, reasons, intros))
    draw(
        {cell: (outcome(rows), _cell_text(rows)) for cell, rows in cells.items()},
        FIGURES / "overview.png",
    )


def _cell_text(rows: list[Row]) -> str:
    done = [row for row in rows if "cannot" not in row]
    return f"{seconds(done):.0f} s" if done else ""


if __name__ == "__main__":
    main()
