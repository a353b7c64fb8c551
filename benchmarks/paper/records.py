"""Result files of the studies: a line of JSON for every finished trial, so that a stopped study goes on.

A study is a list of tasks. A task runs one or more trials of one cell, in a process of its own, and returns
a record of each; this process alone writes, as soon as a task ends. A cell is a small dictionary, for
example ``{"example": "mixture_1d", "mu": 4, "method": "adaann"}``, and its items stand in every record.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

__all__ = [
    "RESULTS",
    "Record",
    "Task",
    "add_arguments",
    "missing_trials",
    "read_records",
    "run_tasks",
    "thin",
]

RESULTS = Path(__file__).resolve().parents[1] / "results" / "paper"

Record = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """Trials of one cell that run in one process.

    ``run(cell, trials)`` returns their records, without cell and trial; it must be a function of a module.
    """

    run: Callable[[Mapping[str, Any], list[int]], list[Record]]
    cell: Mapping[str, Any]
    trials: list[int] = field(default_factory=list)


def read_records(path: Path) -> list[Record]:
    """Return the records of a file, none if it does not exist; half a last line is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # the process was killed while it wrote
    return records


def missing_trials(records: Iterable[Record], cell: Mapping[str, Any], num_trials: int) -> list[int]:
    """Return which of the trials 0, ..., ``num_trials - 1`` of a cell have no record.

    An item that a record does not have counts as None there.
    """
    done = {r["trial"] for r in records if all(r.get(key) == value for key, value in cell.items())}
    return [trial for trial in range(num_trials) if trial not in done]


def run_tasks(tasks: list[Task], path: Path, num_workers: int) -> None:
    """Run tasks in ``num_workers`` processes and append their records to a file as they end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _end_last_line(path)
    total = sum(len(task.trials) for task in tasks)
    with tqdm(total=total, unit="trial", desc=path.stem, smoothing=0) as bar, path.open("a") as file:
        for records in _results(tasks, num_workers):
            file.writelines(json.dumps(_rounded(record)) + "\n" for record in records)
            file.flush()
            bar.update(len(records))


def _results(tasks: list[Task], num_workers: int) -> Iterable[list[Record]]:
    if num_workers == 1:
        yield from map(_run, tasks)
        return
    # A fresh interpreter each: torch's threads do not survive a fork.
    with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
        yield from pool.imap_unordered(_run, tasks)


def _run(task: Task) -> list[Record]:
    import torch

    torch.set_num_threads(1)  # the processes share the cores
    records = task.run(task.cell, task.trials)
    return [
        {**task.cell, "trial": trial, **record} for trial, record in zip(task.trials, records, strict=True)
    ]


def _end_last_line(path: Path) -> None:
    text = path.read_text() if path.exists() else ""
    if text and not text.endswith("\n"):
        path.write_text(text + "\n")


def _rounded(value: Any) -> Any:
    """Seven digits: a sd may be 1e-4 of the mean. What is not finite is null: JSON has no word for it."""
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def add_arguments(parser: argparse.ArgumentParser, num_trials: int) -> None:
    """Add what the commands of all studies share."""
    parser.add_argument("--trials", type=int, default=num_trials, help="trials of every cell")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--fast", action="store_true", help="tiny settings, to see that it runs")
    parser.add_argument("--file", type=Path, help="result file; by default that of the page")


def thin(values: list[float], most: int = 400) -> list[list[float]]:
    """Return at most about ``most`` pairs (index, value), the first and the last among them."""
    every = max(1, len(values) // most)
    indices = sorted({*range(0, len(values), every), len(values) - 1})
    return [[index, values[index]] for index in indices]
