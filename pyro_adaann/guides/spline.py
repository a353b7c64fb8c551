"""A guide of autoregressive splines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pyro_adaann.checks import check_count
from pyro_adaann.guides.base import AutoFlow
from pyro_adaann.transforms.base import FlowTransform
from pyro_adaann.transforms.spline import SplineStack

__all__ = ["AutoSpline"]


class AutoSpline(AutoFlow):
    r"""A guide of autoregressive spline layers, :math:`z_i \mapsto c_i + e^{a_i} S_i(z_i)` given z_<i.

    The guide for three and more latents: it follows separate modes, funnels and bends in tens of dimensions,
    draws and scores in one pass, and has an exact inverse. Made for :func:`~pyro_adaann.natural_svi`.

    :param model: a Pyro model whose latent variables are continuous.
    :param num_transforms: number of layers; the order of the coordinates changes from one to the next. By
        default 2, and 1 in one dimension.
    :param num_bins: bins of every spline; by default 32 in one dimension, 24 in two, 8 from three on.
    :param hidden_dims: widths of the hidden layers of the masked networks; by default two of 64, or of twice
        the latent dimension if that is more.
    :param kwargs: ``init_loc_fn``, ``base_loc``, ``base_scale`` and ``affine`` of :class:`AutoFlow`.
    :raises ValueError: if a count is below 1.

    Source: Durkan et al., *Neural Spline Flows*, NeurIPS 2019; Kingma et al., *Improved Variational Inference
    with Inverse Autoregressive Flow*, NeurIPS 2016.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0, 1).expand([3]).to_event(1))
        >>> guide = AutoSpline(model, base_scale=2.0)
        >>> guide.get_posterior().log_prob(guide()["z"]).shape
        torch.Size([])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        num_transforms: int | None = None,
        num_bins: int | None = None,
        hidden_dims: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        check_count("num_transforms", num_transforms, 1)
        check_count("num_bins", num_bins, 1)
        if hidden_dims is not None and not hidden_dims:
            raise ValueError("Expected `hidden_dims` to name at least one width; got none.")
        for width in hidden_dims or ():
            check_count("hidden_dims", width, 1)
        super().__init__(model, **kwargs)
        self.num_transforms = num_transforms
        self.num_bins = num_bins
        self.hidden_dims = None if hidden_dims is None else tuple(hidden_dims)

    def _make_transform(self, latent_dim: int) -> FlowTransform:
        width = max(64, 2 * latent_dim)
        return SplineStack(
            latent_dim,
            self.num_transforms or (1 if latent_dim == 1 else 2),
            self.num_bins or {1: 32, 2: 24}.get(latent_dim, 8),
            self.hidden_dims or (width, width),
            loc=self._base_loc,
            scale=self._base_scale,
        )
