"""Sequential Monte Carlo against closed forms: evidence, moments, invariance of every move."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import bimodal, conjugate_normal, half_cauchy_scale, mixture, mixture_log_joint, plated
from scipy.stats import kstest
from torch import Tensor

from pyro_adaann import (
    BRIDGE,
    JOINT,
    LIKELIHOOD,
    AdaAnnSchedule,
    AnnealedSMC,
    AutoPlanar,
    CESSSchedule,
    LinearSchedule,
    Path,
)
from pyro_adaann.sampling.density import UnconstrainedModel
from pyro_adaann.sampling.flow import guide_flow
from pyro_adaann.sampling.metric import Metric
from pyro_adaann.sampling.moves import HMC, RandomWalk, independence_move
from pyro_adaann.sampling.particles import Particles, combine_evidences, systematic_resampling
from pyro_adaann.sampling.target import Points, TemperedTarget
from pyro_adaann.state.checkpoint import read_checkpoint, write_checkpoint

PROBLEM = conjugate_normal(2)
#: Of a test that compares a random number with its expectation in units of its error, one-sided 3e-5.
FOUR_SIGMAS = 4.0


def exact_log_evidence(problem=PROBLEM) -> float:
    """The data of a dimension are jointly normal."""
    num = len(problem.data)
    covariance = problem.noise_sd**2 * torch.eye(num) + problem.prior_sd**2
    return float(dist.MultivariateNormal(torch.zeros(num), covariance).log_prob(problem.data.T).sum())


# --- the model in unconstrained coordinates ------------------------------------------------------------


@pytest.mark.parametrize("vectorize", [True, False])
def test_densities_carry_the_jacobian_in_the_prior(vectorize):
    data = torch.tensor([0.3, -1.0, 2.0])
    model = UnconstrainedModel(half_cauchy_scale, (data,), {}, vectorize=vectorize)
    z = torch.linspace(-2.0, 2.0, 5).unsqueeze(-1)
    prior, likelihood = model.log_densities(z)
    scale = z.exp()
    expected = dist.HalfCauchy(1.0).log_prob(scale).squeeze(-1) + z.squeeze(-1)
    assert torch.allclose(prior, expected, atol=1e-5)
    assert torch.allclose(likelihood, dist.Normal(0.0, scale).log_prob(data).sum(-1), atol=1e-4)


@pytest.mark.parametrize("num", [1, 7])
def test_plates_bounded_supports_and_the_loop_agree(num):
    data = torch.randn(4)
    batch, loop = (UnconstrainedModel(plated, (data,), {}, vectorize=v) for v in (True, False))
    z = torch.randn(num, batch.dim)
    for got, expected in zip(batch.log_densities(z), loop.log_densities(z), strict=True):
        assert torch.allclose(got, expected, atol=1e-4)
    values = batch.constrain(z)
    assert values["weights"].shape == (num, 3)
    assert (values["weights"].sum(-1) - 1).abs().max() < 1e-5


def test_enumerated_sites_are_summed_out():
    data = torch.tensor([-1.0, 0.5, 2.0])
    model = UnconstrainedModel(mixture, (data,), {})
    z = torch.randn(5, 2)
    assert torch.allclose(sum(model.log_densities(z)), mixture_log_joint(z, data), atol=1e-4)


def test_draws_of_the_prior_have_its_distribution():
    model = UnconstrainedModel(half_cauchy_scale, (torch.zeros(2),), {})
    z = model.draw_prior(2000).squeeze(-1)
    # False failures: one in a thousand.
    assert (
        kstest(z.exp().numpy(), lambda x: 2 / math.pi * torch.atan(torch.as_tensor(x)).numpy()).pvalue > 1e-3
    )


def test_a_model_that_does_not_vectorize_says_so_and_runs_in_a_loop():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.factor("all", -z.square().sum())

    with pytest.raises(ValueError, match="vectorize=False"):
        AnnealedSMC(model, num_particles=64).run(progress_bar=False)
    result = AnnealedSMC(model, num_particles=64, num_groups=4, num_moves=1, vectorize=False, seed=0).run(
        progress_bar=False
    )
    assert abs(result.log_evidence - -1.5 * math.log(3)) < 0.5


def test_a_subsampled_plate_is_refused():
    with pytest.raises(ValueError, match="every plate in full"):
        AnnealedSMC(plated).run(torch.zeros(4), 2, progress_bar=False)


# --- every move leaves its density invariant -----------------------------------------------------------

GUIDE_SCALE = 0.8


def flow_target(path: Path, with_flow: bool) -> TemperedTarget:
    """The conjugate model, in its own coordinates or in those of a planar flow that is not the identity."""
    model = UnconstrainedModel(PROBLEM.model, (), {})
    flow = None
    if with_flow:
        guide = AutoPlanar(PROBLEM.model, 2, affine=None, base_loc=0.3, base_scale=GUIDE_SCALE).initialize()
        with torch.no_grad():
            # Wide bends across the posterior, so that its density in x is far from normal.
            guide.transform.w.copy_(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
            guide.transform.u.copy_(torch.tensor([[1.0, 0.3], [0.2, 0.8]]))
            guide.transform.b.copy_(torch.tensor([-0.5, 0.2]))
        flow = guide_flow(guide, model, (), {})
    return TemperedTarget(model, path, dist.Normal(0.5, 1.5), flow)


def exact_draws(target: TemperedTarget, t: float, num: int) -> tuple[Tensor, Tensor, float]:
    """Draws of the tempered density in the coordinates of the moves, its mean and its sd in z."""
    mean, sd = PROBLEM.tempered(target.path.name, t, (0.5, 1.5))
    z = mean + sd * torch.randn(num, 2)
    return (z if target.flow is None else target.flow.inverse(z)), mean, sd


MOVES = {
    "hmc": HMC(),
    "hmc, one leapfrog": HMC(max_leapfrogs=1),
    "random_walk": RandomWalk(),
    "guide": 1,
    "guide, five proposals": 5,
}


@pytest.mark.parametrize("t", [0.3, 1.0])
@pytest.mark.parametrize("path", [JOINT, LIKELIHOOD, BRIDGE], ids=lambda path: path.name)
@pytest.mark.parametrize("with_flow", [False, True], ids=["own", "flow"])
@pytest.mark.parametrize("name", MOVES)
def test_exact_draws_stay_exact(name, with_flow, path, t):
    """Kolmogorov-Smirnov of 20,000 draws after three large moves, both coordinates, the radius and a slope.

    Far from equilibrium the moves would have pulled the draws elsewhere. False failures: 4 numbers times
    48 cases at level 1e-5, below 0.2 % for all of them together.
    """
    if name.startswith("guide") and not with_flow:
        pytest.skip("proposals from a guide need one")
    target = flow_target(path, with_flow)
    torch.manual_seed(1)
    x, mean, sd = exact_draws(target, t, 20_000)
    points = target.evaluate(x)
    metric = Metric.of(points, torch.ones(len(x)), dense=True)
    generator = torch.Generator().manual_seed(2)
    acceptance = []
    for _ in range(3):
        move = MOVES[name]
        if isinstance(move, int):
            points, accepted = independence_move(target, t, points, generator, move)
        else:
            points, accepted = move(target, t, points, metric, 0.9, generator)
        acceptance.append(float(accepted.mean()))
    # Neither all nor nothing: a test of moves that are always refused would say nothing.
    assert 0.02 < min(acceptance) < 0.999
    u = (target.to_model(points.x) - mean) / sd
    for number in (u[:, 0], u[:, 1], (u[:, 0] + u[:, 1]) / math.sqrt(2)):
        assert kstest(number.numpy(), "norm").pvalue > 1e-5
    assert kstest(u.square().sum(-1).numpy(), "chi2", args=(2,)).pvalue > 1e-5


def test_moves_are_correlated_with_momentum_and_still_invariant_on_a_bounded_support():
    """One move from exact draws of a Beta posterior; false failures 1e-5."""

    def model():
        p = pyro.sample("p", dist.Beta(2.0, 3.0))
        pyro.sample("k", dist.Binomial(10, p), obs=torch.tensor(7.0))

    target = TemperedTarget(UnconstrainedModel(model, (), {}), LIKELIHOOD)
    p = dist.Beta(9.0, 6.0).sample((20_000, 1))
    points = target.evaluate(p.logit())
    metric = Metric(torch.ones(1, 1) * 0.5)
    points, accepted = HMC()(target, 1.0, points, metric, 0.9, torch.Generator().manual_seed(0))
    assert 0.2 < float(accepted.mean()) < 0.999
    assert kstest(points.x.squeeze(-1).sigmoid().numpy(), "beta", args=(9, 6)).pvalue > 1e-5


def test_a_gradient_that_is_not_finite_refuses():
    def model():
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        # Its derivative at negative numbers is infinity times zero.
        pyro.factor("broken", torch.where(z > 0, z.abs().sqrt(), torch.zeros_like(z)) * 1.0)

    target = TemperedTarget(UnconstrainedModel(model, (), {}), JOINT)
    x = torch.zeros(100, 1)  # the gradient of the square root at 0 is not finite
    points, accepted = HMC()(
        target, 1.0, target.evaluate(x + 1.0), Metric(torch.ones(1, 1)), 0.5, torch.Generator()
    )
    assert torch.isfinite(points.x).all()
    assert torch.isfinite(accepted).all()


# --- weights -------------------------------------------------------------------------------------------


def test_systematic_resampling_rounds_up_or_down():
    weights = torch.rand(5, 40).double()
    index = systematic_resampling(weights.log(), torch.Generator().manual_seed(0))
    expected = 40 * weights / weights.sum(-1, keepdim=True)
    for row in range(5):
        counts = torch.bincount(index[row], minlength=40)
        assert ((counts - expected[row]).abs() < 1).all()


def test_groups_without_weight_count_as_zero_and_stay_away_from_the_others():
    points = Points(torch.arange(4.0).unsqueeze(-1), torch.zeros(4, 4))
    particles = Particles(points, torch.zeros(2, 2).double(), torch.zeros(2).double())
    particles = particles.reweight(torch.tensor([-torch.inf, math.nan, 0.0, -50.0]))
    assert particles.num_broken == 1
    particles, num_resampled = particles.resample(0.9, torch.Generator().manual_seed(0))
    assert num_resampled == 1
    assert particles.points.x.squeeze(-1).tolist() == [0.0, 1.0, 2.0, 2.0]
    log_evidence, error = combine_evidences(particles.group_log_evidences)
    assert log_evidence == pytest.approx(math.log(0.25))
    assert error == pytest.approx(1.0)  # of one group and none


# --- whole runs ----------------------------------------------------------------------------------------

SCHEDULES = {"adaann": AdaAnnSchedule(0.32), "cess": CESSSchedule(0.9), "linear": LinearSchedule(20)}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kernel", ["hmc", "random_walk"])
@pytest.mark.parametrize("path", ["likelihood", "bridge", "joint"])
def test_evidence_and_moments_of_a_conjugate_model(path, kernel, schedule):
    """The evidence within four standard errors, of 15 degrees of freedom: false failures 18 * 0.1 %.

    32 other seeds of the case that was 4.4 standard errors too small with one seed (joint path, a
    random walk, CESS) were off by .7 of their stated errors in the root of the mean square.
    """
    base = None if path == "likelihood" else dist.Normal(0.5, 2.0)
    smc = AnnealedSMC(
        PROBLEM.model, path=path, base=base, kernel=kernel, schedule=SCHEDULES[schedule], seed=5,
        num_particles=2048,
    )  # fmt: skip
    result = smc.run(progress_bar=False)
    assert result.is_done
    assert result.log_evidence_error < 0.15
    assert abs(result.log_evidence - exact_log_evidence()) < FOUR_SIGMAS * result.log_evidence_error
    mean, sd = PROBLEM.tempered("joint", 1.0, (0.0, 1.0))
    assert ((result.mean("z") - mean).abs() < 0.15 * sd).all()
    assert ((result.sd("z") / sd - 1).abs() < 0.12).all()
    assert "log evidence" in repr(result)


@pytest.mark.parametrize("path", ["likelihood", "bridge", "joint"])
def test_the_evidence_is_unbiased_with_temperatures_and_moves_of_a_pilot(path):
    """Mean of 400 small runs within three standard errors of 1: false failures 0.3 % for each.

    Groups never meet and nothing is tuned, so each is a run of its own, of 16 particles.
    """
    kwargs = {"path": path, "base": None if path == "likelihood" else dist.Normal(0.5, 2.0)}
    pilot = AnnealedSMC(PROBLEM.model, num_particles=256, seed=1000, schedule=CESSSchedule(0.5), **kwargs)
    tuning = pilot.run(progress_bar=False).stages
    smc = AnnealedSMC(PROBLEM.model, num_particles=6400, num_groups=400, tuning=tuning, seed=1, **kwargs)
    ratios = (smc.run(progress_bar=False).group_log_evidences - exact_log_evidence()).exp()
    error = float(ratios.std()) / math.sqrt(400)
    assert 0.005 < error < 0.1
    assert abs(float(ratios.mean()) - 1) < 3 * error


@pytest.mark.parametrize("dense_mass", [True, False])
def test_a_pilot_of_other_particles_and_groups_tunes_a_run(dense_mass):
    """The run is right by four stated errors: false failures 0.4 % for each, of 4 degrees of freedom."""
    pilot = AnnealedSMC(PROBLEM.model, num_particles=256, dense_mass=dense_mass, seed=0)
    tuning = pilot.run(progress_bar=False).stages
    smc = AnnealedSMC(PROBLEM.model, num_particles=500, num_groups=5, tuning=tuning, seed=1)
    result = smc.run(progress_bar=False)
    assert [s.inverse_temperature for s in result.stages] == [s.inverse_temperature for s in tuning]
    assert all(len(stage.metric.factor) == 1 for stage in result.stages)
    assert abs(result.log_evidence - exact_log_evidence()) < 4.6 * result.log_evidence_error
    with pytest.raises(ValueError, match="same model, with 1 latent"):
        AnnealedSMC(half_cauchy_scale, tuning=tuning).run(torch.ones(2), progress_bar=False)
    with pytest.raises(ValueError, match="stages of another run; got none"):
        AnnealedSMC(PROBLEM.model, tuning=())


def two_normals(dim: int = 10, separation: float = 8.0) -> tuple:
    """Weights .7 and .3, unit sds, so many sds apart."""
    half = torch.full((dim,), separation / 2 / dim**0.5)

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1).mask(False))
        left, right = (dist.Normal(loc, 1.0).log_prob(z).sum(-1) for loc in (-half, half))
        pyro.factor("density", torch.logaddexp(left + math.log(0.7), right + math.log(0.3)))

    return model, half


def test_two_normals_keep_their_shares():
    """Share .7 within .03: three standard errors of 4096 particles that split early and seldom move over."""
    model, half = two_normals()
    smc = AnnealedSMC(model, path="bridge", base=dist.Normal(0.0, 3.0), num_particles=4096, seed=0)
    result = smc.run(progress_bar=False)
    share = float(result.log_weights.exp()[(result.samples["z"] @ half) < 0].sum())
    assert abs(share - 0.7) < 0.03
    assert abs(result.log_evidence) < FOUR_SIGMAS * result.log_evidence_error


def test_a_funnel():
    """Evidence 1 within four stated errors, although the neck is a hundred times narrower than the mouth."""

    def model():
        v = pyro.sample("v", dist.Normal(0.0, 2.0))
        pyro.sample("x", dist.Normal(torch.zeros(2), (v / 2).exp().unsqueeze(-1)).to_event(1))

    base = dist.Normal(torch.zeros(3), torch.tensor([2.5, 5.0, 5.0])).to_event(1)
    result = AnnealedSMC(model, path="bridge", base=base, seed=4).run(progress_bar=False)
    assert abs(result.log_evidence) < FOUR_SIGMAS * result.log_evidence_error
    assert abs(float(result.mean("v"))) < 0.5
    assert abs(float(result.sd("v")) - 2) < 0.3
    assert max(stage.num_moves for stage in result.stages) > 5  # small steps were needed


def test_a_flat_bimodal_density_by_bridge():
    result = AnnealedSMC(bimodal, path="bridge", base=dist.Normal(0.0, 4.0), seed=0).run(progress_bar=False)
    z = torch.linspace(-6.0, 2.0, 4001).double()
    exact = float((math.log(0.954) - ((z + 2) ** 2 - 3) ** 2).exp().sum() * (z[1] - z[0]))
    assert abs(result.log_evidence - math.log(exact)) < FOUR_SIGMAS * result.log_evidence_error


def test_a_truncated_likelihood_and_a_model_that_breaks():
    """z ~ N(0, 1), x ~ U(0, z) at 0.5: weight zero below 0.5; NaN above 3 counts as broken."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        log_prob = torch.where(z > 0.5, -z.clamp(min=0.5).log(), -torch.inf)
        pyro.factor("uniform", torch.where(z > 2.5, torch.nan, log_prob))

    result = AnnealedSMC(model, num_particles=2048, max_moves=6, seed=0).run(progress_bar=False)
    z = torch.linspace(0.5, 2.5, 20_001).double()
    density = (dist.Normal(0.0, 1.0).log_prob(z) - z.log()).exp()
    exact = float(torch.trapezoid(density, z))
    assert abs(result.log_evidence - math.log(exact)) < FOUR_SIGMAS * result.log_evidence_error
    drawn = result.samples["z"][result.log_weights > -torch.inf]
    assert ((drawn > 0.5) & (drawn < 2.5)).all()
    assert 3 < result.num_broken < 30  # 2048 * 0.6 %, at the start
    assert "broke" in repr(result)


