"""`pytest --device cuda`: the tests that do not depend on the device, there.

A module of such tests says so by the marker `any_device`: it makes tensors on torch's default device, and
compares them with others of that device.
"""

from __future__ import annotations

import pytest
import torch

__all__ = ["find_device", "select"]


def find_device(name: str) -> torch.device:
    """Return a device that can compute here.

    :raises pytest.UsageError: if it cannot.
    """
    try:
        device = torch.device(name)
        if float(torch.ones(2, device=device).sum()) != 2:
            raise RuntimeError("it computes wrongly")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise pytest.UsageError(
            f"Expected `--device` to be one that computes here; got {name!r} ({reason}). Install torch for "
            f"it, or leave the option out."
        ) from error
    return device


def select(items: list[pytest.Item], device: torch.device) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Return the tests to be run on a device, and the others."""
    if device.type == "cpu":
        return items, []
    eligible = [item for item in items if item.get_closest_marker("any_device")]
    return eligible, [item for item in items if item not in eligible]
