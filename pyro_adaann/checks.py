"""Checks of arguments that many parts share."""

from __future__ import annotations

__all__ = ["check_count"]


def check_count(name: str, value: int | None, minimum: int) -> None:
    """Raise a `ValueError` unless ``value`` is an integer from ``minimum`` up, or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < minimum):
        raise ValueError(f"Expected `{name}` to be an integer >= {minimum}; got {value!r}.")
