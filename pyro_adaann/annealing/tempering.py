r"""Tempering a model and a guide, as effect handlers around both.

The tempered density at inverse temperature t moves along a *path* from a density at t = 0 to the
joint density at t = 1. With the log prior, the log likelihood and the log density of the guide's
base, each in the **unconstrained** coordinates z,

.. math:: \log p_t(z) = w_\mathrm{prior}(t) \log p(z) + w_\mathrm{lik}(t) \log p(x \mid z)
          + w_\mathrm{base}(t) \log q_0(z),

where the weights go linearly in t from the path's own values at t = 0 to 1, 1 and 0; on a path of KL
warm-up the guide's own density has a weight too (:mod:`pyro_adaann.annealing.paths`). A handler
multiplies the scale of every site by its weight, so whatever Pyro does with scales (plates, subsampling,
enumeration, any ELBO) holds for tempered densities too: in particular a scale common to enumerated sites is
applied outside their sum, which makes :math:`(\sum_k p)^t` exact.

**Coordinates.** Pyro's autoguides report the Jacobian of a constraint as the density of `Delta` sites
in the guide. Scaling the model alone would temper the density of the *constrained* values; a
half-Cauchy prior then has no normalizable tempered density at small t and the fit runs off to
infinity. So the `Delta` densities get the weight of the prior. For a guide that samples constrained
values itself, the Jacobian is added on the side of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pyro
import pyro.distributions as dist
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import AutoContinuous, AutoDiscreteParallel, AutoGuideList
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_adaann.annealing.paths import Path

__all__ = ["Tempering", "first_density", "flow_parts", "is_delta"]


class Tempering:
    """A model and a guide tempered at one inverse temperature below 1.

    Run ``guide`` and then ``model`` as often as needed; both are ordinary Pyro callables. After a
    run, ``guide_rates`` and ``model_rates`` hold for every site the factor that turns its scaled log
    density into its part of d/dt log p_t.

    :param model: a Pyro model.
    :param guide: its guide.
    :param path: the path.
    :param inverse_temperature: t in (0, 1).
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        path: Path,
        inverse_temperature: float,
    ) -> None:
        self.path = path
        self.inverse_temperature = inverse_temperature
        self.guide_rates: dict[str, float] = {}
        self.model_rates: dict[str, float] = {}
        #: What the scales of the model's sites have been multiplied by.
        self.model_weights: dict[str, float] = {}
        #: Continuous sites whose Jacobian the guide reports, and the guide's other sites.
        self.delta_sites: set[str] = set()
        self.other_sites: set[str] = set()
        self._of_guide = _TemperGuide(self, flow_parts(guide) if path.base else [])
        self._of_model = _TemperModel(self)
        self.guide = self._of_guide(guide)
        self.model = self._of_model(model)

    def around(self, draw: Callable[..., Any]) -> Callable[..., Any]:
        """Temper a part of the guide that draws its latent vector alone."""
        tempered: Callable[..., Any] = self._of_guide(draw)
        return tempered

    def weigh(self, guide_sites: Iterable[Any], model_sites: Iterable[Any]) -> None:
        """Scale sites that were computed without a run of guide and model, as in a run.

        :param guide_sites: the `Delta` sites of a guide that has just been run by :meth:`around`.
        :param model_sites: those of the model.
        """
        for site in guide_sites:
            self._of_guide._pyro_sample(site)
        with self._of_model:
            for site in model_sites:
                self._of_model._pyro_sample(site)

    def scale(self, msg: Any, weight: float, rate: float, rates: dict[str, float]) -> None:
        """Multiply the scale of a site by its weight and note its part of d/dt log p_t."""
        if weight != 1:
            msg["scale"] = msg["scale"] * weight
        rates[msg["name"]] = rate / weight


