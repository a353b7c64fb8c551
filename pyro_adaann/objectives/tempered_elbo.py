"""The tempered ELBO, for a user's own loop around `pyro.infer.SVI`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyro.infer import Trace_ELBO

from pyro_adaann.annealing.paths import Path, get_path
from pyro_adaann.annealing.tempering import Tempering
from pyro_adaann.objectives.capabilities import Capabilities, check_can_temper

__all__ = ["TemperedTrace_ELBO"]


class TemperedTrace_ELBO(Trace_ELBO):
    r"""`Trace_ELBO` of the tempered posterior, for those who keep `pyro.infer.SVI`.

    .. math:: \mathcal{L} = E_q[w_\mathrm{ent}(t) \log q(z) - \log p_t(z)]

    with :math:`w_\mathrm{ent} = 1` except on the path of KL warm-up, where it is t.
    ``inverse_temperature`` may be assigned between steps.

    :param inverse_temperature: t in (0, 1].
    :param path: ``"joint"``, ``"likelihood"``, ``"bridge"``, ``"kl_warmup"`` or a :class:`Path`.
    :param kwargs: those of `pyro.infer.Trace_ELBO`.
    :raises ValueError: if t is outside (0, 1] or the path is unknown; at the first step, if the
        path needs a guide with a base distribution and the guide has none.

    Source: Cobian et al., *AdaAnn*, arXiv 2202.00792, Eq. 15.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0, 1)), 1), obs=torch.ones(()))
        >>> elbo = TemperedTrace_ELBO(inverse_temperature=0.1, num_particles=10)
        >>> svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), elbo)
        >>> for t in (0.1, 0.5, 1.0):
        ...     elbo.inverse_temperature = t
        ...     loss = svi.step()
    """

    capabilities = Capabilities(drops_broken=True, is_tempered=True)

    def __init__(
        self, inverse_temperature: float = 1.0, *, path: str | Path = "joint", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.path = get_path(path)
        self.inverse_temperature = inverse_temperature

    @property
    def inverse_temperature(self) -> float:
        """The inverse temperature t of the next evaluation."""
        return self._inverse_temperature

    @inverse_temperature.setter
    def inverse_temperature(self, value: float) -> None:
        if not 0 < value <= 1:
            raise ValueError(f"Expected `inverse_temperature` in (0, 1]; got {value}.")
        self._inverse_temperature = float(value)

    def _get_traces(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Iterator[Any]:
        if self.inverse_temperature < 1:
            check_can_temper(guide, self, self.path)
            tempering = Tempering(model, guide, self.path, self.inverse_temperature)
            model, guide = tempering.model, tempering.guide
        yield from super()._get_traces(model, guide, args, kwargs)
