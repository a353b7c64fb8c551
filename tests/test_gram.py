"""Gram matrix, scale and direction from outer products, against scores by autograd, multiplied out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.distributions import transforms as T
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormalizingFlow
from pyro.nn import AutoRegressiveNN
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_adaann import (
    AdaAnnSVI,
    AutoPlanar,
    AutoRealNVP,
    AutoSpline,
    AutoZuko,
    ConstantSchedule,
    NaturalStep,
)
from pyro_adaann.objectives.fixed_density import fixed_log_density
from pyro_adaann.objectives.traces import PARTICLE_PLATE
from pyro_adaann.steps import direction as direction_module
from pyro_adaann.steps.direction import NaturalDirection, residuals
from pyro_adaann.steps.mask_groups import mask_groups
from pyro_adaann.steps.scores import draw_scores, score_matrix
from pyro_adaann.transforms import PlanarStack
from pyro_adaann.transforms.linear_maps import calls_of_linear_maps, gradients_of_calls
from pyro_adaann.transforms.outer import OuterProducts

pytestmark = pytest.mark.any_device

NUM_DRAWS = 40
#: What the products of draws may miss in double precision, as a share of their size.
TOLERANCE = 1e-5


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def model() -> None:
    pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))


def flow(make: Callable[[int], Any]) -> Callable[[], Any]:
    return lambda: AutoNormalizingFlow(model, make)


class InPlate(pyro.nn.PyroModule):
    """One flow for every entry of a plate: each draw uses its weights three times."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = T.affine_autoregressive(4, hidden_dims=[40, 40])

    def forward(self) -> None:
        with pyro.plate("groups", 3):
            base = dist.Normal(torch.zeros(4), 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [self.flow]))


