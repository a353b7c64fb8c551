r"""Single particles, read off and mended in the traces that an ELBO makes.

Every ELBO of Pyro's runs guide and model in ``_get_traces`` and then adds up their log densities.
:func:`with_traces` lets the driver look in between: at no cost in model runs it learns the log factor
d/dt log p_t of every particle, and takes broken particles out before they reach the sum.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from opt_einsum import shared_intermediates
from pyro import poutine
from pyro.infer import ELBO
from pyro.infer.traceenum_elbo import _compute_model_factors
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.rings import SampleRing
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_adaann.tempering import Tempering, is_delta

__all__ = [
    "draw_log_factors",
    "drop_broken",
    "has_nonfinite_parameter",
    "log_factors",
    "log_weights",
    "marginal_log_density",
    "per_particle",
    "sites_of",
    "tame_gradients",
    "with_num_particles",
    "with_traces",
]

#: How far below the median a log weight is lost: in nats, and in units of the median distance.
_MIN_LOSS = 1000.0
_MAX_DISTANCE = 50.0
#: Most rows of a Jacobian for which so many backward passes are cheaper than an inverse.
_MAX_ROWS = 30
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


def per_particle(site: Any, log_prob: Tensor) -> Tensor:
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
    return torch.as_tensor(total).reshape(-1)


def log_weights(model_trace: Trace, guide_trace: Trace) -> Tensor:
    """Return log p_t - log q of every particle of a pair of traces, detached, shape ``(n,)``."""
    with torch.no_grad():
        if any("_enumerate_dim" in site["infer"] for site in sites_of(model_trace)):
            log_p: Any = marginal_log_density(model_trace, guide_trace)
        else:
            log_p = sum(per_particle(site, site["log_prob"]) for site in sites_of(model_trace))
        log_q = sum(per_particle(site, site["log_prob"]) for site in sites_of(guide_trace))
    return torch.as_tensor(log_p - log_q).reshape(-1)


def sites_of(trace: Trace) -> Iterator[Any]:
    """Yield the sample sites of a trace."""
    for site in trace.nodes.values():
        if site["type"] == "sample":
            yield site


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
    particle_dim = model_trace.plate_to_symbol.get(_PARTICLE_PLATE)
    total: Any = 0.0
    for term in terms:
        dims = [i for i, symbol in enumerate(term._pyro_dims) if symbol != particle_dim]
        total = total + (term.sum(dims) if dims else term)
    return total


def drop_broken(
    model_trace: Trace, guide_trace: Trace, cost: float = 0.0, *, finds_lost: bool = False
) -> tuple[int, int]:
    r"""Take particles whose log density is not finite out of a pair of traces of `Trace_ELBO`.

    They add zero to the loss; the other particles' parts are what they are without them. To the
    gradient they add that of ``cost`` times the mass m = q(broken region), through the score function

    .. math:: \nabla m = E_q[(1_\mathrm{broken}(z) - m) \nabla_\phi \log q_\phi(z)],

    since no path leads through a density that is not finite. Dropping them alone would not do: of
    :math:`E_q[1_\mathrm{good} \nabla_\phi \log q] = -\nabla m` the missing part is a pull *into* the
    broken region, of strength 1. Any ``cost`` above 1 turns it round. It is the cost, in nats, of a
    broken draw over that of a typical good one, whatever the evidence, and at a posterior without
    mass in the broken region nothing is left of it.

    :param cost: in nats; 0 to drop them alone.
    :param finds_lost: whether draws that are finite and a thousand nats below the others, which stay
        in the loss, get the same push.
    :return: the number of broken particles and of all particles.
    """
    guide_sites = list(sites_of(guide_trace))
    sites = [*sites_of(model_trace), *guide_sites]
    with torch.no_grad():
        log_p, log_q = (
            torch.as_tensor(sum(per_particle(site, site["log_prob"]) for site in part)).reshape(-1)
            for part in (sites_of(model_trace), guide_sites)
        )
        log_weight = log_p - log_q
        # A sum is finite only if all its terms are; the difference could hide an infinite pair.
        total, reach = torch.stack([(log_p + log_q).sum(), log_weight.median() - log_weight.min()]).tolist()
        if math.isfinite(total) and not (finds_lost and reach > _MIN_LOSS):
            return 0, log_p.numel()
        broken = ~torch.isfinite(log_p + log_q)
        lost = _is_lost(log_weight, broken) if finds_lost else broken
    # With itself in the mean, a single particle would weigh nothing.
    mean = float(lost.sum()) / len(lost) if len(lost) > 1 else 0.0
    num_broken = int(broken.sum())
    for site in sites:
        if num_broken:
            _mask(site, broken)
        if cost and "score_parts" in site and _has_score(site):
            _add_score(site, cost * (lost.to(log_weight.dtype) - mean))
    return num_broken, broken.numel()


def _is_lost(log_weight: Tensor, broken: Tensor) -> Tensor:
    """Whether a draw is broken or as good as that: on a plateau at -1e8 there is no slope to climb.

    A thousand nats below the median, and far outside the spread of the others: nothing of the kind
    is left near a posterior.
    """
    good = log_weight[~broken]
    if len(good) < 2:
        return broken
    median = good.median()
    reach = max(_MIN_LOSS, _MAX_DISTANCE * float((good - median).abs().median()))
    return broken | (log_weight < median - reach)


def _has_score(site: Any) -> bool:
    return not (site["is_observed"] or site_is_subsample(site) or is_delta(site["fn"]))


def _add_score(site: Any, weight: Tensor) -> None:
    """Add ``weight * grad log q`` of every particle's draws, held fixed, to the gradient of the loss."""
    log_q = per_particle(site, _log_density_at_fixed_draws(site["fn"], site["value"]))
    # A draw out of reach of the flow's inverse says nothing.
    log_q = torch.where(torch.isfinite(log_q), log_q, 0.0)
    parts = site["score_parts"]
    entropy_term = torch.as_tensor(parts.entropy_term)
    # `Trace_ELBO` takes the sum over the entries, and a constant in the loss has no gradient.
    score = (weight * log_q).sum() / entropy_term.numel()
    site["score_parts"] = parts._replace(entropy_term=entropy_term + score)


