"""The rows of one process among the particles, and distributions of them that stand for all rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from pyro.poutine.runtime import get_plates
from torch import Tensor

from pyro_adaann.processes.group import ProcessError, process_count, process_index

__all__ = ["PARTICLE_PLATE", "Rows", "SplitDistribution", "find_rows"]

#: The name that Pyro gives the plate of a vectorized ELBO.
PARTICLE_PLATE = "num_particles_vectorized"

#: Fewest rows of a process. A single one would look like a dimension that broadcasts.
_MIN_ROWS = 2


@dataclass(frozen=True)
class Rows:
    """The rows ``start`` to ``stop`` of ``total``, in dimension ``dim`` of a batch, from the right."""

    total: int
    start: int
    stop: int
    dim: int

    def are_in(self, shape: torch.Size) -> bool:
        """Whether a batch of this shape has these rows."""
        return len(shape) >= -self.dim and shape[self.dim] == self.stop - self.start

    def of(self, values: Tensor, dim: int) -> Tensor:
        """Return these rows of the values of all rows, whose dimension is ``dim``."""
        return values.narrow(dim, self.start, self.stop - self.start)

    def own(self, value: Tensor, dim: int) -> Tensor:
        """Return these rows of a value, or the value where its dimension ``dim`` does not have all rows."""
        has_rows = value.dim() >= -dim and value.shape[dim] == self.total
        return self.of(value, dim) if has_rows else value

    def among_all(self, values: Tensor, dim: int) -> Tensor:
        """Return values of these rows with zeros for the others."""
        shape = list(values.shape)
        shape[dim] = self.total
        result = values.new_zeros(shape)
        self.of(result, dim).copy_(values)
        return result


def find_rows() -> Rows | None:
    """Return the rows of this process, None if there is no plate to divide."""
    count, index = process_count(), process_index()
    for frame in get_plates():
        if frame.name == PARTICLE_PLATE and frame.size >= _MIN_ROWS * count:
            start, stop = frame.size * index // count, frame.size * (index + 1) // count
            return Rows(frame.size, start, stop, frame.dim)
    return None


class SplitDistribution(TorchDistribution):
    """A distribution of these rows that stands for that of all rows, at one value.

    :param name: of its site.
    :param fn: the distribution of the rows of this process.
    :param rows: these.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, name: str, fn: Any, rows: Rows) -> None:
        self.base_dist = fn
        self._name, self._rows = name, rows
        #: What it is evaluated at in this process.
        self.own_value: Any = None
        #: Log density of the rows of this process, then of all.
        self.own_log_prob = self.full_log_prob = torch.empty(0)
        self.has_rsample = fn.has_rsample
        batch_shape = list(fn.batch_shape)
        batch_shape[rows.dim] = rows.total
        super().__init__(torch.Size(batch_shape), fn.event_shape, validate_args=False)

    @property
    def has_enumerate_support(self) -> bool:
        return bool(self.base_dist.has_enumerate_support)

    @property
    def support(self) -> Any:
        return self.base_dist.support

    def enumerate_support(self, expand: bool = True) -> Tensor:
        values: Tensor = self.base_dist.enumerate_support(expand=expand)
        return values

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        if torch.Size(batch_shape) != self.batch_shape:
            raise ValueError(f"Expected batch shape {tuple(self.batch_shape)}; got {tuple(batch_shape)}.")
        return self

    def own(self, value: Tensor) -> Tensor:
        """Return the rows of a value that are those of this process."""
        return self._rows.own(value, self._rows.dim - len(self.event_shape))

    def score(self) -> None:
        """Compute the log density of the rows of this process.

        :raises ValueError: as Pyro does, with the name of the site.
        """
        try:
            self.own_log_prob = self.base_dist.log_prob(self.own_value)
        except ValueError as error:
            raise ValueError(f"Error while computing log_prob at site {self._name!r}:\n{error}") from error

    def log_prob(self, value: Tensor) -> Tensor:
        return self.full_log_prob

    def sample(self, sample_shape: Any = ()) -> Tensor:
        raise ProcessError(
            f"Expected a guide that draws every latent site of the model, with {process_count()} processes; "
            f"got a {type(self.base_dist).__name__} that the model draws itself, by draws of the guide. Add "
            f"the site to the guide, or use one process."
        )

    rsample = sample
