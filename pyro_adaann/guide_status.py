"""How far a guide is annealed, so that whatever hands out its draws can warn below inverse temperature 1.

A guide below 1 looks like any other one. The driver registers it together with the parameters that it trains.
Nothing here keeps a guide alive, and a copy of a guide has no status.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import ref

from pyro import poutine
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["GuideStatus", "expects_tempered", "is_expected", "status_of", "warn_of_draws"]

#: The status of guides, of their parts and of their parameters.
_STATUS: Any = WeakIdKeyDictionary()
#: What lies between the user's line and a draw.
_LIBRARIES = {"pyro_adaann", "pyro", "torch", "contextlib"}
_num_expecting: ContextVar[int] = ContextVar("_num_expecting", default=0)


class GuideStatus:
    """The inverse temperature of one fit's guide, which the fit keeps up to date."""

    def __init__(self) -> None:
        self.inverse_temperature = 1.0
        self.is_final = True
        self._advice: Callable[[], str] = str
        self._modules: list[ref[nn.Module]] = []
        self._hooks: list[Any] = []
        self._warned: set[str] = set()

    def register(self, model: Any, guide: Any, parameters: Iterable[Tensor]) -> None:
        """Make this the status of a guide and of its parameters, in place of that of an earlier fit.

        :param model: the model.
        :param guide: the guide. If it is a module, or a method of one, calls of the module warn below 1,
            unless they are calls of the model.
        :param parameters: those of the guide.
        """
        for parameter in parameters:
            _STATUS[parameter] = self
        guide = poutine.unwrap(guide)
        module = getattr(guide, "__self__", guide)
        if isinstance(module, nn.Module):
            # The parts of an AutoGuideList have methods of their own.
            for part in module.modules():
                _STATUS[part] = self
            self._modules = [] if module is poutine.unwrap(model) else [ref(module)]
        self.move(self.inverse_temperature, self._advice, is_final=self.is_final)

    def move(self, inverse_temperature: float, advice: Callable[[], str], *, is_final: bool) -> None:
        """Record the inverse temperature of the guide.

        :param advice: returns how to go on with the fit, a clause; it must not hold the guide.
        :param is_final: whether annealing ends there.
        """
        self.inverse_temperature, self.is_final, self._advice = inverse_temperature, is_final, advice
        if is_final:
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()
        elif not self._hooks:
            modules = [module for module in (found() for found in self._modules) if module is not None]
            self._hooks = [module.register_forward_pre_hook(_before_call) for module in modules]

    def warn(self, door: str) -> None:
        """Warn of what is handed out, once for every door.

        :param door: what was called.
        """
        if self.is_final or is_expected() or door in self._warned:
            return
        self._warned.add(door)
        warnings.warn(
            f"{door} is one of a tempered posterior: the guide is at inverse temperature "
            f"{self.inverse_temperature:.3g}, {self._advice()}",
            stacklevel=_level_of_caller(),
        )


def status_of(part: Tensor | nn.Module) -> GuideStatus | None:
    """Return the status of the latest fit that has trained a guide, a part or a parameter of it, or None."""
    found: GuideStatus | None = _STATUS.get(part)
    return found


def warn_of_draws(guide: nn.Module, door: str) -> None:
    """Warn if a fit has left the guide below inverse temperature 1, once for every door.

    :param door: what was called, the subject of the message.
    """
    status = status_of(guide)
    if status is not None:
        status.warn(door)


@contextmanager
def expects_tempered() -> Iterator[None]:
    """Hand out draws of a tempered guide within the block without a warning."""
    token = _num_expecting.set(_num_expecting.get() + 1)
    try:
        yield
    finally:
        _num_expecting.reset(token)


def is_expected() -> bool:
    """Whether a block of :func:`expects_tempered` is entered."""
    return _num_expecting.get() > 0


def _level_of_caller() -> int:
    """Return the stack level, from the calling function, of the first frame outside of the libraries."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    return level


def _before_call(module: nn.Module, args: tuple[Any, ...]) -> None:
    # A function of the module, so that guides with the hook are copied and pickled; a copy has no status.
    warn_of_draws(module, "A draw by a call of the guide")
