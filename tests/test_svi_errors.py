"""Bad input: what was expected, what came, what to do; before a parameter is touched."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import conjugate_normal
from pyro.contrib.gp.kernels import RBF
from pyro.infer import (
    SVI,
    EnergyDistance,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    Trace_ELBO,
    Trace_MMD,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoNormal, AutoNormalMessenger
from torch import Tensor

from pyro_adaann import (
    AdaAnnSVI,
    AutoPlanar,
    ConstantSchedule,
    NaturalStep,
    SequenceSchedule,
    TemperedTrace_ELBO,
    fit,
    natural_svi,
)
from pyro_adaann.objectives.nonfinite import drop_broken, limit_gradients
from pyro_adaann.objectives.traces import traces_seen

PROBLEM = conjugate_normal()


def adam() -> pyro.optim.PyroOptim:
    return pyro.optim.Adam({"lr": 0.01})


def make(loss=None, optim=None, guide=None, **kwargs) -> AdaAnnSVI:
    guide = guide or AutoPlanar(PROBLEM.model, 2)
    return AdaAnnSVI(PROBLEM.model, guide, optim or adam(), loss or Trace_ELBO(), **kwargs)


def empty_guide() -> None:
    pyro.param("unused", torch.tensor(1.0))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda: make(optim=torch.optim.Adam([torch.zeros(1)])),
            "a step such as NaturalStep; got Adam of torch.optim. Use for example pyro.optim.Adam",
        ),
        (lambda: make(optim=pyro.optim.Adam), "got the function Adam. Use for example pyro.optim.Adam"),
        (lambda: make(optim=torch.optim.Adam), "got the class Adam. Use for example pyro.optim.Adam"),
        (lambda: make(optim=NaturalStep), "got the class NaturalStep. Use for example NaturalStep\\(\\)"),
        (lambda: make(optim=Trace_ELBO(), loss=adam()), "got Trace_ELBO. Use for example pyro.optim.Adam"),
        (
            lambda: make(loss=Trace_ELBO()(PROBLEM.model, AutoNormal(PROBLEM.model))),
            "got an ELBOModule, which is a Trace_ELBO .*Pass the ELBO alone",
        ),
        (lambda: make(loss=TraceEnum_ELBO), "got the class TraceEnum_ELBO. Use for example TraceEnum_ELBO"),
        (lambda: make(loss="elbo"), "Expected `loss` to be an ELBO or a function; got 'elbo'"),
        (lambda: make(final_loss=Trace_ELBO), "got the class Trace_ELBO"),
        (lambda: make(guide=AutoPlanar), "`guide` to be .*; got the class AutoPlanar. Make one"),
        (lambda: make(guide="AutoPlanar"), "`guide` to be .*; got 'AutoPlanar'. Pass the guide itself"),
        (lambda: natural_svi(PROBLEM.model, AutoPlanar), "got the class AutoPlanar"),
        (lambda: fit(PROBLEM.model()), "Expected `model` to be .*; got None. Pass the model itself"),
        (lambda: fit(torch.nn.Linear), "Expected `model` to be .*; got the class Linear. Make one"),
        (lambda: make(schedule=SequenceSchedule), "got the class SequenceSchedule"),
        (lambda: make(loss=JitTrace_ELBO()), "Use Trace_ELBO"),
        (lambda: make(loss=JitTraceEnum_ELBO()), "Use TraceEnum_ELBO"),
        (lambda: make(loss=JitTrace_ELBO().differentiable_loss), "got JitTrace_ELBO.*Use Trace_ELBO"),
        (lambda: make(loss=TraceMeanField_ELBO().differentiable_loss), "path='likelihood'"),
        (lambda: make(loss=TraceMeanField_ELBO()), "path='likelihood'"),
        (lambda: make(loss=TraceMeanField_ELBO(), path="bridge"), "path='likelihood'"),
        (lambda: make(loss=Trace_MMD(RBF(1))), "got Trace_MMD"),
        (lambda: make(loss=EnergyDistance()), "got EnergyDistance"),
        (lambda: make(loss=TemperedTrace_ELBO(0.1)), "with pyro.infer.SVI"),
        (lambda: make(loss=Trace_ELBO(num_particles=0)), "loss.num_particles.*>= 1; got 0"),
        (lambda: make(num_final_particles=0), "num_final_particles.*got 0"),
        (lambda: make(loss=lambda *a: 0.0, num_final_particles=2), "Expected an ELBO"),
        (lambda: make(num_variance_samples=1), "num_variance_samples.*>= 2; got 1"),
        (lambda: make(num_steps_per_stage=0), "num_steps_per_stage"),
        (lambda: make(num_initial_steps=-1), "num_initial_steps"),
        (lambda: make(num_final_steps=0.5), "num_final_steps.*got 0.5"),
        (lambda: make(lr_schedule="sometimes"), "'final', 'always' or 'never'; got 'sometimes'"),
        (lambda: make(schedule=[0.1, 1.0]), "SequenceSchedule"),
        (lambda: make(path="sideways"), "\\['bridge', 'joint', 'kl_warmup', 'likelihood'\\].*got 'sideways'"),
        (lambda: make(path="bridge", guide=AutoNormal(PROBLEM.model)), "AutoPlanar"),
        (lambda: make(guide=AutoNormalMessenger(PROBLEM.model)), "AutoNormalMessenger"),
        (lambda: make(guide=empty_guide).step(), "at least one latent site"),
        (lambda: TemperedTrace_ELBO(0.0), "in \\(0, 1\\]; got 0.0"),
    ],
)
def test_bad_arguments_are_named(run, message):
    with pytest.raises(ValueError, match=message):
        run()
    assert all(torch.equal(p, torch.tensor(1.0)) for p in pyro.get_param_store().values())


@pytest.mark.parametrize(
    "optim",
    [
        pyro.optim.ClippedAdam({"lr": 0.01}),
        pyro.optim.AdagradRMSProp({"eta": 0.1}),
        pyro.optim.DCTAdam({"lr": 0.01}),
        pyro.optim.StepLR({"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.01}, "step_size": 1}),
    ],
    ids=lambda optim: type(optim).__name__,
)
def test_every_kind_of_optimizer_of_pyro_trains(optim):
    svi = make(optim=optim, num_initial_steps=1, num_steps_per_stage=1)
    svi.step()
    before = [p.detach().clone() for p in pyro.get_param_store().values()]
    svi.step()
    assert any(not torch.equal(p, b) for p, b in zip(pyro.get_param_store().values(), before, strict=True))


def test_tempered_elbo_checks_the_guide_at_its_first_step():
    guide = AutoNormal(PROBLEM.model)
    svi = SVI(PROBLEM.model, guide, adam(), TemperedTrace_ELBO(0.5, path="bridge"))
    with pytest.raises(ValueError, match="base distribution"):
        svi.step()


def broken_model(is_broken) -> object:
    """N(0, 1) in two dimensions whose density is NaN where ``is_broken(z)``."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        extra = torch.where(is_broken(z), math.nan, 0.0)
        pyro.sample("x", dist.Normal(z[..., 0] + extra, 1.0, validate_args=False), obs=torch.tensor(0.3))

    return model


