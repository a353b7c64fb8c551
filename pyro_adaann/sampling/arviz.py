"""Chains and weighted draws of the samplers as data for ArviZ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from torch import Tensor

from pyro_adaann.version import __version__

__all__ = ["draws_to_arviz"]


def draws_to_arviz(
    posterior: Mapping[str, Tensor],
    sample_stats: Mapping[str, Tensor],
    attrs: Mapping[str, Any],
    stages: Mapping[str, Sequence[float]] | None = None,
    *,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
) -> Any:
    """Return chains as ``arviz.InferenceData``, or as ``xarray.DataTree`` with ArviZ 1.x.

    :param posterior: draws by site, shape ``(chains, draws) + shape of the site``.
    :param sample_stats: likewise, one number a draw.
    :param attrs: numbers and strings that go with them.
    :param stages: for the group ``annealing``, one number a stage.
    :param coords: labels of dimensions.
    :param dims: names of the dimensions of sites.
    :raises ImportError: if there is no ArviZ.
    """
    import xarray

    data: dict[str, Any] = {"posterior": _to_numpy(posterior)}
    if sample_stats:
        data["sample_stats"] = _to_numpy(sample_stats)
    labels: dict[str, Any] = {
        "coords": dict(coords or {}),
        "dims": {name: list(d) for name, d in (dims or {}).items()},
    }
    attrs = {
        "inference_library": "pyro_adaann",
        "inference_library_version": __version__,
        **attrs,
    }
    annealing = None
    if stages:
        columns = {name: ("stage", np.asarray(values, dtype=float)) for name, values in stages.items()}
        annealing = xarray.Dataset(columns)
    if _has_old_arviz():
        import arviz

        old = arviz.from_dict(**data, **labels, attrs=attrs)
        if annealing is not None:
            old.add_groups({"annealing": annealing})
        return old
    try:
        from arviz_base import from_dict
    except ImportError as error:
        raise ImportError("Expected ArviZ to be installed; got none. Run `pip install arviz`.") from error
    new = from_dict(data, **labels, attrs={"/": attrs})
    if annealing is not None:
        new["annealing"] = xarray.DataTree(annealing)
    return new


def _to_numpy(part: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: value.detach().cpu().numpy() for name, value in part.items()}


def _has_old_arviz() -> bool:
    try:
        return int(version("arviz").split(".")[0]) < 1
    except PackageNotFoundError:
        return False
