r"""Single particles, read off the traces that an ELBO makes.

Every ELBO of Pyro's runs guide and model in ``_get_traces`` and then adds up their log densities.
:func:`traces_seen` gives the driver these traces before the sum, and with them the log factor
d/dt log p_t of every particle, at no cost in model runs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from opt_einsum import shared_intermediates
from pyro import poutine
from pyro.infer import ELBO
from pyro.infer.traceenum_elbo import _compute_model_factors
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.rings import SampleRing
from pyro.poutine import Trace
from torch import Tensor

from pyro_adaann.annealing.tempering import Tempering
from pyro_adaann.objectives.sites import PARTICLE_PLATE, common_scale
from pyro_adaann.processes.split import split

__all__ = [
    "PARTICLE_PLATE",
    "TraceSource",
    "as_numbers",
    "captured_parameters",
    "check_full_plates",
    "draw_log_factors",
    "finite_log_weights",
    "log_density",
    "log_factors",
    "log_weights",
    "marginal_log_density",
    "per_particle",
    "sites_of",
    "subsampled_plate",
    "traces_seen",
    "with_num_particles",
]

#: Last digit of a log density, in nats, from which on it says nothing.
_MAX_ROUNDING = 100.0
#: A sum lower than so many last digits of its terms is low, and not what rounding has left.
_NUM_DIGITS = 1000.0

#: Makes pairs of traces of a model and a guide, given an ELBO's own way to make them, the two, and their
#: arguments.
TraceSource: TypeAlias = Callable[..., Iterator[Any]]


@contextmanager
def traces_seen(
    loss: ELBO, look: Callable[[Trace, Trace], None], source: TraceSource | None = None
) -> Iterator[None]:
    """Show ``look`` every (model, guide) trace that ``loss`` makes within the block, before it adds it up.

    :param source: makes the traces, if ``loss`` does not itself.
    """
    get_traces = loss._get_traces if source is None else partial(source, loss._get_traces)

    def _get_traces(model: Any, guide: Any, args: Any, kwargs: Any) -> Iterator[Any]:
        for traces in get_traces(model, guide, args, kwargs):
            look(*traces)
            yield traces

    own = vars(loss).get("_get_traces")
    loss._get_traces = _get_traces
    try:
        yield
    finally:
        if own is None:
            del loss._get_traces
        else:
            loss._get_traces = own


def with_num_particles(loss: ELBO, num_particles: int) -> ELBO:
    """Return a copy of ``loss`` with another number of particles."""
    result = copy.copy(loss)
    result.num_particles = num_particles
    if loss.vectorize_particles:
        # Pyro counts the particle plate into the nesting if there is more than one particle.
        result.max_plate_nesting += (num_particles > 1) - (loss.num_particles > 1)
    return result


def per_particle(site: Any, log_prob: Tensor) -> Tensor:
    """Sum the log density of a site over everything but the particles."""
    for frame in site["cond_indep_stack"]:
        if frame.name == PARTICLE_PLATE and log_prob.dim() >= -frame.dim:
            # All of the rest, and nothing where the particles are the only dimension.
            dim = log_prob.dim() + frame.dim
            return log_prob.transpose(0, dim).reshape(log_prob.shape[dim], -1).sum(-1)
    return log_prob.sum()


def as_numbers(total: Tensor | float, trace: Trace) -> Tensor:
    """Return a sum over sites, a plain number if there were none, flat and on the device of a trace."""
    device = next((site["value"].device for site in sites_of(trace)), None)
    return torch.as_tensor(total, device=device).reshape(-1)


def log_density(trace: Trace) -> Tensor:
    """Return the log density of all sites, flat, one number for each particle.

    It is not a number where terms are so large that in their precision the last digit is a hundred nats and
    more, and they cancel. Far away two such terms, of a prior and of a likelihood, may leave nothing but
    rounding, which looks like a place of immense density. Where the sum is as low as they are large, it is
    the density of a place without any.
    """
    terms = [per_particle(site, site["log_prob"]) for site in sites_of(trace)]
    total = as_numbers(sum(terms), trace)
    for term in terms:
        last_digit = as_numbers(term.detach(), trace).abs() * torch.finfo(term.dtype).eps
        is_rounding = (last_digit > _MAX_ROUNDING) & (total > -_NUM_DIGITS * last_digit)
        total = torch.where(is_rounding, torch.nan, total)
    return total


def log_factors(tempering: Tempering, model_trace: Trace, guide_trace: Trace) -> Tensor | None:
    """Return d/dt log p_t of every particle of a pair of traces, detached, shape ``(n,)``.

    Without a scale that model and guide share (:func:`~pyro_adaann.objectives.sites.common_scale`).

    None if discrete sites are enumerated in the guide: such a trace has no single value per particle.
    """
    if any("_enumerate_dim" in s["infer"] or "_enum_total" in s["infer"] for s in sites_of(guide_trace)):
        return None
    with torch.no_grad():
        total: Any = 0.0
        model_rates = tempering.model_rates
        if any("_enumerate_dim" in site["infer"] for site in sites_of(model_trace)):
            # The marginal of the enumerated sites moves with the likelihood; correct the others.
            path, t = tempering.path, tempering.inverse_temperature
            common = (1 - path.likelihood) / path.likelihood_weight(t)
            total = common * marginal_log_density(model_trace, guide_trace)
            model_rates = {name: rate - common for name, rate in model_rates.items()}
        for site in sites_of(model_trace):
            rate = model_rates.get(site["name"], 0.0)
            if rate and "_enumerate_dim" not in site["infer"]:
                total = total + rate * per_particle(site, site["log_prob"])
        for site in sites_of(guide_trace):
            rate = tempering.guide_rates.get(site["name"], 0.0)
            if rate:
                total = total - rate * per_particle(site, site["log_prob"])
    return as_numbers(total, model_trace) / common_scale(guide_trace)


def log_weights(model_trace: Trace, guide_trace: Trace) -> Tensor:
    """Return log p_t - log q of every particle of a pair of traces, detached, shape ``(n,)``.

    Without a scale that model and guide share (:func:`~pyro_adaann.objectives.sites.common_scale`).
    """
    with torch.no_grad():
        if any("_enumerate_dim" in site["infer"] for site in sites_of(model_trace)):
            log_p: Any = marginal_log_density(model_trace, guide_trace)
        else:
            log_p = sum(per_particle(site, site["log_prob"]) for site in sites_of(model_trace))
        log_q = sum(per_particle(site, site["log_prob"]) for site in sites_of(guide_trace))
    return as_numbers(log_p - log_q, model_trace) / common_scale(guide_trace)


def finite_log_weights(model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, Tensor]:
    """Return :func:`log_weights`, minus infinity for broken particles, and which are not marked broken."""
    log_weight = log_weights(model_trace, guide_trace)
    broken = next((site["is_broken"] for site in sites_of(guide_trace) if "is_broken" in site), None)
    is_kept = torch.ones_like(log_weight, dtype=torch.bool) if broken is None else ~broken
    return torch.where(is_kept, log_weight, -torch.inf), is_kept


def captured_parameters(trace: Trace) -> dict[str, Tensor]:
    """Return the unconstrained parameters in a trace by name."""
    values = {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "param"}
    # With `module_local_params`, Pyro hands out the parameters of a torch module as they are.
    return {
        name: value.unconstrained() if hasattr(value, "unconstrained") else value
        for name, value in values.items()
    }


def sites_of(trace: Trace) -> Iterator[Any]:
    """Yield the sample sites of a trace."""
    for site in trace.nodes.values():
        if site["type"] == "sample":
            yield site


def subsampled_plate(*traces: Trace) -> Any:
    """Return the frame of a plate of which a trace has a part alone, or None."""
    for trace in traces:
        for site in sites_of(trace):
            for frame in site["cond_indep_stack"]:
                if frame.full_size is not None and frame.size != frame.full_size:
                    return frame
    return None


def check_full_plates(advice: str, *traces: Trace) -> None:
    """Raise a `ValueError` if a trace has a part of a plate alone.

    :param advice: what to do, the end of the message.
    """
    frame = subsampled_plate(*traces)
    if frame is not None:
        raise ValueError(
            f"Expected every plate in full; got {frame.size} of {frame.full_size} in plate "
            f"{frame.name!r}. The weights of a random part of the data are not those of the "
            f"posterior: {advice}"
        )


def marginal_log_density(model_trace: Trace, guide_trace: Trace) -> Tensor:
    """Sum the enumerated sites of a model out, as `TraceEnum_ELBO` does; one value per particle."""
    costs, factors, _, enum_dims, scale = _compute_model_factors(model_trace, guide_trace)
    terms = [term for group in costs.values() for term in group]
    sizes = {
        dim: size
        for group in factors.values()
        for term in group
        for dim, size in zip(term._pyro_dims, term.shape, strict=True)
    }
    with shared_intermediates() as cache:
        ring = SampleRing(cache=cache, dim_to_size=sizes)
        for group in contract_tensor_tree(factors, enum_dims, ring=ring).values():
            terms += [packed.scale_and_mask(term, scale=scale) for term in group]
    particle_dim = model_trace.plate_to_symbol.get(PARTICLE_PLATE)
    total: Any = 0.0
    for term in terms:
        dims = [i for i, symbol in enumerate(term._pyro_dims) if symbol != particle_dim]
        total = total + (term.sum(dims) if dims else term)
    return total


def draw_log_factors(
    loss: ELBO, tempering: Tempering, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """Return a fresh log factor and log weight for every particle of ``loss``, shape ``(2, n)``.

    The paper's way (M draws per stage); it costs that many model evaluations, vectorized if ``loss``
    is. Sites that the guide would enumerate are drawn: one value per particle.
    """
    guide = poutine.infer_config(tempering.guide, lambda site: {"enumerate": None})
    with torch.no_grad():
        traces = loss._get_traces(split(tempering.model), guide, args, kwargs)
        pairs = [(log_factors(tempering, *pair), log_weights(*pair)) for pair in traces]
    draws = [torch.stack([f, w.expand_as(f)]) for f, w in pairs if f is not None]
    return torch.cat(draws, dim=1)
