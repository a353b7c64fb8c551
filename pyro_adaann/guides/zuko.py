"""A guide made of a flow of the library zuko."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from pyro_adaann.guides.base import AutoFlow
from pyro_adaann.transforms.base import FlowTransform
from pyro_adaann.transforms.zuko import ZukoFlow, import_zuko

__all__ = ["AutoZuko"]


class AutoZuko(AutoFlow):
    r"""A guide made of any flow of zuko, such as a coupling flow or a neural spline flow.

    Its price: zuko computes from latents to base, and a guide draws. A draw from an autoregressive flow costs
    as many passes as there are latents, from a coupling flow (``passes=2``) two, and its gradient runs
    through all of them. :class:`AutoSpline` is made for this direction, and draws in one pass.

    zuko is not installed with this package: ``pip install zuko``. On import it switches torch's validation of
    distributions off for the whole process; this guide imports it first if you have not, and switches it on
    again.

    :param model: a Pyro model whose latent variables are continuous.
    :param make_flow: is given the latent dimension and returns a flow of `zuko.flows` without context, whose
        base is not used; or the name of a class in `zuko.flows`.
    :param flow_args: further arguments of that class, if a name is given.
    :param kwargs: ``init_loc_fn``, ``base_loc``, ``base_scale`` and ``affine`` of :class:`AutoFlow`.
    :raises ImportError: if zuko is not installed.
    :raises ValueError: if there is no flow of that name.

    Source: Rozet et al., *Zuko: Normalizing flows in PyTorch*, 2022.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0, 1).expand([3]).to_event(1))
        >>> guide = AutoZuko(model, "NSF", {"transforms": 2, "passes": 2})
        >>> guide.get_posterior().log_prob(guide()["z"]).shape
        torch.Size([])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        make_flow: Callable[[int], nn.Module] | str,
        flow_args: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        flows = import_zuko().flows
        if isinstance(make_flow, str) and not isinstance(getattr(flows, make_flow, None), type):
            raise ValueError(f"Expected the name of a class in `zuko.flows`, such as NSF; got {make_flow!r}.")
        super().__init__(model, **kwargs)
        self.make_flow = make_flow
        self.flow_args = dict(flow_args or {})

    def _make_transform(self, latent_dim: int) -> FlowTransform:
        if isinstance(self.make_flow, str):
            flow = getattr(import_zuko().flows, self.make_flow)(latent_dim, **self.flow_args)
        else:
            flow = self.make_flow(latent_dim)
        return ZukoFlow(flow, latent_dim, loc=self._base_loc, scale=self._base_scale)
