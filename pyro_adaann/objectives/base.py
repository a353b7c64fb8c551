"""The base class of objectives: it tempers model and guide and reads every particle of their traces."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any

import pyro.distributions as dist
from pyro.infer import ELBO, Trace_ELBO
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_adaann.annealing.paths import Path
from pyro_adaann.annealing.tempering import Tempering
from pyro_adaann.guide_status import expects_tempered, is_expected
from pyro_adaann.objectives.lenient import Leniency
from pyro_adaann.objectives.memory import LogFactorMemory
from pyro_adaann.objectives.recorded_model import ModelRecorder
from pyro_adaann.objectives.sites import check_scales, num_latents
from pyro_adaann.objectives.traces import (
    TraceSource,
    captured_parameters,
    draw_log_factors,
    log_factors,
    log_weights,
    sites_of,
    subsampled_plate,
    with_num_particles,
)
from pyro_adaann.objectives.validity import PartlyValid
from pyro_adaann.processes.rows import SplitDistribution
from pyro_adaann.processes.split import split

__all__ = ["Objective", "sites_in"]

#: Fresh draws for a variance if training leaves none. With fewer, the relative error of the sd exceeds
#: 1 / sqrt(2 * 100) = 7 %.
_NUM_FRESH_DRAWS = 100


class Objective(ABC):
    """What is minimized at the inverse temperature of the present stage.

    At inverse temperature 1 model and guide are evaluated as they are. A new objective implements
    :meth:`loss`, and passes the traces of its training evaluations to `_look`.

    :param path: the path of tempered densities.
    :param num_recycled_draws: least number of draws of the latest training steps whose log factors are
        kept; 0 for none.
    """

    #: Whether the value of the loss is meaningful.
    reports_loss = True

    def __init__(self, path: Path, num_recycled_draws: int) -> None:
        self.path = path
        self.inverse_temperature = 1.0
        self.is_final = False
        #: Broken and all particles of the training evaluations since `start_stage`.
        self.num_broken = 0
        self.num_particles = 0
        #: Whether a plate of the model has been sub-sampled in training.
        self.is_subsampled = False
        #: The model's sites and their distributions, by which a checkpoint is matched with its model.
        self.sites: list[str] | None = None
        #: How many numbers the guide draws for one particle; None before the first evaluation.
        self.num_latents: int | None = None
        #: The names of the guide's parameters; None where no trace of it has been seen.
        self.guide_names: list[str] | None = None
        #: The log factors of the latest training draws.
        self.memory = LogFactorMemory(num_recycled_draws)
        self._tempering: Tempering | None = None
        #: Whether broken draws still raise errors.
        self.leniency = Leniency()
        self._variance_loss: ELBO | None = None
        self._has_warned = False
        # Makes the traces of evaluations, if model and guide are to be recorded.
        self.recorder: ModelRecorder | None = None

    @abstractmethod
    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the loss; call it under `torch.no_grad`."""

    @abstractmethod
    def _elbos(self) -> list[ELBO]:
        """Return the ELBOs that run model and guide: that of the stages below 1, and the final one."""

    @property
    def is_vectorized(self) -> bool:
        """Whether model and guide run once for all particles."""
        return all(elbo.vectorize_particles or elbo.num_particles == 1 for elbo in self._elbos())

    def start_stage(self, inverse_temperature: float, *, is_final: bool) -> None:
        """Evaluate at this inverse temperature from now on."""
        self.inverse_temperature = inverse_temperature
        self.is_final = is_final
        self.num_broken = self.num_particles = 0

    def _called(self, name: str) -> AbstractContextManager[None]:
        """Return the block of an evaluation; the first one outside of the driver's methods warns below 1."""
        if not (self.is_final or self._has_warned or is_expected()):
            self._has_warned = True
            warnings.warn(
                f"`{name}` of an AdaAnnSVI is called at inverse temperature {self.inverse_temperature:.3g}, "
                f"which AdaAnnSVI.step alone raises: a loop of your own stays there, and its guide is one of "
                f"a tempered posterior. Call step, or use pyro.infer.SVI with TemperedTrace_ELBO.",
                stacklevel=4,
            )
        return expects_tempered()

    def _temper(self, model: Any, guide: Any) -> tuple[Any, Any]:
        """Return model and guide at the present inverse temperature, the model divided among processes."""
        self._tempering = None
        if self.inverse_temperature >= 1:
            return split(model), guide
        self._tempering = Tempering(model, guide, self.path, self.inverse_temperature)
        return split(self._tempering.model), self._tempering.guide

    def _source(self, elbo: ELBO, model: Any, guide: Any, *, needs_graph: bool = True) -> TraceSource | None:
        """Return what makes the traces of a model and a guide that :meth:`_temper` has got, None for an ELBO.

        :param needs_graph: whether log densities have a graph.
        """
        if self.recorder is None:
            return None
        return self.recorder.source(elbo, model, guide, self._tempering, needs_graph=needs_graph)

    def _look(self, model_trace: Trace, guide_trace: Trace) -> None:
        """Record the model's sites, and the log factors of a training step."""
        self._look_at_sites(model_trace, guide_trace)
        if self._tempering is not None and self.memory.num_draws:
            factors = log_factors(self._tempering, model_trace, guide_trace)
            if factors is not None:
                weights = log_weights(model_trace, guide_trace)
                self.memory.add(factors, weights, self.inverse_temperature)

    def _look_at_sites(self, model_trace: Trace, guide_trace: Trace) -> None:
        """Record what model and guide consist of, and check that they can be annealed."""
        if self.sites is None:
            self.sites = sites_in(model_trace)
        if self.guide_names is None:
            self.guide_names = list(captured_parameters(guide_trace))
        self.is_subsampled = self.is_subsampled or subsampled_plate(model_trace) is not None
        if self._tempering is None:
            return
        if not any(_is_latent(site) for site in guide_trace.nodes.values()):
            raise ValueError(
                "Expected a guide with at least one latent site; got none. Without latent "
                "variables there is no posterior to anneal: use pyro.infer.SVI."
            )
        if self.num_latents is None:
            if self.path.entropy == 1:
                check_scales(model_trace, guide_trace, self._tempering.model_weights)
            self.num_latents = num_latents(guide_trace)

    def forget(self) -> None:
        """Drop the draws that were kept, after the guide has been set back."""
        self.memory.forget()

    def ess_share(self) -> float:
        """Return the effective sample size of the kept draws as a share of their number."""
        return self.memory.ess_share(self.inverse_temperature)

    def draw_log_factors(
        self, num_samples: int | None, model: Any, guide: Any, args: Any, kwargs: Any
    ) -> list[Tensor]:
        """Return d/dt log p_t of guide draws and their log weights, ``(2, num_draws)`` for every step.

        The weights are against the density at the present inverse temperature.

        :param num_samples: how many fresh draws, as of one step; None for those that training has
            made, or 100 fresh ones if it has made none.
        """
        if num_samples is None and self.memory:
            return self.memory.steps(self.inverse_temperature)
        if self._variance_loss is None:
            # Once, so that Pyro guesses the nesting of plates once.
            self._variance_loss = self._make_variance_loss(num_samples or _NUM_FRESH_DRAWS)
        loss, t = self._variance_loss, self.inverse_temperature

        def draw() -> Tensor:
            return draw_log_factors(loss, Tempering(model, guide, self.path, t), args, kwargs)

        return [self.leniency.insist(draw)]

    def _make_variance_loss(self, num_samples: int) -> ELBO:
        elbo = next(iter(self._elbos()), None) or Trace_ELBO()
        result = with_num_particles(elbo, num_samples)
        result.strict_enumeration_warning = False  # sites that the guide would enumerate are drawn
        return result

    def state(self) -> dict[str, Any]:
        """Return what the next evaluations depend on, as plain data; :meth:`restore` takes it."""
        variance = self._variance_loss
        return {
            "num_broken": self.num_broken,
            "num_particles": self.num_particles,
            "memory": self.memory.state(),
            "leniency": self.leniency.state(),
            "sites": self.sites,
            # Pyro guesses it at the first evaluation, from a run of the model that uses up draws.
            "max_plate_nesting": [elbo.max_plate_nesting for elbo in self._elbos()],
            "variance": variance and [variance.num_particles, variance.max_plate_nesting],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state that :meth:`state` has returned."""
        self.num_broken, self.num_particles = state["num_broken"], state["num_particles"]
        self.memory.restore(state["memory"])
        self.leniency.restore(state["leniency"])
        self.sites = state["sites"]
        for elbo, nesting in zip(self._elbos(), state["max_plate_nesting"], strict=True):
            elbo.max_plate_nesting = nesting
        if state["variance"] is not None:
            num_samples, nesting = state["variance"]
            self._variance_loss = self._make_variance_loss(num_samples)
            self._variance_loss.max_plate_nesting = nesting


def sites_in(model_trace: Trace) -> list[str]:
    """Return the names of a model's sites with the kinds of their distributions."""
    return [
        f"{site['name']} ({_kind(site['fn'])})"
        for site in sites_of(model_trace)
        if not (site["infer"].get("is_auxiliary") or site_is_subsample(site))
    ]


def _kind(fn: Any) -> str:
    of_torch = dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution
    while isinstance(fn, of_torch | SplitDistribution | PartlyValid):
        fn = fn.base_dist
    return type(fn).__name__


def _is_latent(site: Any) -> bool:
    return site["type"] == "sample" and not site["is_observed"]
