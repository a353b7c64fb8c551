"""The figures of the page, from the records of the studies."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from records import Record
from study_bimodal import FIGURE_GRID, bimodal
from tables import METHODS, groups, hiv, is_captured, is_paper, lorenz

__all__ = ["capture_rates", "densities", "posteriors", "schedules"]

STYLES = {"adaann": "o-", "covering": "D-", "linear": "s--", "natural": "*-", "none": "x:", "realnvp": "^-."}


def save(figure: Figure, path: Path) -> None:
    """Write a figure; without the time in it, so that the same records give the same file."""
    figure.savefig(path, dpi=130, metadata={"Software": None})


def densities(records: list[Record], path: Path) -> None:
    """Figures 1, 2 and 4: the fits of example 1 over the exact density."""
    firsts = [record for record in records if record["trial"] == 0 and "density" in record]
    firsts.sort(key=lambda r: (r["method"] == "adaann", r["method"] == "linear", -(r["tolerance"] or 0)))
    figure = Figure(figsize=(9, 5), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True).flat
    for panel, record in zip(panels, firsts, strict=False):
        panel.fill_between(FIGURE_GRID, bimodal.log_density(FIGURE_GRID).exp(), color="0.85")
        panel.plot(FIGURE_GRID, record["density"])
        tolerance = f", tau = {record['tolerance']:g}" if record["tolerance"] else ""
        panel.set(title=f"{METHODS[record['method']]}{tolerance}".replace("none", "no annealing"))
    save(figure, path)


def schedules(bimodal_records: list[Record], ode_records: list[Record], path: Path) -> None:
    """Figures 3, 10, 14 and 18: inverse temperature by stage."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for record in bimodal_records:
        if "schedule" in record and record["method"] == "adaann":
            _draw_schedule(left, record, f"tau = {record['tolerance']:g}")
        elif "schedule" in record and record["method"] == "linear":
            _draw_schedule(left, record, "linear")
    left.set(title="example 1", xscale="log")
    for record in bimodal_records:
        if "schedule" in record and record["method"] == "adaann" and record["tolerance"] == 0.01:
            _draw_schedule(right, record, "example 1")
    for record in ode_records:
        if "schedule" in record:
            _draw_schedule(right, record, f"{record['example']}, {record['setting']}".replace("_", " "))
    right.set(title="examples 1, 4 and 5", xscale="log", yscale="log")
    for panel in (left, right):
        panel.set(xlabel="stage", ylabel="inverse temperature")
        if panel.lines:
            panel.legend(frameon=False, fontsize=7)
    save(figure, path)


def _draw_schedule(panel: Axes, record: Record, label: str) -> None:
    stages, temperatures = zip(*record["schedule"], strict=True)
    panel.plot([stage + 1 for stage in stages], temperatures, label=label, linewidth=1.2)


def capture_rates(records: Iterable[Record], cases: list[str], path: Path) -> None:
    """Figures 6 and 8: share of the trials that keep both modes."""
    figure = Figure(figsize=(4.4 * len(cases), 3.4), layout="constrained")
    panels = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    records = list(records)
    for panel, case in zip(panels, cases, strict=True):
        cells = groups(
            (r for r in records if r["case"] == case and not r["method"].endswith("_svi") and is_paper(r)),
            lambda r: (r["method"], r["hidden_dim"], r["num_transforms"]),
        )
        for (method, hidden_dim, num_transforms), part in cells.items():
            shares = {
                mu: sum(map(is_captured, trials)) / len(trials)
                for (mu,), trials in groups(part, lambda r: (r["mu"],)).items()
            }
            label = f"{METHODS[method]}, L = {num_transforms}".replace("*", "")
            label += f", H = {hidden_dim}" if hidden_dim else ""
            panel.plot(list(shares), [100 * share for share in shares.values()], STYLES[method], label=label)
        panel.set(title=case, xlabel="mu", ylim=(-5, 105))
        panel.legend(frameon=False, fontsize=7)
    panels[0].set_ylabel("both modes, % of the trials")
    save(figure, path)


def posteriors(records: Iterable[Record], path: Path) -> None:
    """Figures 11, 12 and 15 to 17: draws of the guide, pair by pair, and the true values."""
    found = [record for record in records if "draws" in record]
    figure = Figure(figsize=(9, 2.7 * len(found)), layout="constrained")
    rows = figure.subplots(len(found), 3, squeeze=False)
    for panels, record in zip(rows, found, strict=True):
        truth = (hiv if record["example"] == "hiv" else lorenz).TRUTH
        names = list(record["draws"])
        for panel, (i, j) in zip(panels, ((0, 1), (0, 2), (1, 2)), strict=True):
            x, y = (torch.tensor(record["draws"][names[k]]) for k in (i, j))
            panel.plot(x, y, ".", markersize=2)
            panel.plot(truth[names[i]], truth[names[j]], "k+")
            panel.set(xlabel=names[i], ylabel=names[j])
        panels[0].set_title(f"{record['example']}, {record['setting']}".replace("_", " "), fontsize=9)
    save(figure, path)
