"""Isolated state for every test, and a check that nothing global has changed."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator

import pyro
import pytest
import torch
from on_device import find_device, select
from torch.distributions import Distribution

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of another device."""
    parser.addoption("--device", default="cpu", help="a device of torch's, for the tests that bear any")


def pytest_configure(config: pytest.Config) -> None:
    """Make the device torch's default before a test module makes a tensor."""
    device = find_device(config.getoption("--device"))
    if device.type == "cpu":  # Triton decides on its first import, by whatever test, whether it interprets
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if device.type != "cpu":
        torch.set_default_device(device)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what another device does not bear."""
    items[:], others = select(items, torch.device(config.getoption("--device")))
    config.hook.pytest_deselected(items=others)


@pytest.fixture(autouse=True)
def isolated() -> Iterator[None]:
    """Clear the parameter store, seed, and fail a test that changes settings of torch, Pyro or logging."""
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
        torch.get_default_device(),
        Distribution._validate_args,
        pyro.settings.get("validate_infer"),
        pyro.settings.get("validate_poutine"),
        pyro.settings.get("module_local_params"),
        torch.is_grad_enabled(),
        logging.getLogger("pyro").level,
        logging.root.manager.disable,
    )