def test_double_precision_is_kept():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones((), dtype=torch.float64))

    result = AnnealedSMC(model, num_particles=64, num_groups=4, seed=0).run(progress_bar=False)
    assert result.samples["z"].dtype == torch.float64


# --- with a guide --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["likelihood", "bridge"])
def test_with_a_guide_the_answer_is_the_same(path):
    guide = AutoPlanar(PROBLEM.model, 2, affine=None, base_loc=0.4, base_scale=0.5).initialize()
    with torch.no_grad():
        guide.transform.u.copy_(torch.tensor([[0.4, 0.1], [0.1, 0.3]]))
    base = "guide" if path == "bridge" else None
    smc = AnnealedSMC(PROBLEM.model, path=path, guide=guide, base=base, num_particles=2048, seed=0)
    result = smc.run(progress_bar=False)
    assert abs(result.log_evidence - exact_log_evidence()) < FOUR_SIGMAS * result.log_evidence_error
    mean, sd = PROBLEM.tempered("joint", 1.0, (0.0, 1.0))
    assert ((result.mean("z") - mean).abs() < 0.15 * sd).all()
    assert result.stages[-1].guide_acceptance is not None
    assert 0.05 < result.stages[-1].guide_acceptance < 1
    assert "guide's proposals" in repr(result)


