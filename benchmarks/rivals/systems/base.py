"""What a system hands back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Counter", "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """Draws and what a system says of them.

    :param draws: shape ``(n, dim)``.
    :param log_weights: of the draws, not normalized, shape ``(n,)``; None if all are equal.
    :param log_evidence: None where a system estimates none.
    :param log_evidence_error: that it states.
    :param told: the system's own alarm in a few words, empty if it has none.
    :param num_densities: evaluations of the log density without gradient, None where not known.
    :param num_gradients: evaluations with gradient.
    """

    draws: Any
    log_weights: Any = None
    log_evidence: float | None = None
    log_evidence_error: float | None = None
    told: str = ""
    num_densities: int | None = None
    num_gradients: int | None = None


class Counter:
    """A log density of NumPy points that counts its calls."""

    def __init__(self, log_density: Any) -> None:
        self.log_density = log_density
        self.count = 0

    def __call__(self, z: NDArray[np.float64]) -> Any:
        """Return values at points of shape ``(n, dim)`` or ``(dim,)``; -inf where it is not a number."""
        z = np.asarray(z)
        self.count += len(z) if z.ndim > 1 else 1
        with np.errstate(all="ignore"):
            values = self.log_density(z)
        values = np.where(np.isnan(values), -np.inf, values)
        return values if z.ndim > 1 else float(values)
