r"""Are ranks uniform? Three tests, and words for what they find.

With u uniform, :math:`E u = 1/2` and :math:`E (u - 1/2)^2 = 1/12`. Mean and spread are tested for every
number, and the spread, averaged over all numbers of a data set, over data sets: where every number is too
narrow by a little, no single one shows it. The third test is that of Kolmogorov and Smirnov, for whatever
else may be wrong. P-values are multiplied by the number of tests (Bonferroni).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

__all__ = ["Verdict", "judge_ranks"]

#: At most this share of right fits is called wrong.
_LEVEL = 0.01


@dataclass(frozen=True)
class Verdict:
    """What the tests say.

    :param num_datasets: number of data sets.
    :param findings: in words, empty if all is well.
    :param p_values: of every test, by name, corrected for their number.
    """

    num_datasets: int
    findings: tuple[str, ...]
    p_values: dict[str, float]

    def __str__(self) -> str:
        if not self.findings:
            return f"No sign of a wrong posterior in {self.num_datasets} data sets."
        return "\n".join([f"Not calibrated, by {self.num_datasets} data sets:", *self.findings])


def judge_ranks(ranks: dict[str, Tensor]) -> Verdict:
    """Test ranks in (0, 1) for uniformity.

    :param ranks: by site, shape ``(num_datasets,) + shape of the site``.
    """
    columns: dict[str, Tensor] = {}
    for name, value in ranks.items():
        flat = value.double().reshape(len(value), -1)
        indices = product(*map(range, value.shape[1:]))
        for index, column in zip(indices, flat.unbind(1), strict=True):
            label = f"{name}[{', '.join(map(str, index))}]" if index else name
            columns[label] = column
    num = len(next(iter(columns.values())))
    tests: dict[str, tuple[float, str]] = {}
    for label, u in columns.items():
        bias = float(u.mean() - 0.5) * math.sqrt(12 * num)
        side = "too low" if bias > 0 else "too high"
        tests[f"{label}: mean"] = _normal_tail(bias), f"{label}: the posteriors are {side}"
        spread = float((u - 0.5).square().mean() - 1 / 12) * math.sqrt(180 * num)
        tests[f"{label}: spread"] = _normal_tail(spread), f"{label}: the posteriors are {_width(spread)}"
        tests[f"{label}: shape"] = _kolmogorov_tail(u), f"{label}: the ranks are not uniform"
    if len(columns) > 1 and num > 2:
        each = (torch.stack(list(columns.values()), dim=1) - 0.5).square().mean(1) - 1 / 12
        pooled = float(each.mean() / each.std() * math.sqrt(num))
        tests["all: spread"] = _normal_tail(pooled), f"all together: the posteriors are {_width(pooled)}"
    p_values = {name: min(1.0, p * len(tests)) for name, (p, _) in tests.items()}
    findings = tuple(text for name, (_, text) in tests.items() if p_values[name] < _LEVEL)
    return Verdict(num, findings, p_values)


def _width(spread: float) -> str:
    return "too narrow" if spread > 0 else "too wide"


def _normal_tail(z: float) -> float:
    return math.erfc(abs(z) / math.sqrt(2))


def _kolmogorov_tail(u: Tensor) -> float:
    """Return the probability of a larger distance from uniform, by Stephens' approximation."""
    num = len(u)
    ordered = u.sort().values
    grid = torch.arange(num + 1, dtype=torch.float64, device=u.device) / num
    distance = max(float((grid[1:] - ordered).max()), float((ordered - grid[:-1]).max()))
    x = (math.sqrt(num) + 0.12 + 0.11 / math.sqrt(num)) * distance
    total = sum((-1) ** (k - 1) * math.exp(-2 * (k * x) ** 2) for k in range(1, 101))
    return min(1.0, max(0.0, 2 * total)) if x > 0.2 else 1.0
