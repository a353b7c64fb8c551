"""What a loss can bear, and which losses and guides can be tempered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro import poutine
from pyro.infer import (
    EnergyDistance,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_MMD,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    TraceTMC_ELBO,
)
from pyro.poutine.messenger import Messenger

from pyro_adaann.annealing.paths import Path
from pyro_adaann.annealing.tempering import flow_parts

__all__ = ["check_can_temper"]

#: Losses with importance weights p / q.
_IMPORTANCE_WEIGHTED = RenyiELBO | ReweightedWakeSleep | TraceTailAdaptive_ELBO | TraceTMC_ELBO


def check_can_temper(guide: Callable[..., Any], loss: Any, path: Path) -> None:
    """Raise a `ValueError` that names the way out if this guide or loss cannot be tempered."""
    kind = type(loss).__name__
    if isinstance(loss, JitTrace_ELBO | JitTraceGraph_ELBO | JitTraceEnum_ELBO | JitTraceMeanField_ELBO):
        raise ValueError(
            f"Expected a loss that is computed anew at every step; got {kind}, whose trace would "
            f"freeze the inverse temperature. Use {kind.removeprefix('Jit')}."
        )
    if isinstance(loss, Trace_MMD | EnergyDistance):
        raise ValueError(
            f"Expected a loss made of log densities; got {kind}, which compares samples and does "
            f"not see an inverse temperature. Use Trace_ELBO."
        )
    if isinstance(loss, TraceMeanField_ELBO) and path.prior != path.entropy:
        raise ValueError(
            f"Expected a loss that weighs prior and guide apart on path {path.name!r}; got {kind}, "
            f"whose analytic KL has one weight. Use Trace_ELBO, or path='likelihood' or 'kl_warmup'."
        )
    if isinstance(loss, _IMPORTANCE_WEIGHTED) and path.entropy != 1:
        raise ValueError(
            f"Expected a loss that is linear in the log densities on path {path.name!r}; got {kind}, "
            f"whose importance weights have the guide's density itself as denominator, not a power of "
            f"it. Use Trace_ELBO, or path='likelihood'."
        )
    if isinstance(poutine.unwrap(guide), Messenger):
        raise ValueError(
            f"Expected a guide that runs apart from the model; got a {type(guide).__name__}, an "
            f"effect handler that runs the model itself. Use AutoPlanar, AutoNormal or another "
            f"guide of Pyro's."
        )
    if path.base and not flow_parts(guide):
        raise ValueError(
            f"Expected a guide with a base distribution (`get_base_dist`) on path {path.name!r}; "
            f"got {getattr(guide, '__name__', type(guide).__name__)}. Use AutoPlanar, AutoRealNVP "
            f"or AutoMultivariateNormal, or path='likelihood'."
        )
