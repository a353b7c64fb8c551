"""Autoguides whose posterior is a normalizing flow over all unconstrained latent variables."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous, init_to_median
from torch import Tensor

from pyro_adaann.checks import check_count, learning_sites
from pyro_adaann.guide_status import warn_of_draws
from pyro_adaann.guides.continuous import check_whole_plates, no_latents_in_loops
from pyro_adaann.guides.latents import constrained, log_prob_at
from pyro_adaann.guides.prior import prior_base
from pyro_adaann.guides.quantile_net import normal_net, quantiles_of_columns
from pyro_adaann.guides.stored import check_initialized, check_store
from pyro_adaann.transforms.affine import AffineLayer
from pyro_adaann.transforms.base import FlowTransform
from pyro_adaann.transforms.compose import ComposedFlow
from pyro_adaann.transforms.fixed_affine import FixedAffine

__all__ = ["AutoFlow"]

#: Latents up to which an affine layer has correlations unless told otherwise.
_MAX_TRIANGULAR = 64


class AutoFlow(AutoContinuous):
    r"""Base class of the flow guides: q(z) is a normal base pushed through a trainable bijection.

    .. math:: z = T_\phi(\varepsilon), \quad \varepsilon \sim N(m, \mathrm{diag}(s^2)), \quad
              \log q(z) = \log N(\varepsilon; m, s) - \log|\det J_T(\varepsilon)|

    The bijection is a flow and, after it, an affine layer (:class:`~pyro_adaann.transforms.AffineLayer`),
    so that scales and correlations of the posterior are not the flow's work. A new flow guide implements
    :meth:`_make_transform` alone.

    :param model: a Pyro model whose latent variables are continuous.
    :param init_loc_fn: Pyro's per-site initialization, the base location unless ``base_loc`` is given.
    :param base_loc: location m of the base in unconstrained coordinates, a number, a tensor of
        shape ``(latent_dim,)``, or ``"prior"``: the median of prior draws of every coordinate.
    :param base_scale: scale s > 0 of the base, likewise; ``"prior"`` is half the range of the middle 68 % of
        prior draws. Annealing wants a base that covers the region where the posterior may have its modes.
        A lower triangular matrix L of shape ``(latent_dim, latent_dim)`` makes the guide start at
        :math:`N(m, L L^\top)`: the base is then standard normal, and the flow ends in m + L x.
    :param affine: ``"triangular"`` for an affine layer with correlations, ``"diagonal"`` for one without,
        None for none; by default triangular up to 64 latents.
    :raises ValueError: at set-up, if the base does not fit the latent dimension or s <= 0.
    :raises NotImplementedError: at set-up, if the model cannot be sampled (see the message).

    Dimension, dtype and device are the model's and known when it has run once: at the first call, or
    before it by :meth:`initialize`. To use a fitted guide in another process, store its ``state_dict()`` by
    `torch.save`; there, :meth:`initialize` a guide made alike and call ``load_state_dict``. Pyro's parameter
    store has the parameters and not the base: files of it are refused.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        init_loc_fn: Callable[..., Any] = init_to_median,
        base_loc: float | Tensor | Literal["prior"] | None = None,
        base_scale: float | Tensor | Literal["prior"] = 1.0,
        affine: Literal["auto", "triangular", "diagonal"] | None = "auto",
    ) -> None:
        if affine not in ("auto", "triangular", "diagonal", None):
            raise ValueError(
                f'Expected `affine` to be "auto", "triangular", "diagonal" or None; got {affine!r}.'
            )
        for name, arg in (("base_loc", base_loc), ("base_scale", base_scale)):
            if isinstance(arg, str) and arg != "prior":
                raise ValueError(f'Expected `{name}` to be a number, a tensor or "prior"; got {arg!r}.')
        super().__init__(model, init_loc_fn=init_loc_fn)
        self._base_args = (base_loc, base_scale)
        # `self.model` starts at the values of `init_loc_fn`, which are no draws of the prior.
        self._own_model = (model,)
        self.affine = affine

    @abstractmethod
    def _make_transform(self, latent_dim: int) -> FlowTransform:
        """Return a new flow on ``latent_dim`` coordinates, near the identity."""

    def initialize(self, *args: Any, **kwargs: Any) -> AutoFlow:
        """Run the model once and create the parameters; return the guide.

        Afterwards ``parameters()``, ``state_dict()`` and ``to(device)`` work before the first step.
        Calling it again changes nothing.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        return self

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        # Shapes and values alone are kept, so that a guide can be copied and pickled: no graph of the model's
        # parameters, and none of the model's arguments.
        with torch.no_grad(), learning_sites(), no_latents_in_loops(type(self).__name__):
            super()._setup_prototype(*args, **kwargs)
        check_whole_plates(self.prototype_trace, type(self).__name__)
        for name in ("_INPUT", "_RETURN"):
            if name in self.prototype_trace:
                self.prototype_trace.remove_node(name)

        init_loc = self._init_loc()
        loc, scale = self._resolve_base(args, kwargs)
        loc, start = self._base_tensor(loc, init_loc), None
        if torch.is_tensor(scale) and scale.dim() == 2:
            start = FixedAffine(loc, scale.detach().to(init_loc).clone())
            loc, scale = torch.zeros_like(loc), 1.0
        scale = self._base_tensor(scale, init_loc)
        if not (scale > 0).all():
            raise ValueError(f"Expected `base_scale` > 0; got {self._base_args[1]}.")
        self.register_buffer("_base_loc", loc)
        self.register_buffer("_base_scale", scale)
        # On the model's device from the start, whatever torch's default is.
        with init_loc.device:
            parts = self._with_affine(self._make_transform(self.latent_dim))
            parts += [] if start is None else [start]
            self.transform = (ComposedFlow(parts) if len(parts) > 1 else parts[0]).to(init_loc)

    def _resolve_base(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[float | Tensor | None]:
        """Return location and scale as they were given, that of the prior where that was asked for."""
        if not any(isinstance(arg, str) for arg in self._base_args):
            return [arg for arg in self._base_args if not isinstance(arg, str)]
        prior = prior_base(self._own_model[0], self.prototype_trace, args, kwargs)
        return [own if isinstance(arg, str) else arg for arg, own in zip(self._base_args, prior, strict=True)]

    def _with_affine(self, flow: FlowTransform) -> list[FlowTransform]:
        kind = self.affine
        if kind is None:
            return [flow]
        if kind == "auto":
            kind = "triangular" if self.latent_dim <= _MAX_TRIANGULAR else "diagonal"
        layer = AffineLayer(self.latent_dim, kind, loc=self._base_loc, scale=self._base_scale)
        return [flow, layer]

    def _base_tensor(self, arg: float | Tensor | None, init_loc: Tensor) -> Tensor:
        value = (
            init_loc if arg is None else torch.as_tensor(arg, dtype=init_loc.dtype, device=init_loc.device)
        )
        if value.shape not in ((), (1,), init_loc.shape):
            raise ValueError(
                f"Expected `base_loc` and `base_scale` to be numbers or tensors of shape "
                f"({self.latent_dim},), the latent dimension, or `base_scale` a lower triangular matrix; got "
                f"shape {tuple(value.shape)}."
            )
        return value.detach().expand(init_loc.shape).clone()

    def get_base_dist(self) -> dist.TorchDistribution:
        """Return the base, a fixed diagonal normal with event shape ``(latent_dim,)``."""
        return dist.Normal(self._base_loc, self._base_scale, validate_args=False).to_event(1)

    def get_first_dist(self) -> dist.TorchDistribution:
        """Return the density of the latent vector before training, where path ``"bridge"`` starts."""
        parts = self.transform.parts if isinstance(self.transform, ComposedFlow) else [self.transform]
        if not isinstance(parts[-1], FixedAffine):
            return self.get_base_dist()
        return dist.MultivariateNormal(
            parts[-1].start_loc, scale_tril=parts[-1].start_factor, validate_args=False
        )

    def get_transform(self, *args: Any, **kwargs: Any) -> FlowTransform:
        """Return the flow from base to posterior; the arguments are not used."""
        return self.transform

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TorchDistribution:
        """Return q over the unconstrained latent vector, with a ``log_prob`` at any point.

        :raises ValueError: if Pyro's parameter store was read from a file.
        """
        self.initialize(*args, **kwargs)
        check_store(f"{self._pyro_name}.transform", self._modules["transform"])
        return dist.TransformedDistribution(self.get_base_dist(), [self.transform])

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the posterior median of every latent variable, in the model's shapes.

        Each unconstrained coordinate has its own median, as in Pyro's normal guides; with several
        modes it may lie between them. The values satisfy the constraints of their sites, so the median of a
        probability vector sums to one, which :meth:`quantiles` at 0.5 do not. Computed from a fixed
        quasi-random net, so no random state is used and two calls agree.
        """
        warn_of_draws(self, "A median")
        self.initialize(*args, **kwargs)
        levels = self._base_loc.new_tensor([0.5])
        middle = quantiles_of_columns(self._quantile_points(), levels)
        return {site["name"]: value[0] for site, _, value in constrained(self, middle)}

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the posterior quantiles of every number of every latent variable.

        They are those of the values that the model sees, for each number of a vector or matrix by itself.

        :param quantiles: numbers in [0, 1].
        :return: for every site a tensor with the quantiles along a new first dimension.
        :raises ValueError: if a quantile is outside [0, 1].
        """
        warn_of_draws(self, "A quantile")
        self.initialize(*args, **kwargs)
        levels = torch.as_tensor(quantiles, dtype=self._base_loc.dtype, device=self._base_loc.device)
        if not ((levels >= 0) & (levels <= 1)).all():
            raise ValueError(f"Expected quantiles in [0, 1]; got {quantiles}.")
        latents = self._quantile_points()
        # Of the values: a bijection to a simplex mixes coordinates, and one to an upper bound reverses them.
        return {
            site["name"]: quantiles_of_columns(value.reshape(len(value), -1), levels).reshape(
                -1, *value.shape[1:]
            )
            for site, _, value in constrained(self, latents)
        }

    @torch.no_grad()
    def sample_posterior(
        self, num_samples: int, *args: Any, batch_size: int = 100_000, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Draw every latent variable ``num_samples`` times, without running the model.

        :param num_samples: number of draws.
        :param batch_size: how many pass through the flow at a time.
        :return: for every site its draws along a new first dimension.
        :raises ValueError: if a count is below 1.
        """
        check_count("num_samples", num_samples, 1)
        check_count("batch_size", batch_size, 1)
        warn_of_draws(self, "A draw of sample_posterior")
        posterior = self.get_posterior(*args, **kwargs)
        sizes = [min(batch_size, num_samples - i) for i in range(0, num_samples, batch_size)]
        latents = torch.cat([posterior.sample(torch.Size([size])) for size in sizes])
        return {site["name"]: value for site, _, value in constrained(self, latents)}

    def log_prob(self, values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        r"""Return the log density of the guide at any values of the latent variables.

        .. math:: \log q(c) = \log q(z) - \log|\det dc / dz|, \qquad z = \text{unconstrained } c

        :param values: for every site a tensor of its draws along a first dimension, as
            :meth:`sample_posterior` returns them.
        :return: shape ``(num_draws,)``, in the coordinates of the model.
        :raises ValueError: if a site is missing.
        """
        return log_prob_at(self, self.get_posterior(*args, **kwargs), values)

    def _quantile_points(self) -> Tensor:
        """Return the images of a low-discrepancy sample of the base, the same in every call."""
        return self.transform(self._base_loc + self._base_scale * normal_net(self.latent_dim, self._base_loc))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        check_initialized(self.prototype_trace is not None, prefix, state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's version empties the guide that is being copied, not the copy.
        state = self.__dict__.copy()
        state.update(_model=None, _own_model=None, master=None)
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoFlow:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        state = copy.deepcopy(self.__getstate__(), memo)
        new.__setstate__({**state, "_model": self._model, "_own_model": self._own_model})
        return new
