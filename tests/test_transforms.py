"""Every law of a flow, on every flow of one table."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from pyro_adaann.transforms import FlowTransform, PlanarStack, RealNVPStack, planar
from pyro_adaann.transforms.planar import _layer_by_layer, constrain
from pyro_adaann.transforms.realnvp import _by_layer, _couple

FLOWS = {
    "planar-1d": lambda: PlanarStack(1, 12),
    "planar-2d": lambda: PlanarStack(2, 12),
    "planar-3d-deep": lambda: PlanarStack(3, 100),
    "planar-one-layer": lambda: PlanarStack(4, 1),
    "realnvp-2d": lambda: RealNVPStack(2, 6, [10, 10]),
    "realnvp-5d-odd": lambda: RealNVPStack(5, 3, [8]),
    "realnvp-one-layer": lambda: RealNVPStack(3, 1, [8, 8, 8]),
}


def trained(name: str, seed: int = 0) -> FlowTransform:
    """A flow in double precision with parameters far from the identity."""
    torch.manual_seed(seed)
    flow = FLOWS[name]().double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return flow


def points(flow: FlowTransform, n: int = 20) -> Tensor:
    return 2 * torch.randn(n, flow.input_dim, dtype=torch.float64)


@pytest.fixture(params=list(FLOWS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_log_det_is_that_of_the_autograd_jacobian(name):
    flow = trained(name)
    for x in points(flow, 5):
        jacobian = torch.autograd.functional.jacobian(lambda z: flow(z.clone()), x)
        expected = torch.linalg.slogdet(jacobian).logabsdet
        actual = flow.log_abs_det_jacobian(x, flow(x))
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_round_trip_at_ten_thousand_points(name):
    flow = trained(name)
    x = points(flow, 10_000)
    with torch.no_grad():
        y = flow(x).clone()
        assert (flow.inv(y) - x).abs().max() < 1e-6


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


def test_gradients_of_image_and_log_det(name):
    flow = trained(name)
    if name == "planar-3d-deep":
        flow = trained("planar-2d")
    x = points(flow, 3).requires_grad_()
    parameters = list(flow.parameters())

    def run(x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return flow.forward_and_log_det(x)

    assert torch.autograd.gradcheck(run, (x, *parameters))


def test_gradients_of_the_inverse(name):
    flow = trained("planar-2d" if name == "planar-3d-deep" else name)
    y = points(flow, 3).requires_grad_()
    parameters = list(flow.parameters())
    assert torch.autograd.gradcheck(lambda y, *_: flow._inverse(y), (y, *parameters))


def test_gradient_reaches_every_number_of_every_parameter(name):
    flow = trained(name)
    for parameter_name, parameter in flow.named_parameters():
        if "biases" in parameter_name:
            parameter.data.add_(1.0)  # few dead ReLU units
    y, log_det = flow.forward_and_log_det(points(flow, 200))
    (y.pow(2).sum() - log_det.sum()).backward()
    for parameter_name, parameter in flow.named_parameters():
        share = (parameter.grad != 0).double().mean()
        # A ReLU unit may be dead for all 200 points; a coordinate masked out would take half or more.
        assert share > 0.5, (parameter_name, share)


def test_starts_near_the_identity(name):
    torch.manual_seed(0)
    flow = FLOWS[name]().double()
    x = points(flow, 500)
    y, log_det = flow.forward_and_log_det(x)
    assert (y - x).abs().mean() < 0.2
    assert log_det.abs().mean() < 0.3


def test_any_batch_shape(name):
    flow = trained(name)
    x = points(flow, 12).reshape(2, 3, 2, flow.input_dim)
    y = flow(x)
    assert y.shape == x.shape
    assert flow.log_abs_det_jacobian(x, y).shape == (2, 3, 2)
    torch.testing.assert_close(y[1, 2, 0], flow(x[1, 2, 0]))
    empty = flow(x[:0])
    assert empty.shape == (0, 3, 2, flow.input_dim)


def test_single_precision_agrees_with_double(name):
    flow = trained(name)
    x = points(flow, 100)
    y, log_det = flow.forward_and_log_det(x)
    y32, log_det32 = copy.deepcopy(flow).float().forward_and_log_det(x.float())
    assert y32.dtype == torch.float32
    torch.testing.assert_close(y32.double(), y, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(log_det32.double(), log_det, rtol=1e-3, atol=1e-3)


def test_stack_is_its_layers_one_by_one():
    flow = trained("planar-3d-deep")
    x = points(flow, 50)
    expected = _layer_by_layer(x, flow.u, flow.w, flow.b)
    torch.testing.assert_close(flow.forward_and_log_det(x), expected, rtol=1e-10, atol=1e-10)


def test_recursions_in_torch_are_those_in_numpy(monkeypatch):
    flow = trained("planar-3d-deep")
    x = points(flow, 50).requires_grad_()
    results = []
    for on_numpy in (True, False):
        monkeypatch.setattr(planar, "_on_numpy", lambda tensor, on_numpy=on_numpy: on_numpy)
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
        layers = _by_layer(flow._matrices(), len(flow.networks))
        *halves, log_det = _couple(*x.split(flow.split_sizes, -1), layers)
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


@pytest.mark.parametrize("flow_name", ["planar-1d", "planar-2d", "realnvp-2d"])
def test_density_integrates_to_one(flow_name):
    flow = trained(flow_name)
    dim = flow.input_dim
    n = 4001 if dim == 1 else 601
    axis = torch.linspace(-25, 25, n, dtype=torch.float64)
    grid = torch.cartesian_prod(*[axis] * dim).reshape(-1, dim)
    base = torch.distributions.Normal(torch.zeros(dim).double(), 1.0)
    base = torch.distributions.Independent(base, 1)
    density = torch.distributions.TransformedDistribution(base, [flow], validate_args=False)
    with torch.no_grad():
        total = density.log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** dim
    assert total.item() == pytest.approx(1.0, abs=2e-3)


def test_memory_of_the_last_draw_does_not_survive_an_update(name):
    flow = trained(name)
    x = points(flow, 4)
    before = flow(x)
    assert flow(x) is before
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1)
    assert not torch.equal(flow(x), before)


def test_copies_after_use(name):
    flow = trained(name)
    x = points(flow, 4)
    y = flow(x)
    for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert torch.equal(other(x), y)
        with torch.no_grad():
            next(other.parameters()).add_(1.0)
        assert torch.equal(flow(x), y)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")  # Pyro's JIT uses it
def test_jit_trace_records_the_stack(name):
    flow = trained(name).requires_grad_(False)
    x = points(flow, 6)
    traced = torch.jit.trace(lambda z: flow.forward_and_log_det(z), (x,), check_trace=False)
    other = points(flow, 6)
    torch.testing.assert_close(traced(other), flow.forward_and_log_det(other))


def test_realnvp_of_one_coordinate_names_the_way_out():
    with pytest.raises(ValueError, match="AutoPlanar"):
        RealNVPStack(1, 2, [4])
