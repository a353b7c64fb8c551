r"""Particles without a finite log density, and outliers: removed from traces before an ELBO is summed."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyro_adaann.annealing.tempering import is_delta
from pyro_adaann.objectives.fixed_density import site_log_density
from pyro_adaann.objectives.lenient import run_leniently
from pyro_adaann.objectives.sites import common_scale, has_density
from pyro_adaann.objectives.traces import PARTICLE_PLATE, as_numbers, per_particle, sites_of
from pyro_adaann.weights import median_and_reach

__all__ = ["drop_broken", "limit_gradients", "nonfinite_sites"]

#: Least distance below the median at which a log weight counts as lost, in nats.
_MIN_LOSS = 1000.0


def drop_broken(
    model_trace: Trace,
    guide_trace: Trace,
    cost: float = 0.0,
    *,
    finds_lost: bool = False,
    drops_lost: bool = False,
) -> tuple[int, int]:
    r"""Take particles whose log density is not finite out of a pair of traces of `Trace_ELBO`.

    They add zero to the loss and leave the terms of the other particles unchanged. To the gradient they add
    that of ``cost`` times the mass m = q(broken region), by the score function

    .. math:: \nabla m = E_q[(1_\mathrm{broken}(z) - m) \nabla_\phi \log q_\phi(z)],

    since a density that is not finite has no path derivative. Leaving the particles out is not enough: since
    :math:`E_q[1_\mathrm{good} \nabla_\phi \log q] = -\nabla m`, the gradient of the remaining terms moves
    mass *into* the broken region, with weight 1. Any ``cost`` above 1 reverses that. It is the cost, in nats,
    of a broken draw above that of a typical good one, whatever the evidence; the term vanishes when the guide
    has no mass in the broken region.

    :param cost: in nats, of the loss without a scale that model and guide share; 0 to leave them out only.
    :param finds_lost: whether the term also counts draws that are finite and a thousand nats below the
        others; these stay in the loss.
    :param drops_lost: whether these are left out, too.
    :return: the number of broken particles and of all particles.
    """
    guide_sites = list(sites_of(guide_trace))
    sites = [*sites_of(model_trace), *guide_sites]
    with torch.no_grad():
        log_p, log_q = (
            as_numbers(sum(per_particle(site, site["log_prob"]) for site in sites_of(trace)), trace)
            for trace in (model_trace, guide_trace)
        )
        log_weight = (log_p - log_q) / common_scale(guide_trace)
        # The sum is finite only if all its terms are; in the difference two infinities could cancel.
        total, reach = torch.stack([(log_p + log_q).sum(), log_weight.median() - log_weight.min()]).tolist()
        if math.isfinite(total) and not (finds_lost and reach > _MIN_LOSS):
            return 0, log_p.numel()
        broken = ~torch.isfinite(log_p + log_q)
        lost = _is_lost(log_weight, broken) if finds_lost else broken
    # A single particle minus its own mean would have weight zero.
    mean = float(lost.sum()) / len(lost) if len(lost) > 1 else 0.0
    num_broken = int(broken.sum())
    dropped = lost if drops_lost else broken
    any_dropped = bool(dropped.any())
    cost = cost * common_scale(guide_trace)
    for site in sites:
        if any_dropped:
            _mask(site, dropped)
        if cost and "score_parts" in site and has_density(site):
            _add_score(site, cost * (lost.to(log_weight.dtype) - mean))
    return num_broken, broken.numel()


def _is_lost(log_weight: Tensor, broken: Tensor) -> Tensor:
    """Whether a draw is broken or an extreme outlier, as on a plateau at -1e8, whose gradient is zero.

    That is, a thousand nats below the median and far outside the spread of the others; near a posterior no
    draw is.
    """
    if int((~broken).sum()) < 2:
        return broken
    median, reach = median_and_reach(torch.where(broken, torch.nan, log_weight))
    return broken | (log_weight < median - max(_MIN_LOSS, reach))


def _add_score(site: Any, weight: Tensor) -> None:
    """Add ``weight * grad log q`` of every particle's draws, held fixed, to the gradient of the loss."""
    log_q = per_particle(site, site_log_density(site))
    # A draw that the flow's inverse does not reach adds nothing.
    log_q = torch.where(torch.isfinite(log_q), log_q, 0.0)
    parts = site["score_parts"]
    entropy_term = torch.as_tensor(parts.entropy_term, device=log_q.device)
    # `Trace_ELBO` takes the sum over the entries, and a constant in the loss has no gradient.
    score = (weight * log_q).sum() / entropy_term.numel()
    site["score_parts"] = parts._replace(entropy_term=entropy_term + score)


def limit_gradients(guide_trace: Trace, max_ratio: float) -> None:
    """Clip the gradient of every single particle.

    A hook on every draw of the guide cuts rows of its gradient that are not finite: a masked loss
    alone would send zero times infinity, which is NaN, to the parameters that all particles share.
    It also clips rows longer than ``max_ratio`` times the median row. A draw far from the data may have a
    log density of -1e9; its gradient would dominate the step, and the optimizer's running averages for a
    thousand steps. A clipped row keeps its direction.

    :param guide_trace: trace of the guide, before the backward pass.
    :param max_ratio: bound on a row's largest entry in units of the median row's; infinite for none.
    """
    for site in sites_of(guide_trace):
        value = site["value"]
        # The draws themselves; `Delta` sites are functions of them.
        if not value.requires_grad or site["is_observed"] or is_delta(site["fn"]):
            continue
        frames = [f for f in site["cond_indep_stack"] if f.name == PARTICLE_PLATE]
        dim = frames[0].dim - site["fn"].event_dim if frames else None
        value.register_hook(partial(_limit, dim=dim, max_ratio=max_ratio))


def _limit(grad: Tensor, dim: int | None, max_ratio: float) -> Tensor:
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
    limited = torch.where(keep, rows * factor, 0.0)
    return limited.squeeze(0) if dim is None else limited.movedim(0, dim)


def _mask(site: Any, broken: Tensor) -> None:
    site["is_broken"] = broken  # the zeros are not log densities
    keep = ~broken
    for frame in site["cond_indep_stack"]:
        if frame.name == PARTICLE_PLATE:
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


def nonfinite_sites(model: Any, guide: Any, args: Any, kwargs: Any) -> list[str]:
    """Return the names of the sites whose log density is not finite in one fresh draw."""
    return run_leniently(_nonfinite_sites, model, guide, args, kwargs)


@torch.no_grad()
def _nonfinite_sites(model: Any, guide: Any, args: Any, kwargs: Any) -> list[str]:
    names = []
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    replayed = poutine.replay(model, trace=guide_trace)
    model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
    for trace in (guide_trace, model_trace):
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and name not in names:
                log_prob = site["fn"].log_prob(site["value"])
                if not torch.isfinite(log_prob).all():
                    names.append(name)
    return names