# --- reproducible, resumable, readable -----------------------------------------------------------------


def test_a_seed_gives_the_same_run_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    runs = [AnnealedSMC(PROBLEM.model, num_particles=128, seed=5).run(progress_bar=False) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(runs[0].unconstrained, runs[1].unconstrained)
    pyro.set_rng_seed(0)
    first = AnnealedSMC(PROBLEM.model, num_particles=128).run(progress_bar=False)
    pyro.set_rng_seed(0)
    assert AnnealedSMC(PROBLEM.model, num_particles=128).run(progress_bar=False).seed == first.seed


@contextmanager
def interrupted_after(num_stages: int) -> Iterator[None]:
    """Send Ctrl-C in the middle of a stage."""
    from pyro_adaann.sampling.sampler import Sampler

    step = Sampler.step

    def counting(self):
        if len(self.stages) == num_stages - 1:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "step", counting)
        yield


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("path", ["likelihood", "bridge"])
def test_after_ctrl_c_a_checkpoint_goes_on_bit_for_bit(path, tmp_path):
    kwargs = {"path": path, "base": dist.Normal(0.0, 2.0) if path == "bridge" else None, "num_particles": 256}
    whole = AnnealedSMC(PROBLEM.model, seed=7, **kwargs).run(progress_bar=False)
    file = tmp_path / "smc"
    with interrupted_after(4), pytest.warns(UserWarning, match="tempered posterior"):
        part = AnnealedSMC(PROBLEM.model, seed=7, **kwargs).run(progress_bar=False, checkpoint=file)
    assert not part.is_done
    assert "tempered posterior" in repr(part)
    resumed = AnnealedSMC(PROBLEM.model, seed=7, **kwargs).run(progress_bar=False, checkpoint=file)
    assert torch.equal(resumed.unconstrained, whole.unconstrained)
    assert torch.equal(resumed.log_weights, whole.log_weights)
    assert resumed.log_evidence == whole.log_evidence
    assert len(resumed.stages) == len(whole.stages)
    for other in ({"num_particles": 512}, {"num_groups": 8}, {"tuning": whole.stages}):
        with pytest.raises(ValueError, match="Expected the checkpoint of a run"):
            AnnealedSMC(PROBLEM.model, **{**kwargs, **other}).run(progress_bar=False, checkpoint=file)


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    file = tmp_path / "smc"
    smc = AnnealedSMC(PROBLEM.model, num_particles=64, num_groups=4, seed=0)
    smc.run(progress_bar=False, checkpoint=file)
    state = read_checkpoint(file)
    del state["format"]  # as it was before metrics had one factor for each group
    write_checkpoint(file, state)
    with pytest.raises(ValueError, match="of format 3; got one of format 1"):
        smc.run(progress_bar=False, checkpoint=file)


