"""One rule for each finding, and what the verdict makes of all of them."""

from __future__ import annotations

import math
from dataclasses import replace
from html.parser import HTMLParser

import problems
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_adaann import (
    AdaAnnSchedule,
    AdaAnnSVI,
    AnnealingStage,
    Diagnosis,
    Ladder,
    LadderReport,
    LinearSchedule,
    LostPart,
    Rung,
    SecondOpinion,
    diagnose,
    find_lost_parts,
    mixture_draws,
    to_arviz,
)
from pyro_adaann.diagnostics.mode_shares import ModeShare
from pyro_adaann.diagnostics.numbers import percent, rounded
from pyro_adaann.diagnostics.reach import Reach
from pyro_adaann.diagnostics.rules import Level, findings
from pyro_adaann.diagnostics.thermodynamic import ThermodynamicEstimate

GOOD = Diagnosis(
    num_samples=10_000,
    num_broken=0,
    k_hat=0.2,
    ess=9_900.0,
    log_evidence=-5.0,
    log_evidence_se=0.001,
    elbo=-5.005,
    elbo_se=0.001,
    is_done=True,
    reach=Reach(0.0001, 0.00001, (), 1.0, -5.0, 0.005, 5000.0, 0.3),
    ladder=LadderReport(num_rungs=5, lost=[], min_ess=0.4),
    thermodynamic=ThermodynamicEstimate(-5.02, 0.05, 0.01),
    num_stages=40,
)
LOST = LadderReport(5, [LostPart(Rung(0.1, {}, {}), 0.1, 0.2, 0.3, 0.02)], 0.4)
SHORT = Reach(0.09, 0.01, ("x",), 1.8, -4.9, 0.01, 3000.0, 0.4)
ABOVE = ThermodynamicEstimate(-4.3, 0.05, 0.01)
MODE = ModeShare("z > 0", guide=0.7, particles=0.5, error=0.02)
AGREES = SecondOpinion(-5.02, 0.05, -5.0, 0.001, (), (), is_reliable=True)
FOUND_MORE = replace(AGREES, log_evidence=-4.7, modes=(MODE,))

CASES = [
    ({}, Level.GOOD),
    ({"is_done": False}, Level.NOT_FINISHED),
    ({"elbo": -5.2}, Level.USABLE_WITH_WEIGHTS),
    ({"elbo": -5.2, "is_done": False}, Level.USABLE_WITH_WEIGHTS),
    ({"num_broken": 2000}, Level.UNRELIABLE),
    ({"k_hat": 0.9, "ess": 5000.0}, Level.UNRELIABLE),
    ({"k_hat": 0.9, "ess": 3.0}, Level.UNRELIABLE),
    ({"reach": SHORT}, Level.OUT_OF_REACH),
    ({"reach": SHORT, "k_hat": 0.9}, Level.UNRELIABLE),
    # What wider draws cannot tell is an alarm, unless they tell that it is a lot.
    ({"reach": replace(GOOD.reach, k_hat=1.4)}, Level.UNRELIABLE),
    ({"reach": replace(GOOD.reach, k_hat=1.4, heaviest=0.003)}, Level.GOOD),
    ({"reach": replace(SHORT, k_hat=1.4)}, Level.OUT_OF_REACH),
    # A small share matters by what it changes.
    ({"reach": replace(SHORT, share=0.015, share_se=0.001, effect=0.08)}, Level.OUT_OF_REACH),
    ({"reach": replace(SHORT, share=0.015, share_se=0.001, effect=0.01)}, Level.GOOD),
    ({"reach": replace(SHORT, share=0.03, share_se=0.001, effect=0.01)}, Level.OUT_OF_REACH),
    ({"thermodynamic": ABOVE}, Level.LOST_PART),
    ({"thermodynamic": ABOVE, "k_hat": 0.9, "ess": 100.0}, Level.UNRELIABLE),
    ({"opinion": AGREES}, Level.GOOD),
    ({"opinion": FOUND_MORE}, Level.LOST_PART),
    ({"opinion": FOUND_MORE, "k_hat": 0.9, "ess": 100.0}, Level.UNRELIABLE),
    ({"opinion": replace(AGREES, modes=(MODE,))}, Level.USABLE_WITH_WEIGHTS),
    ({"opinion": replace(AGREES, log_evidence=-6.0)}, Level.GOOD),  # the particles have found less
    ({"opinion": replace(FOUND_MORE, is_reliable=False)}, Level.GOOD),
    ({"ladder": LOST}, Level.LOST_PART),
    ({"ladder": LOST, "reach": SHORT, "k_hat": 2.0, "thermodynamic": ABOVE}, Level.LOST_PART),
    ({"inverse_temperature": 0.5, "ladder": LOST}, Level.NOT_ANNEALED),
    # Harmless: nearly equal weights, and nothing beyond.
    ({"k_hat": 1.1}, Level.GOOD),
    ({"k_hat": 1.1, "reach": None}, Level.UNRELIABLE),
    ({"k_hat": 1.1, "ladder": None}, Level.GOOD),
    ({"k_hat": 1.1, "thermodynamic": ABOVE}, Level.UNRELIABLE),
    ({"k_hat": 1.1, "reach": replace(GOOD.reach, ess=3.0)}, Level.UNRELIABLE),
    ({"k_hat": 1.1, "reach": replace(GOOD.reach, log_evidence=-4.9)}, Level.UNRELIABLE),
    # Where the guide was behind on the way, weights without a variance are not enough.
    ({"num_untracked": 3, "k_hat": 0.6}, Level.GOOD),
    ({"num_untracked": 12, "k_hat": 0.6, "ess": 5000.0}, Level.UNRELIABLE),
    ({"num_untracked": 12, "k_hat": 0.4}, Level.GOOD),
    ({"is_scaled": True}, Level.GOOD),
    ({"k_hat": -math.inf}, Level.GOOD),
]


