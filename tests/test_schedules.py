"""Laws of every schedule, and AdaAnn's increments in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_adaann import (
    AdaAnnSchedule,
    AnnealingSchedule,
    CESSSchedule,
    ConstantSchedule,
    LinearSchedule,
    SequenceSchedule,
)
from pyro_adaann.weights import standard_deviation


class Stubborn(AnnealingSchedule):
    """A schedule that proposes whatever it is told."""

    def __init__(self, proposal: float) -> None:
        super().__init__(0.1)
        self.proposal = proposal

    def propose(self, inverse_temperature: float, log_factor: object) -> float:
        return self.proposal


NUMBERS = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1.0, 1e300, -1e300, 1e-300]),
)
DRAWS = st.one_of(
    st.lists(NUMBERS, max_size=8),
    st.builds(lambda value, n: [value] * n, NUMBERS, st.integers(0, 8)),
)


@settings(max_examples=400, deadline=None)
@given(st.floats(1e-8, 1, exclude_max=True), DRAWS, st.floats(1e-6, 1e6), st.sampled_from(["f", "d"]))
def test_adaann_rises_and_stays_finite_whatever_it_is_given(t, draws, tolerance, dtype):
    dtype = {"f": torch.float32, "d": torch.float64}[dtype]
    following = AdaAnnSchedule(tolerance).next(t, torch.tensor(draws, dtype=torch.float64).to(dtype))
    assert math.isfinite(following)
    assert t < following <= 1.0


@settings(max_examples=60, deadline=None)
@given(st.lists(DRAWS, min_size=1, max_size=5), st.floats(0.1, 10))
def test_adaann_ends_at_exactly_one_whatever_it_is_given(cycle, tolerance):
    schedule = AdaAnnSchedule(tolerance, initial_inverse_temperature=0.5)
    t = 0.5
    # The smallest increment is tolerance * t / 1000, so log(2) / log(1 + tolerance / 1000) stages do.
    limit = math.ceil(math.log(2) / math.log1p(tolerance / 1000)) + 1
    for stage in range(limit):
        t = schedule.next(t, cycle[stage % len(cycle)])
        if t == 1.0:
            break
    assert t == 1.0
    assert schedule.next(t, cycle[0]) == 1.0


WEIGHTED = [AdaAnnSchedule(0.5, weighted=True), CESSSchedule(0.9)]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(WEIGHTED),
    st.floats(1e-8, 1, exclude_max=True),
    st.lists(st.tuples(NUMBERS, NUMBERS), max_size=8),
)
def test_weighted_schedules_rise_at_most_double_and_stay_finite(schedule, t, pairs):
    factors, weights = zip(*pairs, strict=True) if pairs else ((), ())
    following = schedule.next(t, factors, weights)
    assert t < following <= min(1.0, math.nextafter(2 * t, 1))


@pytest.mark.parametrize("schedule", WEIGHTED)
def test_weighted_schedules_end_at_exactly_one(schedule):
    # Absurd draws: all the weight on one of them, an infinite one, none.
    for draws in ([0.0, 1e30], [math.inf, 0.0], [1.0, math.nan], []):
        t, count = 0.5, 0
        while t < 1 and count < 200_000:
            t, count = schedule.next(t, draws, [0.0] * len(draws)), count + 1
        assert t == 1.0


@pytest.mark.parametrize("t", [0.1, 0.4])
def test_weights_correct_the_draws_of_a_guide_that_is_too_wide(t):
    """Draws of N(0, 2 / t) weighted to p^t = N(0, 1 / t), d = 3: the increments are those of p^t itself."""
    n, d = 400_000, 3
    z = torch.randn(n, d, dtype=torch.float64) * math.sqrt(2 / t)
    log_p = -0.5 * (z**2).sum(-1)
    log_weight = t * log_p - t / 2 * log_p
    # The effective number of draws is a third of n; the rest as for the unweighted draws above.
    bound = 5 * math.sqrt((2 + 12 / d) / (4 * n / 3))
    sd = math.sqrt(d / 2) / t
    increment = AdaAnnSchedule(0.01, weighted=True).next(t, log_p, log_weight) - t
    assert increment == pytest.approx(0.01 / sd, rel=bound)
    assert AdaAnnSchedule(0.01).next(t, log_p, log_weight) - t == pytest.approx(0.01 / (2 * sd), rel=bound)
    # CESS(e) = Z(t + e)^2 / (Z(t) Z(t + 2 e)) with Z(t) ~ t^(-d / 2), of a normal density.
    increment = CESSSchedule(0.9).next(t, log_p, log_weight) - t
    cess = ((t + increment) ** 2 / (t * (t + 2 * increment))) ** (-d / 2)
    assert cess == pytest.approx(0.9, abs=0.005)
    assert CESSSchedule(0.9).next(t, log_p) - t < 0.9 * increment


def test_cess_wants_a_share():
    with pytest.raises(ValueError, match="target"):
        CESSSchedule(1.0)


@pytest.mark.parametrize("bad", [[], [1.0], [3.0] * 50, [math.nan] * 9, [math.inf, -math.inf, 2.0]])
@pytest.mark.parametrize("t", [0.001, 0.3, 0.85])
def test_adaann_never_jumps_on_draws_that_say_nothing(t, bad):
    assert AdaAnnSchedule(tolerance=1.0).next(t, bad) <= 1.1 * t + 1e-12


def test_adaann_leaves_out_draws_that_are_not_finite():
    good = torch.randn(500, dtype=torch.float64)
    bad = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64)
    schedule = AdaAnnSchedule(0.01)
    assert schedule.next(0.2, torch.cat([good, bad])) == schedule.next(0.2, good)


@pytest.mark.parametrize("dim", [1, 3, 20])
@pytest.mark.parametrize("t", [0.01, 0.3, 0.7])
def test_adaann_increment_of_a_standard_normal(dim, t):
    # log p has variance d / (2 t^2) under p^t = N(0, I / t). A sample sd of n normal-theory draws has
    # a relative error of sqrt((kurtosis - 1) / 4n) = sqrt((2 + 12 / d) / 4n) <= 0.42 % here, and 5 of
    # those leave a false-failure rate below 1e-6.
    n = 200_000
    z = torch.randn(n, dim, dtype=torch.float64) / math.sqrt(t)
    log_p = -0.5 * (z**2).sum(-1)
    increment = AdaAnnSchedule(tolerance=0.01).next(t, log_p) - t
    bound = 5 * math.sqrt((2 + 12 / dim) / (4 * n))
    assert increment == pytest.approx(0.01 * t * math.sqrt(2 / dim), rel=bound)


def test_adaann_uses_the_sample_sd_with_n_minus_one():
    assert AdaAnnSchedule(0.03).next(0.1, [0.0, 2.0]) == pytest.approx(0.1 + 0.03 / math.sqrt(2))


def test_standard_deviation_survives_squares_that_overflow():
    assert standard_deviation(torch.tensor([1e200, -1e200, 0.0], dtype=torch.float64)) == pytest.approx(1e200)


def test_linear_schedule_has_the_papers_temperatures():
    schedule = LinearSchedule(9900, initial_inverse_temperature=0.01)
    t, visited = 0.01, []
    while t < 1:
        t = schedule.next(t)
        visited.append(t)
    assert len(visited) == 9900
    assert visited[-1] == 1.0
    expected = [0.01 + j * 0.99 / 9900 for j in range(1, 9901)]
    assert visited == pytest.approx(expected, abs=1e-12)


def test_sequence_schedule_visits_its_values_and_joins_from_between():
    schedule = SequenceSchedule([0.1, 0.4, 1.0])
    assert [schedule.next(0.1), schedule.next(0.4), schedule.next(1.0)] == [0.4, 1.0, 1.0]
    assert schedule.next(0.2) == 0.4


def test_constant_schedule_stays():
    assert ConstantSchedule().next(1.0) == 1.0
    assert ConstantSchedule(0.3).next(0.3) == 0.3


@pytest.mark.parametrize("proposal", [math.nan, -1.0, 0.1, math.inf, 7.0, -math.inf])
def test_base_class_guards_any_proposal(proposal):
    following = Stubborn(proposal).next(0.1)
    assert 0.1 < following <= 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaAnnSchedule(0.0), "Expected `tolerance` > 0; got 0.0"),
        (lambda: AdaAnnSchedule(-1.0), "Expected `tolerance` > 0; got -1.0"),
        (lambda: AdaAnnSchedule(math.nan), "Expected `tolerance` > 0; got nan"),
        (lambda: AdaAnnSchedule(initial_inverse_temperature=0.0), "in \\(0, 1\\]; got 0.0"),
        (lambda: AdaAnnSchedule(initial_inverse_temperature=1.5), "in \\(0, 1\\]; got 1.5"),
        (lambda: LinearSchedule(0), "Expected `num_increments` to be an integer >= 1; got 0"),
        (lambda: SequenceSchedule([]), "got none"),
        (lambda: SequenceSchedule([0.5, 0.2, 1.0]), "strictly increasing"),
        (lambda: SequenceSchedule([0.1, 0.5]), "Append 1.0"),
        (lambda: ConstantSchedule(0.0), "in \\(0, 1\\]"),
        (lambda: AdaAnnSchedule().next(0.5), "Expected draws of the log factor"),
        (lambda: AdaAnnSchedule().next(0.0, [1.0, 2.0]), "in \\(0, 1\\]; got 0.0"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_one_absurd_draw_does_not_set_the_increment():
    draws = -0.5 * torch.randn(999, 3, dtype=torch.float64).pow(2).sum(-1)
    absurd = torch.tensor([-1e20], dtype=torch.float64)
    schedule = AdaAnnSchedule(0.1)
    plain = schedule.next(0.1, draws) - 0.1
    # 50 median distances are 27 sds here; one draw in a thousand that far has half of the variance.
    assert plain > schedule.next(0.1, torch.cat([draws, absurd])) - 0.1 > 0.5 * plain


@pytest.mark.parametrize("dim", [1, 2, 10])
def test_outlier_rule_leaves_normal_posteriors_alone(dim):
    log_p = -0.5 * torch.randn(1_000_000, dim, dtype=torch.float64).pow(2).sum(-1)
    assert standard_deviation(log_p) == pytest.approx(log_p.std().item(), rel=5e-4)


def test_draws_that_are_mostly_equal_keep_their_spread():
    assert standard_deviation(torch.tensor([0.0, 0.0, 0.0, 4.0])) == pytest.approx(2.0)
