"""What a loss supports, and which losses can be tempered.

A user's own loss declares an attribute ``capabilities``, an instance of :class:`Capabilities`; those of
Pyro's losses and their subclasses are listed here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyro import poutine
from pyro.infer import (
    ELBO,
    EnergyDistance,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    Trace_MMD,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    TraceTMC_ELBO,
)
from pyro.poutine.messenger import Messenger

from pyro_adaann.annealing.paths import Path
from pyro_adaann.annealing.tempering import flow_parts

__all__ = ["Capabilities", "capabilities_of", "check_can_temper", "elbo_of", "reads_densities_alone"]

#: The cost of a broken draw above that of a typical good one, in nats, see `drop_broken`.
_BROKEN_COST = 10.0


@dataclass(frozen=True)
class Capabilities:
    """What a loss supports.

    :param drops_broken: whether a particle can be left out, since the loss is a sum over particles.
    :param broken_cost: cost of a draw that is left out, in nats, by which the gradient lowers the guide's
        mass there; 0 for a loss that does so itself.
    :param drops_lost: whether draws a thousand nats below the others are also left out.
    :param needs_posterior: whether the loss weights draws by the density of a given posterior, which excludes
        paths on which the guide's own density has a weight.
    :param reports_loss: whether its value is meaningful.
    :param is_tempered: whether it tempers model and guide itself, so that the driver must not.
    :param is_compiled: whether it is compiled once, which freezes the inverse temperature.
    :param compares_samples: whether it compares draws and evaluates no density.
    :param has_analytic_kl: whether prior and guide share one weight.
    :param reads_densities_alone: whether of the sites of a model, and of the `Delta` sites of a guide, it
        reads values and log densities, and no distribution: those may then be recorded. A subclass of a loss
        of Pyro's declares it, or is not recorded.

    Example::

        >>> Capabilities(drops_broken=True).broken_cost
        10.0
    """

    drops_broken: bool = False
    broken_cost: float = _BROKEN_COST
    drops_lost: bool = False
    needs_posterior: bool = False
    reports_loss: bool = True
    is_tempered: bool = False
    is_compiled: bool = False
    compares_samples: bool = False
    has_analytic_kl: bool = False
    reads_densities_alone: bool = False


#: Capabilities of Pyro's losses: those of the first row that a loss is an instance of.
_OF_PYRO: list[tuple[Any, Capabilities]] = [
    (
        (JitTrace_ELBO, JitTraceGraph_ELBO, JitTraceEnum_ELBO, JitTraceMeanField_ELBO),
        Capabilities(is_compiled=True),
    ),
    ((Trace_MMD, EnergyDistance), Capabilities(compares_samples=True)),
    (TraceMeanField_ELBO, Capabilities(has_analytic_kl=True)),
    # Its loss is always infinite.
    (TraceTailAdaptive_ELBO, Capabilities(needs_posterior=True, reports_loss=False)),
    ((RenyiELBO, ReweightedWakeSleep, TraceTMC_ELBO), Capabilities(needs_posterior=True)),
    (Trace_ELBO, Capabilities(drops_broken=True)),
]


def capabilities_of(loss: Any) -> Capabilities:
    """Return the capabilities that a loss declares, or those of its class of Pyro's."""
    loss = elbo_of(loss) or loss
    own = getattr(loss, "capabilities", None)
    if isinstance(own, Capabilities):
        return own
    return next((found for kind, found in _OF_PYRO if isinstance(loss, kind)), Capabilities())


def reads_densities_alone(loss: ELBO) -> bool:
    """Return whether a loss declares so, or is one of Pyro's of which that is known."""
    own = getattr(loss, "capabilities", None)
    if isinstance(own, Capabilities):
        return own.reads_densities_alone
    return type(loss) in (Trace_ELBO, RenyiELBO)


def elbo_of(loss: Any) -> ELBO | None:
    """Return the ELBO that a loss is, or is a bound method of."""
    owner = getattr(loss, "__self__", loss)
    return owner if isinstance(owner, ELBO) else None


def check_can_temper(guide: Callable[..., Any], loss: Any, path: Path) -> None:
    """Raise a `ValueError` that names the way out if this guide or loss cannot be tempered."""
    found, kind = capabilities_of(loss), type(elbo_of(loss) or loss).__name__
    if found.is_compiled:
        raise ValueError(
            f"Expected a loss that is computed anew at every step; got {kind}, whose trace would "
            f"freeze the inverse temperature. Use {kind.removeprefix('Jit')}."
        )
    if found.compares_samples:
        raise ValueError(
            f"Expected a loss made of log densities; got {kind}, which compares samples and does "
            f"not see an inverse temperature. Use Trace_ELBO."
        )
    if found.has_analytic_kl and path.prior != path.entropy:
        raise ValueError(
            f"Expected a loss that weighs prior and guide apart on path {path.name!r}; got {kind}, "
            f"whose analytic KL has one weight. Use Trace_ELBO, or path='likelihood' or 'kl_warmup'."
        )
    if found.needs_posterior and path.entropy != 1:
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
