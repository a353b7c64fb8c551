r"""Single particles, read off and mended in the traces that an ELBO makes.

Every ELBO of Pyro's runs guide and model in ``_get_traces`` and then adds up their log densities.
:func:`with_traces` lets the driver look in between: at no cost in model runs it learns the log factor
d/dt log p_t of every particle, and takes broken particles out before they reach the sum.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from opt_einsum import shared_intermediates
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.traceenum_elbo import _compute_model_factors
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.rings import SampleRing
from pyro.poutine import Trace
from torch import Tensor

from pyro_adaann.tempering import Path, Tempering

__all__ = [
    "draw_log_factors",
    "drop_broken",
    "has_nonfinite_parameter",
    "log_factors",
    "with_num_particles",
    "with_traces",
]

_PARTICLE_PLATE = "num_particles_vectorized"


def with_traces(loss: ELBO, look: Callable[[Trace, Trace], None]) -> ELBO:
    """Return a copy of ``loss`` that shows ``look`` every (model, guide) trace before it adds it up."""
    loss = copy.copy(loss)
    get_traces = loss._get_traces

    def _get_traces(model: Any, guide: Any, args: Any, kwargs: Any) -> Iterator[Any]:
        for traces in get_traces(model, guide, args, kwargs):
            look(*traces)
            yield traces

    loss._get_traces = _get_traces
    return loss


def with_num_particles(loss: ELBO, num_particles: int) -> ELBO:
    """Return a copy of ``loss`` with another number of particles."""
    result = copy.copy(loss)
    result.num_particles = num_particles
    if loss.vectorize_particles:
        # Pyro counts the particle plate into the nesting if there is more than one particle.
        result.max_plate_nesting += (num_particles > 1) - (loss.num_particles > 1)
    return result


def _per_particle(site: Any, log_prob: Tensor) -> Tensor:
    """Sum the log density of a site over everything but the particles."""
    for frame in site["cond_indep_stack"]:
        if frame.name == _PARTICLE_PLATE and log_prob.dim() >= -frame.dim:
            # All of the rest, and nothing where the particles are the only dimension.
            dim = log_prob.dim() + frame.dim
            return log_prob.transpose(0, dim).reshape(log_prob.shape[dim], -1).sum(-1)
    return log_prob.sum()


def log_factors(tempering: Tempering, model_trace: Trace, guide_trace: Trace) -> Tensor | None:
    """Return d/dt log p_t of every particle of a pair of traces, detached, shape ``(n,)``.

    None if discrete sites are enumerated in the guide: such a trace has no single value per particle.
    """
    if any("_enumerate_dim" in s["infer"] or "_enum_total" in s["infer"] for s in _sites(guide_trace)):
        return None
    with torch.no_grad():
        total: Any = 0.0
        model_rates = tempering.model_rates
        if any("_enumerate_dim" in site["infer"] for site in _sites(model_trace)):
            # The marginal of the enumerated sites moves with the likelihood; correct the others.
            path, t = tempering.path, tempering.inverse_temperature
            common = (1 - path.likelihood) / path.likelihood_weight(t)
            total = common * _marginal_log_density(model_trace, guide_trace)
            model_rates = {name: rate - common for name, rate in model_rates.items()}
        for site in _sites(model_trace):
            rate = model_rates.get(site["name"], 0.0)
            if rate and "_enumerate_dim" not in site["infer"]:
                total = total + rate * _per_particle(site, site["log_prob"])
        for site in _sites(guide_trace):
            rate = tempering.guide_rates.get(site["name"], 0.0)
            if rate:
                total = total - rate * _per_particle(site, site["log_prob"])
    return torch.as_tensor(total).reshape(-1)


def _sites(trace: Trace) -> Iterator[Any]:
    for site in trace.nodes.values():
        if site["type"] == "sample":
            yield site


def _marginal_log_density(model_trace: Trace, guide_trace: Trace) -> Tensor:
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
    particle_dim = model_trace.plate_to_symbol.get(_PARTICLE_PLATE)
    total: Any = 0.0
    for term in terms:
        dims = [i for i, symbol in enumerate(term._pyro_dims) if symbol != particle_dim]
        total = total + (term.sum(dims) if dims else term)
    return total


def drop_broken(model_trace: Trace, guide_trace: Trace) -> tuple[int, int]:
    """Take particles whose log density is not finite out of a pair of traces of `Trace_ELBO`.

    They add zero to the loss and to its gradient; the other particles' parts are what they are
    without them. Rows of a latent variable's gradient that are not finite are cut as well: a masked
    loss alone would send zero times infinity, which is NaN, to the parameters that all share.

    :return: the number of broken particles and of all particles.
    """
    sites = list(_sites(model_trace)) + list(_sites(guide_trace))
    with torch.no_grad():
        total = sum(_per_particle(site, site["log_prob"]) for site in sites)
        broken = ~torch.isfinite(torch.as_tensor(total)).reshape(-1)
    num_broken = int(broken.sum())
    if num_broken:
        for site in sites:
            _mask(site, broken)
    for site in _sites(guide_trace):
        value = site["value"]
        if value.requires_grad and not value.is_leaf and not site["is_observed"]:
            value.register_hook(_finite_or_zero)
    return num_broken, broken.numel()


def _finite_or_zero(grad: Tensor) -> Tensor:
    return grad if torch.isfinite(grad.sum()) else torch.where(torch.isfinite(grad), grad, 0.0)


def _mask(site: Any, broken: Tensor) -> None:
    keep = ~broken
    for frame in site["cond_indep_stack"]:
        if frame.name == _PARTICLE_PLATE:
            keep = keep.reshape((-1,) + (1,) * (-1 - frame.dim))
            break
    else:
        keep = keep.all()

    def mask(term: Any) -> Any:
        return torch.where(keep, term, 0.0) if torch.is_tensor(term) else term

    site["log_prob"] = mask(site["log_prob"])
    site["log_prob_sum"] = site["log_prob"].sum()
    if "score_parts" in site:
        site["score_parts"] = type(site["score_parts"])(*map(mask, site["score_parts"]))


def has_nonfinite_parameter(error: BaseException) -> bool:
    """Whether torch refused a distribution's parameter for numbers that are not finite alone."""
    while error.__cause__ is not None:  # Pyro raises anew, with the shapes of the trace
        error = error.__cause__
    traceback = error.__traceback__
    if traceback is None or not str(error).startswith("Expected parameter"):
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    found = traceback.tb_frame.f_locals
    value, valid = found.get("value"), found.get("valid")
    if not (torch.is_tensor(value) and torch.is_tensor(valid)):
        return False
    # A constraint on vectors or matrices has one verdict per event.
    is_finite = torch.isfinite(value).reshape(*valid.shape, -1).all(-1)
    return bool((valid | ~is_finite).all())


def draw_log_factors(
    loss: Any,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    path: Path,
    inverse_temperature: float,
    num_draws: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """Return ``num_draws`` fresh draws of the log factor under the guide, vectorized as the loss is.

    The paper's way (M draws per stage); it costs that many model evaluations.
    """
    loss = with_num_particles(loss if isinstance(loss, ELBO) else Trace_ELBO(), num_draws)
    if isinstance(loss, TraceEnum_ELBO):
        loss.strict_enumeration_warning = False
    # Sites that the guide would enumerate are drawn here: one value per particle.
    guide = poutine.infer_config(guide, lambda site: {"enumerate": None})
    tempering = Tempering(model, guide, path, inverse_temperature)
    draws = []
    with torch.no_grad():
        for traces in loss._get_traces(tempering.model, tempering.guide, args, kwargs):
            draws.append(log_factors(tempering, *traces))
    return torch.cat([draw for draw in draws if draw is not None])
