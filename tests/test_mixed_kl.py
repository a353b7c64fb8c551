"""The mixed divergence against its closed form, and where it must be exact or refuse."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import agreeing_guide, conjugate_normal
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoNormal, AutoNormalizingFlow
from torch import Tensor

from pyro_adaann import (
    AdaAnnSVI,
    AutoPlanar,
    CESSSchedule,
    ConstantSchedule,
    ESSStageRule,
    LinearSchedule,
    TraceMixedKL_ELBO,
    importance_draws,
)
from pyro_adaann.weights import truncated_weights

POSTERIOR = 0.5, 0.8  # mean and sd


def model() -> None:
    pyro.sample("z", dist.Normal(*POSTERIOR))


def guide() -> None:
    loc = pyro.param("loc", torch.tensor(0.2))
    log_scale = pyro.param("log_scale", torch.tensor(math.log(0.7)))
    pyro.sample("z", dist.Normal(loc, log_scale.exp()))


def gradients(elbo: Trace_ELBO) -> Tensor:
    elbo.loss_and_grads(model, guide)
    store = pyro.get_param_store()
    return torch.stack([store._params[name].grad for name in ("loc", "log_scale")])


def closed_form(a: float) -> Tensor:
    """The gradient of (1 - a) KL(q || p) + a KL(p || q) between normal distributions."""
    loc = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    log_scale = torch.tensor(math.log(0.7), dtype=torch.float64, requires_grad=True)
    q, p = torch.distributions.Normal(loc, log_scale.exp()), torch.distributions.Normal(*POSTERIOR)
    kl = torch.distributions.kl_divergence
    ((1 - a) * kl(q, p) + a * kl(p, q)).backward()
    return torch.stack([loc.grad, log_scale.grad]).float()


@pytest.mark.parametrize("path_derivative", [False, True])
@pytest.mark.parametrize("a", [0.0, 0.3, 1.0])
def test_the_gradient_is_that_of_the_mixed_divergence(a, path_derivative):
    n = 100_000
    elbo = TraceMixedKL_ELBO(a, path_derivative=path_derivative, num_particles=n, max_plate_nesting=0)
    # A term of either gradient has an sd below 3 here; 5 standard errors fail once in a million seeds.
    torch.testing.assert_close(gradients(elbo), closed_form(a), rtol=0, atol=5 * 3 / math.sqrt(n))


def test_with_nothing_forward_it_is_trace_elbo():
    losses = []
    for elbo in (
        TraceMixedKL_ELBO(0.0, path_derivative=False, num_particles=10, max_plate_nesting=0),
        Trace_ELBO(num_particles=10, vectorize_particles=True, max_plate_nesting=0),
    ):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), elbo)
        losses.append([svi.step() for _ in range(10)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("path", ["joint", "likelihood", "bridge"])
@pytest.mark.parametrize("flow", ["planar", "realnvp"])
@pytest.mark.parametrize("a", [0.0, 0.5, 1.0])
def test_no_noise_where_guide_and_tempered_density_agree(path, flow, a):
    problem, t = conjugate_normal(), 0.3
    own = agreeing_guide(problem, path, t, flow)
    elbo = TraceMixedKL_ELBO(a, num_particles=50)
    svi = AdaAnnSVI(
        problem.model,
        own,
        pyro.optim.SGD({"lr": 1.0}),
        elbo,
        schedule=LinearSchedule(2, initial_inverse_temperature=t),
        path=path,
    )
    before = [parameter.detach().clone() for parameter in own.parameters()]
    svi.step()
    for parameter, value in zip(own.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=0, atol=2e-5)


def test_broken_draws_weigh_nothing_and_push_away():
    def broken_model() -> None:
        z = pyro.sample("z", dist.Normal(0.5, 0.8))
        pyro.factor("edge", torch.where(z > 0.0, 0.0, -torch.inf))

    n = 100_000
    elbo = TraceMixedKL_ELBO(1.0, num_particles=n, max_plate_nesting=0)
    svi = AdaAnnSVI(broken_model, guide, pyro.optim.SGD({"lr": 1.0}), elbo, schedule=ConstantSchedule())
    svi.step()
    step = pyro.param("loc").item() - 0.2
    # -d/dloc KL(p || q) = (E_p[z] - loc) / scale^2, with the mean of a truncated normal, and the push of
    # the cost does not count with a = 1.
    normal = torch.distributions.Normal(0.0, 1.0)
    alpha = torch.tensor(-0.5 / 0.8)
    mean = 0.5 + 0.8 * float(normal.log_prob(alpha).exp() / (1 - normal.cdf(alpha)))
    assert step == pytest.approx((mean - 0.2) / 0.49, abs=5 * 3 / math.sqrt(n))


def test_truncated_weights():
    log_weights = torch.tensor([0.0, 1.0, 2.0, -torch.inf, torch.nan])
    weights = truncated_weights(log_weights)
    assert float(weights.sum()) == pytest.approx(1.0)
    assert weights[3] == weights[4] == 0
    # 2 is above 1 / sqrt(5) of the sum, and is cut there.
    total = 1 + math.e + math.e**2
    cut = total / math.sqrt(5)
    expected = torch.tensor([1.0, math.e, cut]) / (1 + math.e + cut)
    torch.testing.assert_close(weights[:3], expected)
    assert truncated_weights(torch.full((4,), -torch.inf)).tolist() == [0.25] * 4


def test_iaf_and_normal_guides_train():
    problem = conjugate_normal()
    for own in (AutoIAFNormal(problem.model), AutoNormal(problem.model)):
        pyro.clear_param_store()
        svi = AdaAnnSVI(problem.model, own, pyro.optim.Adam({"lr": 0.02}), TraceMixedKL_ELBO(0.5))
        losses = [svi.step() for _ in range(60)]
        assert losses[-1] < losses[0]


def test_it_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="forward_weight"):
        TraceMixedKL_ELBO(1.5)
    with pytest.raises(ValueError, match="vectorize_particles"):
        TraceMixedKL_ELBO(0.5, vectorize_particles=False)

    def subsampled(data: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 10, subsample_size=5, dim=-1) as index:
            pyro.sample("x", dist.Normal(z, 1.0), obs=data[index])

    svi = AdaAnnSVI(subsampled, AutoNormal(subsampled), pyro.optim.Adam({"lr": 0.01}), TraceMixedKL_ELBO(0.5))
    with pytest.raises(ValueError, match="plate 'data'"):
        svi.step(torch.zeros(10))

    planar = AutoNormalizingFlow(model, lambda dim: dist.transforms.Planar(dim))
    svi = AdaAnnSVI(model, planar, pyro.optim.Adam({"lr": 0.01}), TraceMixedKL_ELBO(0.5))
    with pytest.raises(ValueError, match="density at any point"):
        svi.step()
    with pytest.raises(ValueError, match="kl_warmup"):
        AdaAnnSVI(
            model,
            AutoNormal(model),
            pyro.optim.Adam({"lr": 0.01}),
            TraceMixedKL_ELBO(0.5),
            path="kl_warmup",
            schedule=LinearSchedule(10),
        )


def test_draws_far_below_the_others_do_not_lead_the_guide_away():
    """A curved ridge of a tempered density is stiff: by the reverse divergence Adam ran along it to 1e7."""

    def ridge() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 3.0).to_event(1).mask(False))
        x, y = z.unbind(-1)
        log_y = torch.stack(
            [
                math.log(weight) + dist.Normal(sign * (1.5 + 0.5 * x.square()), 0.3).log_prob(y)
                for sign, weight in ((1.0, 0.7), (-1.0, 0.3))
            ]
        )
        pyro.factor("density", dist.Normal(0.0, 1.0).log_prob(x) + log_y.logsumexp(0))

    pyro.set_rng_seed(6)
    guide = AutoIAFNormal(ridge, hidden_dim=[40, 40], num_transforms=4)
    svi = AdaAnnSVI(ridge, guide, pyro.optim.Adam({"lr": 0.005}), TraceMixedKL_ELBO())
    losses = [svi.step() for _ in range(60)]
    assert max(losses) < 1e4  # 1e9 before


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_balance_of_separated_modes(seed):
    """Weights 0.7 and 0.3, 5.7 apart: the settings of the page on lost modes."""
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.tensor([0.7, 0.3])),
        torch.distributions.Independent(
            torch.distributions.Normal(torch.tensor([[-2.0], [2.0]]).expand(2, 2), 0.5), 1
        ),
    )

    def bimodal() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(False))
        pyro.factor("density", mixture.log_prob(z))

    pyro.set_rng_seed(seed)
    own = AutoPlanar(bimodal, 50, base_loc=0.0, base_scale=3.0)
    svi = AdaAnnSVI(
        bimodal,
        own,
        pyro.optim.ExponentialLR(
            {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.002}, "gamma": 0.01**1e-3}
        ),
        TraceMixedKL_ELBO(0.9, num_particles=1000),
        schedule=CESSSchedule(0.9),
        stage_rule=ESSStageRule(0.5, max_num_steps=300),
        num_initial_steps=300,
        num_final_steps=1000,
    )
    svi.run(progress_bar=False)
    draws = importance_draws(svi, num_samples=20_000)
    is_first = (draws.samples["z"][:, 0] < 0).double()
    assert float(is_first.mean()) == pytest.approx(0.7, abs=0.1)
    assert float(draws.log_weights.softmax(0) @ is_first) == pytest.approx(0.7, abs=0.03)