class Coupled(pyro.nn.PyroModule):
    """A flow whose network is told another draw, by an encoder with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(2, 3)
        self.flow = T.conditional_affine_autoregressive(4, 3, hidden_dims=[30, 30])
        self.log_scale = nn.Parameter(torch.zeros(2))

    def forward(self) -> None:
        b = pyro.sample("b", dist.Normal(torch.zeros(2), self.log_scale.exp()).to_event(1))
        flow = self.flow.condition(self.encoder(b.detach()))
        base = dist.Normal(torch.zeros(4), 1.0).to_event(1)
        pyro.sample("z", dist.TransformedDistribution(base, [flow]))


WIDTH = 30


class Shift(T.Transform):
    """Scale and shift one half by a linear map of the other, used in ways that hooks alone get wrong."""

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, kind: str, network: nn.Linear) -> None:
        super().__init__(cache_size=1)
        self.kind, self.network = kind, network

    def _shift(self, a: Tensor) -> Tensor:
        shift = self.network(a)
        if self.kind == "chained":
            shift = self.network(torch.tanh(shift))
        elif self.kind == "functional":
            shift = shift + F.linear(a.square(), self.network.weight)
        elif self.kind == "in place":
            shift = shift.relu_()
        return torch.tanh(shift)

    def _call(self, x: Tensor) -> Tensor:
        a, b = x.split(WIDTH, -1)
        return torch.cat([a, b * torch.exp(self._shift(a)) + self._shift(a)], -1)

    def _inverse(self, y: Tensor) -> Tensor:
        a, b = y.split(WIDTH, -1)
        return torch.cat([a, (b - self._shift(a)) * torch.exp(-self._shift(a))], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self._shift(x.split(WIDTH, -1)[0]).sum(-1)


class Shifted(pyro.nn.PyroModule):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.network = kind, nn.Linear(WIDTH, WIDTH)

    def forward(self) -> None:
        base = dist.Normal(torch.zeros(2 * WIDTH), 1.0).to_event(1)
        flow = Shift(self.kind, self.network)
        pyro.sample("z", dist.TransformedDistribution(base, [flow]))


#: Guides, and how many of their parameters are left as outer products.
GUIDES: dict[str, tuple[Callable[[], Any], int]] = {
    # Flows of this package leave as many as they say.
    "planar": (lambda: AutoPlanar(model, 6), -1),
    "realnvp": (lambda: AutoRealNVP(model, 3, [20, 20]), -1),
    "spline of ours": (lambda: AutoSpline(model, 2, 4, [12, 12]), -1),
    "zuko": (lambda: AutoZuko(model, "NSF", {"transforms": 1, "hidden_features": [12, 12]}), -1),
    "normal": (lambda: AutoMultivariateNormal(model), 0),
    "iaf": (lambda: AutoIAFNormal(model, hidden_dim=[20, 20], num_transforms=2), 6),
    "skip": (flow(lambda d: T.AffineAutoregressive(AutoRegressiveNN(d, [20, 30], skip_connections=True))), 4),
    "coupling": (flow(lambda d: T.iterated(2, T.affine_coupling, d, hidden_dims=[20, 20])), 6),
    "spline coupling": (flow(lambda d: T.spline_coupling(d, hidden_dims=[20, 20])), 3),
    "spline": (flow(lambda d: T.spline_autoregressive(d, hidden_dims=[20, 20])), 3),
    "affine between": (
        flow(lambda d: T.ComposeTransformModule([T.affine_autoregressive(d), T.Permute(torch.arange(d))])),
        2,
    ),
    "planar of Pyro's": (flow(T.planar), 0),
    "plate": (InPlate, 1),
    "conditional": (Coupled, 3),
    "three uses": (lambda: Shifted("plain"), 1),
    "six uses": (lambda: Shifted("chained"), 0),
    "functional": (lambda: Shifted("functional"), 0),
    "in place": (lambda: Shifted("in place"), 0),
}


def trace_of(own: Callable[[], Any], dim: int = -2) -> Any:
    """Return a trace of a guide with particles along a dimension."""
    with pyro.plate(PARTICLE_PLATE, NUM_DRAWS, dim=dim):
        return poutine.trace(own).get_trace()


def by_autograd(log_q: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """Return the gradients of the entries of ``log_q``, one backward pass for each."""
    rows = []
    for value in log_q:
        found = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, allow_unused=True)
        pairs = zip(parameters.values(), found, strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in pairs]))
    return torch.stack(rows)


def multiplied_out(scores: Sequence[Tensor | Sequence[OuterProducts]]) -> Tensor:
    found = [s if isinstance(s, Tensor) else torch.stack([t.dense() for t in s]).sum(0) for s in scores]
    return torch.cat([score.reshape(len(score), -1) for score in found], dim=1)


def dense_direction(scores: Tensor, scale: Tensor, log_weights: Tensor, damping: float) -> Any:
    """Return Gram matrix and direction from the matrix of scores, by their definitions."""
    centered = (scores - scores.mean(0)) * scale
    gram = centered @ centered.T / len(scores)
    system = gram + damping * torch.eye(len(scores), dtype=scores.dtype)
    solution = torch.linalg.solve(system, residuals(log_weights))
    return gram, scale * (solution @ centered) / len(scores)


def assert_close(got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert float((got - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize("name", GUIDES)
def test_gram_matrix_and_direction_are_the_dense_ones(name, double):
    make, num_outer = GUIDES[name]
    pyro.set_rng_seed(0)
    own = make()
    own()
    parameters = dict(own.named_parameters())
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += 0.1 * torch.randn_like(parameter)
    trace = trace_of(own)
    scores = draw_scores(trace, parameters, NUM_DRAWS)
    if num_outer >= 0:
        assert sum(not isinstance(score, Tensor) for score in scores) == num_outer
    matrix = multiplied_out(scores)
    # The oracle goes another way: by the inverse, one backward pass for each draw.
    sites = [site for site in trace.nodes.values() if site["type"] == "sample"]
    for site in sites:
        for transform in getattr(site["fn"], "transforms", []):
            if hasattr(transform, "clear_cache"):
                transform.clear_cache()
    has_inverse = name != "planar of Pyro's"
    expected = by_autograd(fixed_log_density(trace), parameters) if has_inverse else matrix
    assert_close(matrix, expected)
    log_weights = torch.randn(NUM_DRAWS)
    direction = NaturalDirection(scores, log_weights)
    gram, step = dense_direction(expected, direction.scale(), log_weights, 0.1)
    assert_close(direction._gram, gram)
    assert_close(direction.solve(0.1)[0], step)


def masks() -> dict[str, Tensor]:
    torch.manual_seed(0)
    rows, columns = torch.randint(0, 4, (9, 1)), torch.randint(0, 4, (1, 7))
    return {
        "ones": torch.ones(9, 7),
        "degrees": (rows >= columns).float(),
        "strict": (rows > columns).float(),
        "blocks": torch.block_diag(torch.ones(5, 3), torch.ones(4, 4)),
        "any": (torch.rand(9, 7) > 0.4).float(),
        "nothing": torch.zeros(9, 7),
        "autoregressive": AutoRegressiveNN(7, [9]).masks[0],
    }


def indices(which: Tensor | slice) -> list[int]:
    return list(range(10_000))[which] if isinstance(which, slice) else which.tolist()


@pytest.mark.parametrize("name", masks())
def test_groups_cover_every_one_of_a_mask_once(name):
    mask = masks()[name]
    groups, is_transposed = mask_groups(mask)
    seen = torch.zeros_like(mask.T if is_transposed else mask)
    columns: list[int] = []
    for group in groups:
        columns = [*(columns if group.is_nested else []), *indices(group.columns)]
        for row in indices(group.rows):
            seen[row, columns] += 1
    assert torch.equal(seen.T if is_transposed else seen, mask)
    assert mask_groups(mask) is mask_groups(mask)
    if name in ("degrees", "strict", "autoregressive"):
        assert all(group.is_nested for group in groups)
        assert sum(len(indices(group.columns)) for group in groups) <= max(mask.shape)


@pytest.mark.parametrize("num_terms", [1, 2])
@pytest.mark.parametrize("name", ["none", "degrees", "blocks", "any"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_masked_outer_products_are_those_multiplied_out(name, num_terms, dtype):
    torch.manual_seed(0)
    num, mask = 600, masks().get(name)  # more than two blocks of draws
    terms = [
        OuterProducts(torch.randn(num, 2, 9).to(dtype), torch.randn(num, 2, 7).to(dtype) + 0.5, mask)
        for _ in range(num_terms)
    ]
    scores = [torch.randn(num, 3).to(dtype), terms]
    log_weights = torch.randn(num).to(dtype)
    units = torch.cat([torch.rand(3) + 0.5, (torch.rand(2, 9, 1) * torch.rand(2, 1, 7)).reshape(-1)])
    direction = NaturalDirection(scores, log_weights, units.to(dtype))
    gram, step = dense_direction(
        multiplied_out(scores).double(), direction.scale().double(), log_weights.double(), 0.1
    )
    assert_close(direction._gram, gram, 1e-6 if dtype == torch.float32 else 1e-12)
    assert_close(direction.solve(0.1)[0], step, 1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("name", ["none", "degrees", "blocks"])
def test_the_scale_has_the_row_and_column_sums_of_the_variance_and_keeps_the_floor(name, monkeypatch):
    torch.manual_seed(0)
    mask = masks().get(name, torch.ones(9, 7)).double()
    num = 500
    term = OuterProducts(
        torch.randn(num, 9).double() * torch.rand(9),
        torch.randn(num, 7).double(),
        None if name == "none" else mask,
    )
    variance = (term.dense() - term.dense().mean(0)).square().mean(0)
    scale = NaturalDirection([[term]], torch.zeros(num).double()).scale().reshape(9, 7)
    assert float((scale**-2).min()) >= 0.01 * float(variance.mean())
    monkeypatch.setattr(direction_module, "_FLOOR", 1e-20)
    scale = NaturalDirection([[term]], torch.zeros(num).double()).scale().reshape(9, 7)
    got, expected = torch.where(mask > 0, scale**-2, 0.0), variance * mask
    # Proportional fitting is exact after one round without a mask, and stops after four with one.
    tolerance = {"rtol": 1e-6 if name == "none" else 0.05, "atol": 0.0}
    torch.testing.assert_close(got.sum(0), expected.sum(0), **tolerance)
    torch.testing.assert_close(got.sum(1), expected.sum(1), **tolerance)


def test_draws_whose_scores_overflow_count_as_draws_without_a_score():
    torch.manual_seed(0)
    left, right, log_weights = torch.randn(30, 5), torch.randn(30, 6), torch.randn(30)
    dense = torch.randn(30, 4)
    left[3], right[4], dense[5, 2] = torch.inf, 1e30, torch.nan
    left[4] = 1e30  # their product alone overflows
    got = NaturalDirection([[OuterProducts(left, right)], dense], log_weights).solve(0.1)[0]
    for factor in (left, right, dense):
        factor[3:6] = 0.0
    expected = NaturalDirection([[OuterProducts(left, right)], dense], log_weights).solve(0.1)[0]
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got, expected)


def test_damping_grows_where_rounding_leaves_no_positive_matrix():
    torch.manual_seed(0)
    direction = NaturalDirection(torch.randn(30, 4), torch.randn(30))
    direction._gram.diagonal().sub_(0.5)  # as rounding would, and far more
    assert torch.isfinite(direction.solve(1e-3)[0]).all()


def test_a_network_that_mixes_draws_is_not_taken_draw_by_draw(double):
    torch.manual_seed(0)
    x, network = torch.randn(20, 5), nn.Linear(5, 3)
    for mix, num_found in ((0.0, 2), (1.0, 0)):
        with calls_of_linear_maps(torch.Size([20])) as calls:
            out = network(x)
            values = (out - mix * out.mean(0)).square().sum(-1)
        found, on_graph = gradients_of_calls(values, calls, list(network.parameters()))
        assert len(found) == num_found
        assert len(on_graph) == 2
    assert not nn.modules.module._global_forward_hooks


def test_particles_may_be_any_dimension(double):
    class Inner(pyro.nn.PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.flow = T.affine_autoregressive(4, hidden_dims=[40, 40])

        def forward(self) -> None:
            with pyro.plate("groups", 3, dim=-2):
                base = dist.Normal(torch.zeros(4), 1.0).to_event(1)
                pyro.sample("z", dist.TransformedDistribution(base, [self.flow]))

    pyro.set_rng_seed(0)
    own = Inner()
    trace = trace_of(own, dim=-1)
    parameters = dict(own.named_parameters())
    got = score_matrix(trace, parameters, NUM_DRAWS)
    assert_close(got, by_autograd(fixed_log_density(trace), parameters))


class Masked(pyro.nn.PyroModule):
    """Three points in a plate, of which a mask leaves some; by Pyro's handler or by the distribution."""

    def __init__(self, make: Callable[[], Any], way: str, mask: Tensor) -> None:
        super().__init__()
        self.flow, self.way, self.mask = make(), way, mask
        self.loc = nn.Parameter(torch.zeros(4))

    def forward(self) -> None:
        with pyro.plate("groups", 3), poutine.mask(mask=self.mask if self.way == "handler" else True):
            base = dist.Normal(self.loc if self.flow is None else torch.zeros(4), 1.0).to_event(1)
            fn = base if self.flow is None else dist.TransformedDistribution(base, [self.flow])
            pyro.sample("z", fn.mask(self.mask) if self.way == "distribution" else fn)