def test_groups_that_disagree_say_so():
    """One jump from a wide base to a narrow density in eight dimensions leaves one group with the weight."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(8), 1.0).to_event(1).mask(False))
        pyro.factor("density", dist.Normal(0.0, 0.01).log_prob(z).sum(-1))

    base = dist.Normal(0.0, 1.0)
    smc = AnnealedSMC(model, path="bridge", base=base, schedule=LinearSchedule(1), num_particles=256, seed=0)
    assert "groups disagree" in repr(smc.run(progress_bar=False))


def test_the_result_goes_to_arviz():
    result = AnnealedSMC(PROBLEM.model, num_particles=128, seed=0).run(progress_bar=False)
    data = result.to_arviz(dims={"z": ["side"]})
    assert data["posterior"]["z"].dims == ("chain", "draw", "side")
    assert data["annealing"]["inverse_temperature"].values[-1] == 1
    assert data.attrs["log_evidence"] == result.log_evidence


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_particles": 100, "num_groups": 16}, "multiple of `num_groups`"),
        ({"path": "kl_warmup"}, "path of tempered densities"),
        ({"path": "bridge"}, "Expected `base`"),
        ({"path": "joint"}, "Expected `base`"),
        ({"base": "guide"}, "Pass `guide`"),
        ({"base": "prior"}, "a distribution or"),
        ({"kernel": "nuts"}, "Expected `kernel`"),
        ({"max_correlation": 1.5}, "max_correlation"),
        ({"num_moves": -1}, "num_moves"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_at_once(kwargs, message):
    with pytest.raises(ValueError, match=message):
        AnnealedSMC(PROBLEM.model, **kwargs)


def test_what_only_a_run_can_see_is_refused_there():
    with pytest.raises(ValueError, match="proper prior"):
        AnnealedSMC(bimodal).run(progress_bar=False)
    with pytest.raises(ValueError, match="vectors of length 2"):
        AnnealedSMC(PROBLEM.model, path="bridge", base=dist.Normal(torch.zeros(3), 1.0)).run(
            progress_bar=False
        )

    def broken():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("nan", z * math.nan)

    with pytest.raises(ValueError, match="at least one particle with a finite log density"):
        AnnealedSMC(broken).run(progress_bar=False)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_errors_of_the_evidence_are_those_stated(schedule):
    """Within two stated errors in at least 31 of 40 runs; expected 37 (15 degrees of freedom): 0.5 % fail."""
    exact = exact_log_evidence()
    hits = 0
    for seed in range(40):
        smc = AnnealedSMC(PROBLEM.model, schedule=SCHEDULES[schedule], seed=seed)
        result = smc.run(progress_bar=False)
        hits += abs(result.log_evidence - exact) < 2 * result.log_evidence_error
    assert hits >= 31


def test_the_metric_of_a_group_does_not_see_its_own_points():
    torch.manual_seed(0)
    x = torch.randn(12, 2)
    weights = torch.rand(12)

    def factors(x):
        return Metric.of_others(Points(x, x.new_zeros(12, 0), None), weights, 3, dense=True).factor

    before = factors(x)
    changed = x.clone()
    changed[4:8] *= 3.0  # the second group
    after = factors(changed)
    assert before.shape == (3, 2, 2)
    torch.testing.assert_close(after[1], before[1])
    assert not torch.allclose(after[0], before[0])
    u = torch.randn(12, 2)
    colored = Metric(before).color(u)
    torch.testing.assert_close(colored[5], before[1] @ u[5])
    torch.testing.assert_close(Metric(before).color_transposed(u)[5], before[1].T @ u[5])


def test_a_pooled_metric_is_the_mean_of_those_of_groups():
    torch.manual_seed(0)
    dense = Metric(torch.randn(3, 4, 4).tril())
    expected = (dense.factor @ dense.factor.mT).mean(0)
    (pooled,) = dense.pooled().factor
    torch.testing.assert_close(pooled @ pooled.T, expected)
    assert torch.equal(pooled, pooled.tril())
    diagonal = Metric(torch.rand(3, 4))
    torch.testing.assert_close(
        diagonal.pooled().factor.square(), diagonal.factor.square().mean(0, keepdim=True)
    )


@pytest.mark.parametrize("num", [200, 201])
@pytest.mark.parametrize("num_groups", [1, 2])
def test_moves_by_metrics_of_others_keep_a_normal_density_in_many_dimensions(num_groups, num):
    """The mean square after ten moves, each with a new metric, within 4.5 standard errors: 7e-6 for each.

    With metrics of 201 moved points themselves it is 6.5 standard errors too small in the mean of 16 seeds.
    """
    dim = 50

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1))

    target = TemperedTarget(UnconstrainedModel(model, (), {}), JOINT)
    torch.manual_seed(0)
    points = target.evaluate_with_gradient(torch.randn(num, dim), 1.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        metric = Metric.of_others(points, torch.ones(num), num_groups, dense=True)
        points, accepted = HMC()(target, 1.0, points, metric, 0.4, generator)
    assert float(accepted.mean()) > 0.5
    excess = float(points.x.square().mean()) - 1
    assert abs(excess) < 4.5 * math.sqrt(2 / (num * dim))


def log_evidence_in_many_dimensions(num_groups: int, seed: int) -> float:
    """Of 1,024 particles from N(0, 5^2) to N(0, 1), in 50 dimensions; exactly 0, with an error of .15."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(50), 5.0).to_event(1))
        density = dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(0.0, 5.0).log_prob(z)
        pyro.factor("density", density.sum(-1))

    smc = AnnealedSMC(model, num_particles=1024, num_groups=num_groups, seed=seed)
    return smc.run(progress_bar=False).log_evidence


@pytest.mark.parametrize("num_groups", [1, 16])
def test_the_evidence_is_right_in_many_dimensions(num_groups):
    """Off by more than .8 with probability 1e-7; a metric of the particles themselves adds 1.9."""
    assert abs(log_evidence_in_many_dimensions(num_groups, 0)) < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("num_groups", [1, 2, 16])
def test_the_evidence_is_not_biased_in_many_dimensions(num_groups):
    """The mean of eight runs is off by more than .25 with probability 3e-6."""
    found = [log_evidence_in_many_dimensions(num_groups, seed) for seed in range(8)]
    assert abs(sum(found) / 8) < 0.25
