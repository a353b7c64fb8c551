"""The tables of the page, in Markdown, from the records of the studies."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median

from records import Record

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import hiv
import lorenz
from comparison import MIN_SHARE
from posterior import REFERENCES, load_reference

__all__ = [
    "bimodal_table",
    "five_table",
    "hiv_table",
    "lorenz_table",
    "missing_cells",
    "mixture_table",
    "summary_table",
    "times_table",
]

#: A weight is right within this of one half.
RIGHT = 0.05
METHODS = {
    "none": "none",
    "linear": "linear",
    "adaann": "AdaAnn",
    "adaann_svi": "AdaAnn, driver",
    "covering": "AdaAnn, *mass-covering loss*",
    "covering_svi": "AdaAnn, *mass-covering loss*, driver",
    "realnvp": "RealNVP, none",
    "natural": "CESS, *natural gradients*",
}


#: Settings of a trial that are not the paper's, where a record has them.
OTHER_SETTINGS = {"rate": "learning rate", "particles": "particles", "final_steps": "steps at t = 1"}


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def is_captured(record: Record) -> bool:
    """Whether both modes have at least a tenth of their weight."""
    return MIN_SHARE <= record["first_mode"] <= 1 - MIN_SHARE


def is_right(record: Record) -> bool:
    """Whether the weights of the modes are right within 0.05."""
    return abs(record["first_mode"] - 0.5) <= RIGHT


def groups(records: Iterable[Record], key: Callable[[Record], tuple]) -> dict[tuple, list[Record]]:
    """Return records by key, in the order of the keys."""
    found: dict[tuple, list[Record]] = {}
    for record in records:
        found.setdefault(key(record), []).append(record)
    return dict(sorted(found.items()))


def middle(records: Iterable[Record], name: str, digits: int = 3) -> str:
    """Return the median of a number, where there is one."""
    values = [record[name] for record in records if record[name] is not None]
    return _number(median(values), digits) if values else "-"


def spread(records: Iterable[Record], name: str) -> str:
    """Return the median of a count, and its range if it has one."""
    values = sorted(record[name] for record in records)
    if values[0] == values[-1]:
        return f"{values[0]:,}"
    return f"{median(values):,.0f} ({values[0]:,} to {values[-1]:,})"


def quality(records: list[Record]) -> list[str]:
    """Return the cells that all examples with an exact density share."""
    weights = sorted(record["first_mode"] for record in records)
    weighted = sorted(record["weighted_first_mode"] for record in records)
    return [
        f"{sum(map(is_captured, records))} of {len(records)}",
        f"{sum(map(is_right, records))} of {len(records)}",
        f"{weights[0]:.2f} to {weights[-1]:.2f}",
        f"{weighted[0]:.2f} to {weighted[-1]:.2f}",
        middle(records, "total_variation"),
        middle(records, "kl"),
        middle(records, "ess", 2),
        middle(records, "log_evidence"),
        spread(records, "num_steps"),
    ]


QUALITY = [
    "both modes",
    "weights right",
    "weight of one mode",
    "importance weighted",
    "total variation",
    "KL(p to q)",
    "ESS share",
    "log evidence",
    "updates",
]


def is_paper(record: Record) -> bool:
    """Whether a trial has the paper's settings."""
    return not any(record.get(name) for name in OTHER_SETTINGS)


def method_name(record: Record) -> str:
    """Return the method, and what of its settings is not the paper's."""
    other = [f", *{record[name]:g} {what}*" for name, what in OTHER_SETTINGS.items() if record.get(name)]
    return METHODS[record["method"]] + "".join(other)


def flow(record: Record) -> str:
    """Return the size of a flow in words."""
    hidden = f", H = {record['hidden_dim']}" if record["hidden_dim"] else ""
    return f"{record['num_transforms']}{hidden}"