@pytest.mark.parametrize("way", ["handler", "distribution"])
@pytest.mark.parametrize("kind", ["planar", "iaf", "normal"])
def test_masked_entries_add_nothing(kind, way, double):
    makers = {
        "planar": lambda: PlanarStack(4, 3),
        "iaf": lambda: T.affine_autoregressive(4, hidden_dims=[6]),
        "normal": lambda: None,
    }
    scores = []
    for mask in ([True, True, True], [True, False, True], [False, True, False]):
        pyro.set_rng_seed(0)
        own = Masked(makers[kind], way, torch.tensor(mask))
        parameters = {
            name: value for name, value in own.named_parameters() if (name == "loc") == (kind == "normal")
        }
        scores.append(score_matrix(trace_of(own), parameters, NUM_DRAWS))
    torch.testing.assert_close(scores[1] + scores[2], scores[0])
    assert float(scores[1].abs().max()) > 0.1
    assert float(scores[2].abs().max()) > 0.1


def test_a_flow_without_an_inverse_follows_the_posterior():
    def target() -> None:
        pyro.sample("z", dist.Normal(torch.tensor([1.0, -0.5]), 0.5).to_event(1))

    pyro.set_rng_seed(0)
    own = AutoNormalizingFlow(target, lambda d: T.iterated(6, T.planar, d))
    svi = AdaAnnSVI(target, own, NaturalStep(200, max_kl=0.1), schedule=ConstantSchedule())
    losses = [svi.step() for _ in range(40)]
    assert losses[-1] < 0.3 * losses[0]
