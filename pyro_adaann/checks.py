"""Checks of arguments that many parts share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["check_callable", "check_count", "kind_of", "learning_sites"]


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


@contextmanager
def learning_sites() -> Iterator[None]:
    """Run a model for its sites, and say what to write where it has latent ones that cannot be used.

    :raises NotImplementedError: if it has an ``ImproperUniform`` prior, or a latent variable that has no map
        from real numbers, such as a positive definite matrix.
    """
    try:
        yield
    except NotImplementedError as error:
        if "ImproperUniform" in str(error):
            raise NotImplementedError(
                "Expected priors that can be sampled, since the model is run once to learn its sites; got "
                "an ImproperUniform. For a flat prior use a proper distribution with the same support and "
                "switch its density off, for example `dist.Normal(0, 10).mask(False)`."
            ) from error
        if "Cannot transform" in str(error):
            raise NotImplementedError(
                f"Expected latent variables whose support has a map from real numbers; got another one "
                f"({str(error).splitlines()[0]}). For a covariance matrix sample its scales and a "
                f"`dist.LKJCholesky`."
            ) from error
        raise