def mixture_table(records: Iterable[Record], case: str) -> str:
    """Return the table of one case of examples 2 and 3."""
    order = list(METHODS)
    cells = groups(
        (r for r in records if r["case"] == case),
        lambda r: (
            r["mu"],
            order.index(r["method"]),
            r["hidden_dim"],
            r["num_transforms"],
            *(r.get(name) or 0 for name in OTHER_SETTINGS),
        ),
    )
    rows = [
        [f"{part[0]['mu']:g}", method_name(part[0]), flow(part[0]), *quality(part)] for part in cells.values()
    ]
    return markdown(["mu", "annealing", "layers", *QUALITY], rows)


#: Steps in the paper, by tolerance.
PAPER_STEPS = {1.0: "10", 0.1: "56", 0.01: "355", 0.001: "2,929", None: "-"}


def bimodal_table(records: Iterable[Record]) -> str:
    """Return the table of example 1: no annealing, linear, and AdaAnn by tolerance."""
    cells = groups(records, lambda r: (r["method"] == "adaann", r["method"], -(r["tolerance"] or 0)))
    rows = []
    for part in cells.values():
        method, tolerance = part[0]["method"], part[0]["tolerance"]
        name = METHODS[method] + (f", tau = {tolerance:g}" if tolerance else "")
        paper = "9,902" if method == "linear" else PAPER_STEPS[tolerance]
        rows.append([name, spread(part, "num_stages"), paper, *quality(part)])
    return markdown(["annealing", "inverse temperatures", "paper", *QUALITY], rows)


def summary_table(records: Iterable[Record]) -> str:
    """Return, over all separations, in how many trials each method keeps both modes."""
    order = list(METHODS)
    cells = groups(filter(is_paper, records), lambda r: (r["case"], order.index(r["method"])))
    rows = [
        [
            part[0]["case"],
            METHODS[part[0]["method"]],
            ", ".join(f"{mu:g}" for mu in sorted({r["mu"] for r in part})),
            f"{sum(map(is_captured, part))} of {len(part)}",
            f"{sum(map(is_right, part))} of {len(part)}",
        ]
        for part in cells.values()
    ]
    return markdown(["case", "annealing", "mu", "both modes", "weights right"], rows)


def missing_cells(records: Iterable[Record], planned: Iterable[Record]) -> str:
    """Return, as a list, the cells of examples 2 and 3 that no record is of."""
    names = ("case", "method", "num_transforms", "hidden_dim")

    def key(record: Record) -> tuple:
        return tuple(record[name] for name in names)

    done = {(*key(record), record["mu"]) for record in records if is_paper(record)}
    lines = []
    for part in groups(planned, key).values():
        lacking = [f"{cell['mu']:g}" for cell in part if (*key(cell), cell["mu"]) not in done]
        if lacking:
            name = f"{part[0]['case']}, {METHODS[part[0]['method']]}, L = {flow(part[0])}"
            lines.append(f"* {name}: mu = {', '.join(lacking)}")
    return "\n".join(lines) or "None."


#: Seeds of an ODE example whose fits have rows of their own.
_NUM_SHOWN = 3
#: Minutes in the paper's Table 2, median.
PAPER_MINUTES = {"none 25": 2.84, "none 50": 5.71, "none 75": 11.28, "linear 50": 7.23, "adaann 50": 3.25}


def times_table(records: list[Record]) -> str:
    """Return processor time over that of no annealing with 50 layers, trial by trial."""
    rows = []
    for name, minutes in PAPER_MINUTES.items():
        ratios = sorted(r["cpu_seconds"][name] / r["cpu_seconds"]["none 50"] for r in records)
        per_step = median(
            (r["cpu_seconds"][name] / r["num_steps"][name])
            / (r["cpu_seconds"]["none 50"] / r["num_steps"]["none 50"])
            for r in records
        )
        method, layers = name.split()
        rows.append(
            [
                METHODS[method],
                layers,
                f"{median(r['num_steps'][name] for r in records):,.0f}",
                f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                f"{minutes / PAPER_MINUTES['none 50']:.2f}",
                f"{per_step:.2f}",
            ]
        )
    return markdown(["annealing", "layers", "updates", "time", "time, paper", "time of an update"], rows)


