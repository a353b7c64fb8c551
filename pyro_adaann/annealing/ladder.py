"""The distance between the inverse temperatures at which a fit keeps copies of its guide."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Ladder"]


@dataclass(frozen=True)
class Ladder:
    """Keep copies of the guide at inverse temperatures a given distance apart, the first before training.

    Pass one to `AdaAnnSVI` (``ladder=Ladder()``); several fits may share it. The rungs of a fit are in
    ``svi.ladder.rungs``: :func:`diagnose` compares every rung with the next ones and reports where a part of
    the posterior was lost; :func:`mixture_draws` weights draws of all rungs against the posterior;
    ``svi.restart(rung)`` anneals again from a rung. A rung costs as much memory as the parameters and
    their optimizers.

    :param distance: between two rungs; 1 is a divergence of about half a nat.
    :raises ValueError: if it is not positive.

    Example::

        >>> Ladder(distance=0.5)
        Ladder(distance=0.5)
    """

    distance: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.distance < math.inf:
            raise ValueError(f"Expected `distance` > 0; got {self.distance}.")
