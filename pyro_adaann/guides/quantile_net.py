"""Quantiles of a flow without randomness: of the images of a low-discrepancy sample of its base."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

__all__ = ["normal_net", "quantiles_of_columns"]

#: Points of the net.
_NUM_POINTS = 8192


def normal_net(dim: int, like: Tensor) -> Tensor:
    """Return a low-discrepancy sample of the standard normal distribution, the same in every call.

    :param dim: number of columns.
    :param like: a tensor of the dtype and the device that the sample is to have.
    """
    num_columns = min(dim, SobolEngine.MAXDIM)
    with torch.device("cpu"):  # the same points on every device
        uniform = SobolEngine(num_columns, scramble=True, seed=0).draw(_NUM_POINTS, dtype=torch.float64)
        if num_columns < dim:
            generator = torch.Generator().manual_seed(0)
            rest = torch.rand(_NUM_POINTS, dim - num_columns, generator=generator)
            uniform = torch.cat([uniform, rest.double()], dim=-1)
    return torch.special.ndtri(uniform.clamp(1e-12, 1 - 1e-12)).to(like)


def quantiles_of_columns(values: Tensor, levels: Tensor) -> Tensor:
    """Return the quantiles of every column, ``(num_levels, num_columns)``."""
    # One column at a time: torch.quantile takes at most 2^24 numbers.
    columns = [column.quantile(levels) for column in values.unbind(-1)]
    return torch.stack(columns, dim=-1) if columns else values[: len(levels)]
