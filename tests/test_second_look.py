"""Fresh particles as a second opinion on fits of many latents."""

from __future__ import annotations

import dataclasses
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_value

import pyro_adaann.fitting.direct as direct_module
import pyro_adaann.fitting.fit as fit_module
import pyro_adaann.fitting.second_look as second_look
from pyro_adaann import AnnealedSMC, fit
from pyro_adaann.diagnostics.diagnose import statistics
from pyro_adaann.diagnostics.rules import Level
from pyro_adaann.diagnostics.verdict import Diagnosis
from pyro_adaann.fitting.attempts import Plan
from pyro_adaann.fitting.clock import Clock
from pyro_adaann.fitting.coordinates import Coordinates
from pyro_adaann.fitting.necks import search

DIM, APART, SD = 16, 1.0, 0.25


def model():
    """Return modes of weights .9 and .1 at both sides of zero, of evidence 1."""
    z = pyro.sample("z", dist.Normal(torch.zeros(DIM), 1.5).to_event(1))
    plus, minus = (dist.Normal(loc, SD).log_prob(z).sum(-1) for loc in (APART, -APART))
    prior = dist.Normal(0.0, 1.5).log_prob(z).sum(-1)
    pyro.factor("rest", torch.logaddexp(plus + math.log(0.9), minus + math.log(0.1)) - prior)


@pytest.fixture(scope="module")
def particles():
    return AnnealedSMC(model, num_particles=1024, seed=0).run(progress_bar=False)


def guide_of_larger_mode():
    guide = AutoMultivariateNormal(model, init_loc_fn=init_to_value(values={"z": torch.full((DIM,), APART)}))
    guide._init_scale = SD
    guide()
    return guide


def diagnosis_of(log_evidence):
    generator = torch.Generator().manual_seed(0)
    found = statistics(log_evidence + 0.01 * torch.randn(1000, generator=generator, dtype=torch.double))
    return Diagnosis(**found, is_done=True)


def test_a_mode_that_a_guide_lacks_is_seen_with_its_share(particles):
    coordinates, guide = Coordinates(model, (), {}), guide_of_larger_mode()
    lost = second_look.share_lost(coordinates, [guide], math.log(0.9), particles)
    share = float(
        particles.log_weights.softmax(0) @ (particles.samples["z"].mean(1) < 0).to(particles.log_weights)
    )
    assert share > 0.03  # there by some four standard errors of 1,024 particles, whatever their ancestors
    assert lost == pytest.approx(share, abs=0.005)
    assert not second_look.agree(coordinates, guide, diagnosis_of(math.log(0.9)), particles)


def test_what_holds_all_particles_agrees_unless_they_find_more_evidence(particles):
    class Exact:
        @staticmethod
        def get_posterior():
            loc = torch.tensor([APART, -APART]).unsqueeze(1).expand(2, DIM)
            shares = dist.Categorical(torch.tensor([0.9, 0.1]))
            return dist.MixtureSameFamily(shares, dist.Normal(loc, SD).to_event(1))

    coordinates = Coordinates(model, (), {})
    assert second_look.agree(coordinates, Exact, diagnosis_of(0.0), particles)
    # What a guide holds of the posterior is its density times the evidence.
    assert second_look.share_lost(coordinates, [Exact], 0.0, particles) == 0.0
    assert second_look.share_lost(coordinates, [Exact], -10.0, particles) == pytest.approx(1.0)
    # The evidence of particles is known within some .1.
    assert not second_look.agree(coordinates, Exact, diagnosis_of(-2.0), particles)


def test_modes_without_a_flow_need_a_second_look(monkeypatch):
    result = fit(model, seed=0, progress_bar=False)
    assert result.svi is None
    assert result.guides[0].num_modes == 2
    share = result.draws.log_weights.double().softmax(0) @ (result.draws.samples["z"].mean(1) > 0).double()
    assert abs(float(share) - 0.9) < 0.02  # six standard errors
    monkeypatch.setattr(direct_module, "share_lost", lambda *_: 0.5)
    assert fit(model, seed=0, budget=5.0, progress_bar=False).svi is not None


def one_mode_of(particles, sign):
    """Return particles of which those of the other mode have lost their weight."""
    is_kept = sign * particles.samples["z"].mean(1) > 0
    return dataclasses.replace(particles, log_weights=particles.log_weights.masked_fill(~is_kept, -torch.inf))


class Watching:
    """Progress, clock and Ctrl-C of a fit."""

    requested = False

    def phase(self, _):
        """Show nothing."""

    def watch(self, budget=None):
        """Return all three."""
        return self, Clock(budget), self


def test_what_a_second_set_of_particles_finds_is_in_the_next_approximation(monkeypatch, particles):
    # The first set has lost nine tenths of the posterior.
    monkeypatch.setattr(direct_module, "fresh_particles", lambda *_: particles)
    looks = [one_mode_of(particles, -1)]
    found = direct_module.fit_directly(Coordinates(model, (), {}), looks, 4000, 0, Watching().watch())
    assert len(looks) == 3
    assert found.nested.guide.num_modes == 2
    assert second_look.REMARK in found.remarks
    share = found.draws.log_weights.double().softmax(0) @ (found.draws.samples["z"].mean(1) > 0).double()
    assert abs(float(share) - 0.9) < 0.03  # six standard errors
    assert abs(found.diagnosis.log_evidence) < 0.03


