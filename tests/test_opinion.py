"""Guide and particles compared: evidence, marginals, shares of modes, and what the verdict makes of it."""

from __future__ import annotations

import math
from functools import cache

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import conjugate_normal
from pyro.infer.autoguide import AutoDiagonalNormal
from torch import Tensor

from pyro_adaann import AnnealedSMC, AutoPlanar, SMCResult, diagnose, second_opinion
from pyro_adaann.diagnostics.mode_shares import find_modes
from pyro_adaann.diagnostics.rules import Level

PROBLEM = conjugate_normal(2)
HALF = 8.0


def two_modes() -> None:
    """Weights .7 and .3, at -8 and 8 in the first of two coordinates."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(False))
    center = torch.tensor([HALF, 0.0])
    left, right = (dist.Normal(side * center, 1.0).log_prob(z).sum(-1) for side in (-1.0, 1.0))
    pyro.factor("density", torch.logaddexp(left + math.log(0.7), right + math.log(0.3)))


@cache
def particles(name: str) -> SMCResult:
    if name == "conjugate":
        return AnnealedSMC(PROBLEM.model, num_particles=2048, seed=0).run(progress_bar=False)
    base = dist.Normal(0.0, 8.0)
    smc = AnnealedSMC(two_modes, path="bridge", base=base, num_particles=2048, seed=0)
    return smc.run(progress_bar=False)


def normal_guide(model, loc, sd) -> AutoDiagonalNormal:
    pyro.clear_param_store()
    guide = AutoDiagonalNormal(model)
    guide()
    guide.loc.data.copy_(torch.as_tensor(loc))
    guide.scale = torch.ones(2) * sd
    return guide


def exact_guide(shift: float = 0.0, scale: float = 1.0) -> AutoDiagonalNormal:
    mean, sd = PROBLEM.tempered("joint", 1.0, (0.0, 1.0))
    return normal_guide(PROBLEM.model, mean + shift * sd, scale * sd)


# --- modes ---------------------------------------------------------------------------------------------

UNIMODAL = {
    "normal": lambda: torch.randn(1024, 4),
    "heavy tails": lambda: dist.StudentT(2.0).sample((1024, 4)),
    "uniform": lambda: torch.rand(1024, 4),
    "funnel": lambda: torch.randn(1024, 1).exp() * torch.randn(1024, 4),
    "skewed": lambda: torch.randn(1024, 4).exp(),
}


@pytest.mark.parametrize("name", UNIMODAL)
def test_a_single_mode_is_one_region(name):
    """In at least 47 of 50 samples: of 200 of each kind six uniform ones were split, and no other."""
    single = 0
    for seed in range(50):
        torch.manual_seed(seed)
        a, b = UNIMODAL[name](), UNIMODAL[name]()
        single += len(find_modes(list("abcd"), a, b, torch.zeros(1024), 16)) == 1
    assert single >= 47


def mixture(shares: Tensor, num: int) -> Tensor:
    """Normal modes 8 sds apart, at the corners of a square."""
    corners = 4.0 * torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    return corners[torch.multinomial(shares, num, replacement=True)] + torch.randn(num, 2)


def test_shares_of_four_modes_and_their_errors():
    """Weights .4 .3 .2 .1; each share within 4.5 of its errors, from 32 groups: false failures 4 * 1e-4."""
    torch.manual_seed(0)
    shares = torch.tensor([0.4, 0.3, 0.2, 0.1])
    wrong = torch.tensor([0.4, 0.3, 0.3, 0.0])
    modes = find_modes(["x", "y"], mixture(wrong, 5000), mixture(shares, 3200), torch.zeros(3200), 32)
    assert len(modes) == 4
    assert sum(mode.particles for mode in modes) == pytest.approx(1)
    for mode in modes:
        low_x, low_y = "x < " in mode.where, "y < " in mode.where
        index = 2 * (not low_x) + (not low_y)
        share = float(shares[index])
        assert mode.error == pytest.approx(math.sqrt(share * (1 - share) / 3200), rel=0.6)
        assert abs(mode.particles - share) < 4.5 * mode.error
        assert mode.matters == (index >= 2)


def test_a_mode_that_only_the_guide_has_is_found_and_weights_count():
    torch.manual_seed(0)
    guide = mixture(torch.tensor([0.5, 0.0, 0.0, 0.5]), 2000)
    both = mixture(torch.tensor([0.5, 0.0, 0.0, 0.5]), 2000)
    log_weights = torch.where(both[:, 0] < 0, 0.0, -torch.inf)
    modes = find_modes(["x", "y"], guide, both, log_weights, 1)
    assert sorted(round(mode.particles, 6) for mode in modes) == [0.0, 1.0]
    assert all(abs(mode.guide - 0.5) < 0.06 for mode in modes)  # five sds


# --- opinions ------------------------------------------------------------------------------------------


def test_an_exact_guide_and_particles_agree():
    """By their thresholds of four errors; with this seed they do, whatever the machine."""
    torch.manual_seed(0)
    opinion = second_opinion((PROBLEM.model, exact_guide()), particles("conjugate"))
    assert opinion.is_reliable
    assert opinion.agrees, opinion
    assert "agree" in str(opinion)
    assert opinion.lost_share is None


@pytest.mark.parametrize(("kwargs", "words"), [({"shift": 0.4}, "mean +0.3"), ({"scale": 0.7}, "sd x 0.7")])
def test_a_wrong_moment_is_named(kwargs, words):
    torch.manual_seed(0)
    opinion = second_opinion((PROBLEM.model, exact_guide(**kwargs)), particles("conjugate"))
    assert not opinion.agrees
    assert opinion.remarks[0].startswith("z[")
    assert words in str(opinion)  # within a tenth


def test_a_mode_that_the_guide_lacks_is_named_with_its_share():
    torch.manual_seed(0)
    guide = normal_guide(two_modes, [-HALF, 0.0], 1.0)
    opinion = second_opinion((two_modes, guide), particles("two modes"))
    assert abs(opinion.lost_share - 0.3) < 0.12  # four errors of the log evidence, .04
    assert opinion.remarks[0].startswith("z[0] > ")
    assert "0% of the guide's draws" in opinion.remarks[0]
    assert "miss about" in str(opinion)


def test_a_mode_that_the_particles_lack_is_named_too():
    """Particles of the left mode alone, against a guide that has both."""
    pyro.clear_param_store()
    guide = AutoPlanar(two_modes, 2, affine=None, base_loc=0.0, base_scale=1.0).initialize()
    with torch.no_grad():
        guide.transform.w.copy_(torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
        guide.transform.u.copy_(torch.tensor([[7.5, 0.0], [0.0, 0.0]]))
        guide.transform.b.zero_()
    base = dist.Normal(torch.tensor([-HALF, 0.0]), 1.5).to_event(1)
    left = AnnealedSMC(two_modes, path="bridge", base=base, num_particles=1024, seed=0)
    opinion = second_opinion((two_modes, guide), left.run(progress_bar=False))
    assert abs(opinion.unseen_share - 0.3) < 0.12
    assert "The particles miss" in str(opinion)
    assert any(mode.particles < 0.03 and mode.guide > 0.4 for mode in opinion.modes)


def test_particles_that_are_no_judge_say_so():
    base = dist.Normal(0.0, 3.0)
    smc = AnnealedSMC(PROBLEM.model, path="bridge", base=base, num_particles=64, num_groups=1, seed=0)
    opinion = second_opinion((PROBLEM.model, exact_guide()), smc.run(progress_bar=False))
    assert not opinion.is_reliable  # one group does not say how certain it is
    assert "no judge" in str(opinion)
    with pytest.raises(ValueError, match="particles of the same model"):
        second_opinion((two_modes, normal_guide(two_modes, [0.0, 0.0], 1.0)), _without_sites(smc))


def _without_sites(smc: AnnealedSMC) -> SMCResult:
    from dataclasses import replace

    return replace(smc.run(progress_bar=False), samples={})


# --- the verdict ---------------------------------------------------------------------------------------


def test_the_verdict_has_the_judgment_of_particles():
    torch.manual_seed(0)
    good = diagnose((PROBLEM.model, exact_guide()), smc=particles("conjugate"))
    assert good.is_good
    assert "AnnealedSMC agrees" in good.verdict
    assert "log evidence, SMC" in str(good)
    guide = normal_guide(two_modes, [-HALF, 0.0], 1.0)
    seeing = diagnose((two_modes, guide), smc=particles("two modes"))
    assert seeing.level == Level.LOST_PART
    assert "lack about" in seeing.verdict
    assert "z[0] > " in seeing.verdict
    assert "AnnealedSMC" not in diagnose((two_modes, guide)).verdict
