"""Parameters of a flow guide that were read from a file in a way that does not reach it.

A flow guide is made of torch modules. Its parameters and its base are in its `state_dict`. Pyro's parameter
store has the parameters alone, and `pyro.module` passes over what a file has put there: the guide would draw
from a flow that was never trained.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyro
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["check_initialized", "check_store"]

#: Parameters of guides of this process. Guides of one class have the same names in Pyro's store.
_OWN: Any = WeakIdKeyDictionary()


def check_store(name: str, module: nn.Module) -> None:
    """Raise a `ValueError` if Pyro's store has parameters of a file under the name of a guide's module.

    :param name: the full name of the module in Pyro.
    :param module: the module of the guide.
    """
    first, parameter = next(module.named_parameters(), (None, None))
    if first is None:
        return
    _OWN[parameter] = True
    store, full_name = pyro.get_param_store(), f"{name}$$${first}"
    if full_name in store and store[full_name].unconstrained() not in _OWN:
        raise ValueError(
            f"Expected Pyro's parameter store to hold parameters of this process; got another {full_name!r}, "
            f"as after pyro.get_param_store().load, which does not reach a guide made of torch modules and "
            f"does not have its base. Call pyro.clear_param_store(); then guide.initialize(*args), with the "
            f"model's arguments, and guide.load_state_dict(torch.load(path)) read what "
            f"torch.save(guide.state_dict(), path) has written."
        )


def check_initialized(is_initialized: bool, prefix: str, names: Iterable[str]) -> None:
    """Raise a `ValueError` if a state has parameters for a guide that has none yet.

    :param prefix: that of the guide's names.
    :param names: those of the state.
    """
    if not is_initialized and any(name.startswith(prefix) for name in names):
        raise ValueError(
            "Expected a guide that has its parameters; got one that has not run yet. Call "
            "guide.initialize(*args), with the model's arguments, before load_state_dict."
        )
