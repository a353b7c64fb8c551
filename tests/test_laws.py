"""The published laws, each on one table of what the package has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO

from pyro_adaann import (
    AdaAnnSchedule,
    AnnealingSchedule,
    CESSSchedule,
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    NaturalStep,
    SequenceSchedule,
    TraceMixedKL_ELBO,
)
from pyro_adaann.steps.base import Step
from pyro_adaann.testing.losses import LossLaws
from pyro_adaann.testing.schedules import ScheduleLaws
from pyro_adaann.testing.steps import StepLaws

pytestmark = pytest.mark.any_device

SCHEDULES: dict[str, AnnealingSchedule] = {
    "adaann": AdaAnnSchedule(1.0, initial_inverse_temperature=0.5),
    "adaann weighted": AdaAnnSchedule(1.0, initial_inverse_temperature=0.5, weighted=True),
    "cess": CESSSchedule(0.9, initial_inverse_temperature=0.5),
    "linear": LinearSchedule(70),
    "cosine": CosineSchedule(70),
    "sequence": SequenceSchedule([0.1, 0.11, 0.5, 1.0]),
    "constant": ConstantSchedule(0.3),
    "at one": ConstantSchedule(),
}
STEPS: dict[str, Step] = {
    "natural": NaturalStep(200, max_kl=0.3),
    "small natural": NaturalStep(100, max_kl=0.2, damping=1.0),
}
VECTORIZED: dict[str, Any] = {"num_particles": 50, "vectorize_particles": True}
LOSSES: dict[str, Callable[[], ELBO]] = {
    "trace": lambda: Trace_ELBO(**VECTORIZED),
    "trace, one by one": lambda: Trace_ELBO(num_particles=5),
    "graph": lambda: TraceGraph_ELBO(num_particles=5),
    "enum": lambda: TraceEnum_ELBO(strict_enumeration_warning=False, **VECTORIZED),
    "renyi": lambda: RenyiELBO(alpha=0.5, **VECTORIZED),
    "mixed": lambda: TraceMixedKL_ELBO(0.5, num_particles=200),
    "forward": lambda: TraceMixedKL_ELBO(1.0, num_particles=200),
}


class TestSchedules(ScheduleLaws):
    @pytest.fixture(params=list(SCHEDULES))
    def schedule(self, request: pytest.FixtureRequest) -> AnnealingSchedule:
        return SCHEDULES[request.param]


class TestSteps(StepLaws):
    @pytest.fixture(params=list(STEPS))
    def step(self, request: pytest.FixtureRequest) -> Step:
        return STEPS[request.param]


class TestLosses(LossLaws):
    @pytest.fixture(params=list(LOSSES))
    def make_loss(self, request: pytest.FixtureRequest) -> Callable[[], ELBO]:
        return LOSSES[request.param]