def _mean_sd(pair: Sequence[float | None]) -> str:
    mean, sd = pair
    return "-" if mean is None or sd is None else f"{mean:.4f} ({sd:.5f})"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _fit_cells(record: Record) -> list[str]:
    return [
        f"{record['num_stages']:,}",
        f"{record['num_steps']:,}",
        _number(record["ess"], 3),
        _number(record["k_hat"], 2),
        _number(record["log_evidence"], 3),
    ]


def _exact_cells(example: str, key: str) -> list[str]:
    entry = json.loads((REFERENCES / f"{example}.json").read_text())["posteriors"][key]
    # The evidence of HIV is that of both modes.
    log_evidence = entry["log_evidence"] + (math.log(2) if example == "hiv" else 0)
    return ["-", "-", "1", "-", f"{log_evidence:.3f}"]


FIT = ["stages", "updates", "ESS share", "k-hat", "log evidence"]


def lorenz_table(records: Iterable[Record]) -> str:
    """Return Table 4: exact, paper, and every fit."""
    headings = ["noise variance", "fit", "s", "b", "r", *FIT]
    rows = []
    for variance in ("0.2", "0.001"):
        exact = load_reference("lorenz", variance) or {}
        rows.append([variance, "exact", *map(_mean_sd, exact.values()), *_exact_cells("lorenz", variance)])
        stages = {"0.2": "140", "0.001": "778"}[variance]
        paper = map(_mean_sd, lorenz.PAPER[float(variance)].values())
        rows.append([variance, "paper", *paper, stages, "-", "-", "-", "-"])
        for record in _fits(records, f"lorenz_{variance}"):
            moments = record["modes"]["only"]["moments"]
            rows.append([variance, _name(record), *map(_mean_sd, moments.values()), *_fit_cells(record)])
    return markdown(headings, rows)


def hiv_table(records: Iterable[Record]) -> str:
    """Return Table 6: exact, paper, and both modes of every fit."""
    headings = ["mode", "fit", "weight", "p1", "p2", "x2(0)", *FIT]
    rows = []
    for mode in ("negative", "positive"):
        exact = map(_mean_sd, (load_reference("hiv", mode) or {}).values())
        rows.append([mode, "exact", "0.5", *exact, *_exact_cells("hiv", mode)])
        paper = map(_mean_sd, hiv.PAPER[mode].values())
        rows.append([mode, "paper", "-", *paper, "4,645", "-", "-", "-", "-"])
        for record in _fits(records, "hiv"):
            part = record["modes"][mode]
            cells = map(_mean_sd, part["moments"].values())
            rows.append([mode, _name(record), f"{part['share']:.3f}", *cells, *_fit_cells(record)])
    return markdown(headings, rows)


def ode_summary(records: Iterable[Record]) -> str:
    """Return, over the seeds of every example and settings, the smallest and the largest of everything."""
    headings = ["example", "settings", "seeds", "updates", "ESS share", "sds, guide"]
    headings += ["sds, weighted", "means, weighted", "share of a mode", "its weight", "alarms"]
    rows = []
    for (example, setting), fits in sorted(groups(records, lambda r: (r["example"], r["setting"])).items()):
        errors: dict[str, list[float]] = {"sd": [], "weighted_sd": [], "weighted_mean": []}
        for record in fits:
            for key, part in record["modes"].items():
                name = "hiv" if example == "hiv" else "lorenz"
                exact = load_reference(name, key if name == "hiv" else example.removeprefix("lorenz_")) or {}
                for site, (mean, sd) in exact.items():
                    if part["moments"][site][1] is None or part["share"] < 0.01:
                        continue
                    errors["sd"].append(part["moments"][site][1] / sd)
                    errors["weighted_sd"].append(part["weighted_moments"][site][1] / sd)
                    errors["weighted_mean"].append((part["weighted_moments"][site][0] - mean) / sd)
        modes = [record["modes"].get("positive", {}) for record in fits]
        rows.append(
            [
                example.replace("_", " "),
                setting,
                str(len(fits)),
                f"{median(record['num_steps'] for record in fits):,.0f}",
                _span(record["ess"] for record in fits),
                *(_span(values) for values in errors.values()),
                *(_span(mode[key] for mode in modes if mode) for key in ("share", "weighted_share")),
                str(sum(bool(record["alarm"]) for record in fits)),
            ]
        )
    return markdown(headings, rows)


