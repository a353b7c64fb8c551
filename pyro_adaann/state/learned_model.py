"""A model that has parameters of its own, which annealing would fit to tempered posteriors."""

from __future__ import annotations

import warnings
from collections.abc import Collection

from torch import Tensor

from pyro_adaann.annealing.paths import Path

__all__ = ["warn_of_learning"]

_MAX_NAMES = 3


def warn_of_learning(
    found: dict[str, Tensor], names_of_guide: Collection[str] | None, path: Path, inverse_temperature: float
) -> None:
    """Warn if a model learns parameters on a path that flattens its prior.

    :param found: parameters of model and guide by name.
    :param names_of_guide: those of the guide; None if they are not known.
    :param path: the path of tempered densities.
    :param inverse_temperature: that of the first step.
    """
    if names_of_guide is None or path.prior > 0 or path.entropy < 1 or inverse_temperature >= 1:
        return
    names = [name for name, value in found.items() if name not in names_of_guide and value.requires_grad]
    if not names:
        return
    listed = ", ".join(names[:_MAX_NAMES]) + (
        f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    )
    warnings.warn(
        f"The model has parameters ({listed}), which path {path.name!r} fits to tempered posteriors, prior "
        f"and likelihood alike, until the inverse temperature is 1. To learn a model take path='kl_warmup' "
        f"with a fixed schedule such as LinearSchedule, or path='likelihood'.",
        stacklevel=7,
    )
