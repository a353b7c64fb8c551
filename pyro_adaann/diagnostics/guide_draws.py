r"""Draws from a guide with their log densities, in batches.

Diagnostics and exports need draws z of the guide with :math:`\log q(z)` under the guide and
:math:`\log p(x, z)` under the model, in batches, so that memory does not grow with the number of draws.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_adaann.annealing.tempering import is_delta
from pyro_adaann.diagnostics.model_and_guide import (
    Fit,
    check_latents,
    check_subsampling,
    get_model_and_guide,
    latent_names,
    plate_nesting,
)
from pyro_adaann.guide_status import expects_tempered
from pyro_adaann.objectives.lenient import Leniency
from pyro_adaann.objectives.observed import DrawObserved
from pyro_adaann.objectives.rows import join_rows, most_draws
from pyro_adaann.objectives.sites import check_scales, common_scale, has_density
from pyro_adaann.objectives.traces import (
    as_numbers,
    log_density,
    marginal_log_density,
    per_particle,
    sites_of,
    with_num_particles,
)
from pyro_adaann.processes.group import ProcessError
from pyro_adaann.processes.split import split
from pyro_adaann.weights import finite_or_no_weight

__all__ = ["DrawBatch", "GuideDraws"]

#: Tolerated difference of a log density between a batch and a single run, absolute and relative: adaptive
#: solvers round differently in a batch; a model that sums over its particles is off by their number.
_TOLERANCE = 0.1, 0.01
#: Draws of the first batch that are compared with runs of their own.
_NUM_CHECKED = 5


@dataclass(frozen=True)
class DrawBatch:
    """One or more draws of a guide and the model run on them.

    :param log_p: log joint density of every draw, shape ``(n,)``, double precision.
    :param log_q: log density under the guide, likewise.
    :param guide_trace: trace of the guide.
    :param model_trace: trace of the model.
    """

    log_p: Tensor
    log_q: Tensor
    guide_trace: Trace
    model_trace: Trace

    @property
    def log_weights(self) -> Tensor:
        """Log importance weights; minus infinity for draws whose log density is not finite."""
        return finite_or_no_weight(self.log_p - self.log_q)


class GuideDraws:
    """Draws from a guide, scored by guide and model.

    :param svi: an `SVI` or a pair ``(model, guide)``.
    :param args: positional arguments of model and guide.
    :param kwargs: keyword arguments of model and guide.
    :param vectorize: whether guide and model run once for a batch, under an outermost plate.
    :raises ValueError: if a plate is subsampled, the guide misses a latent site, or the guide runs the
        model itself.
    """

    def __init__(self, svi: Fit, args: tuple[Any, ...], kwargs: dict[str, Any], *, vectorize: bool) -> None:
        self.model, guide = get_model_and_guide(svi)
        if isinstance(poutine.unwrap(guide), Messenger):
            raise ValueError(
                f"Expected a guide that runs apart from the model; got a {type(guide).__name__}, an "
                f"effect handler that runs the model itself. Use a guide that is none."
            )
        # Sites that the guide would enumerate are drawn: one value per particle.
        self.guide = poutine.infer_config(guide, lambda site: {"enumerate": None})
        self._args, self._kwargs, self._vectorize = args, kwargs, vectorize
        #: What has broken draws so far.
        self.leniency = Leniency()
        self.guide_prototype, self.prototype = self._run(lambda: self._run_once(self.guide))
        names = latent_names(self.prototype)
        #: Latent sites of the model that are summed out, since the guide does not draw them.
        self.enumerated_names = [name for name in names if name not in self.guide_prototype]
        #: The other latent sites of the model, auxiliary ones left out.
        self.latent_names = [
            name
            for name in names
            if name in self.guide_prototype and not self.prototype.nodes[name]["infer"].get("is_auxiliary")
        ]
        check_latents(self.prototype, self.enumerated_names)
        check_subsampling(self.guide_prototype, self.prototype)
        check_scales(self.prototype, self.guide_prototype, {})
        kind = TraceEnum_ELBO if self.enumerated_names else Trace_ELBO
        self.plate_nesting = plate_nesting(self.guide_prototype, self.prototype)
        self._loss: ELBO = kind(
            max_plate_nesting=self.plate_nesting,
            vectorize_particles=vectorize,
            strict_enumeration_warning=False,
        )
        self._is_checked = not vectorize or bool(self.enumerated_names)

    def _run(self, run: Callable[[], Any]) -> Any:
        """Run without gradients, and without torch's checks if these refuse a broken draw.

        Log densities that are not finite are counted later, so no warning is needed.
        """
        with torch.no_grad(), warnings.catch_warnings(), expects_tempered():
            warnings.filterwarnings("ignore", message="Encountered")
            return self.leniency.insist(run)

    def _run_batch(self, run: Callable[[], Any]) -> Any:
        """Run; an error of a batch, after a single draw has worked, says that the model may not vectorize."""
        try:
            return self._run(run)
        except Exception as error:  # the code of a user may raise anything
            if isinstance(error, ProcessError) or not self._vectorize:
                raise
            raise _does_not_vectorize(f"{type(error).__name__}: {error}") from error

    def _run_once(self, guide: Callable[..., Any]) -> tuple[Trace, Trace]:
        guide_trace = poutine.trace(guide).get_trace(*self._args, **self._kwargs)
        model = poutine.replay(self.model, trace=guide_trace)
        model_trace = poutine.trace(model).get_trace(*self._args, **self._kwargs)
        guide_trace.compute_log_prob()
        model_trace.compute_log_prob()
        return guide_trace, model_trace

    def batches(self, num_samples: int, batch_size: int) -> Iterator[DrawBatch]:
        """Yield batches of draws, ``num_samples`` in all.

        Batches have ``batch_size`` draws if vectorized, the last one possibly fewer, or as many as a large
        model should run on at a time. They have one draw each if not vectorized.

        :raises ValueError: if the model or the guide does not run for many draws at once.
        """
        batch_size = self._most_draws(batch_size)
        for start in range(0, num_samples, batch_size):
            yield self._batch(min(batch_size, num_samples - start))

    @property
    def num_densities(self) -> int:
        """Return how many log densities the model has for one draw."""
        return sum(site["log_prob"].numel() for site in sites_of(self.prototype))

    def _most_draws(self, batch_size: int) -> int:
        if not self._vectorize:
            return 1
        device = next(site["value"].device for site in sites_of(self.prototype))
        return min(batch_size, most_draws(self.num_densities, device))

    def _batch(self, num_samples: int) -> DrawBatch:
        loss = with_num_particles(self._loss, num_samples)

        def run() -> DrawBatch:
            traces = loss._get_traces(split(self.model), self.guide, self._args, self._kwargs)
            model_trace, guide_trace = next(iter(traces))
            return self._score(model_trace, guide_trace, num_samples)

        batch: DrawBatch = self._run_batch(run)
        if not self._is_checked and num_samples > 1:
            self._check_vectorizes(batch)
        return batch

    def _score(self, model_trace: Trace, guide_trace: Trace, num_samples: int) -> DrawBatch:
        if self.enumerated_names:
            log_p = marginal_log_density(model_trace, guide_trace)
        else:
            log_p = log_density(model_trace)
        log_q, scale = log_density(guide_trace), common_scale(guide_trace)
        log_p, log_q = (term.double().reshape(-1).expand(num_samples) / scale for term in (log_p, log_q))
        return DrawBatch(log_p, log_q, guide_trace, model_trace)

    def _check_vectorizes(self, batch: DrawBatch) -> None:
        """Compare draws of a batch with runs of their own, a few at most, until one is the same.

        A model that sums over all dimensions runs under a plate of particles without an error, and is wrong
        at every draw. A single draw that differs is no evidence: alone, the guide's density uses the
        inverse of a flow, which in single precision fails at some draws.
        """
        finite = torch.isfinite(batch.log_p + batch.log_q).nonzero().reshape(-1).tolist()
        finite = finite[:: max(len(finite) // _NUM_CHECKED, 1)]
        differences = list(takewhile(bool, (self._difference(batch, index) for index in finite)))
        if finite and len(differences) == len(finite):
            raise _does_not_vectorize(differences[0])
        self._is_checked = self._is_checked or bool(finite)

    def _difference(self, batch: DrawBatch, index: int) -> str:
        """Return how a draw of a batch differs from a run of its own, nothing if it does not."""
        single = Trace()
        for name, site in ((site["name"], site) for site in sites_of(batch.guide_trace)):
            if not site["is_observed"] and not is_delta(site["fn"]):
                value = self.values(batch.guide_trace, name, len(batch.log_p))[index]
                single.add_node(name, name=name, type="sample", is_observed=False, value=value, infer={})
        traces = self._run(lambda: self._run_once(poutine.replay(self.guide, trace=single)))
        one = self._score(traces[1], traces[0], 1)
        for name in ("log_p", "log_q"):
            got, expected = float(getattr(batch, name)[index]), float(getattr(one, name))
            if not abs(got - expected) <= _TOLERANCE[0] + _TOLERANCE[1] * abs(expected):
                return f"{name} {got:.6g} in a batch and {expected:.6g} alone"
        return ""

    def values(self, trace: Trace, name: str, num_samples: int) -> Tensor:
        """Return the values of a site of a batch, shape ``(num_samples,) + shape of the site``.

        :raises ValueError: if the batch has another shape.
        """
        prototype = self.prototype if name in self.prototype else self.guide_prototype
        shape = prototype.nodes[name]["value"].shape
        return self.as_draws(name, trace.nodes[name]["value"], shape, num_samples)

    @staticmethod
    def as_draws(name: str, value: Tensor, shape: torch.Size, num_samples: int) -> Tensor:
        """Bring a value of a batch, particles leftmost, to the shape ``(num_samples,) + shape``."""
        if value.numel() == num_samples * shape.numel():
            return value.reshape((num_samples, *shape))
        if value.numel() == shape.numel():
            return value.reshape(shape).expand((num_samples, *shape))
        raise _does_not_vectorize(
            f"shape {tuple(value.shape)} for {num_samples} draws of site {name!r} of shape {tuple(shape)}"
        )

    def guide_density(self, guide_trace: Trace, num_samples: int) -> Tensor:
        """Return the log density of what a guide draws, its `Delta` sites left out, shape ``(n,)``."""
        terms = [per_particle(site, site["log_prob"]) for site in sites_of(guide_trace) if has_density(site)]
        scale = common_scale(guide_trace)
        return as_numbers(sum(terms), guide_trace).double().expand(num_samples) / scale

    def score_guide(self, traces: list[tuple[Trace, int]]) -> Tensor:
        """Return the log density of the guide, as it is now, at traces of draws with the number of each."""
        return torch.cat([self._score_guide(*each) for each in join_rows(traces)])

    def _score_guide(self, guide_trace: Trace, num_samples: int) -> Tensor:
        fixed = Trace()
        for site in filter(has_density, sites_of(guide_trace)):
            # A copy: a transform may remember the point that it has mapped there.
            name, value = site["name"], site["value"].clone()
            fixed.add_node(name, name=name, type="sample", is_observed=False, value=value, infer={})
        guide: Callable[..., Any] = poutine.replay(self.guide, trace=fixed)
        if self._vectorize:
            guide = with_num_particles(self._loss, num_samples)._vectorized_num_particles(guide)
        trace = poutine.trace(guide)

        def run() -> Tensor:
            scored = trace.get_trace(*self._args, **self._kwargs)
            scored.compute_log_prob()
            return self.guide_density(scored, num_samples)

        result: Tensor = self._run_batch(run)
        return result

    def predict(self, batch: DrawBatch) -> Trace:
        """Run the model once more on the draws of a batch, with its observed sites drawn."""
        return self._run_model(poutine.replay(self.model, trace=batch.guide_trace), len(batch.log_p))

    def prior(self, num_samples: int, batch_size: int) -> Iterator[tuple[Trace, int]]:
        """Yield runs of the model with all its sites drawn, and how many draws each holds."""
        batch_size = self._most_draws(batch_size)
        for start in range(0, num_samples, batch_size):
            num = min(batch_size, num_samples - start)
            yield self._run_model(self.model, num), num

    def _run_model(self, model: Callable[..., Any], num_samples: int) -> Trace:
        model = DrawObserved()(model)
        if self._vectorize:
            model = with_num_particles(self._loss, num_samples)._vectorized_num_particles(model)
        trace = poutine.trace(model)
        return self._run_batch(lambda: trace.get_trace(*self._args, **self._kwargs))


def _does_not_vectorize(got: str) -> ValueError:
    return ValueError(
        f"Expected a model and a guide that run for many draws at once, under an outermost plate; got "
        f"{got}. Pass `vectorize=False`, or let the model index and sum its dimensions from the right."
    )