def five_table(records: dict[str, list[Record]]) -> str:
    """Return the five examples with the paper's settings and with natural gradients, side by side."""
    rows = []
    for example, fits in _five(records).items():
        for settings, part in fits.items():
            if not part:
                continue
            seconds = [record["seconds"] for record in part if record["seconds"] is not None]
            rows.append(
                [
                    example,
                    settings,
                    str(len(part)),
                    f"{median(record['num_steps'] for record in part):,.0f}",
                    f"{median(seconds):.0f} ({len(seconds)})" if seconds else "-",
                    _span(record["ess"] for record in part),
                    _span(record["share"] for record in part if record["share"] is not None),
                    _span(record["weight"] for record in part if record["weight"] is not None),
                    _number(max(abs(record["error"]) for record in part), 3),
                ]
            )
    headings = ["example", "settings", "seeds", "updates", "CPU s (fits)", "ESS share"]
    return markdown([*headings, "share of a mode", "its weight", "worst log evidence error"], rows)


def _five(records: dict[str, list[Record]]) -> dict[str, dict[str, list[Record]]]:
    """Return the fits of every example by settings, with the numbers that all of them have."""
    found: dict[str, dict[str, list[Record]]] = {}
    one = [record for record in records["bimodal"] if record["tolerance"] in (0.01, None)]
    found["1, bimodal"] = {
        name: [_density_fit(r, r["cpu_seconds"]) for r in one if r["method"] == method]
        for name, method in (("paper", "adaann"), ("natural", "natural"))
    }
    for number, case, mu in ((2, "symmetric", 4), (2, "asymmetric", 5), (3, "plane", 0.5)):
        cell = [
            record
            for record in records["mixture_2d" if case == "plane" else "mixture_1d"]
            if record["case"] == case and record["mu"] == mu and is_paper(record)
        ]
        # Trials that run together say nothing of the time of one.
        found[f"{number}, {case}, mu = {mu:g}"] = {
            "paper": [
                _density_fit(r, r["cpu_seconds"] if r["method"] == "adaann_svi" else None)
                for r in cell
                if r["method"] in ("adaann", "adaann_svi")
            ],
            "natural": [_density_fit(r, r["cpu_seconds"]) for r in cell if r["method"] == "natural"],
        }
    for number, example in ((4, "lorenz_0.2"), (4, "lorenz_0.001"), (5, "hiv")):
        name, _, key = example.partition("_")
        exact = float(_exact_cells(name, key or "positive")[-1])
        fits = [record for record in records["odes"] if record["example"] == example]
        found[f"{number}, {example.replace('_', ' ')}"] = {
            setting: [
                {
                    **{key: record[key] for key in ("num_steps", "ess")},
                    "seconds": record["cpu_seconds"],
                    "share": record["modes"].get("positive", {}).get("share"),
                    "weight": record["modes"].get("positive", {}).get("weighted_share"),
                    "error": record["log_evidence"] - exact,
                }
                for record in fits
                if record["setting"] == setting
            ]
            for setting in ("paper", "natural")
        }
    return found


def _density_fit(record: Record, seconds: float | None) -> Record:
    return {
        **{key: record[key] for key in ("num_steps", "ess")},
        "seconds": seconds,
        "share": record["first_mode"],
        "weight": record["weighted_first_mode"],
        "error": record["log_evidence"],
    }


def _span(values: Iterable[float]) -> str:
    found = list(values)
    return f"{min(found):.2f} to {max(found):.2f}" if found else "-"


def _fits(records: Iterable[Record], example: str) -> list[Record]:
    # The summary has the others.
    found = [record for record in records if record["example"] == example and record["trial"] < _NUM_SHOWN]
    return sorted(found, key=lambda record: (record["setting"], record["trial"]))


def _name(record: Record) -> str:
    return f"{record['setting']}, seed {record['trial']}"