class _TemperGuide(Messenger):
    def __init__(self, tempering: Tempering, flow_parts: list[AutoContinuous]) -> None:
        super().__init__()
        self.tempering = tempering
        self.flow_parts = flow_parts
        self.bases: dict[str, AutoContinuous] = {}

    def __enter__(self) -> Any:
        tempering = self.tempering
        tempering.guide_rates.clear()
        tempering.delta_sites.clear()
        tempering.other_sites.clear()
        self.bases = {f"_{part._pyro_name}_latent": part for part in self.flow_parts}
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        tempering, path, t = self.tempering, self.tempering.path, self.tempering.inverse_temperature
        if site_is_subsample(msg) or msg["name"] in tempering.guide_rates:
            return
        if path.entropy != 1 and not is_delta(msg["fn"]):
            # Also of sites that are not drawn by the model: they are where an autoguide has its density.
            # Score-function terms stay right: Pyro scales costs, but not the score itself.
            msg["scale"] = msg["scale"] * path.entropy_weight(t)
        if msg["is_observed"] or msg["infer"].get("is_auxiliary"):
            return
        if is_delta(msg["fn"]):
            tempering.delta_sites.add(msg["name"])
            tempering.scale(msg, path.prior_weight(t), 1 - path.prior, tempering.guide_rates)
        else:
            tempering.other_sites.add(msg["name"])

    def _pyro_post_sample(self, msg: Any) -> None:
        part = self.bases.get(msg["name"])
        if part is None:
            return
        # In the guide, minus the weighted log density of the base: the loss is log q - log p_t.
        path, t = self.tempering.path, self.tempering.inverse_temperature
        weight = path.base_weight(t)
        name = f"{msg['name']}_base"
        self.tempering.guide_rates[name] = -path.base / weight
        log_factor = -weight * first_density(part).log_prob(msg["value"])
        with log_factor.device:  # Pyro would move it to torch's default device
            pyro.factor(name, log_factor, has_rsample=True)


class _TemperModel(Messenger):
    def __init__(self, tempering: Tempering) -> None:
        super().__init__()
        self.tempering = tempering
        self.jacobian_sites: set[str] = set()

    def __enter__(self) -> Any:
        self.tempering.model_rates.clear()
        self.jacobian_sites.clear()
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.jacobian_sites or site_is_subsample(msg):
            return
        tempering, path, t = self.tempering, self.tempering.path, self.tempering.inverse_temperature
        enumerated = msg["infer"].get("enumerate") == "parallel" and not (
            name in tempering.other_sites or name in tempering.delta_sites
        )
        if msg["is_observed"] or enumerated:
            weight, rate = path.likelihood_weight(t), 1 - path.likelihood
        else:
            weight, rate = path.prior_weight(t), 1 - path.prior
        tempering.scale(msg, weight, rate, tempering.model_rates)
        tempering.model_weights[name] = weight

    def _pyro_post_sample(self, msg: Any) -> None:
        tempering, path = self.tempering, self.tempering.path
        if msg["name"] not in tempering.other_sites or msg["is_observed"]:
            return
        t = tempering.inverse_temperature
        weight = path.prior_weight(t) - path.entropy_weight(t)
        if weight == 0 or not _has_jacobian(msg["fn"]):
            return
        # The guide's density is one of constrained values: so is p_t, with |dz/du|^weight.
        name = f"_{msg['name']}_jacobian"
        log_jacobian = _log_jacobian(msg["fn"], msg["value"])
        self.jacobian_sites.add(name)
        tempering.model_rates[name] = (1 - path.prior) / weight
        factor = dist.Unit(weight * log_jacobian, validate_args=False)
        pyro.sample(name, factor, obs=factor.sample(), infer={"is_auxiliary": True})


def is_delta(fn: Any) -> bool:
    """Whether a distribution is a single point, whatever wraps it."""
    while isinstance(fn, dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)


def _has_jacobian(fn: Any) -> bool:
    support = fn.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return not (support.is_discrete or support is constraints.real)


def _log_jacobian(fn: Any, value: Tensor) -> Tensor:
    """Return log |d constrained / d unconstrained| at a constrained value, in batch shape."""
    transform = biject_to(fn.support)
    result = transform.log_abs_det_jacobian(transform.inv(value), value)
    return sum_rightmost(result, result.dim() - value.dim() + fn.event_dim)


def first_density(guide: Any) -> Any:
    """Return the density of the latent vector of a guide that path "bridge" starts from."""
    return guide.get_first_dist() if hasattr(guide, "get_first_dist") else guide.get_base_dist()


def flow_parts(guide: Callable[..., Any]) -> list[AutoContinuous]:
    """Return the parts of a guide that have a base density, or none if one has not."""
    parts = [guide]
    if isinstance(guide, AutoGuideList):
        parts = [part for part in guide if not isinstance(part, AutoDiscreteParallel)]
    has_base = (
        isinstance(part, AutoContinuous) and type(part).get_base_dist is not AutoContinuous.get_base_dist
        for part in parts
    )
    return parts if all(has_base) else []
