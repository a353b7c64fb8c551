r"""Which numbers of a model are fitted decentered: those whose posterior is closer to a normal one then.

A posterior p lies by the divergence

.. math:: KL(p \,\|\, N_S) = \tfrac12 \log \det C_S + \sum_{i \in S} E_p[\log s_i] + \text{const}

from the normal distribution of its own moments, with the covariance C_S of the coordinates in which the
numbers S are decentered, :math:`\epsilon_i = (\theta_i - m_i) / s_i`: new coordinates move that normal
distribution, and p is what it was. Particles of :class:`~pyro_adaann.AnnealedSMC` know both terms well
enough.

Source: Gorinova, Moore and Hoffman, *Automatic Reparameterisation of Probabilistic Programs*, ICML 2020. They
learn the coordinates beside a guide.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import LogNormal, constraints

from pyro_adaann.diagnostics.model_and_guide import latent_names
from pyro_adaann.fitting.coordinates import Coordinates, location_family, names_taken
from pyro_adaann.fitting.pilot import Watch, base_at, has_pilot, run_particles
from pyro_adaann.guides.base import AutoFlow
from pyro_adaann.objectives.lenient import run_leniently
from pyro_adaann.sampling.density import UnconstrainedModel
from pyro_adaann.sampling.result import SMCResult
from pyro_adaann.state.random_states import get_random_states, set_random_states

__all__ = ["Start", "choose_start"]

#: By how many nats a posterior has to come closer to a normal one. All numbers are decentered where none is
#: closer by so much: else a percent or two may lie in the neck of a funnel, where no moment shows them. Forty
#: counties lost 4 % of their evidence centered, .6 nats farther; kinetics (36 latents) lost a part of the
#: posterior decentered, 3.6 nats farther.
_MIN_GAIN = 1.0
#: Runs of the model that show whether a scale is a number or a variable.
_NUM_RUNS = 3
#: Most rounds over all numbers.
_MAX_ROUNDS = 5
#: Particles at which prior and likelihood in other coordinates are compared with the model's own; by how much
#: each may differ, absolutely and relatively, in single precision; and for how many of them, since a particle
#: in the neck of a funnel has lost digits.
_NUM_COMPARED, _TOLERANCE, _MIN_SHARE_CLOSE = 100, (0.02, 1e-5), 0.75


class Start(NamedTuple):
    """How to begin to fit a model.

    :param coordinates: in which it is fitted.
    :param base: where a guide of many latents starts there, if particles are at hand.
    :param has_run: whether there have been particles in these coordinates: none for the base, if it is None.
    :param particles: these, in these coordinates.
    """

    coordinates: Coordinates
    base: tuple[Tensor, Tensor] | None = None
    has_run: bool = False
    particles: SMCResult | None = None


def choose_start(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    guide: AutoFlow,
    seed: int | None,
    watch: Watch,
) -> Start:
    """Return the coordinates in which a model is to be fitted, with particles where these are of use.

    The coordinates are its own for a model without sites of a variable scale, or with discrete ones, and
    where there are no particles to tell (:func:`~pyro_adaann.fitting.pilot.run_particles`).

    :param guide: of the model, for the order of its unconstrained numbers.
    :param seed: of the particles.
    :param watch: progress, clock and Ctrl-C.
    """
    own = Coordinates(model, args, kwargs)
    shapes = _sites_of_variable_scale(model, args, kwargs)
    if not (shapes or has_pilot(guide.latent_dim)):
        return Start(own)
    watch[0].phase("coordinates" if shapes else "particles")
    result = run_particles(model, args, kwargs, guide.latent_dim, seed, watch)
    if result is None:
        return Start(own, has_run=True)
    if not shapes:
        return Start(own, base_at(result), has_run=True, particles=result)
    try:
        centered, result = _choose(own, guide, shapes, result)
    except (ValueError, RuntimeError):  # no finite moments
        return Start(own)
    base = base_at(result) if has_pilot(guide.latent_dim) else None
    has_run = base is not None or not centered
    return Start(Coordinates(model, args, kwargs, centered), base, has_run, result)


def _sites_of_variable_scale(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, torch.Size]:
    """Return the shapes of latent sites, normal and the like or log normal, whose scale depends on others."""
    random = get_random_states()
    try:
        with poutine.block(), torch.no_grad(), warnings.catch_warnings(), pyro.validation_enabled(False):
            warnings.simplefilter("ignore")
            traces = [
                run_leniently(poutine.trace(model).get_trace, *args, **kwargs) for _ in range(_NUM_RUNS)
            ]
    except (ValueError, RuntimeError):  # a draw of the prior that the model cannot take
        return {}
    finally:
        set_random_states(random)
    if any(traces[0].nodes[name]["fn"].support.is_discrete for name in latent_names(traces[0])):
        return {}  # a scale might depend on what is summed out
    return {
        name: traces[0].nodes[name]["value"].shape
        for name in latent_names(traces[0])
        if all(_may_be_decentered(name, trace) for trace in traces) and _has_variable_scale(name, traces)
    }


def _may_be_decentered(name: str, trace: Trace) -> bool:
    site = trace.nodes.get(name)
    if site is None:
        return False
    # A part or a multiple of the density of a site is not that of its distance.
    is_weighted = site["mask"] is not None or torch.is_tensor(site["scale"]) or site["scale"] != 1
    if is_weighted or not names_taken(name).isdisjoint(trace.nodes) or site["infer"].get("is_auxiliary"):
        return False
    family = location_family(site["fn"])
    if not {"loc", "scale"} <= set(getattr(family, "arg_constraints", ())):
        return False
    return family.support is constraints.real or isinstance(family, LogNormal)


def _has_variable_scale(name: str, traces: list[Trace]) -> bool:
    scales = [location_family(trace.nodes[name]["fn"]).scale for trace in traces]
    same_shape = all(scale.shape == scales[0].shape for scale in scales)
    return same_shape and not all(torch.equal(scale, scales[0]) for scale in scales)


def _choose(
    own: Coordinates, guide: AutoFlow, shapes: dict[str, torch.Size], result: SMCResult
) -> tuple[dict[str, Tensor], SMCResult]:
    """Return which numbers of which sites stay centered, nothing if all do, and the particles there."""
    places = own.places(result.samples, shapes)
    free, log_scales = [], []
    for name, place in places.items():
        free.append(place.distance(result.samples[name]).reshape(len(place.loc), -1).double())
        log_scales.append(place.scale.log().reshape(len(place.loc), -1).double())
    points, is_kept = result.unconstrained.double().clone(), result.log_weights > -torch.inf
    columns = _columns(guide, shapes)
    choice = _Choice(
        points[is_kept],
        torch.cat(free, 1)[is_kept],
        torch.cat(log_scales, 1)[is_kept],
        result.log_weights[is_kept].double().softmax(0),
    )
    is_free = choice.best(columns)
    if not is_free.any():
        return {}, result
    parts = (~is_free).to(result.unconstrained).split([shape.numel() for shape in shapes.values()])
    found = {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    points[:, torch.tensor(columns, device="cpu")[is_free]] = torch.cat(free, 1)[:, is_free]
    moved = dataclasses.replace(result, unconstrained=points.to(result.unconstrained))
    centered = {name: part for name, part in found.items() if not part.all()}
    fitted = Coordinates(own.own_model, own.args, own.kwargs, centered)
    some = is_kept.nonzero().reshape(-1)[:_NUM_COMPARED]
    log_slopes = torch.cat(log_scales, 1)[:, is_free].sum(1)
    names = {fitted.fitted_name(name, places[name]) for name in centered}
    if not _agree(
        own, fitted, result.unconstrained[some], moved.unconstrained[some], log_slopes[some], names
    ):
        return {}, result
    return centered, moved


def _agree(
    own: Coordinates, fitted: Coordinates, points: Tensor, moved: Tensor, log_slopes: Tensor, names: set[str]
) -> bool:
    """Whether the density in other coordinates is the model's own, up to the slopes of these.

    It is not where a family has location and scale by name alone, where a handler of the model's does
    something to the new sites, or changes their names.

    :param points: unconstrained, shape ``(n, dim)``.
    :param moved: the same points in the other coordinates.
    :param log_slopes: by how much their log densities are larger there, shape ``(n,)``.
    :param names: of the sites in these coordinates.
    """
    try:
        densities = []
        for coordinates, at in ((own, points), (fitted, moved)):
            model = UnconstrainedModel(coordinates.model, own.args, own.kwargs)
            with torch.no_grad():
                densities.append(torch.stack(model.log_densities(at)).double())
    except Exception:  # whatever a model's own handlers and families say to what they do not know
        return False
    before, after = densities  # of prior and likelihood; the slopes belong to the first
    before[0] += log_slopes
    is_close = ((after - before).abs() <= _TOLERANCE[0] + _TOLERANCE[1] * before.abs()).all(0)
    return names <= set(model.sites) and float(is_close.double().mean()) >= _MIN_SHARE_CLOSE


def _columns(guide: AutoFlow, shapes: dict[str, torch.Size]) -> list[int]:
    """Return where the numbers of sites lie among all unconstrained ones."""
    starts, position = {}, 0
    for name, shape in guide._unconstrained_shapes.items():
        starts[name] = position
        position += shape.numel()
    return [starts[name] + i for name, shape in shapes.items() for i in range(shape.numel())]


class _Choice:
    """How close weighted draws are to a normal distribution, by the numbers that are decentered.

    :param own: all numbers as they are, shape ``(n, dim)``.
    :param free: those that may be decentered, decentered, shape ``(n, k)``.
    :param log_scales: the log scales of these, likewise.
    :param weights: of the draws, with sum 1.
    """

    def __init__(self, own: Tensor, free: Tensor, log_scales: Tensor, weights: Tensor) -> None:
        both = torch.cat([own, free], 1)
        both = both - weights @ both
        self._covariance = ((weights * both.T) @ both).cpu()
        self._dim, self._log_scales = own.shape[1], (weights @ log_scales).cpu()

    def best(self, columns: list[int]) -> Tensor:
        """Return which numbers to decenter.

        :param columns: where they lie among all numbers.
        """
        none = torch.zeros(len(columns), dtype=torch.bool, device="cpu")
        some, closest = min(
            (self._descend(start, columns) for start in (none, ~none)), key=lambda pair: pair[1]
        )
        if self.divergence(~none, columns) < closest + _MIN_GAIN:
            return ~none
        return some if closest + _MIN_GAIN < self.divergence(none, columns) else none

    def _descend(self, is_free: Tensor, columns: list[int]) -> tuple[Tensor, float]:
        """Change one number after the other as long as that brings the draws closer."""
        best = self.divergence(is_free, columns)
        for _ in range(_MAX_ROUNDS):
            before = best
            for i in range(len(columns)):
                other = is_free.clone()
                other[i] = ~other[i]
                divergence = self.divergence(other, columns)
                if divergence < best:
                    is_free, best = other, divergence
            if best == before:
                break
        return is_free, best

    def divergence(self, is_free: Tensor, columns: list[int]) -> float:
        """Return the divergence from the normal distribution of the draws' moments, up to a constant."""
        index = torch.arange(self._dim, device="cpu")
        index[torch.tensor(columns, device="cpu")[is_free]] = self._dim + is_free.nonzero().reshape(-1)
        sign, log_det = torch.linalg.slogdet(self._covariance[index][:, index])
        if not (sign > 0 and log_det.isfinite()):
            raise ValueError("Expected draws with a covariance of full rank; got others.")
        return float(0.5 * log_det + self._log_scales[is_free].sum())
