"""An export of several fits in which every fit is a chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pyro_adaann.fitting.mixture import Apart

__all__ = ["export_by_fit"]


def export_by_fit(
    model: Callable[..., Any],
    guides: Sequence[Callable[..., Any]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    settings: dict[str, Any],
) -> Any:
    """Return one data set with the draws of every guide, weighted by themselves, as a chain.

    :param settings: arguments of :func:`~pyro_adaann.to_arviz`.
    """
    from pyro_adaann.export.arviz import to_arviz

    fits = [to_arviz((model, Apart(guide)), *args, **settings, **kwargs) for guide in guides]
    if len(fits) == 1:
        return fits[0]
    if hasattr(fits[0], "groups") and callable(fits[0].groups):  # InferenceData, of ArviZ before version 1
        import arviz

        concat: Any = arviz.concat  # its stubs do not have several data sets as arguments
        return concat(*fits, dim="chain", reset_dim=True)
    import xarray

    rules: dict[str, Any] = {"data_vars": "minimal", "coords": "minimal", "compat": "override"}
    return xarray.concat(fits, "chain", join="outer", **rules)
