"""Flows recorded on a graphics card; elsewhere with a record that runs its function into fixed memory."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from pyro_adaann.transforms import AffineLayer, ComposedFlow, PlanarStack, RealNVPStack, SplineStack, recorded
from pyro_adaann.transforms.outer import OuterProducts

pytestmark = pytest.mark.any_device

FLOWS = {
    "planar": lambda: PlanarStack(3, 8),
    "RealNVP": lambda: RealNVPStack(3, 3, [8, 8]),
    "spline": lambda: SplineStack(3, 2, 4, [8, 8]),
    "composed": lambda: ComposedFlow([SplineStack(2, 2, 4, [8]), AffineLayer(2)]),
}


class FixedMemory:
    """What a CUDA graph does: read inputs and parameters, and write results, where they were at first."""

    def __init__(self, function, inputs):
        self._function = function
        self._inputs = [value.clone() for value in inputs]
        self._outputs = function(*self._inputs)

    def replay(self, inputs):
        for place, value in zip(self._inputs, inputs, strict=True):
            place.copy_(value)
        for name, value in self._function(*self._inputs).items():
            for place, new in zip(_tensors(self._outputs[name]), _tensors(value), strict=True):
                place.copy_(new)
        return recorded._each(torch.clone, self._outputs)


def _tensors(value: Tensor | OuterProducts) -> list[Tensor]:
    return [value.left, value.right] if isinstance(value, OuterProducts) else [value]


@pytest.fixture
def records(monkeypatch):
    """Have functions recorded on any device; return the list of all records that are made."""
    make, made = recorded._Graph, []
    if torch.get_default_device().type != "cuda":
        monkeypatch.setattr("pyro_adaann.transforms.base.can_record", lambda x: True)
        make = FixedMemory

    def record(function, inputs):
        made.append(make(function, inputs))
        return made[-1]

    monkeypatch.setattr(recorded, "_Graph", record)
    return made


def all_of(flow, x):
    """Return whatever a flow computes."""
    x = x.clone().requires_grad_()
    y, log_det = flow.forward_and_log_det(x)
    gradients = torch.autograd.grad(
        y.square().sum() - log_det.square().sum(), [x, *flow.parameters()], allow_unused=True
    )
    with torch.no_grad():
        plain = flow.forward_and_log_det(x)
        inverse = flow._inverse(y.detach())
    points = flow.point_gradients(x, -x)
    return [
        *(y.detach(), log_det.detach(), *plain, inverse, flow.score(x, -x)),
        *(torch.zeros(()) if g is None else g for g in gradients),
        *(
            points[p].dense() if isinstance(points[p], OuterProducts) else points[p]
            for p in flow.parameters()
        ),
    ]


@pytest.mark.parametrize("kind", FLOWS)
def test_a_record_gives_what_the_flow_gives(kind, records, monkeypatch):
    flow = FLOWS[kind]().double()
    # Draws of one size and, row by row, of several that are filled up to one.
    for number, size in enumerate([70, 70, 70, 70, 90, 70]):
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        x = torch.randn(size, flow.input_dim).double()
        found = all_of(flow, x)
        with monkeypatch.context() as plain:
            plain.setattr("pyro_adaann.transforms.base.can_record", lambda x: False)
            expected = all_of(flow, x)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b.expand_as(a), rtol=1e-9, atol=1e-9)
        if number == 0:
            assert not records
    # Map, gradient, score, gradients by point and, where it is closed, the inverse: once each.
    assert len(records) == 4 + flow.has_closed_inverse


def test_results_of_a_record_stay_when_it_runs_again(records):
    flow = RealNVPStack(2, 2, [8])
    batches = [torch.randn(50, 2) for _ in range(5)]
    with torch.no_grad():
        found = [flow.forward_and_log_det(x)[0] for x in batches]
        for x, y in zip(batches, found, strict=True):
            torch.testing.assert_close(y, flow._forward(x)[0])
    assert len(records) == 1


def test_a_moved_parameter_makes_another_record(records):
    flow = RealNVPStack(2, 2, [8])
    x = torch.randn(50, 2)
    for dtype in (torch.float32, torch.float64, torch.float32):
        flow.to(dtype)
        with torch.no_grad():
            for _ in range(4):
                y = flow.forward_and_log_det(x.to(dtype))[0]
            torch.testing.assert_close(y, flow._forward(x.to(dtype))[0])
    assert len(records) >= 2


def test_few_records_are_kept(records, monkeypatch):
    class First:  # keeps nothing of the flow, as a graph does not
        def __init__(self, function, inputs):
            self._outputs = function(*inputs)

        def replay(self, inputs):
            return self._outputs

    monkeypatch.setattr(recorded, "_Graph", First)
    flow = RealNVPStack(2, 2, [8])
    with torch.no_grad():
        for size in range(50, 50 + 2 * recorded._MAX_RECORDS):
            for _ in range(3):
                flow.forward_and_log_det(torch.randn(size, 2))
    assert len(recorded._of_flows[flow]._found) == recorded._MAX_RECORDS
    # Copies and pickles are without them, and a flow takes its own along when it goes.
    assert copy.deepcopy(flow) not in recorded._of_flows
    assert pickle.loads(pickle.dumps(flow)) not in recorded._of_flows
    num_flows = len(recorded._of_flows)
    del flow
    assert len(recorded._of_flows) == num_flows - 1


def test_a_parameter_that_changes_before_the_gradient_is_told(records):
    flow = RealNVPStack(2, 2, [8])
    loss = flow.forward_and_log_det(torch.randn(5, 2))[0].sum()
    with torch.no_grad():
        next(flow.parameters()).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_cannot_be_recorded_runs_plainly(records, monkeypatch):
    def refuse(function, inputs):
        raise RuntimeError("operation not permitted when stream is capturing.")

    monkeypatch.setattr(recorded, "_Graph", refuse)
    flow = RealNVPStack(2, 2, [8])
    x = torch.randn(5, 2)
    with torch.no_grad():
        for _ in range(2):
            flow.forward_and_log_det(x)
        with pytest.warns(UserWarning, match="not permitted.*PYRO_ADAANN_GRAPHS=0"):
            flow.forward_and_log_det(x)
        torch.testing.assert_close(flow.forward_and_log_det(x)[0], flow._forward(x)[0])  # and warns no more


def test_nothing_is_recorded_on_a_processor():
    assert not recorded.can_record(torch.zeros(5, 2, device="cpu"))