# What is tested here, and what Pyro says of a guide without latent sites.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning"),
    pytest.mark.filterwarnings("ignore:Found vars in model but not guide:UserWarning"),
]


@pytest.mark.parametrize("vectorize", [False, True])
def test_a_density_that_is_never_finite_is_named_before_a_parameter_changes(vectorize):
    model = broken_model(lambda z: z[..., 0] > -math.inf)
    guide = AutoPlanar(model, 3).initialize()
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=vectorize)
    svi = AdaAnnSVI(model, guide, adam(), elbo)
    with pytest.raises(ValueError, match=r"Expected a finite loss.*sites.*: x\)"):
        svi.step()
    for name, value in guide.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("t", [0.3, 1.0])
def test_broken_particles_cost_ten_nats_and_leave_the_others_exact(t):
    model = broken_model(lambda z: z[..., 1] > 0.5)
    good = broken_model(lambda z: z[..., 1] > math.inf)
    guide = AutoPlanar(model, 4).initialize()
    elbo = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=0)
    seen = []

    def grads(model) -> tuple[float, list[Tensor], Tensor]:
        svi = AdaAnnSVI(model, guide, adam(), elbo, schedule=ConstantSchedule(t))
        guide.zero_grad()
        pyro.set_rng_seed(7)
        loss = svi.loss_and_grads(model, guide)
        seen.append((svi._fit.objective.num_broken, svi._fit.objective.num_particles))
        return loss, [p.grad.clone() for p in guide.parameters()]

    loss, broken_grads = grads(model)
    pyro.set_rng_seed(7)
    z = guide.get_posterior().expand([50]).sample()
    is_broken = z[:, 1] > 0.5
    assert seen == [(int(is_broken.sum()), 50)]
    assert 0 < is_broken.sum() < 50

    # The same sum over the other particles alone, each on its own.
    guide.zero_grad()
    log_q = guide.get_posterior()
    pyro.set_rng_seed(7)
    z = log_q.expand([50]).rsample()
    terms = log_q.expand([50]).log_prob(z)
    log_p = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    log_p = log_p + dist.Normal(z[:, 0], 1.0).log_prob(torch.tensor(0.3))
    expected = (terms - t * log_p)[~is_broken].sum() / 50
    # And what pushes the guide back: ten times the gradient of the broken mass.
    weight = is_broken.float() - is_broken.float().mean()
    cost = 10 * (weight * log_q.log_prob(z.detach().clone())).sum() / 50
    (expected + cost).backward()
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    for actual, parameter in zip(broken_grads, guide.parameters(), strict=True):
        torch.testing.assert_close(actual, parameter.grad, rtol=1e-3, atol=1e-6)
    assert good is not model


