"""Checks of arguments that many parts share."""

from __future__ import annotations

from typing import Any

__all__ = ["check_callable", "check_count", "kind_of"]


def check_count(name: str, value: int | None, minimum: int) -> None:
    """Raise a `ValueError` unless ``value`` is an integer from ``minimum`` up, or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < minimum):
        raise ValueError(f"Expected `{name}` to be an integer >= {minimum}; got {value!r}.")


def check_callable(name: str, value: Any, example: str) -> None:
    """Raise a `ValueError` unless ``value`` can be called as a model or guide is.

    :param example: how one is made of a class, such as ``AutoPlanar(model)``.
    """
    if callable(value) and not isinstance(value, type):
        return
    make = f"Make one of it, as in {example}" if isinstance(value, type) else f"Pass the {name} itself"
    raise ValueError(f"Expected `{name}` to be a function or a module; got {kind_of(value)}. {make}.")


def kind_of(value: Any) -> str:
    """Return what a value is, for a message: the class of an object, or which class or function it is."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    name = getattr(value, "__name__", None)
    return type(value).__name__ if name is None else f"the function {name}"
