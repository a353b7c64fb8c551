"""What steps change: parameters with their optimizers, buffers, and the state of the step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any
from weakref import ref

import torch
from pyro import poutine
from pyro.nn import PyroModule
from pyro.optim.optim import _get_state_dict, _load_state_dict, is_scheduler
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_adaann.objectives.traces import captured_parameters
from pyro_adaann.state.random_states import get_random_states, set_random_states
from pyro_adaann.steps.base import Step
from pyro_adaann.steps.gradient import have_finite_norms

__all__ = ["FitParameters"]

#: Which guide has trained a parameter. Guides of one class have one set of names in Pyro's store.
_TRAINED_BY: Any = WeakTensorKeyDictionary()


class FitParameters:
    """The unconstrained parameters and the buffers that a fit changes.

    Names are those of the trace. `PyroOptim.get_state` uses the names in Pyro's global store, which is empty
    with ``module_local_params``.

    :param model: the model of the fit.
    :param guide: its guide.
    :param step: its step.
    """

    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any], step: Step) -> None:
        self.model = model
        self.guide = guide
        self.step = step
        #: The optimizer, a `PyroOptim`, or None for a step that needs none.
        self.optim: Any = None
        #: The state that the latest step returned.
        self.step_state = step.start()
        self._tensors: dict[str, Tensor] = {}
        self._guide_names: list[str] | None = None
        self._guide_buffers: list[str] = []
        # A model may hold its data as a buffer: one that no step changes is neither kept nor written back.
        self._model_versions = {name: buffer._version for name, buffer in _buffers(model, "model").items()}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name. A module may put another tensor in a buffer's place at any time."""
        if self._tensors:
            self._add_buffers()
        return self._tensors

    def add(self, found: dict[str, Tensor]) -> None:
        """Register the parameters of a step, and the buffers of model and guide.

        :raises ValueError: if one belongs to another guide of the same name.
        """
        new = {name: value for name, value in found.items() if self._tensors.get(name) is not value}
        if not new:
            return
        if isinstance(self.guide, PyroModule):
            prefix = f"{self.guide._pyro_name}."
            own = {id(parameter) for parameter in self.guide.parameters()}
            for name, value in new.items():
                if name.startswith(prefix):
                    self._check_owner(name, value, id(value) in own)
        self._tensors.update(new)
        self._add_buffers()

    def _add_buffers(self) -> None:
        guide_buffers = _buffers(self.guide, "guide")
        self._guide_buffers = list(guide_buffers)
        self._tensors.update(guide_buffers)
        for name, buffer in _buffers(self.model, "model").items():
            if name in self._tensors or buffer._version != self._model_versions.get(name):
                self._tensors[name] = buffer

    def names_of_guide(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        """Return the names of the parameters and buffers that the guide alone has, not those of the model."""
        if self._guide_names is None:
            random = get_random_states()  # a resumed fit looks too, at another time
            with poutine.trace(param_only=True) as capture, torch.no_grad():
                self.guide(*args, **kwargs)
            set_random_states(random)
            self._guide_names = list(captured_parameters(capture.trace))
        return [*self._guide_names, *self._guide_buffers]

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
        """Whether all parameters, buffers and states of optimizers are finite."""
        values = [value.detach() for value in self._tensors.values()]
        for optimizer in self._optimizers():
            for memory in optimizer.state.values():
                values += [v for v in memory.values() if torch.is_tensor(v)]
        # A sum of absolute values is finite only if all of them are.
        return have_finite_norms([value for value in values if value.is_floating_point()], 1)

    def state(self, *, has_all_buffers: bool = False) -> dict[str, Any]:
        """Return values, optimizers and the state of the step; :meth:`restore` takes it.

        :param has_all_buffers: whether to add the model's buffers that no step has changed, for another
            process.
        """
        tensors = dict(self.tensors)
        if has_all_buffers:
            tensors |= _buffers(self.model, "model")
        optimizers = {name: _get_state_dict(optim) for name, optim in self._optim_objects().items()}
        return {
            "values": {name: value.detach().clone() for name, value in tensors.items()},
            "optimizers": copy.deepcopy(optimizers),
            # An optimizer passes over a parameter that has never had a gradient.
            "have_gradient": [name for name, value in self._tensors.items() if value.grad is not None],
            "step": dict(self.step_state),
        }

    def check(self, state: dict[str, Any], found: dict[str, Tensor]) -> None:
        """Raise a `ValueError` unless ``state`` is one of the parameters ``found``."""
        tensors = {**found, **_buffers(self.guide, "guide"), **_buffers(self.model, "model")}
        expected = {name: tuple(value.shape) for name, value in tensors.items()}
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
        self.add(found)
        here = {**self.tensors, **_buffers(self.model, "model")}
        with torch.no_grad():
            for name, value in state["values"].items():
                tensor = here[name]
                tensor.copy_(value)
                if tensor.requires_grad:
                    tensor.grad = torch.zeros_like(tensor) if name in state["have_gradient"] else None
        for parameter, optimizer in made.items():
            self.optim.optim_objs[parameter] = optimizer
            self.optim.grad_clip[parameter] = self.optim._get_grad_clip(parameter)
        self.step_state = dict(state["step"])

    def go_back(self, state: dict[str, Any], factor: float) -> None:
        """Restore a state of this fit, with the present step lengths multiplied by ``factor``.

        A learning-rate scheduler keeps its place.
        """
        here = self.tensors
        with torch.no_grad():
            for name, value in state["values"].items():
                here[name].copy_(value)
        for value, name in self._distinct().items():
            scheduler = self._optim_objects().get(name)
            if scheduler is None:
                continue
            optimizer = scheduler.optimizer if is_scheduler(scheduler) else scheduler
            rates = [{k: g[k] for k in ("lr", "initial_lr") if k in g} for g in optimizer.param_groups]
            memory = state["optimizers"].get(name)
            if memory is None:  # not stepped yet when the state was taken
                fresh = self.optim._get_optim(value)
                optimizer.state = fresh.optimizer.state if is_scheduler(fresh) else fresh.state
            else:
                optimizer.load_state_dict(copy.deepcopy(memory.get("optimizer", memory)))
            for group, old in zip(optimizer.param_groups, rates, strict=True):
                group.update(old)
            _slow_down(self.optim.optim_objs[value], factor)
        self.step_state = self.step.slow_down(self.step_state, factor)

    def rewind(self, state: dict[str, Any], factor: float) -> None:
        """Restore an earlier state of this fit, with learning-rate schedulers and the state of the step.

        The step lengths of that state are multiplied by ``factor``.
        """
        self.restore(state, {name: self.tensors[name] for name in state["values"]})
        for value, name in self._distinct().items():
            if not value.requires_grad or self.optim is None:
                continue
            if name not in state["optimizers"]:  # not stepped yet when the state was taken
                self.optim.optim_objs[value] = self.optim._get_optim(value)
            _slow_down(self.optim.optim_objs[value], factor)
        self.step_state = self.step.slow_down(self.step_state, factor)

    def _distinct(self) -> dict[Tensor, str]:
        """Return the parameters, each with one of its names: it may have two, and has one optimizer."""
        return {value: name for name, value in self._tensors.items()}

    def _optim_objects(self) -> dict[str, Any]:
        """Return the optimizer or scheduler of every parameter that has one."""
        objects = {} if self.optim is None else self.optim.optim_objs
        return {name: objects[value] for name, value in self._tensors.items() if value in objects}

    def _optimizers(self) -> Iterator[Any]:
        for found in self._optim_objects().values():
            yield found.optimizer if is_scheduler(found) else found


def _slow_down(scheduler: Any, factor: float) -> None:
    """Multiply the learning rates of an optimizer, or of a scheduler and its optimizer."""
    optimizer = scheduler.optimizer if is_scheduler(scheduler) else scheduler
    for group in optimizer.param_groups:
        group.update({key: group[key] * factor for key in ("lr", "initial_lr") if key in group})
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]


def _buffers(part: Any, role: str) -> dict[str, Tensor]:
    """Return the buffers of a module, or of the module that a function is a method of, by name."""
    owner = getattr(part, "__self__", part)
    if not isinstance(owner, nn.Module):
        return {}
    return {f"{role} buffer {name}": buffer for name, buffer in owner.named_buffers()}
