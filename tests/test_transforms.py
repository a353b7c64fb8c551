"""Every law of a flow, on every flow of one table; and what single flows promise."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_adaann.testing.flows import FlowLaws, points
from pyro_adaann.testing.flows import trained as trained_flow
from pyro_adaann.transforms import (
    AffineLayer,
    ComposedFlow,
    FixedAffine,
    FlowTransform,
    OuterProducts,
    PlanarStack,
    RealNVPStack,
    SplineStack,
)
from pyro_adaann.transforms.kernels import planar_recursion
from pyro_adaann.transforms.kernels.coupling import by_layer, couple
from pyro_adaann.transforms.kernels.planar import constrain, layer_by_layer
from pyro_adaann.transforms.kernels.rational_quadratic import apply_spline
from pyro_adaann.transforms.zuko import ZukoFlow, import_zuko

pytestmark = pytest.mark.any_device


def zuko_flow(name: str, dim: int, num_transforms: int, scale: float = 1.0, **kwargs: int) -> FlowTransform:
    flow = getattr(import_zuko().flows, name)(
        dim, transforms=num_transforms, hidden_features=[8, 8], **kwargs
    )
    return ZukoFlow(flow, dim, scale=scale)


def start() -> FixedAffine:
    return FixedAffine(*(torch.tensor(x, device="cpu") for x in ([0.1, -0.05], [[1.1, 0.0], [-0.1, 0.95]])))


FLOWS: dict[str, Callable[[], FlowTransform]] = {
    "planar-1d": lambda: PlanarStack(1, 12),
    "planar-2d": lambda: PlanarStack(2, 12),
    "planar-3d-deep": lambda: PlanarStack(3, 100),
    "planar-one-layer": lambda: PlanarStack(4, 1),
    "realnvp-2d": lambda: RealNVPStack(2, 6, [10, 10]),
    "realnvp-5d-odd": lambda: RealNVPStack(5, 3, [8]),
    "realnvp-one-layer": lambda: RealNVPStack(3, 1, [8, 8, 8]),
    "spline-1d": lambda: SplineStack(1, 2, 16, [8, 8]),
    "spline-2d": lambda: SplineStack(2, 3, 8, [16, 16], loc=0.5, scale=2.0),
    "spline-5d-odd": lambda: SplineStack(5, 3, 5, [12]),
    "spline-narrow": lambda: SplineStack(6, 2, 4, [3, 3], loc=1.0),
    "affine-1d": lambda: AffineLayer(1),
    "affine-triangular": lambda: AffineLayer(4, loc=1.0, scale=2.0),
    "affine-diagonal": lambda: AffineLayer(4, "diagonal", scale=0.5),
    "planar-affine": lambda: ComposedFlow([PlanarStack(3, 6), AffineLayer(3)]),
    "spline-affine": lambda: ComposedFlow([SplineStack(2, 2, 6, [8, 8]), AffineLayer(2, "diagonal")]),
    "spline-start": lambda: ComposedFlow([SplineStack(2, 1, 6, [8, 8]), start()]),
}


def trained(name: str, seed: int = 0) -> FlowTransform:
    return trained_flow(FLOWS[name], seed)


class TestFlows(FlowLaws):
    @pytest.fixture(params=list(FLOWS))
    def make_flow(self, request: pytest.FixtureRequest) -> Callable[[], FlowTransform]:
        return FLOWS[request.param]


ZUKO_FLOWS: dict[str, Callable[[], FlowTransform]] = {
    "zuko-coupling": lambda: zuko_flow("RealNVP", 3, 3),
    "zuko-maf": lambda: zuko_flow("MAF", 3, 2),
    "zuko-spline": lambda: zuko_flow("NSF", 2, 2, scale=2.0),
    "zuko-spline-coupling": lambda: zuko_flow("NSF", 3, 2, passes=2),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # zuko counts with tensors
@pytest.mark.skipif(importlib.util.find_spec("zuko") is None, reason="needs zuko")
class TestZukoFlows(FlowLaws):
    min_share = 0.2

    @pytest.fixture(params=list(ZUKO_FLOWS))
    def make_flow(self, request: pytest.FixtureRequest) -> Callable[[], FlowTransform]:
        return ZUKO_FLOWS[request.param]

    def test_made_on_another_device_than_the_default_one(self, make_flow):
        """zuko sorts masks when it makes them, and a meta tensor has no order."""


@pytest.mark.parametrize("raw", [-3.0, -20.0, -1e4])
@pytest.mark.parametrize("dim", [1, 3])
def test_planar_round_trip_with_u_w_near_minus_one(dim, raw):
    torch.manual_seed(1)
    flow = PlanarStack(dim, 3).double()
    with torch.no_grad():
        flow.w.copy_(nn.functional.normalize(torch.randn(3, dim), dim=-1))
        flow.u.copy_(raw * flow.w)
        flow.b.zero_()
        u_dot_w = (constrain(flow.u, flow.w) * flow.w).sum(-1)
        assert (u_dot_w > -1).all()
        assert (u_dot_w < -0.85).all()
        x = torch.cat([points(flow, 10_000), torch.zeros(1, dim)])
        assert (flow.inv(flow(x).clone()) - x).abs().max() < 1e-6


def test_stack_is_its_layers_one_by_one():
    flow = trained("planar-3d-deep")
    x = points(flow, 50)
    expected = layer_by_layer(x, flow.u, flow.w, flow.b)
    torch.testing.assert_close(flow.forward_and_log_det(x), expected, rtol=1e-10, atol=1e-10)


def test_recursions_in_torch_are_those_in_numpy(monkeypatch):
    flow = trained("planar-3d-deep")
    x = points(flow, 50).requires_grad_()
    results = []
    for on_numpy in (True, False):
        monkeypatch.setattr(planar_recursion, "_on_numpy", lambda tensor, on_numpy=on_numpy: on_numpy)
        flow.zero_grad()
        x.grad = None
        y, log_det = flow.forward_and_log_det(x)
        (y.pow(2).sum() - log_det.sum()).backward()
        results.append([y, log_det, x.grad.clone(), *(p.grad.clone() for p in flow.parameters())])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_coupling_stack_is_its_definition():
    for name in ("realnvp-2d", "realnvp-5d-odd", "realnvp-one-layer"):
        flow = trained(name)
        x = points(flow, 30)
        layers = by_layer(flow._matrices(), len(flow.networks))
        *halves, log_det = couple(*x.split(flow.split_sizes, -1), layers)
        y, actual = flow.forward_and_log_det(x)
        expected = torch.cat(halves if flow.num_transforms % 2 == 0 else halves[::-1], -1)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(actual, log_det)
        grads = []
        for image, log in ((y, actual), (expected, log_det)):
            flow.zero_grad()
            (image.pow(3).sum() - log.sum()).backward()
            grads.append([parameter.grad.clone() for parameter in flow.parameters()])
        torch.testing.assert_close(*grads)


def test_every_output_depends_on_every_input_after_two_coupling_layers():
    torch.manual_seed(0)
    flow = RealNVPStack(5, 2, [16, 16]).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.normal_()
    jacobian = torch.autograd.functional.jacobian(lambda z: flow(z.clone()), points(flow, 1)[0])
    first, _ = flow.split_sizes
    # Layer 1 maps the second half given the first, layer 2 the first half given the second.
    assert (jacobian[:first].abs() > 0).all()
    assert (jacobian[first:, :first].abs() > 0).all()


def test_realnvp_of_one_coordinate_names_the_way_out():
    with pytest.raises(ValueError, match="AutoPlanar"):
        RealNVPStack(1, 2, [4])


@pytest.mark.parametrize(
    "make_flow",
    [
        lambda: ComposedFlow([PlanarStack(2, 12), AffineLayer(2)]),
        lambda: ComposedFlow([RealNVPStack(2, 2, [8]), AffineLayer(2)]),
        lambda: AffineLayer(2, "diagonal"),
        lambda: SplineStack(2, 2, 8, [8, 8]),
    ],
)
def test_contracts_to_a_hundredth_of_the_base(make_flow):
    torch.manual_seed(0)
    flow = make_flow()
    # A short memory: the first gradients are ten thousand times as large as the last.
    optim = torch.optim.Adam(flow.parameters(), lr=0.05, betas=(0.9, 0.9))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optim, 0.993)
    for _ in range(1000):
        y, log_det = flow.forward_and_log_det(torch.randn(100, 2))
        loss = (0.5 * ((y - 0.5) / 0.01).square().sum(-1) - log_det).mean()
        optim.zero_grad()
        loss.backward()
        optim.step()
        scheduler.step()
    with torch.no_grad():
        y = flow.forward_and_log_det(torch.randn(10_000, 2))[0]
    # The error of an sd of 10,000 draws is .7 %.
    assert y.std(0).tolist() == pytest.approx([0.01] * 2, rel=0.1)
    assert y.mean(0).tolist() == pytest.approx([0.5] * 2, abs=0.002)


def test_spline_is_the_identity_at_zero_and_linear_beyond_its_ends():
    flow = SplineStack(2, 2, 8, [8], loc=1.0, scale=2.0).double()
    x = 10 * torch.randn(100, 2).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.zero_()
        y, log_det = flow.forward_and_log_det(x)
        torch.testing.assert_close(y, x)
        torch.testing.assert_close(log_det, torch.zeros(100).double(), atol=1e-6, rtol=0)
    raw = torch.randn(4, 25).double()
    far = torch.tensor([-6.0, -7.0, 6.0, 7.0]).double()
    y, log_slope = apply_spline(far, raw[:1].expand(4, -1), 8)
    torch.testing.assert_close(y[1] - y[0], (far[1] - far[0]) * log_slope[0].exp())
    torch.testing.assert_close(y[3] - y[2], (far[3] - far[2]) * log_slope[2].exp())


@pytest.mark.parametrize("input_dim", [1, 2, 3])
def test_a_spline_starts_at_the_identity_with_many_bins_in_the_middle_of_a_plane(input_dim):
    flow = SplineStack(input_dim, 2, 8, [8]).double()
    x = 3 * torch.randn(200, input_dim).double()
    with torch.no_grad():
        for network in flow.networks:
            for weight in network.weights[-1:]:
                weight.zero_()  # small, since the bends before would else never move
        y, log_det = flow.forward_and_log_det(x)
    torch.testing.assert_close(y, x)
    torch.testing.assert_close(log_det, torch.zeros(200).double(), atol=1e-6, rtol=0)
    shares = flow.networks[0].table[0, :8].softmax(0)
    assert (shares[0] / shares[4] > 4) == (input_dim == 2)


def test_a_coordinate_of_a_spline_layer_depends_on_those_before_it():
    flow = trained_flow(lambda: SplineStack(5, 1, 5, [16, 16]))
    jacobian = torch.autograd.functional.jacobian(lambda z: flow(z.clone()), points(flow, 1)[0])
    # One layer, so the outputs are in the order of the inputs.
    assert (jacobian.triu(1) == 0).all()
    assert (jacobian[torch.ones(5, 5).tril().bool()] != 0).all()


def test_inverse_of_a_layer_is_one_pass_through_its_network(monkeypatch):
    flow, count = SplineStack(8, 1, 4, [16, 16]), 0
    addmm = torch.addmm

    def counted(bias: Tensor, weight: Tensor, inputs: Tensor) -> Tensor:
        nonlocal count
        assert inputs.shape[1] == 3
        count += weight.numel()
        return addmm(bias, weight, inputs)

    monkeypatch.setattr(torch, "addmm", counted)
    flow._backward_map(torch.randn(3, 8))
    assert 0 < count <= sum(p.numel() for p in flow.parameters())


def test_a_remembered_inverse_is_used_until_a_parameter_changes():
    torch.manual_seed(0)
    stack = SplineStack(3, 2, 8, [12]).double()
    x = torch.randn(6, 3).double()
    y, log_det = (part.detach().clone() for part in stack.forward_and_log_det(x))
    stack.remember(x, y)
    with torch.no_grad():
        assert stack.inv(y) is x
        torch.testing.assert_close(stack.log_abs_det_jacobian(x, y), log_det)
        assert stack.recall(y) is None  # no pass has made it
    assert stack.inv(y) is not x  # which has no gradient
    with torch.no_grad():
        stack.networks[0].table.add_(0.3 * torch.randn_like(stack.networks[0].table))
    torch.testing.assert_close(stack(stack.inv(y).clone()), y)
    assert (stack.inv(y) - x).detach().abs().max() > 0.01


@pytest.mark.parametrize("kind", ["triangular", "diagonal"])
def test_affine_layer_is_its_formula(kind):
    layer = trained_flow(lambda: AffineLayer(3, kind, loc=1.0, scale=2.0))
    x = points(layer)
    matrix = torch.eye(3).double()
    if kind == "triangular":
        matrix = matrix + layer.factor.tril(-1)
    expected = 1 + 2 * (layer.shift + ((x - 1) / 2 * layer.log_scale.exp()) @ matrix.T)
    torch.testing.assert_close(layer._forward(x)[0], expected)


def test_units_of_an_affine_layer_make_its_fisher_information_even():
    layer = trained_flow(lambda: AffineLayer(3))
    with torch.no_grad():
        layer.factor.mul_(20)  # strong correlations
    x = torch.randn(100_000, 3, dtype=torch.float64)
    gradients = layer.point_gradients(x, -x)
    for parameter, unit in layer.parameter_units().items():
        gradient = gradients[parameter]
        gradient = gradient.dense() if isinstance(gradient, OuterProducts) else gradient
        fisher = gradient.square().mean(0) * unit.square()
        # Of a standard normal base: 1, and 2 for log scales. A mean of 100,000 draws is uncertain by 1 %.
        expected = 2.0 if parameter is layer.log_scale else 1.0
        used = fisher[fisher > 0]
        torch.testing.assert_close(used, torch.full_like(used, expected), rtol=0.1, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AffineLayer(2, "full"), 'Expected `kind` to be "triangular" or "diagonal"; got'),
        (lambda: ComposedFlow([]), "Expected flows of one dimension; got no flow"),
        (lambda: ComposedFlow([AffineLayer(2), AffineLayer(3)]), "got \\[2, 3\\]"),
    ],
)
def test_what_cannot_be_made_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.skipif(importlib.util.find_spec("zuko") is None, reason="needs zuko")
def test_importing_zuko_leaves_validation_on(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "zuko"]:
        monkeypatch.delitem(sys.modules, name)  # it is imported anew, and replaced by the old one afterwards
    assert Distribution._validate_args
    import_zuko()
    assert "zuko" in sys.modules
    assert Distribution._validate_args
