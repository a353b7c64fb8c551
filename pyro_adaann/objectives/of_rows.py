"""The distributions of one site in the runs of a model for one draw after the other, as one of all draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

__all__ = ["OfRows"]


class OfRows(TorchDistribution):
    """The distributions of one site in all runs.

    :param site: the site in one run.
    :param num_rows: number of draws.
    :param dim: dimension of their plate.
    :param draw: draws all rows, where they depend on what was not known when the site was made.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, site: Any, num_rows: int, dim: int, draw: Callable[[], list[Tensor]] | None) -> None:
        self._fn, self._dim, self._draw = site["fn"], dim, draw
        self.rows: Sequence[Any] = ()
        batch_shape = self._fn.batch_shape
        free = -1 - dim - len(batch_shape)
        if free < 0:
            raise ValueError(
                f"Expected every dimension of site {site['name']!r} to the right of dimension {dim} of the "
                f"draws; got batch shape {tuple(batch_shape)}. Declare it by plates or by to_event."
            )
        super().__init__(
            torch.Size([num_rows, *[1] * free, *batch_shape]), self._fn.event_shape, validate_args=False
        )

    @property
    def support(self) -> Any:
        return self._fn.support

    @property
    def has_rsample(self) -> bool:
        return bool(self._fn.has_rsample)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        if torch.Size(batch_shape) != self.batch_shape:
            raise ValueError(f"Expected batch shape {tuple(self.batch_shape)}; got {tuple(batch_shape)}.")
        return self

    def join(self, rows: Sequence[Tensor]) -> Tensor:
        """Return values of all rows as a batch."""
        value = torch.stack([row.expand(self._fn.shape()) for row in rows])
        return value.reshape(self.batch_shape + self.event_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        if sample_shape:
            raise ValueError(f"Expected one value of every draw; got sample_shape {tuple(sample_shape)}.")
        return self.join(self._draw() if self._draw else [fn() for fn in self.rows])

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        full = value.expand(self.batch_shape + self.event_shape)
        by_row = full.movedim(self._dim - len(self.event_shape), 0)
        values = by_row.reshape(len(self.rows), *self._fn.shape())  # that of a factor has no numbers
        rows = [fn.log_prob(own) for fn, own in zip(self.rows, values, strict=True)]
        return torch.stack([row.expand(self._fn.batch_shape) for row in rows]).reshape(self.batch_shape)
