"""Isolated state for every test, and a check that nothing global has changed."""

from __future__ import annotations

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


def _settings() -> tuple[object, ...]:
    return (
        torch.get_default_dtype(),
        Distribution._validate_args,
        pyro.settings.get("validate_infer"),
        pyro.settings.get("validate_poutine"),
        pyro.settings.get("module_local_params"),
        torch.is_grad_enabled(),
    )
