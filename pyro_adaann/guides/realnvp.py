"""A guide of affine coupling layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pyro_adaann.checks import check_count
from pyro_adaann.guides.base import AutoFlow
from pyro_adaann.transforms.base import FlowTransform
from pyro_adaann.transforms.realnvp import RealNVPStack

__all__ = ["AutoRealNVP"]


class AutoRealNVP(AutoFlow):
    r"""A guide of affine coupling layers, :math:`z_b \mapsto z_b e^{s(z_a)} + t(z_a)`.

    More expressive per layer than :class:`AutoPlanar`, with an exact inverse, for two or more
    latent dimensions.

    :param model: a Pyro model whose latent variables are continuous.
    :param num_transforms: number of coupling layers; the paper uses 6 and 12.
    :param hidden_dims: widths of the hidden layers of the networks s and t; the paper uses two of
        10, 25 or 100 units.
    :param kwargs: ``init_loc_fn``, ``base_loc``, ``base_scale`` and ``affine`` of :class:`AutoFlow`.
    :raises ValueError: if a count is below 1; at set-up, if the model has one latent dimension.

    Source: Dinh et al., *Density estimation using Real NVP*, ICLR 2017; Cobian et al., *AdaAnn*,
    Eqs. 8 and 9.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0, 1).expand([3]).to_event(1))
        >>> guide = AutoRealNVP(model, num_transforms=6, hidden_dims=[25, 25])
        >>> guide.get_posterior().log_prob(guide()["z"]).shape
        torch.Size([])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        num_transforms: int = 6,
        hidden_dims: Sequence[int] = (100, 100),
        **kwargs: Any,
    ) -> None:
        check_count("num_transforms", num_transforms, 1)
        if not hidden_dims:
            raise ValueError("Expected `hidden_dims` to name at least one width; got none.")
        for width in hidden_dims:
            check_count("hidden_dims", width, 1)
        super().__init__(model, **kwargs)
        self.num_transforms = num_transforms
        self.hidden_dims = tuple(hidden_dims)

    def _make_transform(self, latent_dim: int) -> FlowTransform:
        if latent_dim < 2:
            raise ValueError(
                f"Expected a model with at least 2 latent dimensions for AutoRealNVP, which maps "
                f"one half of them given the other; got {latent_dim}. Use AutoPlanar instead."
            )
        return RealNVPStack(latent_dim, self.num_transforms, self.hidden_dims)
