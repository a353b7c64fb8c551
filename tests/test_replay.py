"""Replayed draws of the steps before: a sample of the tempered density, scored under the present guide."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_adaann import AutoPlanar, AutoRealNVP, AutoSpline, ConstantSchedule, natural_svi
from pyro_adaann.objectives.traces import PARTICLE_PLATE
from pyro_adaann.objectives.weighted import WeightObjective
from pyro_adaann.steps import natural as steps_natural
from pyro_adaann.steps.direction import NaturalDirection, residuals
from pyro_adaann.steps.scores import draw_scores, joined_scores, score_matrix

#: No weight is too small.
ANY = -math.inf
LOCS = torch.tensor([-1.0, 2.0])


def model():
    pyro.sample("z", dist.Normal(LOCS, torch.tensor([0.5, 1.0])).to_event(1))


def make_objective(guide, num_particles=20_000):
    svi = natural_svi(model, guide, num_particles=num_particles, num_final_steps=3)
    objective = svi.optim.make_objective(svi.path, 500)
    assert isinstance(objective, WeightObjective)
    return objective


def draws_of(trace):
    (site,) = (site for name, site in trace.guide_trace.nodes.items() if name.endswith("_latent"))
    return site["value"].detach().reshape(-1, 2)


@pytest.mark.parametrize("kind", [AutoSpline, AutoRealNVP])
def test_replayed_draws_are_a_sample_of_the_tempered_density(kind):
    pyro.set_rng_seed(0)
    guide = kind(model, base_loc=0.0, base_scale=2.0)
    objective = make_objective(guide)
    objective.start_stage(0.3, is_final=False)
    objective.weigh(model, guide, (), {})
    assert objective.replay(guide, 100, ANY, (), {}) is None  # there is no step before
    t = 0.6
    objective.start_stage(t, is_final=False)
    objective.weigh(model, guide, (), {})
    got = draws_of(objective.replay(guide, 40_000, ANY, (), {}))
    # Bridge: log p_t = (1 - t) log base + t log p, a product of normals.
    precision = (1 - t) / 4.0 + t / torch.tensor([0.25, 1.0])
    mean, sd = t * LOCS / torch.tensor([0.25, 1.0]) / precision, precision.rsqrt()
    # The share of effective draws of the 20,000 is above a tenth: standard errors below .025 sd of a mean.
    assert ((got.mean(0) - mean).abs() < 0.12 * sd).all()
    assert ((got.std(0) / sd - 1).abs() < 0.12).all()


def test_a_guide_without_a_closed_inverse_replays_nothing():
    pyro.set_rng_seed(0)
    guide = AutoPlanar(model, 4, base_scale=2.0)
    objective = make_objective(guide, 100)
    objective.start_stage(0.3, is_final=False)
    for _ in range(2):
        objective.weigh(model, guide, (), {})
    assert objective.replay(guide, 100, ANY, (), {}) is None


def test_what_was_kept_is_forgotten_when_the_guide_goes_back():
    pyro.set_rng_seed(0)
    guide = AutoSpline(model, base_scale=2.0)
    objective = make_objective(guide, 100)
    objective.start_stage(0.3, is_final=False)
    for _ in range(2):
        objective.weigh(model, guide, (), {})
    assert objective.replay(guide, 100, ANY, (), {}) is not None
    objective.forget()
    assert objective.replay(guide, 100, ANY, (), {}) is None


def test_joined_scores_are_those_of_all_draws():
    pyro.set_rng_seed(0)
    guide = AutoSpline(model, base_scale=2.0)
    guide()
    parameters = dict(guide.named_parameters())

    def trace_of(num_draws, at=None):
        with pyro.plate(PARTICLE_PLATE, num_draws, dim=-1):
            return poutine.trace(guide if at is None else poutine.replay(guide, trace=at)).get_trace()

    together = trace_of(30)
    parts = []
    for rows in (slice(0, 20), slice(20, 30)):
        part = together.copy()
        for name, site in part.nodes.items():
            part.nodes[name] = {**site, "value": site["value"][rows]} if name.endswith("latent") else site
        num_draws = rows.stop - rows.start
        parts.append(draw_scores(trace_of(num_draws, part), parameters, num_draws))
    joined = joined_scores(*parts)
    torch.manual_seed(0)
    log_weights = torch.randn(30)
    expected = NaturalDirection(draw_scores(together, parameters, 30), log_weights).solve(0.1)[0]
    torch.testing.assert_close(
        NaturalDirection(joined, log_weights).solve(0.1)[0], expected, rtol=1e-3, atol=1e-4
    )
    dense = score_matrix(together, parameters, 30)
    mixed = joined_scores([dense[:20]], [dense[20:]])
    torch.testing.assert_close(mixed[0], dense)


def test_replayed_rows_pull_where_the_guide_has_too_little_density():
    torch.manual_seed(0)
    scores = torch.randn(50, 6, dtype=torch.float64)
    log_weights, replayed = torch.randn(40, dtype=torch.float64), torch.randn(10, dtype=torch.float64)
    got = NaturalDirection(scores, log_weights, replayed=replayed).solve(0.3)[0]
    centered = scores - scores.mean(0)
    fisher = centered.T @ centered / 50
    diagonal = fisher.diagonal() + 0.01 * fisher.diagonal().mean()
    weights = replayed.exp() / log_weights.exp().mean()
    pull = torch.cat([residuals(log_weights), (1 - 1 / weights).clamp(min=0.0)])
    expected = torch.linalg.solve(fisher + 0.3 * torch.diag(diagonal), pull @ centered / 50)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-10)


def test_replayed_rows_do_not_pull_where_guide_and_density_agree():
    torch.manual_seed(0)
    same = torch.full((50,), 3.0, dtype=torch.float64)
    step = NaturalDirection(torch.randn(50, 6).double(), same[:40], replayed=same[40:]).solve(0.3)[0]
    assert step.abs().max() < 1e-9


def test_weights_of_replayed_draws_are_those_of_the_present_guide():
    pyro.set_rng_seed(0)
    guide = AutoSpline(model, base_loc=0.0, base_scale=2.0)
    objective = make_objective(guide, 100)
    objective.start_stage(0.3, is_final=False)
    objective.weigh(model, guide, (), {})
    objective.start_stage(0.6, is_final=False)
    objective.weigh(model, guide, (), {})
    with torch.no_grad():  # the guide that drew them is another one by now
        guide.transform.parts[1].shift.add_(0.3)
    replayed = objective.replay(guide, 50, ANY, (), {})
    z = draws_of(replayed)
    log_p = 0.6 * dist.Normal(LOCS, torch.tensor([0.5, 1.0])).log_prob(z).sum(-1)
    log_p = log_p + 0.4 * dist.Normal(0.0, 2.0).log_prob(z).sum(-1)
    torch.testing.assert_close(
        replayed.log_weights, log_p - guide.get_posterior().log_prob(z), rtol=0, atol=1e-3
    )


def test_what_is_replayed_lacks_density():
    pyro.set_rng_seed(0)
    guide = AutoSpline(model, base_loc=0.0, base_scale=2.0)
    objective = make_objective(guide, 100)
    objective.start_stage(0.6, is_final=False)
    for _ in range(2):
        objective.weigh(model, guide, (), {})
    pyro.set_rng_seed(1)
    everything = objective.replay(guide, 50, ANY, (), {})
    log_mean = everything.log_weights.median().item()
    pyro.set_rng_seed(1)
    lacking = objective.replay(guide, 50, log_mean, (), {})
    expected = everything.log_weights[everything.log_weights > log_mean + math.log(1.5)]
    assert 0 < len(expected) < 25
    torch.testing.assert_close(lacking.log_weights, expected)
    assert len(draws_of(lacking)) == len(expected)
    assert objective.replay(guide, 50, math.inf, (), {}) is None


def two_modes():
    z = pyro.sample("z", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(z**2, 0.5), obs=torch.tensor(4.0))


def test_a_lost_part_is_seen_by_the_replayed_draws_alone():
    """A guide that fits one of two modes exactly: its own draws all weigh the same, and tell nothing."""
    torch.manual_seed(0)
    own, other = 2 + torch.randn(200, dtype=torch.float64), -2 + torch.randn(50, dtype=torch.float64)

    def scores(z):
        return torch.stack(
            [z - 2, ((z - 2).square() - 1) / 2], 1
        )  # of N(2, 1), in location and log precision

    equal = torch.zeros(200, dtype=torch.float64)
    alone = NaturalDirection(scores(own), equal).solve(0.1)[0]
    assert alone.abs().max() < 1e-9
    both = torch.cat([scores(own), scores(other)])
    step = NaturalDirection(both, equal, replayed=torch.full((50,), 9.0)).solve(0.1)[0]
    assert float((scores(other) @ step).mean()) > float((scores(own) @ step).mean())
    assert step[0] < 0  # towards the other mode


def test_a_step_inverts_the_flow_once_for_the_points_it_replays(monkeypatch):
    """The inverse of those that lack density is known from the search for them."""
    pyro.set_rng_seed(0)
    guide = AutoSpline(model, base_loc=0.0, base_scale=2.0)
    svi = natural_svi(model, guide, num_particles=200, schedule=ConstantSchedule(0.3))
    svi.step()
    made, scored = [], []
    kind, draw = type(guide.transform), steps_natural.draw_scores

    def counted(invert):
        def count(self, y):
            made.append(len(y))
            return invert(self, y)

        return count

    for name in ("_backward_map", "_backward_with_log_det"):
        monkeypatch.setattr(kind, name, counted(getattr(kind, name)))

    def look(trace, parameters, num_particles):
        scored.append(num_particles)
        return draw(trace, parameters, num_particles)

    monkeypatch.setattr(steps_natural, "draw_scores", look)
    for _ in range(3):
        made.clear()
        scored.clear()
        svi.step()
        assert len(scored) == 2  # own draws, and some that are replayed
        assert made == [50]  # a quarter of the draws of a step, before some of them are selected


def test_a_fit_resumed_replays_the_same_draws(tmp_path):
    def make():
        return natural_svi(
            two_modes, AutoSpline(two_modes, base_scale=3.0), num_particles=100, num_final_steps=2
        )

    pyro.set_rng_seed(0)
    svi = make()
    for _ in range(6):
        svi.step()
    svi.save_checkpoint(tmp_path / "fit.pt")
    expected = [svi.step() for _ in range(4)]
    pyro.clear_param_store()
    again = make()
    again.load_checkpoint(tmp_path / "fit.pt")
    assert [again.step() for _ in range(4)] == expected
    assert not any(math.isnan(loss) for loss in expected)
