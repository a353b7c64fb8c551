r"""A Pyro model as two log densities of many points of its unconstrained coordinates at once.

With the constraint :math:`c(z)` of the latent variables, the log prior of a point z carries the Jacobian,

.. math:: \log p(z) = \log p_\mathrm{model}(c(z)) + \log |\det dc / dz|,

and all else is log likelihood: observed sites, `pyro.factor`, and sites that the model enumerates. So all
tempering is in unconstrained coordinates, as everywhere in the package.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoContinuous
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from pyro_adaann.diagnostics.model_and_guide import check_subsampling, plate_nesting
from pyro_adaann.guides.continuous import no_latents_in_loops
from pyro_adaann.objectives.lenient import Leniency, Violations, run_leniently
from pyro_adaann.objectives.traces import marginal_log_density, per_particle, sites_of
from pyro_adaann.processes.split import split

__all__ = ["UnconstrainedModel", "without_validation"]

#: How far a point may be from itself in a batch, absolutely and relatively: adaptive solvers round
#: differently in a batch; a model that adds its particles up is off by their number.
_TOLERANCE = 0.1, 0.01


class _Points(AutoContinuous):
    """A guide that draws the points it is given, with the Jacobians as densities of its `Delta` sites."""

    def at(self, points: Tensor) -> Callable[..., Any]:
        """Return the guide at ``points``, shape ``(n, 1, ..., 1, latent_dim)`` or ``(latent_dim,)``."""

        def guide(*args: Any, **kwargs: Any) -> Any:
            self.__dict__["_points"] = points
            return self(*args, **kwargs)

        return guide

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        points: Tensor = self.__dict__["_points"]
        return points


class UnconstrainedModel:
    """The log prior and log likelihood of a model at points of its unconstrained coordinates.

    :param model: a Pyro model whose latent variables are continuous or enumerated in the model.
    :param args: its positional arguments.
    :param kwargs: its keyword arguments.
    :param vectorize: whether the model runs once for all points, under an outermost plate.
    :raises ValueError: if a plate is subsampled.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        vectorize: bool = True,
    ) -> None:
        self.model, self._args, self._kwargs, self._vectorize = model, args, kwargs, vectorize
        # Values of these runs are not used, so neither shall be their random numbers.
        with torch.no_grad(), without_validation(), torch.random.fork_rng():
            trace = run_leniently(poutine.block(poutine.trace(model).get_trace), *args, **kwargs)
            check_subsampling(trace)
            enumerated = {s["name"] for s in sites_of(trace) if s["infer"].get("enumerate") == "parallel"}
            self._points = _Points(poutine.block(model, hide=sorted(enumerated)))
            with no_latents_in_loops("AnnealedSMC"):
                run_leniently(self._points._setup_prototype, *args, **kwargs)
        self._kind: type[ELBO] = TraceEnum_ELBO if enumerated else Trace_ELBO
        self.sites: dict[str, Any] = dict(self._points.prototype_trace.iter_stochastic_nodes())
        self._transforms = {name: biject_to(site["fn"].support) for name, site in self.sites.items()}
        self.dim: int = self._points.latent_dim
        self.example: Tensor = self._points._init_loc()
        shapes = [site["fn"].batch_shape for site in sites_of(trace) if not site_is_subsample(site)]
        self._nesting = max(plate_nesting(trace), *map(len, shapes))
        self._is_checked = not vectorize
        self._leniency = Leniency(validates=False)
        #: Names of latent sites without a density: those cannot be drawn from the prior.
        self.masked = [name for name, site in self.sites.items() if _is_masked(site)]

    def log_densities(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return log prior and log likelihood of points, with a graph if the points have one.

        :param points: shape ``(n, dim)``.
        :return: two tensors of shape ``(n,)``, not finite where the model breaks.
        :raises ValueError: if the model does not run for many points at once.
        """
        if not self._vectorize:
            pairs = [self._run(point) for point in points]
            prior, likelihood = zip(*pairs, strict=True)
            return torch.cat(prior), torch.cat(likelihood)
        if len(points) == 1:
            return self._run(points[0])
        try:
            result = self._run(points)
        except (RuntimeError, ValueError, IndexError) as error:
            raise _does_not_vectorize(f"{type(error).__name__}: {error}") from error
        if not self._is_checked:
            self._check_vectorizes(points, *result)
        return result

    def _run(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Run guide and model at ``(n, dim)`` points, or at one of shape ``(dim,)``."""
        num = len(points) if points.dim() == 2 else 1
        if num > 1:
            points = points.reshape(num, *[1] * self._nesting, self.dim)
        run = self._sum_out if self._kind is TraceEnum_ELBO else self._score
        with without_validation():
            prior, likelihood = self._leniency.insist(lambda: run(points, num))

        def each(term: Tensor) -> Tensor:
            return term.to(points).reshape(-1).expand(num)

        return each(prior), each(likelihood)

    def _score(self, points: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """Run the model alone, with its latent sites at given values."""
        values, prior = {}, points.new_zeros(num)
        for site, free in self._points._unpack_latent(points):
            transform = self._transforms[site["name"]]
            values[site["name"]] = value = transform(free)
            prior = prior + transform.log_abs_det_jacobian(free, value).reshape(num, -1).sum(-1)
        model = poutine.condition(split(self.model), data=values)
        model = self._elbo(num)._vectorized_num_particles(model)
        # Within the block, which hides the sites from handlers around it.
        trace = poutine.block(Violations()(poutine.trace(model).get_trace))(*self._args, **self._kwargs)
        trace.compute_log_prob(lambda name, site: not site_is_subsample(site))
        others = (site for site in sites_of(trace) if not (site["name"] in values or site_is_subsample(site)))
        return prior + _log_density(trace.nodes[name] for name in values), _log_density(others)

    def _sum_out(self, points: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """Run guide and model as `TraceEnum_ELBO` does, whose enumerated sites are summed out."""
        guide = self._points.at(points)
        traces = self._elbo(num)._get_traces(split(self.model), guide, self._args, self._kwargs)
        model_trace, guide_trace = next(iter(traces))
        prior = _log_density(model_trace.nodes[name] for name in self.sites)
        likelihood = marginal_log_density(model_trace, guide_trace) - prior
        # The density of a Delta site is minus the Jacobian.
        return prior - _log_density(sites_of(guide_trace)), likelihood

    def _elbo(self, num: int) -> ELBO:
        return self._kind(
            num_particles=num,
            vectorize_particles=True,
            max_plate_nesting=self._nesting,
            strict_enumeration_warning=False,
        )

    def _check_vectorizes(self, points: Tensor, prior: Tensor, likelihood: Tensor) -> None:
        """Compare one point of a batch with a run of its own."""
        finite = torch.isfinite(prior + likelihood).nonzero().reshape(-1)
        if not len(finite):
            return
        index = int(finite[0])
        with torch.no_grad():
            alone = self._run(points[index].detach())
        pairs = zip((prior, likelihood), alone, strict=True)
        for name, (got, expected) in zip(("log prior", "log likelihood"), pairs, strict=True):
            a, b = float(got[index].detach()), float(expected)
            if abs(a - b) > _TOLERANCE[0] + _TOLERANCE[1] * abs(b):
                raise _does_not_vectorize(f"a {name} of {a:.6g} in a batch and of {b:.6g} alone")
        self._is_checked = True

    @torch.no_grad()
    def draw_prior(self, num_samples: int) -> Tensor:
        """Return draws from the prior in unconstrained coordinates, shape ``(num_samples, dim)``.

        They come from torch's global generator, as Pyro's do.

        :raises ValueError: if a latent site has no density (a mask), so that there is no prior to draw from.
        """
        if self.masked:
            raise ValueError(
                f"Expected a proper prior, from which this path starts; got a site without density: "
                f"{', '.join(self.masked)}. Pass `base`, a distribution of the unconstrained latent "
                f"variables that covers the posterior, with path='bridge'."
            )
        if not self._vectorize:
            return torch.stack([self._prior_run(self.model, 1)[0] for _ in range(num_samples)])
        model = self._elbo(num_samples)._vectorized_num_particles(self.model)
        return self._prior_run(model, num_samples)

    def _prior_run(self, model: Callable[..., Any], num: int) -> Tensor:
        with without_validation():
            get_trace = poutine.block(poutine.trace(model).get_trace)
            trace: Trace = self._leniency.insist(lambda: get_trace(*self._args, **self._kwargs))
        columns = []
        for name in self.sites:
            free = self._transforms[name].inv(trace.nodes[name]["value"])
            columns.append(free.reshape(num, -1))
        return torch.cat(columns, dim=-1)

    def split(self, point: Tensor) -> dict[str, Tensor]:
        """Return the unconstrained values of a point ``(dim,)`` by site, in the shapes of the sites."""
        shapes = {name: self._points._unconstrained_shapes[name] for name in self.sites}
        parts = point.split([shape.numel() for shape in shapes.values()])
        return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    @torch.no_grad()
    def constrain(self, points: Tensor) -> dict[str, Tensor]:
        """Return the latent variables of points ``(n, dim)`` by site, shape ``(n,) + shape of the site``."""
        position, result = 0, {}
        for name in self.sites:
            shape = self._points._unconstrained_shapes[name]
            column = points[:, position : position + shape.numel()].reshape(-1, *shape)
            position += shape.numel()
            result[name] = self._transforms[name](column)
        return result


def _log_density(sites: Iterable[Any]) -> Tensor:
    """Return the summed log density of sites, of every particle where they depend on it."""
    total = sum(per_particle(site, site["log_prob"]) for site in sites)
    # One number, of no site, goes with tensors of any device; one that is a tensor stays where it is.
    return total if isinstance(total, Tensor) else torch.tensor(float(total), device="cpu")


class without_validation:
    """Run a model without validation and its warnings: values that break it are counted instead."""

    def __enter__(self) -> None:
        self._validation = pyro.validation_enabled(False)
        self._warnings = warnings.catch_warnings()
        self._validation.__enter__()
        self._warnings.__enter__()
        warnings.filterwarnings("ignore", message="Encountered")

    def __exit__(self, *error: Any) -> None:
        self._warnings.__exit__(*error)
        self._validation.__exit__(*error)


def _is_masked(site: Any) -> bool:
    fn = site["fn"]
    while isinstance(fn, dist.Independent | dist.ExpandedDistribution):
        fn = fn.base_dist
    return isinstance(fn, dist.MaskedDistribution) or site["mask"] is not None


def _does_not_vectorize(got: str) -> ValueError:
    return ValueError(
        f"Expected a model that runs for many points at once, under an outermost plate; got {got}. Pass "
        f"`vectorize=False`, or let the model index and sum its dimensions from the right."
    )
