"""Results as files of tensors, numbers and strings, read without running any code of theirs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_adaann.diagnostics.importance import WeightedDraws
from pyro_adaann.diagnostics.lost_parts import LadderReport, LostPart
from pyro_adaann.diagnostics.reach import Reach
from pyro_adaann.diagnostics.rules import Finding, Level
from pyro_adaann.diagnostics.thermodynamic import ThermodynamicEstimate
from pyro_adaann.diagnostics.verdict import Diagnosis
from pyro_adaann.fitting.coordinates import Coordinates, location_family
from pyro_adaann.fitting.summary import FitSummary
from pyro_adaann.guides.base import AutoFlow
from pyro_adaann.guides.continuous import continuous_part
from pyro_adaann.guides.spline import AutoSpline
from pyro_adaann.nested.guide import NestedGuide
from pyro_adaann.objectives.lenient import run_leniently
from pyro_adaann.state.checkpoint import read_checkpoint, write_checkpoint
from pyro_adaann.state.rungs import Rung

__all__ = ["Guide", "read_result", "write_result"]

#: What the draws of a result are of.
Guide: TypeAlias = AutoFlow | NestedGuide
#: Tells a result from the checkpoint of a fit.
_KIND = "FitResult"


def write_result(
    path: str | os.PathLike[str],
    *,
    draws: WeightedDraws,
    diagnosis: Diagnosis,
    remarks: Sequence[Finding],
    fits: Sequence[FitSummary],
    seconds: float,
    guides: Sequence[Guide],
    centered: Mapping[str, Tensor],
) -> None:
    """Write the fields of a result, whole or not at all."""
    state = {
        "kind": _KIND,
        "draws": _fields(draws),
        "diagnosis": _diagnosis_state(diagnosis),
        "remarks": [[int(remark.level), remark.sentence] for remark in remarks],
        "fits": [dataclasses.asdict(fit) for fit in fits],
        "seconds": seconds,
        "guides": [guide.state_dict() for guide in guides],
        "centered": dict(centered),
    }
    write_checkpoint(path, state)


def read_result(
    path: str | os.PathLike[str],
    model: Callable[..., Any] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[dict[str, Any], list[Guide]]:
    """Return the fields of a result, and its guides if there is a model to make them for.

    :raises ValueError: if it is no result, or one of another model.
    """
    state = read_checkpoint(path)
    if state.get("kind") != _KIND:
        raise ValueError(
            f"Expected a file of FitResult.save; got {os.fspath(path)!r}, the checkpoint of a fit. Read it "
            f"with load_checkpoint of an AdaAnnSVI."
        )
    fields = {
        "draws": WeightedDraws(**state["draws"]),
        "diagnosis": _diagnosis(state["diagnosis"]),
        "remarks": tuple(Finding(Level(level), sentence) for level, sentence in state["remarks"]),
        "fits": tuple(FitSummary(**fit) for fit in state["fits"]),
        "seconds": state["seconds"],
        "centered": state.get("centered", {}),  # not in files of earlier versions
    }
    if model is not None:
        _check_sites(path, model, args, kwargs, fields["centered"])
        model = Coordinates(model, args, kwargs, fields["centered"]).model
    guides = [] if model is None else [_guide(path, model, args, kwargs, own) for own in state["guides"]]
    return fields, guides


def _check_sites(
    path: str | os.PathLike[str],
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    centered: Mapping[str, Tensor],
) -> None:
    """Raise a `ValueError` if a model lacks a site that was fitted in other coordinates."""
    if not centered:
        return
    with poutine.block(), torch.no_grad(), pyro.get_param_store().scope():
        trace = run_leniently(poutine.trace(model).get_trace, *args, **kwargs)
    for name, numbers in centered.items():
        site = trace.nodes.get(name)
        shape = None if site is None else tuple(site["value"].shape)
        if shape != tuple(numbers.shape) or not hasattr(location_family(site["fn"]), "scale"):
            found = "no such site" if shape is None else f"{type(site['fn']).__name__} of shape {shape}"
            raise ValueError(
                f"Expected the result of this model with these arguments; got {os.fspath(path)!r} of "
                f"another, with a scale and shape {tuple(numbers.shape)} at site {name!r} where this has "
                f"{found}. Give the model that was fitted, and its arguments."
            )


def _guide(
    path: str | os.PathLike[str],
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    state: dict[str, Any],
) -> Guide:
    if NestedGuide.is_state(state):
        nested = NestedGuide.of_state(model, state).initialize(*args, **kwargs)
        num = nested.get_posterior(*args, **kwargs).event_shape[0]
        if num != nested.latent_dim:
            raise _of_another(path, num, nested.latent_dim)
        return nested
    guide = AutoSpline(continuous_part(model)).initialize(*args, **kwargs)
    # One that starts at a full covariance has a last part that others have not.
    factor = next((value for name, value in state.items() if name.endswith(".start_factor")), None)
    if factor is not None and len(factor) == guide.latent_dim:
        guide = AutoSpline(continuous_part(model), base_scale=factor).initialize(*args, **kwargs)
    try:
        guide.load_state_dict(state)
    except RuntimeError as error:
        raise _of_another(path, len(state["_base_loc"]), guide.latent_dim) from error
    return guide


def _of_another(path: str | os.PathLike[str], found: int, expected: int) -> ValueError:
    return ValueError(
        f"Expected the result of this model with these arguments; got {os.fspath(path)!r} of another, "
        f"with {found} free numbers where this has {expected}. Give the model that was fitted."
    )


def _fields(record: Any) -> dict[str, Any]:
    """Return the fields of a record, not copied as `dataclasses.asdict` does."""
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def _diagnosis_state(diagnosis: Diagnosis) -> dict[str, Any]:
    state = _fields(diagnosis)
    if diagnosis.ladder is not None:
        # The rungs hold guides; their places are enough to read what was lost.
        lost = [[loss.lower, loss.upper, loss.share, loss.share_se] for loss in diagnosis.ladder.lost]
        state["ladder"] = {
            "num_rungs": diagnosis.ladder.num_rungs,
            "lost": lost,
            "min_ess": diagnosis.ladder.min_ess,
        }
    for name in ("reach", "thermodynamic"):
        if state[name] is not None:
            state[name] = _fields(state[name])
    return state


def _diagnosis(state: dict[str, Any]) -> Diagnosis:
    state = dict(state)
    if state["ladder"] is not None:
        lost = [
            LostPart(Rung(lower, {}, {}), lower, upper, share, se)
            for lower, upper, share, se in state["ladder"]["lost"]
        ]
        state["ladder"] = LadderReport(state["ladder"]["num_rungs"], lost, state["ladder"]["min_ess"])
    if state["reach"] is not None:
        state["reach"] = Reach(**{**state["reach"], "sites": tuple(state["reach"]["sites"])})
    if state["thermodynamic"] is not None:
        state["thermodynamic"] = ThermodynamicEstimate(**state["thermodynamic"])
    return Diagnosis(**state)