def test_particles_that_lack_the_same_are_not_enough_for_all_time(monkeypatch, particles):
    # Every look finds another mode than the approximation before: three are enough.
    monkeypatch.setattr(direct_module, "fresh_particles", lambda *_: particles)
    monkeypatch.setattr(direct_module, "share_lost", lambda *_: 0.5)
    looks = [particles]
    assert direct_module.fit_directly(Coordinates(model, (), {}), looks, 1000, 0, Watching().watch()) is None
    assert len(looks) == 1 + direct_module._MAX_LOOKS


@pytest.mark.parametrize("end", ["interrupt", "budget", "lag"])
def test_a_second_look_that_ends_early_keeps_what_there_is_and_says_so(monkeypatch, particles, end):
    monkeypatch.setattr(direct_module, "fresh_particles", lambda *_: None)
    watching = Watching()
    watching.requested = end == "interrupt"
    watch = watching.watch(1000.0 if end == "budget" else None)
    monkeypatch.setattr(direct_module, "search", lambda c, z, lw, _: search(c, z, lw))
    found = direct_module.fit_directly(Coordinates(model, (), {}), [particles], 1000, 0, watch)
    if end == "lag":  # of no use: flows are
        assert found is None
    else:
        assert second_look.NO_TIME in found.remarks


def test_a_second_look_at_a_flow_that_was_stopped_is_told_and_no_fit_follows(monkeypatch):
    def one_more(attempts, seed, num_fits):
        return Plan(seed, {}, 500, is_check=True) if len(attempts) == 1 else None

    def stopped(coordinates, num_latents, seed, watch):
        watch[2].requested = True

    monkeypatch.setattr(fit_module, "has_pilot", lambda _: True)
    monkeypatch.setattr(fit_module, "fit_directly", lambda *_: None)
    monkeypatch.setattr(fit_module, "find_nested", lambda *_: None)
    monkeypatch.setattr(fit_module, "next_plan", one_more)
    monkeypatch.setattr(fit_module, "fresh_particles", stopped)
    result = fit(normal, seed=0, progress_bar=False)
    assert len(result.fits) == 1
    assert second_look.NO_TIME.sentence in result.verdict
    assert result.level is Level.NOT_FINISHED


def test_what_particles_have_found_is_not_forgotten_when_two_fits_agree(monkeypatch):
    def two(attempts, seed, num_fits):
        return Plan(seed, {}, 500, is_check=True) if len(attempts) == 1 else None

    monkeypatch.setattr(fit_module, "has_pilot", lambda _: True)
    monkeypatch.setattr(fit_module, "fit_directly", lambda *_: None)
    monkeypatch.setattr(fit_module, "find_nested", lambda *_: None)
    monkeypatch.setattr(fit_module, "next_plan", two)
    monkeypatch.setattr(second_look, "share_lost", lambda *_: 0.3)
    result = fit(normal, seed=0, progress_bar=False)
    assert result.level is Level.LOST_PART
    assert "30% of the particles" in result.verdict
    assert second_look.REMARK.sentence not in result.verdict


def normal():
    pyro.sample("z", dist.Normal(torch.tensor([-1.0, 1.0]), 0.5).to_event(1))


@pytest.mark.parametrize("is_confirmed", [True, False])
def test_a_usable_fit_that_fresh_particles_confirm_is_the_only_one(monkeypatch, is_confirmed):
    def one_more(attempts, seed, num_fits):
        return Plan(seed, {}, 500, is_check=True) if len(attempts) == 1 else None

    monkeypatch.setattr(
        fit_module, "has_pilot", lambda _: True
    )  # two latents are as good as many, in less time
    monkeypatch.setattr(fit_module, "fit_directly", lambda *_: None)
    monkeypatch.setattr(fit_module, "find_nested", lambda *_: None)
    monkeypatch.setattr(fit_module, "next_plan", one_more)
    if not is_confirmed:
        monkeypatch.setattr(fit_module, "agree", lambda *_: False)
    result = fit(normal, seed=0, progress_bar=False)
    assert len(result.fits) == (1 if is_confirmed else 2)
    assert (second_look.REMARK.sentence in result.verdict) == is_confirmed
    assert abs(result.log_evidence) < 0.01


def apart():
    """Return modes of weights .7 and .3 in two dimensions."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    plus, minus = (dist.Normal(loc, 0.3).log_prob(z).sum(-1) for loc in (2.0, -2.0))
    prior = dist.Normal(0.0, 3.0).log_prob(z).sum(-1)
    pyro.factor("rest", torch.logaddexp(plus + math.log(0.7), minus + math.log(0.3)) - prior)


@pytest.mark.parametrize("is_confirmed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_approximation_of_several_modes_is_a_witness_only_if_fresh_particles_agree(
    monkeypatch, is_confirmed
):
    # It is made of the draws of the fit, so that both may lack the same mode.
    def one_more(attempts, seed, num_fits):
        return Plan(seed, {}, 500, is_check=True) if len(attempts) == 1 else None

    monkeypatch.setattr(fit_module, "next_plan", one_more)
    if not is_confirmed:
        monkeypatch.setattr(fit_module, "agree", lambda *_: False)
    result = fit(apart, seed=0, progress_bar=False)
    assert "of 2 modes" in result.verdict
    assert len(result.fits) == (1 if is_confirmed else 2)
    plus = result.draws.log_weights.double().softmax(0) @ (result.draws.samples["z"][:, 0] > 0).double()
    assert abs(float(plus) - 0.7) < 0.02
