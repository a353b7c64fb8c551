"""The laws of a flow."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyro_adaann.transforms import FlowTransform, OuterProducts
from pyro_adaann.transforms.masked import MaskedNetwork

__all__ = ["FlowLaws", "points", "trained"]


def trained(make_flow: Callable[[], FlowTransform], seed: int = 0) -> FlowTransform:
    """Return a flow in double precision with parameters far from the identity."""
    torch.manual_seed(seed)
    flow = make_flow().double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
        for module in flow.modules():
            if isinstance(module, MaskedNetwork):  # its units would be far out in the linear part
                for weight in module.weights:
                    weight.mul_(1 / weight.shape[0] ** 0.5)
    return flow


def points(flow: FlowTransform, n: int = 20) -> Tensor:
    """Return points in double precision from a normal base of sd 2, shape ``(n, d)``."""
    return 2 * torch.randn(n, flow.input_dim, dtype=torch.float64)


def _dense(gradient: Tensor | OuterProducts) -> Tensor:
    return gradient.dense() if isinstance(gradient, OuterProducts) else gradient


class FlowLaws:
    """What the natural step, densities and Pyro rely on; a subclass gives a function without arguments that
    makes a new flow, a fixture ``make_flow``.

    Example::

        >>> import pytest
        >>> from pyro_adaann.transforms import PlanarStack
        >>> class TestPlanar(FlowLaws):
        ...     @pytest.fixture
        ...     def make_flow(self):
        ...         return lambda: PlanarStack(3, 12)
    """

    #: Share of the numbers of a parameter that have a gradient, at least: a ReLU unit may be dead at all
    #: points, and half of a triangular or masked matrix is zero. A coordinate left out would take more.
    min_share = 0.3

    @pytest.fixture
    def flow(self, make_flow: Callable[[], FlowTransform]) -> FlowTransform:
        return trained(make_flow)

    def test_log_det_is_that_of_the_autograd_jacobian(self, flow: FlowTransform) -> None:
        for x in points(flow, 5):
            jacobian = torch.autograd.functional.jacobian(lambda z: flow(z.clone()), x)
            expected = torch.linalg.slogdet(jacobian).logabsdet
            actual = flow.log_abs_det_jacobian(x, flow(x))
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)

    def test_definition_is_the_kernel(self, flow: FlowTransform) -> None:
        x = points(flow)
        torch.testing.assert_close(flow._define(x), flow._forward(x), rtol=1e-9, atol=1e-9)

    def test_round_trip_at_ten_thousand_points(self, flow: FlowTransform) -> None:
        x = points(flow, 10_000)
        with torch.no_grad():
            y = flow(x).clone()
            back = flow.inv(y)
            assert (back - x).abs().max() < 1e-6
            # It may have been found on the way back.
            log_det = flow.log_abs_det_jacobian(back, y)
            torch.testing.assert_close(log_det, flow.forward_and_log_det(x)[1], rtol=1e-5, atol=1e-5)

    def test_gradients_of_image_and_log_det(self, flow: FlowTransform) -> None:
        x = points(flow, 3).requires_grad_()

        def run(x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
            return flow.forward_and_log_det(x)

        assert torch.autograd.gradcheck(run, (x, *flow.parameters()), fast_mode=True)

    def test_gradients_of_the_inverse(self, flow: FlowTransform) -> None:
        y = flow(points(flow, 3)).detach().requires_grad_()

        def run(y: Tensor, *_: Tensor) -> Tensor:
            return flow._inverse(y)

        assert torch.autograd.gradcheck(run, (y, *flow.parameters()), fast_mode=True, atol=1e-4)

    def test_what_is_remembered_without_a_graph_hides_no_gradient(self, flow: FlowTransform) -> None:
        y, parameters = flow._forward(points(flow, 3))[0].detach(), list(flow.parameters())

        def gradients(y: Tensor) -> tuple[Tensor, ...]:
            x = flow.inv(y)
            total = -0.5 * x.square().sum() - flow.log_abs_det_jacobian(x, y).sum()
            return torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)

        expected = gradients(y.clone())
        with torch.no_grad():
            x = flow.inv(y)
            flow.log_abs_det_jacobian(x, y)
        torch.testing.assert_close(gradients(y), expected)

    def test_score_is_the_gradient_of_the_log_density(self, flow: FlowTransform) -> None:
        x = points(flow)
        y = flow._forward(x)[0].detach().requires_grad_()
        inverse = flow._backward_map(y)
        log_q = -0.5 * inverse.square().sum() - flow._forward(inverse)[1].sum()
        (expected,) = torch.autograd.grad(log_q, y)
        torch.testing.assert_close(flow.score(x, -x), expected, rtol=1e-5, atol=1e-5)

    def test_point_gradients_are_those_of_autograd_point_by_point(self, flow: FlowTransform) -> None:
        x, base_score = points(flow, 4), points(flow, 4)
        found = {parameter: _dense(g) for parameter, g in flow.point_gradients(x, base_score).items()}
        score, parameters = flow.score(x, base_score), list(flow.parameters())
        assert set(found) == set(parameters)
        for i in range(len(x)):
            y, log_det = flow._forward(x[i : i + 1])
            total = -(score[i] * y).sum() - log_det.sum()
            expected = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
            actual = tuple(found[parameter][i] for parameter in parameters)
            torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-7)

    def test_gradient_reaches_every_parameter(self, flow: FlowTransform) -> None:
        for name, parameter in flow.named_parameters():
            if "biases" in name:
                parameter.data.add_(1.0)  # few dead ReLU units
        y, log_det = flow.forward_and_log_det(points(flow, 200))
        (y.pow(2).sum() - log_det.sum()).backward()
        for name, parameter in flow.named_parameters():
            share = (parameter.grad != 0).double().mean()
            assert share > self.min_share, (name, share)

    def test_starts_near_the_identity(self, make_flow: Callable[[], FlowTransform]) -> None:
        torch.manual_seed(0)
        flow = make_flow().double()
        x = points(flow, 500)
        y, log_det = flow.forward_and_log_det(x)
        assert (y - x).abs().mean() < 0.2
        assert log_det.abs().mean() < 0.3

    def test_any_batch_shape(self, flow: FlowTransform) -> None:
        x = points(flow, 12).reshape(2, 3, 2, flow.input_dim)
        y = flow(x)
        assert y.shape == x.shape
        assert flow.log_abs_det_jacobian(x, y).shape == (2, 3, 2)
        torch.testing.assert_close(y[1, 2, 0], flow(x[1, 2, 0]))
        empty = flow(x[:0])
        assert empty.shape == (0, 3, 2, flow.input_dim)

    def test_single_precision_agrees_with_double(self, flow: FlowTransform) -> None:
        x = points(flow, 100)
        y, log_det = flow.forward_and_log_det(x)
        y32, log_det32 = copy.deepcopy(flow).float().forward_and_log_det(x.float())
        assert y32.dtype == torch.float32
        torch.testing.assert_close(y32.double(), y, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(log_det32.double(), log_det, rtol=1e-3, atol=1e-3)

    def test_density_integrates_to_one(self, flow: FlowTransform) -> None:
        if flow.input_dim > 2:
            return  # a grid is for one and two dimensions
        n = 4001 if flow.input_dim == 1 else 251
        normal = torch.distributions.Normal(torch.zeros(flow.input_dim).double(), 1.0)
        base = torch.distributions.Independent(normal, 1)
        density = torch.distributions.TransformedDistribution(base, [flow], validate_args=False)
        with torch.no_grad():
            # The grid is where draws are: what is beyond all of 20,000 and a twentieth of their range is less
            # than 1e-3.
            draws = density.sample((20_000,))
            low, high = draws.amin(0), draws.amax(0)
            margin = 0.05 * (high - low)
            axes = [
                torch.linspace(*ends, n).double() for ends in zip(low - margin, high + margin, strict=True)
            ]
            cell = math.prod(float(axis[1] - axis[0]) for axis in axes)
            grid = torch.cartesian_prod(*axes).reshape(-1, flow.input_dim)
            total = density.log_prob(grid).exp().sum() * cell
        assert total.item() == pytest.approx(1.0, abs=5e-3)

    def test_memory_of_the_last_draw_does_not_survive_an_update(self, flow: FlowTransform) -> None:
        x = points(flow, 4)
        before = flow(x)
        assert flow(x) is before
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.add_(0.1)
        assert not torch.equal(flow(x), before)

    def test_copies_after_use(self, flow: FlowTransform) -> None:
        x = points(flow, 4)
        y = flow(x)
        for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
            assert torch.equal(other(x), y)
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.add_(1.0)
            assert torch.equal(flow(x), y)

    @pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")  # Pyro's JIT uses it
    @pytest.mark.parametrize("num_points", [1, 7])
    def test_jit_trace_follows_points_and_parameters(self, flow: FlowTransform, num_points: int) -> None:
        flow.requires_grad_(False)
        # As Pyro's JIT does it: the parameters are inputs of the trace, by being the same tensors.
        parameters = list(flow.parameters())

        def run(x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
            return flow.forward_and_log_det(x)

        traced = torch.jit.trace(run, (points(flow, num_points), *parameters), check_trace=False)
        for _ in range(50 // num_points):
            for parameter in parameters:
                parameter.add_(0.01 * torch.randn_like(parameter))
            x = points(flow, num_points)
            with torch.jit.optimized_execution(False):  # the graph is what is tested; its compilation is slow
                actual = traced(x, *parameters)
            torch.testing.assert_close(actual, flow.forward_and_log_det(x), rtol=1e-7, atol=1e-7)

    @pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
    def test_jit_trace_follows_images_and_parameters_of_the_inverse(self, flow: FlowTransform) -> None:
        flow.requires_grad_(False)
        parameters = list(flow.parameters())

        def run(y: Tensor, *_: Tensor) -> Tensor:
            return flow._inverse(y)

        traced = torch.jit.trace(run, (points(flow, 5), *parameters), check_trace=False)
        for _ in range(4):
            for parameter in parameters:
                parameter.add_(0.03 * torch.randn_like(parameter))
            y = flow._forward(points(flow, 5))[0]
            with torch.jit.optimized_execution(False):
                actual = traced(y, *parameters)
            torch.testing.assert_close(actual, flow._inverse(y), rtol=1e-5, atol=1e-6)

    def test_units_of_all_parameters(self, flow: FlowTransform) -> None:
        units = flow.parameter_units()
        assert set(units) == set(flow.parameters())
        for parameter, unit in units.items():
            assert unit.shape == parameter.shape
            assert (unit > 0).all()
            assert torch.isfinite(unit).all()

    def test_made_on_another_device_than_the_default_one(
        self, make_flow: Callable[[], FlowTransform]
    ) -> None:
        with torch.device("meta"):
            flow = make_flow()
        assert {p.device.type for p in flow.parameters()} == {"meta"}
