"""A nested Laplace approximation as a guide, to be mixed with others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor

from pyro_adaann.checks import learning_sites
from pyro_adaann.guides.continuous import continuous_part
from pyro_adaann.guides.latents import log_prob_at
from pyro_adaann.nested.laplace import NestedLaplace
from pyro_adaann.nested.mixture import LaplaceMixture

__all__ = ["NestedGuide"]

#: Arguments of every part, a `NestedLaplace`, kept as buffers with this and its number before their names.
_NAMES, _PREFIX = ("outer", "origin", "spacing", "nodes", "loc", "factor", "log_mass"), "nested_"
_SHARES = _PREFIX + "log_shares"


class NestedGuide(AutoContinuous):
    """A guide whose posterior over all free numbers is a nested Laplace approximation, or one of each mode.

    Its draws have the name of those of other guides, so that each scores the draws of the others.

    :param model: a Pyro model.
    :param found: of its posterior.
    :param name: of the guides that it is mixed with.
    """

    def __init__(self, model: Callable[..., Any], found: LaplaceMixture, name: str = "AutoSpline") -> None:
        super().__init__(continuous_part(model))
        self._pyro_name = name
        self.register_buffer(_SHARES, found.log_shares)
        for k, part in enumerate(found.parts):
            for each in _NAMES:
                self.register_buffer(f"{_PREFIX}{k}_{each}", getattr(part, each))

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        with torch.no_grad(), learning_sites():
            super()._setup_prototype(*args, **kwargs)

    @property
    def num_modes(self) -> int:
        """Of how many modes it is a mixture."""
        return len(self.get_buffer(_SHARES))

    @property
    def outer(self) -> list[int]:
        """Indices of the outer coordinates of all modes, in order."""
        parts = [self.get_buffer(f"{_PREFIX}{k}_outer").tolist() for k in range(self.num_modes)]
        return sorted({index for part in parts for index in part})

    def initialize(self, *args: Any, **kwargs: Any) -> NestedGuide:
        """Run the model once, for the shapes of its sites; return the guide."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        return self

    def get_posterior(self, *args: Any, **kwargs: Any) -> LaplaceMixture:
        """Return the approximation."""
        self.initialize(*args, **kwargs)
        return _of_buffers(dict(self.named_buffers()), self._init_loc().dtype)

    def log_prob(self, values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Return the log density at values of all sites, as the flow guides do."""
        return log_prob_at(self, self.get_posterior(*args, **kwargs), values)

    @staticmethod
    def is_state(state: Mapping[str, Tensor]) -> bool:
        """Whether a ``state_dict`` is one of this class."""
        return _SHARES in state

    @classmethod
    def of_state(cls, model: Callable[..., Any], state: Mapping[str, Tensor]) -> NestedGuide:
        """Return the guide of a ``state_dict``."""
        return cls(model, _of_buffers(state))


def _of_buffers(buffers: Mapping[str, Tensor], dtype: torch.dtype = torch.double) -> LaplaceMixture:
    # In double precision, whatever a module has been cast to.
    buffers = {name: each.double() if each.is_floating_point() else each for name, each in buffers.items()}
    log_shares = buffers[_SHARES]
    parts = [
        NestedLaplace(*(buffers[f"{_PREFIX}{k}_{each}"] for each in _NAMES), dtype=dtype)
        for k in range(len(log_shares))
    ]
    return LaplaceMixture(parts, log_shares)