def test_gradients_that_are_not_finite_are_cut_row_by_row():
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        # Finite value, infinite slope at negative z: sqrt of a number clamped to zero.
        pyro.factor("steep", torch.sqrt(z[..., 0].clamp(min=0.0)))

    guide = AutoPlanar(model, 3).initialize()
    elbo = Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=0)
    svi = AdaAnnSVI(model, guide, adam(), elbo)
    svi.step()
    assert all(torch.isfinite(p).all() for p in guide.parameters())
    assert svi.history.stages[0].num_rejected == 0


def test_broken_particles_one_at_a_time():
    model = broken_model(lambda z: z[..., 1] > 0.5)
    svi = AdaAnnSVI(model, AutoPlanar(model, 3), adam(), Trace_ELBO(num_particles=20))
    svi.step()
    stage = svi.history.stages[0]
    assert 0 < stage.num_broken < 20
    assert stage.num_particles == 20
    assert 0 < stage.broken_share < 1
    assert math.isfinite(stage.losses[0])


@pytest.mark.parametrize(
    "make_loss", [TraceGraph_ELBO, lambda: lambda *a: Trace_ELBO().differentiable_loss(*a)]
)
def test_a_step_that_is_not_finite_changes_no_parameter(make_loss):
    state = {"broken": False}

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("f", z.sum(-1) * (math.nan if state["broken"] else 1.0))

    guide = AutoPlanar(model, 3)
    schedule = SequenceSchedule([0.5, 1.0])
    svi = AdaAnnSVI(model, guide, adam(), make_loss(), schedule=schedule)
    svi.step()
    before = [p.clone() for p in guide.parameters()]
    state["broken"] = True
    assert math.isnan(svi.step())
    assert all(map(torch.equal, before, guide.parameters()))
    assert svi.history.stages[0].num_rejected == 1
    state["broken"] = False
    svi.step()
    assert not all(map(torch.equal, before, guide.parameters()))
    state["broken"] = True
    for _ in range(99):
        svi.step()
    with pytest.raises(ValueError, match="100 attempts"):
        svi.step()


def test_drop_broken_masks_every_site_of_a_plated_model():
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3, dim=-1):
            bad = torch.where(z > 0, math.nan, 0.0)
            pyro.sample("x", dist.Normal(z + bad, 1.0, validate_args=False), obs=torch.zeros(3))

    guide = AutoNormal(model)
    guide()
    counts = []
    elbo = Trace_ELBO(num_particles=30, vectorize_particles=True)
    with traces_seen(elbo, lambda m, g: counts.append(drop_broken(m, g))):
        assert math.isfinite(elbo.loss_and_grads(model, guide))
    assert 0 < counts[0][0] < 30
    assert counts[0][1] == 30


def test_a_steep_particle_is_shortened_and_the_others_left_alone():
    def model(slope: float) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("edge", slope * (z[..., 0] - 3.0).clamp(min=0.0))

    def grads(slope: float, tame: bool) -> tuple[Tensor, Tensor]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoNormal(model)
        guide(slope)
        guide.scales.z = torch.full((2,), 1.5)
        seen = []

        def look(model_trace, guide_trace):
            value = guide_trace.nodes["z_unconstrained"]["value"]
            seen.append(value)
            value.register_hook(seen.append)
            if tame:
                limit_gradients(guide_trace, 100.0)
            value.register_hook(seen.append)

        elbo = Trace_ELBO(num_particles=400, vectorize_particles=True, max_plate_nesting=0)
        with traces_seen(elbo, look):
            elbo.loss_and_grads(model, guide, slope)
        return seen[0].detach(), seen[-1]

    z, plain = grads(-1e9, tame=False)
    _, tamed = grads(-1e9, tame=True)
    steep = z[:, 0] > 3.0
    assert 0 < steep.sum() < 40
    assert torch.equal(tamed[~steep], plain[~steep])
    # As long as 100 times the median row, and the way it pointed.
    limit = 100 * plain.abs().amax(-1).median()
    torch.testing.assert_close(tamed[steep].abs().amax(-1), limit.expand(int(steep.sum())))
    torch.testing.assert_close(
        torch.nn.functional.normalize(tamed[steep], dim=-1),
        torch.nn.functional.normalize(plain[steep], dim=-1),
    )
