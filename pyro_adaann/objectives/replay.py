r"""Draws of the stage before, replayed so that a part of the density that the guide has is not lost.

Draws that a guide makes show where it has too little density only where it has some. Over a few steps it
can lose a part by chance, and nothing of its own shows that from then on. The draws :math:`z_i` of the last
steps at :math:`t'`, with weights :math:`w_i = p_t(z_i) / q_{t'}(z_i)`, are a sample of :math:`p_t` that does
not depend on the present guide. The weights need no model run: their logarithm is linear in t.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine import Trace
from torch import Tensor

from pyro_adaann.objectives.fixed_density import flow_of, has_density
from pyro_adaann.objectives.traces import PARTICLE_PLATE, sites_of, with_num_particles
from pyro_adaann.weights import resample, truncated_weights

__all__ = ["Replay"]

#: How many steps at the end of a stage are kept: in one alone a part of 1 % may be missing.
_NUM_STEPS = 2


class _Kept(NamedTuple):
    """Draws of a step.

    :param values: values of the guide's sites by name, particles first.
    :param dims: where the particles have been, by name.
    :param log_weights: at t = 0, shape ``(n,)``.
    :param log_factors: their slope in t, likewise.
    """

    values: dict[str, Tensor]
    dims: dict[str, int]
    log_weights: Tensor
    log_factors: Tensor

    def to(self, device: torch.device) -> _Kept:
        values = {name: value.to(device) for name, value in self.values.items()}
        return _Kept(values, self.dims, self.log_weights.to(device), self.log_factors.to(device))


class Replay:
    """Weighted draws of the last steps of the stage before the present one."""

    def __init__(self) -> None:
        self._present: deque[_Kept] = deque(maxlen=_NUM_STEPS)
        self._before: list[_Kept] = []

    def to(self, device: torch.device) -> None:
        """Move the draws of a checkpoint, which are read to the CPU, to a device."""
        self._before = [kept.to(device) for kept in self._before]
        self._present = deque((kept.to(device) for kept in self._present), maxlen=_NUM_STEPS)

    def turn(self) -> None:
        """Begin a stage: the draws that were of the present one are of the one before."""
        if self._present:
            self._before = list(self._present)
            self._present.clear()

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
        at_zero = log_weights - inverse_temperature * log_factors
        self._present.append(_Kept(values, dims, at_zero, log_factors))

    def run(self, elbo: ELBO, guide: Any, num_draws: int, t: float, args: Any, kwargs: Any) -> Trace | None:
        """Return a trace of the guide, with its graph, at draws that are a sample of p_t; None without draws.

        :param elbo: the one whose plate of particles the draws come from.
        :param num_draws: how many.
        :param t: the inverse temperature.
        """
        if not self._before or not num_draws:
            return None
        log_weights = torch.cat([kept.log_weights + t * kept.log_factors for kept in self._before])
        order = resample(truncated_weights(log_weights).log(), num_draws)
        elbo = with_num_particles(elbo, num_draws)
        fixed = Trace()
        for name in self._before[0].values:
            value = torch.cat([kept.values[name] for kept in self._before])[order]
            dim = self._before[0].dims[name]
            fixed.add_node(
                name, name=name, type="sample", is_observed=False, infer={}, value=value.movedim(0, dim)
            )
        replayed = poutine.replay(elbo._vectorized_num_particles(guide), trace=fixed)
        return poutine.trace(replayed).get_trace(*args, **kwargs)

    def forget(self) -> None:
        """Drop all draws, after the guide has been set back."""
        self._present.clear()
        self._before.clear()

    def state(self) -> list[list[Any]]:
        """Return the draws as plain data; :meth:`restore` takes it."""
        return [[list(kept) for kept in part] for part in (self._present, self._before)]

    def restore(self, state: list[list[Any]]) -> None:
        """Go on from what :meth:`state` has returned."""
        present, before = ([_Kept(*kept) for kept in part] for part in state)
        self._present = deque(present, maxlen=_NUM_STEPS)
        self._before = before


def _particle_dim(site: Any) -> int | None:
    """Return the dimension of a site's value in which the particles are, None if it has none."""
    for frame in site["cond_indep_stack"]:
        if frame.name == PARTICLE_PLATE:
            return int(frame.dim - site["fn"].event_dim)
    return None
