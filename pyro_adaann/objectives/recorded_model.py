"""Traces of a model and its guide from records of their operations, for as long as these fit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from pyro.infer import ELBO

from pyro_adaann.annealing.tempering import Tempering
from pyro_adaann.objectives.model_record import ModelRecord
from pyro_adaann.objectives.operations import CannotRecordError
from pyro_adaann.objectives.traces import TraceSource

__all__ = ["ModelRecorder"]

#: Calls that a record did not fit, more than it did, after which there is none.
_MAX_MISSES = 20
#: Numbers of draws of which there is a record.
_MAX_RECORDS = 4


class ModelRecorder:
    """Makes traces of a model and its autoguide from a record, where there is one.

    The first call runs them, with all of Pyro's checks; the next one makes the record, and so does the first
    one with another number of draws. Calls with other arguments run them, too.
    """

    def __init__(self) -> None:
        #: Why nothing is recorded any more; empty while something is.
        self.reason = ""
        self._has_run = False
        self._num_misses = 0
        #: By the number of draws and the nesting of plates.
        self._records: dict[tuple[float, float], ModelRecord] = {}

    def source(
        self, elbo: ELBO, model: Any, guide: Any, tempering: Tempering | None, *, needs_graph: bool
    ) -> TraceSource:
        """Return what makes traces in place of an ELBO.

        :param elbo: whose plate of particles they have.
        :param model: the model without tempering.
        :param guide: its guide, likewise.
        :param tempering: of both, None at inverse temperature 1.
        :param needs_graph: whether the log densities have a graph.
        """

        def make(
            get_traces: Any, tempered: Any, tempered_guide: Any, args: Any, kwargs: Any
        ) -> Iterator[Any]:
            if self._has_run and not self.reason:
                try:
                    record = self._find(elbo, model, guide, args, kwargs, needs_graph)
                    if record is not None:
                        yield record.traces(elbo, tempering, args, kwargs)
                        return
                except CannotRecordError as error:
                    self.give_up(str(error))
            for traces in get_traces(tempered, tempered_guide, args, kwargs):
                self._has_run = True
                yield traces

        return make

    def _find(
        self, elbo: ELBO, model: Any, guide: Any, args: Any, kwargs: Any, needs_graph: bool
    ) -> ModelRecord | None:
        """Return the record if it fits, a new one if there is none of this number of draws."""
        size = elbo.num_particles, elbo.max_plate_nesting
        if size not in self._records:
            if len(self._records) >= _MAX_RECORDS:
                raise CannotRecordError("ever another number of draws")
            self._records[size] = ModelRecord(elbo, model, guide, args, kwargs, needs_graph)
        if self._records[size].fits(model, guide, args, kwargs):
            self._num_misses = max(self._num_misses - 1, 0)
            return self._records[size]
        self._num_misses += 1
        if self._num_misses > _MAX_MISSES:
            raise CannotRecordError("other arguments at most of the steps")
        return None

    def give_up(self, reason: str) -> None:
        """Record nothing from now on, and warn of that once.

        :param reason: what was found, as the end of "got ...".
        """
        if self.reason:
            return
        self.reason = reason
        self._records.clear()
        warnings.warn(
            f"Expected a model, a guide and a loss that do the same operations at every step; got {reason}. "
            f"From now on they run, as without `record_model`.",
            stacklevel=2,
        )