@pytest.mark.parametrize(("changes", "level"), CASES)
def test_the_verdict_is_the_worst_of_all_findings(changes, level):
    d = replace(GOOD, **changes)
    assert d.level == level
    assert d.verdict.startswith(f"{level.headline}. ")
    assert d.is_good == (level == Level.GOOD)
    assert d.asks_for_weights == (level == Level.USABLE_WITH_WEIGHTS)
    levels = [finding.level for finding in findings(d)]
    assert levels == sorted(levels, reverse=True)
    if level > Level.USABLE_WITH_WEIGHTS:
        for word in ("weights are reliable", "can be used as they are", "GOOD", "USABLE"):
            assert word not in d.verdict
    # Every number that is above what it should be is explained where it is printed.
    if d.k_hat > d.k_threshold and d.is_annealed:
        assert ("no alarm" in d.verdict) == ("harmless" in str(d)) == d.is_tail_harmless
    assert max(map(len, str(d).splitlines())) <= 90


@pytest.mark.parametrize(
    ("opinion", "words"),
    [
        (AGREES, "AnnealedSMC agrees"),
        (
            FOUND_MORE,
            "lack about 26% of the posterior. The largest difference: z > 0: 70% of the guide's draws",
        ),
        (replace(AGREES, modes=(MODE,)), "differ from those of the guide"),
        (replace(AGREES, log_evidence=-6.0), "AnnealedSMC misses about 63%"),
        (replace(AGREES, is_reliable=False), "no judge yet"),
    ],
)
def test_the_verdict_says_what_particles_say(opinion, words):
    d = replace(GOOD, opinion=opinion)
    assert words in d.verdict
    assert sum("AnnealedSMC" in finding.sentence for finding in findings(d)) == 1
    assert "log evidence, SMC" in str(d)


def test_the_error_of_the_elbo_is_used():
    """A few absurd draws make the mean log weight: 2.35 nats +- 1.72 say nothing of the others."""
    d = replace(GOOD, elbo=GOOD.log_evidence - 2.35, elbo_se=1.72, ess=9300.0)
    assert d.level == Level.USABLE_WITH_WEIGHTS
    assert "2.35 +- 1.7 nats below" in d.verdict
    assert "standard deviations" not in d.verdict
    sure = replace(d, elbo_se=0.02)
    # The mean is off by no more than the spread of the weights allows, sqrt(10000 / 9300 - 1) = 0.27.
    assert "2.35 +- 0.02 nats from the posterior, enough to move a mean by up to 0.27" in sure.verdict


@pytest.mark.parametrize("shift", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("scale", [0.9, 1.0, 1.5])
def test_means_are_off_by_no_more_than_the_verdict_says(shift, scale):
    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    d = diagnose((model, lambda: pyro.sample("z", dist.Normal(shift, scale))), num_samples=20_000)
    # Of the infinite sample: |E_q[z] - E_p[z]| = shift.
    assert shift / scale <= 1.05 * d.largest_shift + 0.02


def test_where_hardly_a_draw_counts_the_base_is_what_to_change():
    def model() -> None:
        pyro.sample("z", dist.Normal(300.0, 1.0))

    d = diagnose((model, lambda: pyro.sample("z", dist.Normal(0.0, 1.0))), num_samples=2000)
    assert d.verdict.startswith("UNRELIABLE")
    assert "base_loc, base_scale" in d.verdict
    assert "learning rate" not in d.verdict


def test_a_scale_that_is_rounded_to_zero_is_a_broken_draw_and_no_error():
    """exp(-120) is zero in single precision, and validation refuses a scale of zero."""

    def model() -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 60.0))
        pyro.sample("x", dist.Normal(0.0, scale), obs=torch.tensor(1.0))

    def guide() -> None:
        pyro.sample("scale", dist.LogNormal(0.0, 60.0))

    d = diagnose((model, guide), num_samples=2000)
    # Above exp(88.7) it is infinite; below exp(-44.7) its square is so small that the density is zero, and
    # below exp(-103.9) it is zero itself. Five standard errors are .05.
    normal = torch.distributions.Normal(0.0, 60.0)
    broken = float(1 - normal.cdf(torch.tensor(88.7)) + normal.cdf(torch.tensor(-44.7)))
    assert d.broken_share == pytest.approx(broken, abs=0.05)

    def negative() -> None:
        z = pyro.sample("scale", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, z), obs=torch.tensor(1.0))

    # A scale below zero has a finite density that means nothing. Five standard errors of 1,000 draws are .08.
    d = diagnose((negative, lambda: pyro.sample("scale", dist.Normal(0.0, 1.0))), num_samples=1000)
    assert d.broken_share == pytest.approx(0.5, abs=0.08)
    assert d.verdict.startswith("UNRELIABLE")
    assert "outside of its constraint" in d.verdict


