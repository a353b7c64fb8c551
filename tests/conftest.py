"""Isolated state for every test, and a check that nothing global has changed."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pyro
import pytest
import torch
from torch.distributions import Distribution

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def isolated() -> Iterator[None]:
    """Clear the parameter store, seed, and fail a test that changes torch's or Pyro's settings."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    before = _settings()
    yield
    after = _settings()
    pyro.clear_param_store()
    assert after == before, f"global settings changed: {before} to {after}"


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own handler of SIGINT, which a background job of a shell is started without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _settings() -> tuple[object, ...]:
    return (
        torch.get_default_dtype(),
        Distribution._validate_args,
        pyro.settings.get("validate_infer"),
        pyro.settings.get("validate_poutine"),
        pyro.settings.get("module_local_params"),
        torch.is_grad_enabled(),
    )
