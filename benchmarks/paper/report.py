"""Redraw the page of the paper's tables and figures from the result files.

    python benchmarks/paper/report.py

Reads ``benchmarks/results/paper/`` and writes ``docs/paper.md`` and ``docs/figures/paper_*.png``. The words
are those of ``page.md`` beside this file; every ``$name`` there is a table made here. Where no record is
there for one, the page says so.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from string import Template

import figures
import tables
from records import RESULTS, Record, read_records
from study_mixtures import SEPARATIONS, flows_of

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs"
MISSING = "*Not run yet.*"


def load(folder: Path) -> dict[str, list[Record]]:
    """Return the records of every study, tiny trials left out."""
    names = ("bimodal", "mixture_1d", "mixture_2d", "times", "odes")
    found = {name: read_records(folder / f"{name}.jsonl") for name in names}
    return {name: [r for r in records if not r.get("fast")] for name, records in found.items()}


def planned_cells() -> list[Record]:
    """Return all cells of examples 2 and 3."""
    return [
        {"case": case, "mu": mu, **cell}
        for case, separations in SEPARATIONS.items()
        for cell in flows_of(case)
        for mu in separations
    ]


def make_tables(records: dict[str, list[Record]]) -> dict[str, str]:
    """Return the tables by their names on the page."""
    mixtures = records["mixture_1d"]
    made = {
        "bimodal_table": records["bimodal"] and tables.bimodal_table(records["bimodal"]),
        "symmetric_table": mixtures and tables.mixture_table(mixtures, "symmetric"),
        "asymmetric_table": mixtures and tables.mixture_table(mixtures, "asymmetric"),
        "plane_table": records["mixture_2d"] and tables.mixture_table(records["mixture_2d"], "plane"),
        "summary_table": mixtures and tables.summary_table(mixtures + records["mixture_2d"]),
        "missing_cells": tables.missing_cells(mixtures + records["mixture_2d"], planned_cells()),
        "times_table": records["times"] and tables.times_table(records["times"]),
        "five_table": tables.five_table(records),
        "lorenz_table": tables.lorenz_table(records["odes"]),
        "hiv_table": tables.hiv_table(records["odes"]),
        "ode_summary": records["odes"] and tables.ode_summary(records["odes"]),
    }
    return {name: table or MISSING for name, table in made.items()}


def figure(name: str, title: str, is_there: bool) -> str:
    """Return the reference to a figure of the page."""
    return f"![{title}](figures/paper_{name}.png)" if is_there else ""


def make_figures(records: dict[str, list[Record]]) -> dict[str, str]:
    """Return the references to the figures by their names on the page."""
    has = {name: bool(found) for name, found in records.items()}
    has_draws = any("draws" in record for record in records["odes"])
    made = {
        "bimodal": ("Fitted densities of example 1 over the exact one", has["bimodal"]),
        "schedules": ("Schedules of examples 1, 4 and 5", has["bimodal"]),
        "mixture_1d": ("Share of the trials with both modes, example 2", has["mixture_1d"]),
        "mixture_2d": ("Share of the trials with both modes, example 3", has["mixture_2d"]),
        "odes": ("Draws of the guide, pair by pair, examples 4 and 5", has_draws),
    }
    return {f"{name}_figure": figure(name, *what) for name, what in made.items()}


def draw(records: dict[str, list[Record]], folder: Path) -> None:
    """Draw all figures for which there are records."""
    folder.mkdir(parents=True, exist_ok=True)
    if records["bimodal"]:
        figures.densities(records["bimodal"], folder / "paper_bimodal.png")
        figures.schedules(records["bimodal"], records["odes"], folder / "paper_schedules.png")
    if records["mixture_1d"]:
        cases = ["symmetric", "asymmetric"]
        figures.capture_rates(records["mixture_1d"], cases, folder / "paper_mixture_1d.png")
    if records["mixture_2d"]:
        figures.capture_rates(records["mixture_2d"], ["plane"], folder / "paper_mixture_2d.png")
    if any("draws" in record for record in records["odes"]):
        figures.posteriors(records["odes"], folder / "paper_odes.png")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the page")
    args = parser.parse_args(arguments)
    records = load(args.results)
    args.out.mkdir(parents=True, exist_ok=True)
    page = Template((HERE / "page.md").read_text()).substitute(make_tables(records), **make_figures(records))
    (args.out / "paper.md").write_text(page)
    # The page on lost modes shows these two too.
    summary = tables.ode_summary(records["odes"]) if records["odes"] else MISSING
    (args.out / "figures").mkdir(exist_ok=True)
    (args.out / "figures" / "modes_ode.md").write_text(summary + "\n")
    (args.out / "figures" / "modes_five.md").write_text(tables.five_table(records) + "\n")
    draw(records, args.out / "figures")
    print(f"wrote {args.out / 'paper.md'}")


if __name__ == "__main__":
    main()