def test_a_scaled_model_has_a_verdict_about_its_arguments():
    def model(x: torch.Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.scale(scale=10.0), pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoNormal(model, init_scale=0.3)
    svi = AdaAnnSVI(
        model,
        guide,
        pyro.optim.Adam({"lr": 0.02}),
        Trace_ELBO(num_particles=20, vectorize_particles=True),
        schedule=AdaAnnSchedule(1.0),
        num_initial_steps=5,
        num_final_steps=5,
    )
    x = torch.zeros(1)
    svi.run(x, progress_bar=False)
    d = diagnose(svi, x, num_samples=1000)
    assert d.is_scaled
    assert d.thermodynamic is None
    assert "about these arguments" in d.verdict


def test_mini_batches_have_no_second_opinion():
    def model(x: torch.Tensor, size: int | None = None) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x), subsample_size=size) as index:
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    x = torch.linspace(-1.0, 1.0, 20)
    for size in (5, None):
        pyro.clear_param_store()
        svi = AdaAnnSVI(
            model,
            AutoNormal(model),
            pyro.optim.Adam({"lr": 0.02}),
            Trace_ELBO(num_particles=20, vectorize_particles=True),
            schedule=AdaAnnSchedule(1.0),
            num_initial_steps=5,
            num_final_steps=5,
        )
        svi.run(x, size, progress_bar=False)
        d = diagnose(svi, x, num_samples=1000)
        assert (d.thermodynamic is None) == (size is not None)


def small_fit(model, ladder: Ladder | None) -> AdaAnnSVI:
    svi = AdaAnnSVI(
        model,
        AutoNormal(model, init_scale=1.0),
        pyro.optim.Adam({"lr": 0.01}),
        Trace_ELBO(num_particles=10, vectorize_particles=True),
        schedule=LinearSchedule(3, initial_inverse_temperature=0.2),
        num_initial_steps=3,
        num_final_steps=3,
        ladder=ladder,
    )
    svi.run(progress_bar=False)
    return svi


def test_stages_of_an_abandoned_pass_do_not_count():
    svi = small_fit(problems.conjugate_normal(1).model, None)
    before = diagnose(svi, num_samples=200)
    abandoned = [AnnealingStage(t, [1.0], is_tracked=False) for t in (0.1, 0.3, 0.6)]
    svi.history.stages[:0] = abandoned
    after = diagnose(svi, num_samples=200)
    # The first of them was at a lower inverse temperature than any since.
    assert (after.num_untracked, after.num_stages) == (1, before.num_stages + 1)


def test_no_batch_is_larger_than_asked_for():
    sizes: list[int] = []

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        sizes.append(z.numel())

    svi = small_fit(model, Ladder(0.1))
    calls = [
        lambda: diagnose(svi, num_samples=1050, batch_size=100),
        lambda: find_lost_parts(svi, num_samples=700, batch_size=100),
        lambda: mixture_draws(svi, num_samples=1000, batch_size=100),
        lambda: to_arviz(svi, num_samples=1050, batch_size=100),
    ]
    for call in calls:
        sizes.clear()
        call()
        assert max(sizes) == 100


def test_few_draws_are_few_of_every_rung_too():
    rows: list[int] = []

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        rows.append(z.numel())

    svi = small_fit(model, Ladder(0.1))
    diagnose((model, svi.guide), num_samples=200)
    alone = sum(rows)
    rows.clear()
    diagnose(svi, num_samples=200)
    # The ladder's own default would be 5,000 draws of every rung.
    num_looks = len(svi.ladder.rungs) + 1
    assert sum(rows) <= alone + num_looks * 2 * 200 + 1100


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_notebook_shows_the_verdict_first():
    assert repr(GOOD).startswith("Diagnosis: GOOD. ")
    assert "k-hat" in repr(GOOD)
    text = replace(GOOD, reach=replace(SHORT, sites=("a<b",)))._repr_html_()
    assert text.startswith("<p><b>OUT OF REACH.</b>")
    assert "a&lt;b" in text
    tags = _Tags()
    tags.feed(text)
    assert not tags.open


@pytest.mark.parametrize("value", [0.1, 0.999, 0.9999, 0.999999, 1e-8, 1.0])
def test_no_number_below_1_reads_as_1(value):
    assert (float(rounded(value)) == 1) == (value == 1)
    assert (percent(value) == "100%") == (value == 1)
    assert (percent(1 - value) == "0%") == (value == 1)
