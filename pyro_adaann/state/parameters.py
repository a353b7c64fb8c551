"""The parameters that a fit trains, with their optimizers: by name, whatever store holds them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any
from weakref import ref

import torch
from pyro.nn import PyroModule
from pyro.optim import PyroOptim
from pyro.optim.optim import _get_state_dict, _load_state_dict, is_scheduler
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["FitParameters"]

#: Which guide has trained a parameter. Guides of one class have one set of names in Pyro's store.
_TRAINED_BY: Any = WeakTensorKeyDictionary()


class FitParameters:
    """The unconstrained parameters that a fit has met.

    `PyroOptim.get_state` goes by the names in Pyro's global store, where ``module_local_params``
    leaves none; the names here are those of the trace.

    :param guide: the guide of the fit.
    :param optim: its optimizer.
    """

    def __init__(self, guide: Callable[..., Any], optim: PyroOptim) -> None:
        self.guide = guide
        self.optim = optim
        self.tensors: dict[str, Tensor] = {}

    def meet(self, found: dict[str, Tensor]) -> None:
        """Take note of the parameters of a step.

        :raises ValueError: if one belongs to another guide of the same name.
        """
        new = {name: value for name, value in found.items() if self.tensors.get(name) is not value}
        if not new:
            return
        if isinstance(self.guide, PyroModule):
            prefix = f"{self.guide._pyro_name}."
            own = {id(parameter) for parameter in self.guide.parameters()}
            for name, value in new.items():
                if name.startswith(prefix):
                    self._check_owner(name, value, id(value) in own)
        self.tensors.update(new)

    def _check_owner(self, name: str, value: Tensor, is_own: bool) -> None:
        owner = _TRAINED_BY.get(value, lambda: None)()
        if not is_own or owner not in (None, self.guide):
            raise ValueError(
                f"Expected a guide with parameters of its own; got {name!r}, which in Pyro's parameter "
                f"store is another guide's: guides of one class have the same names there. Call "
                f"pyro.clear_param_store() before a new fit; for two fits side by side call "
                f"pyro.settings.set(module_local_params=True) before the guides are made, or use "
                f"`with pyro.get_param_store().scope():` around each. For parameters read from a file use "
                f"load_checkpoint or the guide's load_state_dict."
            )
        _TRAINED_BY[value] = ref(self.guide)

    def is_finite(self) -> bool:
        """Whether all parameters and all that their optimizers remember are finite."""
        values = [value.detach() for value in self.tensors.values()]
        for optimizer in self._optimizers():
            for memory in optimizer.state.values():
                values += [v for v in memory.values() if torch.is_tensor(v) and v.is_floating_point()]
        # A sum is finite only if all its terms are.
        sums = [value.sum() for value in values]
        return all(map(math.isfinite, torch.stack(sums).tolist())) if sums else True

    def state(self) -> dict[str, Any]:
        """Return values and optimizers by name; :meth:`restore` takes it."""
        optimizers = {
            name: _get_state_dict(self.optim.optim_objs[value])
            for name, value in self.tensors.items()
            if value in self.optim.optim_objs
        }
        return {
            "values": {name: value.detach().clone() for name, value in self.tensors.items()},
            "optimizers": copy.deepcopy(optimizers),
            # An optimizer passes over a parameter that has never had a gradient.
            "have_gradient": [name for name, value in self.tensors.items() if value.grad is not None],
        }

    def check(self, state: dict[str, Any], found: dict[str, Tensor]) -> None:
        """Raise a `ValueError` unless ``state`` is one of the parameters ``found``."""
        expected = {name: tuple(value.shape) for name, value in found.items()}
        got = {name: tuple(value.shape) for name, value in state["values"].items()}
        if expected != got:
            differing = sorted(name for name in {*expected, *got} if expected.get(name) != got.get(name))
            name = differing[0]
            raise ValueError(
                f"Expected a checkpoint of this model and guide; got one whose parameter {name!r} has shape "
                f"{got.get(name, 'nowhere')}, here {expected.get(name, 'nowhere')} ({len(differing)} "
                f"differ). Build model and guide as they were, or start with another checkpoint file."
            )

    def restore(self, state: dict[str, Any], found: dict[str, Tensor]) -> None:
        """Write values and optimizers of ``state`` into the parameters ``found``, all or none."""
        made: dict[Tensor, Any] = {}
        for name, memory in state["optimizers"].items():
            made[found[name]] = self.optim._get_optim(found[name])
            _load_state_dict(made[found[name]], copy.deepcopy(memory))
        self.meet(found)
        with torch.no_grad():
            for name, value in state["values"].items():
                found[name].copy_(value)
                has_gradient = name in state["have_gradient"]
                found[name].grad = torch.zeros_like(found[name]) if has_gradient else None
        for parameter, optimizer in made.items():
            self.optim.optim_objs[parameter] = optimizer
            self.optim.grad_clip[parameter] = self.optim._get_grad_clip(parameter)

    def go_back(self, state: dict[str, Any], lr_factor: float) -> None:
        """Write a state of this fit back, with smaller learning rates.

        The learning rates are the present ones times ``lr_factor``, and a learning-rate scheduler
        keeps its place.
        """
        with torch.no_grad():
            for name, value in state["values"].items():
                self.tensors[name].copy_(value)
        for value, name in self._distinct().items():
            scheduler = self.optim.optim_objs.get(value)
            if scheduler is None:
                continue
            optimizer = scheduler.optimizer if is_scheduler(scheduler) else scheduler
            rates = [{k: g[k] for k in ("lr", "initial_lr") if k in g} for g in optimizer.param_groups]
            memory = state["optimizers"].get(name)
            if memory is None:  # not stepped yet when the state was taken
                optimizer.state.clear()
            else:
                optimizer.load_state_dict(copy.deepcopy(memory.get("optimizer", memory)))
            for group, old in zip(optimizer.param_groups, rates, strict=True):
                group.update({k: rate * lr_factor for k, rate in old.items()})
            if hasattr(scheduler, "base_lrs"):
                scheduler.base_lrs = [rate * lr_factor for rate in scheduler.base_lrs]

    def rewind(self, state: dict[str, Any], lr_factor: float) -> None:
        """Write an earlier state of this fit back, learning-rate schedulers included.

        The learning rates are those of then times ``lr_factor``.
        """
        self.restore(state, {name: self.tensors[name] for name in state["values"]})
        for value, name in self._distinct().items():
            if name not in state["optimizers"]:  # not stepped yet when the state was taken
                self.optim.optim_objs[value] = self.optim._get_optim(value)
            scheduler = self.optim.optim_objs[value]
            optimizer = scheduler.optimizer if is_scheduler(scheduler) else scheduler
            for group in optimizer.param_groups:
                group.update({key: group[key] * lr_factor for key in ("lr", "initial_lr") if key in group})
            if hasattr(scheduler, "base_lrs"):
                scheduler.base_lrs = [rate * lr_factor for rate in scheduler.base_lrs]

    def _distinct(self) -> dict[Tensor, str]:
        """Return the parameters, each with one of its names: it may have two, and has one optimizer."""
        return {value: name for name, value in self.tensors.items()}

    def _optimizers(self) -> Iterator[Any]:
        for value in self.tensors.values():
            found = self.optim.optim_objs.get(value)
            if found is not None:
                yield found.optimizer if is_scheduler(found) else found
