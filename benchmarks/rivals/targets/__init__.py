"""The targets, by name, in the order in which they are run: from the cheapest."""

from __future__ import annotations

from collections.abc import Callable

from .base import Target, Truth
from .bayesian import breast_cancer, brownian_gap, eight_schools
from .item_response import item_response
from .odes import hiv, lorenz, lotka_volterra, lynx_hare
from .simulators import slcp, two_moons
from .synthetic import (
    forty_modes,
    funnel,
    ill_conditioned,
    many_well,
    student_mixture,
    two_modes_50,
)
from .volatility import stochastic_volatility

__all__ = ["QUICK", "TARGETS", "Target", "Truth"]

TARGETS: dict[str, Callable[[], Target]] = {
    "forty modes, 2-D": forty_modes,
    "funnel, 10-D": funnel,
    "eight schools, centered": eight_schools,
    "two moons": two_moons,
    "many-well, 32-D": many_well,
    "two modes, 50-D": two_modes_50,
    "Student t mixture, 2-D": student_mixture,
    "breast cancer, 31-D": breast_cancer,
    "Brownian gap, 32-D": brownian_gap,
    "SLCP": slcp,
    "HIV": hiv,
    "Lorenz": lorenz,
    "ill-conditioned, 100-D": ill_conditioned,
    "lynx and hare": lynx_hare,
    "Lotka-Volterra": lotka_volterra,
    "stochastic volatility, 103-D": stochastic_volatility,
    "item response, 501-D": item_response,
}
#: What ``--quick`` runs.
QUICK = ("forty modes, 2-D", "funnel, 10-D", "eight schools, centered", "two moons")
