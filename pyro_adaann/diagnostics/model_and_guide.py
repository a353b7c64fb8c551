"""What a fit consists of, and checks of its traces before its draws are weighed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from pyro.infer import SVI
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample

from pyro_adaann.objectives.tempered_elbo import TemperedTrace_ELBO
from pyro_adaann.objectives.traces import sites_of, subsampled_plate
from pyro_adaann.svi import AdaAnnSVI

__all__ = [
    "Fit",
    "check_latents",
    "check_subsampling",
    "get_inverse_temperature",
    "get_model_and_guide",
    "has_scale",
    "latent_names",
    "plate_nesting",
]

#: A fit: an `AdaAnnSVI`, a `pyro.infer.SVI`, or a pair ``(model, guide)``.
Fit: TypeAlias = "SVI | tuple[Callable[..., Any], Callable[..., Any]]"


def get_model_and_guide(svi: Fit) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return model and guide of an `SVI`, or of a pair ``(model, guide)``.

    :raises ValueError: if ``svi`` is neither.
    """
    if isinstance(svi, SVI):
        return svi.model, svi.guide
    if isinstance(svi, tuple) and len(svi) == 2 and all(map(callable, svi)):
        return svi
    raise ValueError(
        f"Expected an AdaAnnSVI, a pyro.infer.SVI or a pair (model, guide); got {type(svi).__name__}."
    )


def latent_names(trace: Trace) -> list[str]:
    """Return the names of the latent sites of a trace."""
    return [s["name"] for s in sites_of(trace) if not (s["is_observed"] or site_is_subsample(s))]


def plate_nesting(*traces: Trace) -> int:
    """Return the number of dimensions that plates take, from the right."""
    frames = [frame for trace in traces for site in sites_of(trace) for frame in site["cond_indep_stack"]]
    return max((-frame.dim for frame in frames if frame.vectorized), default=0)


def has_scale(trace: Trace) -> bool:
    """Whether a site of a trace has a log density that is scaled."""
    scales = [site["scale"] for site in sites_of(trace)]
    return any(bool((s != 1).any()) if torch.is_tensor(s) else s != 1 for s in scales)


def check_latents(prototype: Trace, names: list[str]) -> None:
    """Raise a `ValueError` if a latent site that the guide does not draw is not enumerated either."""
    missing = [name for name in names if prototype.nodes[name]["infer"].get("enumerate") != "parallel"]
    if missing:
        raise ValueError(
            f"Expected the guide to draw every latent site of the model; got none for "
            f"{', '.join(map(repr, missing))}. Add them to the guide, or sum discrete sites out with "
            f'infer={{"enumerate": "parallel"}}.'
        )


def check_subsampling(*traces: Trace) -> None:
    """Raise a `ValueError` if a plate is subsampled."""
    frame = subsampled_plate(*traces)
    if frame is not None:
        raise ValueError(
            f"Expected every plate in full; got {frame.size} of {frame.full_size} in plate "
            f"{frame.name!r}. The weights of a random part of the data are not those of the posterior: call "
            f"with the whole plate, for example by making its subsample_size an argument of the model that "
            f"is None here."
        )


def get_inverse_temperature(svi: Fit) -> float:
    """Return the inverse temperature at which a guide has been trained, 1 for plain Pyro."""
    if isinstance(svi, AdaAnnSVI):
        return float(svi.inverse_temperature)
    loss = getattr(getattr(svi, "loss", None), "__self__", None)
    return loss.inverse_temperature if isinstance(loss, TemperedTrace_ELBO) else 1.0