def _log_density_at_fixed_draws(fn: Any, value: Tensor) -> Tensor:
    r"""Return a number per draw with the gradient of :math:`\log q_\phi(z)` at fixed z.

    A deep planar stack has no cheap inverse, and none is needed at its own draws: along the path,
    :math:`d \log q(z(\phi)) = \partial_\phi \log q + s \cdot dz` with the score
    :math:`s = \nabla_z \log q = J^{-\top} \nabla_\varepsilon (\log q_0 - \log|\det J|)`, one backward pass
    for every row of J.
    """
    transforms = getattr(fn, "transforms", [])
    is_flow = len(transforms) == 1 and hasattr(transforms[0], "forward_and_log_det")
    if not is_flow or value.shape[-1] > _MAX_ROWS:
        return fn.log_prob(value.detach())
    # Apart from the graph of the draws, whose gradient is cut where the model has none.
    with torch.enable_grad():
        x = transforms[0].inv(value).detach().requires_grad_()
        y, log_det = transforms[0].forward_and_log_det(x)
        log_q = fn.base_dist.log_prob(x) - log_det
        outputs = [log_q, *y.unbind(-1)]
        gradient, *rows = (torch.autograd.grad(out.sum(), x, retain_graph=True)[0] for out in outputs)
    jacobian = torch.stack(rows, dim=-1).double()  # transposed
    score = torch.linalg.solve_ex(jacobian, gradient.double().unsqueeze(-1))[0].squeeze(-1).to(y.dtype)
    is_known = torch.isfinite(score).all(-1)
    score = torch.where(is_known.unsqueeze(-1), score, 0.0)
    return torch.where(is_known, log_q - (score * y).sum(-1), 0.0)


def tame_gradients(guide_trace: Trace, max_ratio: float) -> None:
    """Bound what a single particle can do to an update.

    A hook on every draw of the guide cuts rows of its gradient that are not finite: a masked loss
    alone would send zero times infinity, which is NaN, to the parameters that all particles share.
    And it shortens rows longer than ``max_ratio`` times the median row. A draw far from the data may
    have a log density of -1e9; its gradient alone would set the direction of the step, and the
    optimizer's running averages for a thousand steps to come. Shortened, it still points back.

    :param guide_trace: trace of the guide, before the backward pass.
    :param max_ratio: bound on a row's largest entry in units of the median row's; infinite for none.
    """
    for site in sites_of(guide_trace):
        value = site["value"]
        # The draws themselves; `Delta` sites are functions of them.
        if not value.requires_grad or site["is_observed"] or is_delta(site["fn"]):
            continue
        frames = [f for f in site["cond_indep_stack"] if f.name == _PARTICLE_PLATE]
        dim = frames[0].dim - site["fn"].event_dim if frames else None
        value.register_hook(partial(_tame, dim=dim, max_ratio=max_ratio))


def _tame(grad: Tensor, dim: int | None, max_ratio: float) -> Tensor:
    if max_ratio == math.inf and math.isfinite(float(grad.sum())):
        return grad
    rows = grad.unsqueeze(0) if dim is None else grad.movedim(dim, 0)
    # The largest entry and not the Euclidean length, whose squares overflow.
    size = rows.reshape(len(rows), -1).abs().amax(-1)
    median, largest = torch.stack([size.median(), size.max()]).tolist()
    if largest <= max_ratio * median:
        return grad
    finite = size[torch.isfinite(size)]
    limit = max_ratio * float(finite.median()) if len(finite) else 0.0
    factor = (limit / size).clamp(max=1.0) if limit > 0 else torch.ones_like(size)
    factor = factor.reshape(-1, *(1 for _ in rows.shape[1:]))
    keep = torch.isfinite(size).reshape(factor.shape)
    tamed = torch.where(keep, rows * factor, 0.0)
    return tamed.squeeze(0) if dim is None else tamed.movedim(0, dim)


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
    loss: ELBO, tempering: Tempering, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """Return a fresh log factor and log weight for every particle of ``loss``, shape ``(2, n)``.

    The paper's way (M draws per stage); it costs that many model evaluations, vectorized if ``loss``
    is. Sites that the guide would enumerate are drawn: one value per particle.
    """
    guide = poutine.infer_config(tempering.guide, lambda site: {"enumerate": None})
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TraceEnum_ELBO found no sample sites")
        traces = loss._get_traces(tempering.model, guide, args, kwargs)
        pairs = [(log_factors(tempering, *pair), log_weights(*pair)) for pair in traces]
    draws = [torch.stack([f, w.expand_as(f)]) for f, w in pairs if f is not None]
    return torch.cat(draws, dim=1)
