"""How far apart the inverse temperatures are at which a fit keeps its guide."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Ladder"]


@dataclass(frozen=True)
class Ladder:
    """Keep the guide at inverse temperatures a given distance apart, the lowest rung before training.

    Give one to `AdaAnnSVI` (``ladder=Ladder()``); it may be shared by several fits. The rungs of a fit are in
    ``svi.ladder.rungs``: :func:`diagnose` compares every rung with the next ones and says where a part of the
    posterior was lost; :func:`mixture_draws` weighs draws of all rungs against the posterior;
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
