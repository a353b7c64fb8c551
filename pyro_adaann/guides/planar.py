"""A guide of planar layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro_adaann.checks import check_count
from pyro_adaann.guides.base import AutoFlow
from pyro_adaann.transforms.base import FlowTransform
from pyro_adaann.transforms.planar import PlanarStack

__all__ = ["AutoPlanar"]


class AutoPlanar(AutoFlow):
    r"""A guide of planar layers, :math:`z \mapsto z + u_l \tanh(w_l \cdot z + b_l)`.

    The guide of the AdaAnn paper. It keeps several modes under annealing, works in any dimension
    and is cheap: 250 layers cost about as much as Pyro's own bookkeeping of a step.

    :param model: a Pyro model whose latent variables are continuous.
    :param num_transforms: number of layers; the paper uses 50 in one dimension and 250 in three.
    :param kwargs: ``init_loc_fn``, ``base_loc``, ``base_scale`` and ``affine`` of :class:`AutoFlow`.
    :raises ValueError: if ``num_transforms`` < 1.

    Source: Cobian et al., *AdaAnn*, arXiv 2202.00792, Eqs. 4-7.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0, 1).expand([3]).to_event(1))
        >>> guide = AutoPlanar(model, num_transforms=50, base_scale=2.0)
        >>> guide()["z"].shape
        torch.Size([3])
    """

    def __init__(self, model: Callable[..., Any], num_transforms: int = 50, **kwargs: Any) -> None:
        check_count("num_transforms", num_transforms, 1)
        super().__init__(model, **kwargs)
        self.num_transforms = num_transforms

    def _make_transform(self, latent_dim: int) -> FlowTransform:
        stack = PlanarStack(latent_dim, self.num_transforms)
        stack.reset_parameters(self._base_loc, self._base_scale)
        return stack
