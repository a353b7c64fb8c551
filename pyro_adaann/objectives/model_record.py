r"""Model and guide as the operations of torch that they were recorded as, without Pyro's handlers.

For a latent vector z that the guide has drawn, its sites and the model run through hundreds of calls of
handlers and constructors of distributions, the same at every step, between the operations that compute
something. Here they run once on a vector whose operations are recorded; from then on

.. math:: z \mapsto (\text{log densities}, \text{values}) \text{ of all sites}

is that list of operations. The draw of z itself, where the parameters are, stays with Pyro, and tempering is
applied to what comes out.

A record is right only while model and guide do the same operations, which nobody can know. So it is compared
with a run on another vector, in numbers and gradients, when it is made, when it is used for the second,
fourth, eighth, ... time and at every :data:`_INTERVAL`-th. Where they differ, model and guide run from then
on (:mod:`pyro_adaann.objectives.recorded_model`), and a warning says so.
"""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.score_parts import ScoreParts
from pyro.infer import ELBO
from pyro.infer.autoguide import AutoContinuous
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_adaann.annealing.tempering import Tempering, is_delta
from pyro_adaann.objectives.lenient import Violations
from pyro_adaann.objectives.operations import CannotRecordError, first_line, recorded
from pyro_adaann.objectives.traces import captured_parameters, sites_of, subsampled_plate
from pyro_adaann.processes.group import process_count

__all__ = ["ModelRecord"]

#: Uses of a record between two comparisons, once there have been as many.
_INTERVAL = 128
#: How far numbers and gradients may differ, relatively to the largest: the operations are the same.
_TOLERANCE = 1e-5


