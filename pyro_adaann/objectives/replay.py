r"""Draws of the steps before, replayed so that a part of the density that the guide has is not lost.

Draws that a guide makes show where it has too little density only where it has some. Over a few steps it
can lose a part by chance, and nothing of its own shows that from then on. The draws :math:`z_i` of the guides
:math:`q_k` of the steps before, with weights :math:`p_t(z_i) / q_k(z_i)`, are a sample of :math:`p_t` that
does not depend on the present guide. The weights need no model run: their logarithm is linear in t.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine import Trace
from torch import Tensor

from pyro_adaann.objectives.fixed_density import flow_of, has_density
from pyro_adaann.objectives.traces import PARTICLE_PLATE, per_particle, sites_of, with_num_particles
from pyro_adaann.weights import resample, truncated_weights

__all__ = ["Replay", "Replayed"]

#: How many steps are kept: more of them hold what a guide loses slowly, fewer follow one that spreads. With
#: increments that keep a conditional effective sample size of 0.97, 24 steps are a third of an annealing.
_NUM_STEPS = 24
#: Points with a smaller weight, in means of the guide's own draws, tell noise and cost as much as its draws.
_MIN_LACK = 1.5


class _Kept(NamedTuple):
    """Draws of a step.

    :param values: values of the guide's sites by name, particles first.
    :param dims: where the particles have been, by name.
    :param log_p: log density at t = 0, shape ``(n,)``.
    :param log_q: that of the guide which drew them, likewise.
    :param log_factors: the slope of the former in t, likewise.
    """

    values: dict[str, Tensor]
    dims: dict[str, int]
    log_p: Tensor
    log_q: Tensor
    log_factors: Tensor

    def to(self, device: torch.device) -> _Kept:
        values = {name: value.to(device) for name, value in self.values.items()}
        numbers = (number.to(device) for number in (self.log_p, self.log_q, self.log_factors))
        return _Kept(values, self.dims, *numbers)


@dataclass(frozen=True)
class Replayed:
    """Draws replayed under the present guide.

    :param guide_trace: trace of the guide, with its graph, log densities left out.
    :param log_weights: of the draws against the density at the present inverse temperature, shape ``(n,)``,
        up to the constant that the weights of the guide's own draws have too.
    """

    guide_trace: Trace
    log_weights: Tensor


class Replay:
    """Weighted draws of the latest steps."""

    def __init__(self) -> None:
        self._steps: deque[_Kept] = deque(maxlen=_NUM_STEPS + 1)

    def to(self, device: torch.device) -> None:
        """Move the draws of a checkpoint, which are read to the CPU, to a device."""
        self._steps = deque((kept.to(device) for kept in self._steps), maxlen=_NUM_STEPS + 1)

    def add(
        self, guide_trace: Trace, log_weights: Tensor, log_factors: Tensor, inverse_temperature: float
    ) -> None:
        """Keep the draws of a step; the log weights are those at its inverse temperature.

        Nothing is kept of a guide whose density at a given point is not that of a flow with an inverse in
        closed form: it would cost more than the step.
        """
        values, dims = {}, {}
        for site in filter(has_density, sites_of(guide_trace)):
            flow, dim = flow_of(site["fn"]), _particle_dim(site)
            if flow is None or not flow.has_closed_inverse or dim is None:
                return
            values[site["name"]], dims[site["name"]] = site["value"].detach().movedim(dim, 0), dim
        if not values:
            return
        log_q = _log_density(guide_trace)
        log_p = log_weights + log_q - inverse_temperature * log_factors
        self._steps.append(_Kept(values, dims, log_p, log_q, log_factors))

    def run(
        self, elbo: ELBO, guide: Any, num_draws: int, t: float, log_mean: float, args: Any, kwargs: Any
    ) -> Replayed | None:
        """Return those of a sample of p_t where the guide has too little density, None if there are none.

        The sample is made of the draws of the steps before the latest.

        :param elbo: the one whose plate of particles the draws come from.
        :param num_draws: size of the sample.
        :param t: the inverse temperature.
        :param log_mean: log of the mean weight of the guide's own draws.
        """
        earlier = list(self._steps)[:-1]
        if not earlier or not num_draws:
            return None
        log_p = torch.cat([kept.log_p + t * kept.log_factors for kept in earlier])
        log_weights = log_p - torch.cat([kept.log_q for kept in earlier])
        order = resample(truncated_weights(log_weights).log(), num_draws)
        values = {name: torch.cat([kept.values[name] for kept in earlier]) for name in earlier[0].values}

        def trace_at(order: Tensor) -> Trace:
            fixed = Trace()
            for name, dim in earlier[0].dims.items():
                value = values[name][order].movedim(0, dim)
                fixed.add_node(name, name=name, type="sample", is_observed=False, infer={}, value=value)
            batch = with_num_particles(elbo, len(order))
            replayed = poutine.replay(batch._vectorized_num_particles(guide), trace=fixed)
            return poutine.trace(replayed).get_trace(*args, **kwargs)

        with torch.no_grad():
            sample = trace_at(order)
            sample.compute_log_prob(lambda name, site: name in values)
            log_weights = log_p[order] - _log_density(sample)
        lacks = (log_weights > log_mean + math.log(_MIN_LACK)).nonzero().squeeze(1)  # a card is asked once
        if not len(lacks):
            return None
        lacking = trace_at(order[lacks])
        with torch.no_grad():
            for name, dim in earlier[0].dims.items():
                # Their inverse, most of the work here, is known.
                flow, value = flow_of(lacking.nodes[name]["fn"]), lacking.nodes[name]["value"]
                flow.remember(flow.inv(sample.nodes[name]["value"]).index_select(dim, lacks), value)
        return Replayed(lacking, log_weights[lacks])

    def forget(self) -> None:
        """Drop all draws, after the guide has been set back."""
        self._steps.clear()

    def state(self) -> list[list[Any]]:
        """Return the draws as plain data; :meth:`restore` takes it."""
        return [list(kept) for kept in self._steps]

    def restore(self, state: list[list[Any]]) -> None:
        """Go on from what :meth:`state` has returned."""
        self._steps = deque((_Kept(*kept) for kept in state), maxlen=_NUM_STEPS + 1)


def _log_density(guide_trace: Trace) -> Tensor:
    """Return the log density of every particle, detached, shape ``(n,)``."""
    parts = [per_particle(s, s["log_prob"].detach()) for s in sites_of(guide_trace) if has_density(s)]
    return torch.stack([part.reshape(-1) for part in parts]).sum(0)


def _particle_dim(site: Any) -> int | None:
    """Return the dimension of a site's value in which the particles are, None if it has none."""
    for frame in site["cond_indep_stack"]:
        if frame.name == PARTICLE_PLATE:
            return int(frame.dim - site["fn"].event_dim)
    return None
