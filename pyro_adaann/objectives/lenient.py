"""Models run so that one draw they cannot take costs that draw alone: its log density becomes NaN."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_adaann.annealing.tempering import is_delta
from pyro_adaann.checks import learning_sites
from pyro_adaann.objectives.validity import (
    PartlyValid,
    describe_violation,
    valid_entries,
    values_inside,
)
from pyro_adaann.processes.errors import true_of_all_errors
from pyro_adaann.processes.rows import SplitDistribution

__all__ = ["BROKEN_DRAW_ERRORS", "Leniency", "Violations", "run_leniently"]

#: The kinds of errors by which torch refuses a whole batch for one draw.
BROKEN_DRAW_ERRORS = (ValueError, torch.linalg.LinAlgError)

_T = TypeVar("_T")


class Leniency:
    """Whether a model still runs with torch's checks, which refuse a whole batch for one broken draw.

    It runs with them until they refuse something. From then on a parameter that violates its constraint, a
    value outside of its support, such as a scale that has become 0 by rounding, or a matrix that cannot be
    factorized, makes the log density of its own draw NaN. Data outside of their support are refused.

    :param validates: whether to begin with these checks.
    """

    def __init__(self, *, validates: bool = True) -> None:
        self.validates = validates
        #: Whether factorizations are watched, which costs a microsecond for every operation of torch.
        self.watches_factorizations = False
        #: The latest error that was forgiven, which tells why no draw is left if none is.
        self.error: BaseException | None = None
        #: What was wrong with a parameter, by site.
        self.violated: dict[str, str] = {}
        #: Names of the observed sites of the latest run with torch's checks.
        self._observed: set[str] = set()

    def forgive(self, error: BaseException) -> bool:
        """Whether the error may be that of one draw of a batch, and the next run will not raise it.

        If several processes have an error, whether that is true of all.
        """
        is_factorization = isinstance(error, torch.linalg.LinAlgError)
        is_known = not self.watches_factorizations if is_factorization else self._is_of_draw(error)
        forgives = true_of_all_errors(error, is_known and (is_factorization or self.validates))
        if forgives:
            self.error = error
            self.validates = False
            self.watches_factorizations = self.watches_factorizations or is_factorization
        return forgives

    def _is_of_draw(self, error: BaseException) -> bool:
        """Whether the error is of a parameter, or of the value of a latent site."""
        named = re.search(r"at site '([^']*)'", str(error))
        while error.__cause__ is not None:  # Pyro raises anew, with the shapes of the trace
            error = error.__cause__
        if str(error).startswith("Expected parameter"):
            return True
        is_latent = named is not None and named[1] not in self._observed
        return is_latent and str(error).startswith("Expected value argument")

    def insist(self, run: Callable[[], _T]) -> _T:
        """Run within :meth:`block`, and again where an error is forgiven."""
        while True:
            try:
                with self.block():
                    return run()
            except BROKEN_DRAW_ERRORS as error:
                if not self.forgive(error):
                    raise

    @property
    def cause(self) -> str:
        """What has broken draws, as a clause; empty where nothing was forgiven."""
        causes = [f"{what} at site {name!r}" for name, what in self.violated.items()]
        if isinstance(self.error, torch.linalg.LinAlgError):
            # Without the place of a matrix in the batch.
            causes.insert(0, re.sub(r" ?\([^)]*\):?", "", str(self.error).splitlines()[0]).rstrip("."))
        return "; ".join(causes)

    def state(self) -> list[bool]:
        """Return what the next runs depend on, as plain data; :meth:`restore` takes it."""
        return [self.validates, self.watches_factorizations]

    def restore(self, state: list[bool]) -> None:
        """Go on from what :meth:`state` has returned."""
        self.validates, self.watches_factorizations = state

    @contextmanager
    def block(self) -> Iterator[None]:
        """Run the block with torch's checks, or without once they have refused something."""
        if self.validates:
            with _Observed(self._observed):
                yield
            return
        with pyro.validation_enabled(False), Violations(self.violated):
            if not self.watches_factorizations:
                yield
                return
            with _NaNFactors():
                yield


def run_leniently(run: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
    """Run something once, for its sites and shapes, whatever its draw does to the model."""
    with learning_sites():
        return Leniency(validates=False).insist(lambda: run(*args, **kwargs))


class _Observed(Messenger):
    """Note the names of observed sites.

    :param names: gets them.
    """

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["is_observed"]:
            self.names.add(msg["name"])


class Violations(Messenger):
    """Make the log density of a site NaN where a parameter violates its constraint, or a latent value does.

    Without torch's validation it may be finite there and mean nothing, as that of a gamma distribution with
    a negative shape.

    Within :meth:`recorded` the choice between density and NaN is made by operations of torch alone, whether
    or not something is violated, and nothing is noted.

    :param violated: gets what is wrong with a parameter, by site.
    """

    _is_recorded: ClassVar[bool] = False

    def __init__(self, violated: dict[str, str] | None = None) -> None:
        super().__init__()
        self.violated = {} if violated is None else violated

    @classmethod
    @contextmanager
    def recorded(cls) -> Iterator[None]:
        """Run the block so that its operations can be recorded, under handlers that are there, too."""
        before = cls._is_recorded
        cls._is_recorded = True
        try:
            with cls():
                yield
        finally:
            cls._is_recorded = before

    def _pyro_post_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        value = None if msg["is_observed"] else msg["value"]
        if isinstance(fn, SplitDistribution):  # of which this process knows its own rows
            fn.base_dist = self._checked(name, fn.base_dist, None if value is None else fn.own(value))
        else:
            msg["fn"] = self._checked(name, fn, value)

    def _checked(self, name: str, fn: Any, value: Tensor | None) -> Any:
        if self._is_recorded and (isinstance(fn, PartlyValid) or is_delta(fn)):
            return fn  # another handler has done it, or there is no density
        found = (valid_entries(fn), None if value is None else values_inside(fn, value))
        known = [is_valid for is_valid in found if is_valid is not None]
        if not known:
            return fn
        is_valid = known[0] if len(known) == 1 else known[0] & known[1]
        if self._is_recorded:
            return PartlyValid(fn, is_valid)
        if bool(is_valid.all()):  # a card is asked once a site
            return fn
        if name not in self.violated:
            self.violated[name] = describe_violation(fn, value)
        return PartlyValid(fn, is_valid)


class _NaNFactors(TorchFunctionMode):
    """Make factors NaN for the matrices of a batch that have none, and leave the others as they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            return func(*args, **kwargs)
        except torch.linalg.LinAlgError:
            checked = _WITH_INFO.get(func)
            if checked is None:
                raise
            result, info = checked(*args, **kwargs)
            is_good = info == 0
            return torch.where(
                is_good.reshape(*is_good.shape, *[1] * (result.dim() - is_good.dim())), result, torch.nan
            )


#: Functions that raise for a batch, and those that say of every matrix whether it has failed.
_WITH_INFO: dict[Any, Callable[..., Any]] = {
    torch.linalg.cholesky: torch.linalg.cholesky_ex,
    torch.cholesky: torch.linalg.cholesky_ex,
    torch.Tensor.cholesky: torch.linalg.cholesky_ex,
    torch.linalg.inv: torch.linalg.inv_ex,
    torch.inverse: torch.linalg.inv_ex,
    torch.Tensor.inverse: torch.linalg.inv_ex,
    torch.linalg.solve: torch.linalg.solve_ex,
}