class ModelRecord:
    """The operations of a model and its guide from a latent vector on, and sites that hold their numbers.

    :raises CannotRecordError: if they cannot be recorded.
    """

    def __init__(self, elbo: ELBO, model: Any, guide: Any, args: Any, kwargs: Any, needs_graph: bool) -> None:
        _check(elbo, guide)
        self._needs_graph = needs_graph
        self._model, self._guide = model, guide
        self._latent = f"_{guide._pyro_name}_latent"
        self._key = _key(args, kwargs)
        self._num_uses = 0
        with torch.no_grad(), torch.random.fork_rng():
            z, other = (
                self._draw(elbo, None, args, kwargs).nodes[self._latent]["value"].detach() for _ in range(2)
            )
            guide_trace, model_trace = self._run(z, elbo, args, kwargs)
            _check_traces(guide_trace, model_trace, self._latent)
            self._of_guide = self._others(guide_trace)
            self._of_model = list(sites_of(model_trace))
            self._operations = recorded(lambda z: self._numbers(z, elbo, args, kwargs), z)
            self._compare(other, elbo, args, kwargs)

    def fits(self, model: Any, guide: Any, args: Any, kwargs: Any) -> bool:
        """Whether the record is one of these, with these arguments."""
        key = _key(args, kwargs)
        is_same = model is self._model and guide is self._guide and len(key) == len(self._key)
        return is_same and all(_is_same(a, b) for a, b in zip(key, self._key, strict=True))

    def traces(self, elbo: ELBO, tempering: Tempering | None, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        """Return traces of model and guide for fresh draws.

        :raises CannotRecordError: if the record is not what model and guide do.
        """
        guide_trace = self._draw(elbo, tempering, args, kwargs)
        z = guide_trace.nodes[self._latent]["value"]
        self._num_uses += 1
        is_power_of_two = self._num_uses > 1 and self._num_uses & (self._num_uses - 1) == 0
        if is_power_of_two or self._num_uses % _INTERVAL == 0:
            self._compare(z.detach(), elbo, args, kwargs)
        model_trace = Trace()
        with torch.set_grad_enabled(self._needs_graph and torch.is_grad_enabled()):
            of_guide, of_model = self._filled(self._computed(z))
            if tempering is not None:
                tempering.weigh(of_guide, of_model)
            _add_sites(guide_trace, of_guide, self._of_guide)
            _add_sites(model_trace, of_model, self._of_model)
        for own in self._of_guide:
            site = guide_trace.nodes[own["name"]]
            site["score_parts"] = ScoreParts(site["log_prob"], 0, site["log_prob"])
        return model_trace, guide_trace

    def _draw(self, elbo: ELBO, tempering: Tempering | None, args: Any, kwargs: Any) -> Trace:
        """Return the trace of the guide's draw of its latent vector alone, with its density."""

        def draw(*args: Any, **kwargs: Any) -> Any:
            with self._guide._pyro_context:
                return self._guide.sample_latent(*args, **kwargs)

        run = draw if tempering is None else tempering.around(draw)
        trace = poutine.trace(elbo._vectorized_num_particles(run)).get_trace(*args, **kwargs)
        trace = prune_subsample_sites(trace)
        trace.compute_score_parts()
        return trace

    def _run(self, z: Tensor, elbo: ELBO, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        """Run guide and model for given latent vectors; everything else of them has its log density."""
        drawn = Trace()
        drawn.add_node(self._latent, name=self._latent, type="sample", is_observed=False, infer={}, value=z)
        guide = poutine.replay(elbo._vectorized_num_particles(self._guide), trace=drawn)
        with pyro.validation_enabled(False), Violations.recorded():
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            model = poutine.replay(elbo._vectorized_num_particles(self._model), trace=guide_trace)
            model_trace = poutine.trace(model).get_trace(*args, **kwargs)
            guide_trace, model_trace = map(prune_subsample_sites, (guide_trace, model_trace))
            guide_trace.compute_log_prob(lambda name, site: name != self._latent)
            model_trace.compute_log_prob()
        return guide_trace, model_trace

    def _others(self, guide_trace: Trace) -> list[Any]:
        """Return the sites of the guide besides its latent vector."""
        return [site for site in sites_of(guide_trace) if site["name"] != self._latent]

    def _numbers(self, z: Tensor, elbo: ELBO, args: Any, kwargs: Any) -> list[Tensor]:
        """Return the log densities of all sites, the guide's first, and their values that are tensors."""
        guide_trace, model_trace = self._run(z, elbo, args, kwargs)
        sites = [*self._others(guide_trace), *sites_of(model_trace)]
        return [site["log_prob"] for site in sites] + [site["value"] for site in sites if _has_tensor(site)]

    def _computed(self, z: Tensor) -> list[Tensor]:
        """Do :meth:`_numbers` by the record."""
        try:
            return self._operations(z)
        except (RuntimeError, ValueError) as error:  # such as a matrix without a factor
            raise CannotRecordError(first_line(error)) from error

    def _filled(self, numbers: list[Tensor]) -> tuple[list[Any], list[Any]]:
        """Return the sites with new numbers, with a scale of one."""
        sites = [{**site, "scale": 1.0} for site in [*self._of_guide, *self._of_model]]
        values = iter(numbers[len(sites) :])
        for site, log_prob in zip(sites, numbers[: len(sites)], strict=True):
            site["log_prob"] = log_prob
            site["value"] = next(values) if _has_tensor(site) else site["value"]
        return sites[: len(self._of_guide)], sites[len(self._of_guide) :]

    def _compare(self, z: Tensor, elbo: ELBO, args: Any, kwargs: Any) -> None:
        """Compare the record with a run.

        :raises CannotRecordError: if they differ.
        """
        found = []
        for run in (self._computed, lambda z: self._numbers(z, elbo, args, kwargs)):
            with torch.set_grad_enabled(self._needs_graph):
                leaf = z.clone().requires_grad_(self._needs_graph)
                numbers = run(leaf)
                sums = [number.sum().to(z) for number in numbers if number.is_floating_point()]
                total = torch.stack(sums).sum()
                gradient = torch.autograd.grad(total, leaf)[0] if total.requires_grad else torch.zeros_like(z)
            found.append([*numbers, gradient])
        sites = [*self._of_guide, *self._of_model]
        names = [site["name"] for site in [*sites, *filter(_has_tensor, sites)]]
        for name, got, expected in zip([*names, "the gradient"], *found, strict=True):
            if not _is_close(got.detach(), expected.detach()):
                raise CannotRecordError(f"another {name!r}; {self._doubt()} evaluations may have been wrong")

    def _doubt(self) -> int:
        """Return how often the record has been used since it was compared."""
        return max(min(self._num_uses - self._num_uses // 2, _INTERVAL) - 1, 0)


def _check(elbo: ELBO, guide: Any) -> None:
    if not isinstance(guide, AutoContinuous):
        raise CannotRecordError(f"a {type(guide).__name__}, which is no guide with one latent vector")
    if not (elbo.vectorize_particles or elbo.num_particles == 1):
        raise CannotRecordError("particles one by one (vectorize_particles=False)")
    if process_count() > 1:
        raise CannotRecordError("several processes")


def _check_traces(guide_trace: Trace, model_trace: Trace, latent: str) -> None:
    """Refuse what depends on more than the latent vector."""
    plate = subsampled_plate(model_trace, guide_trace)
    if plate is not None:
        raise CannotRecordError(f"a part of plate {plate.name!r}, chosen anew at every step")
    learned = [name for name, value in captured_parameters(model_trace).items() if value.requires_grad]
    if learned:
        raise CannotRecordError(f"parameters of the model ({', '.join(learned)})")
    for site in sites_of(guide_trace):
        if site["name"] != latent and not is_delta(site["fn"]):
            raise CannotRecordError(f"a draw of the guide at site {site['name']!r} besides its vector")
    for site in sites_of(model_trace):
        if not site["is_observed"] and site["name"] not in guide_trace.nodes:
            raise CannotRecordError(f"site {site['name']!r}, which the guide does not draw")


def _has_tensor(site: Any) -> bool:
    return isinstance(site["value"], Tensor)


def _key(args: Any, kwargs: Any) -> list[Any]:
    """Return what the operations depend on besides the latent vector."""
    leaves: list[Any] = []
    for leaf in tree_leaves((args, kwargs)):
        leaves += [leaf, leaf._version] if isinstance(leaf, Tensor) else [leaf]
    return leaves


def _is_same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, bool | int | float | str | bytes) and a == b)


def _add_sites(trace: Trace, sites: list[Any], recorded_sites: list[Any]) -> None:
    """Add sites whose scales say by what to multiply the log densities of the record."""
    for site, own in zip(sites, recorded_sites, strict=True):
        weight = site["scale"]
        log_prob = site["log_prob"] if weight == 1 else site["log_prob"] * weight
        numbers = {"log_prob": log_prob, "log_prob_sum": log_prob.sum(), "scale": own["scale"] * weight}
        trace.add_node(site["name"], **{**site, **numbers})


def _is_close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    size = float(torch.where(torch.isfinite(b), b, 0.0).abs().max()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE * size, equal_nan=True)
