"""How many operations a step launches, and how often it waits for their numbers.

On a graphics card both are read off the card's own record. Elsewhere operations are counted as torch hands
them to its kernels, without views and allocations: about what a card would launch. The recursion of planar
layers counts as one, as its Triton kernel does, since NumPy is not torch.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

#: Operations that launch nothing.
FREE = ("aten.empty", "aten.new_empty", "aten.detach", "aten._local_scalar", "aten.resize", "profiler.")


class Operations(TorchDispatchMode):
    """Count the operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in results)
        if not is_view and not str(func).startswith(FREE):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def count_launches(step: Callable[[], Any], device: torch.device) -> int:
    """Return the number of operations that a step launches."""
    if device.type != "cuda":
        with Operations() as operations:
            step()
        return operations.counts.total()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
    # Triton launches by the driver's own function.
    kinds = ("cudaLaunch", "cuLaunch")
    return sum(event.count for event in profile.key_averages() if event.key.startswith(kinds))


def count_waits(step: Callable[[], Any], device: torch.device) -> int | None:
    """Return how often a step waits for a graphics card, None elsewhere."""
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)
