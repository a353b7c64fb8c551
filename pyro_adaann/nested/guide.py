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

__all__ = ["NestedGuide"]

#: Arguments of `NestedLaplace`, kept as buffers with this before their names.
_NAMES, _PREFIX = ("outer", "origin", "spacing", "nodes", "loc", "factor", "log_mass"), "nested_"


class NestedGuide(AutoContinuous):
    """A guide whose posterior over all free numbers is a nested Laplace approximation.

    Its draws have the name of those of other guides, so that each scores the draws of the others.

    :param model: a Pyro model.
    :param found: of its posterior.
    :param name: of the guides that it is mixed with.
    """

    def __init__(self, model: Callable[..., Any], found: NestedLaplace, name: str = "AutoSpline") -> None:
        super().__init__(continuous_part(model))
        self._pyro_name = name
        for each in _NAMES:
            self.register_buffer(_PREFIX + each, getattr(found, each))

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        with torch.no_grad(), learning_sites():
            super()._setup_prototype(*args, **kwargs)

    @property
    def outer(self) -> list[int]:
        """Indices of the outer coordinates."""
        indices: list[int] = getattr(self, _PREFIX + "outer").tolist()
        return indices

    def initialize(self, *args: Any, **kwargs: Any) -> NestedGuide:
        """Run the model once, for the shapes of its sites; return the guide."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        return self

    def get_posterior(self, *args: Any, **kwargs: Any) -> NestedLaplace:
        """Return the approximation."""
        self.initialize(*args, **kwargs)
        parts = [getattr(self, _PREFIX + each) for each in _NAMES]
        return NestedLaplace(*parts, dtype=self._init_loc().dtype)

    def log_prob(self, values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Return the log density at values of all sites, as the flow guides do."""
        return log_prob_at(self, self.get_posterior(*args, **kwargs), values)

    @staticmethod
    def is_state(state: Mapping[str, Tensor]) -> bool:
        """Whether a ``state_dict`` is one of this class."""
        return _PREFIX + _NAMES[0] in state

    @classmethod
    def of_state(cls, model: Callable[..., Any], state: Mapping[str, Tensor]) -> NestedGuide:
        """Return the guide of a ``state_dict``."""
        return cls(model, NestedLaplace(*(state[_PREFIX + each] for each in _NAMES)))
