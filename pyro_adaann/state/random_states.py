"""The states of all random generators that a fit uses, as plain data."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

__all__ = ["get_random_states", "set_random_states"]


def get_random_states() -> dict[str, Any]:
    """Return the states of all generators that Pyro's `set_rng_seed` seeds, as plain data."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002, the one that Pyro seeds
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": [version, list(words), gauss],
        "numpy": [str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Write back what :func:`get_random_states` has returned."""
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
