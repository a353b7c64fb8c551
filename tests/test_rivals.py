"""The targets of ``benchmarks/rivals`` against mathematics, its measures, its runner and its report."""

from __future__ import annotations

import base64
import importlib.util
import json
import math
import re
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from rivals import __main__ as rivals_main
from rivals import report
from rivals.measures import measure, score
from rivals.namespaces import NAMESPACES
from rivals.results import read
from rivals.runner import run_cell
from rivals.systems import OURS, SYSTEMS
from rivals.systems.pyro_model import PyroModel
from rivals.targets import QUICK, TARGETS
from rivals.targets.bayesian import BROWNIAN, EFFECTS, ERRORS, SEEN
from rivals.targets.importance import REFERENCE
from scipy.sparse import csr_array
from scipy.special import expit, logsumexp
from scipy.stats import multivariate_normal, norm

from pyro_adaann import AdaAnnSVI, AutoPlanar, natural_svi

ROOT = Path(__file__).resolve().parents[1]
XP = NAMESPACES["numpy"]()


@pytest.fixture(scope="module")
def known():
    """Targets with their truths, made once."""
    made = {name: make() for name, make in TARGETS.items()}
    return {name: (target, target.truth()) for name, target in made.items()}


def log_density(target, z):
    with np.errstate(all="ignore"):
        return np.asarray(target.log_density(XP, np.asarray(z, dtype=float)))


@pytest.mark.parametrize("library", ["torch", "jax", "pytensor"])
@pytest.mark.parametrize("name", TARGETS)
def test_a_formula_is_the_same_in_every_library(known, name, library):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    target, truth = known[name]
    z = target.prior_draws(0, 50) if truth.draw is None else truth.draw(np.random.default_rng(0), 50)
    xp = NAMESPACES[library]()
    if library == "torch":
        torch.set_default_dtype(torch.float64)
        try:
            values = target.log_density(xp, torch.tensor(z)).numpy()
            one = float(target.log_density(xp, torch.tensor(z[0])))
        finally:
            torch.set_default_dtype(torch.float32)
        tolerance = 1e-9
    elif library == "jax":
        import jax

        values = np.asarray(jax.vmap(lambda point: target.log_density(xp, point))(z))
        one, tolerance = float(target.log_density(xp, jax.numpy.asarray(z[0]))), 2e-3  # single precision
    else:
        import pytensor.tensor as pt

        values = target.log_density(xp, pt.constant(z)).eval()
        one, tolerance = float(target.log_density(xp, pt.constant(z[0])).eval()), 1e-9
    np.testing.assert_allclose(values, log_density(target, z), rtol=tolerance, atol=10 * tolerance)
    np.testing.assert_allclose(one, values[0], rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("name", ["funnel, 10-D", "eight schools, centered", "HIV"])
def test_the_pyro_model_has_the_density_and_counts(known, name):
    target, truth = known[name]
    model = PyroModel(target)
    z = torch.tensor(truth.draw(np.random.default_rng(0), 6), dtype=torch.float32)

    def many():
        with pyro.plate("particles", 6):
            model()

    trace = pyro.poutine.trace(pyro.poutine.condition(many, {"z": z})).get_trace()
    found = sum(site["log_prob"] for site in _scored(trace))
    np.testing.assert_allclose(found.numpy(), log_density(target, z.numpy()), rtol=1e-3, atol=1e-3)
    pyro.poutine.trace(pyro.poutine.condition(model, {"z": z[0].requires_grad_()})).get_trace()
    assert (model.num_densities, model.num_gradients) == (6, 1)
    free = pyro.poutine.trace(many).get_trace().nodes["z"]["value"]
    assert free.shape == z.shape
    assert free.std() > 0


def test_the_drivers_of_this_package_take_the_pyro_model(known):
    model = PyroModel(known["two moons"][0])
    guide = AutoPlanar(model, 2, base_loc="prior", base_scale="prior")
    loss = Trace_ELBO(num_particles=8, vectorize_particles=True)
    svi = AdaAnnSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss, num_final_steps=1)
    svi.step()
    assert model.num_gradients >= 8
    svi = natural_svi(model, num_particles=20)
    svi.step()
    assert len(svi.history.stages) == 1


def _scored(trace):
    trace.compute_log_prob()
    return [site for site in trace.nodes.values() if "log_prob" in site]


@pytest.mark.parametrize("name", TARGETS)
def test_the_prior_has_the_density_of_its_draws(known, name):
    """Change of variables: log p(f(u)) + log |det f'(u)| = log N(u), with f' by central differences."""
    target, _ = known[name]
    h = 1e-5
    for u in np.random.default_rng(1).standard_normal((3, target.dim)):
        steps = h * np.eye(target.dim)
        jacobian = (target.from_normal(u + steps) - target.from_normal(u - steps)) / (2 * h)
        _, log_det = np.linalg.slogdet(jacobian)
        z = target.from_normal(u[None])
        found = float(np.asarray(target.log_prior(XP, z))[0]) + log_det
        assert found == pytest.approx(norm.logpdf(u).sum(), abs=1e-4)


@pytest.mark.parametrize("name", TARGETS)
def test_moments_and_shares_are_those_of_exact_draws(known, name):
    """Within five standard errors, with a fixed seed; among 600 numbers one is off in 3,000 seeds."""
    _, truth = known[name]
    if truth.draw is None:
        assert np.isfinite(truth.mean).all()  # moments of others, in tests of their own
        assert (truth.sd > 0).all()
        return
    n = 20_000
    z = truth.draw(np.random.default_rng(2), n)
    judged = ~np.isnan(truth.mean)
    off = np.abs(z.mean(0) - truth.mean)[judged] / truth.sd[judged] * math.sqrt(n)
    assert (off < 5).all()
    kurtosis = (((z - truth.mean) / truth.sd) ** 4).mean(0)[judged]
    spread = np.abs(z.std(0) / truth.sd - 1)[judged] * 2 * math.sqrt(n) / np.sqrt(kurtosis - 1)
    assert (spread < 5).all()
    if truth.shares is not None:
        error = np.abs(truth.regions(z).mean(0) - truth.shares)
        assert (error < 5 * np.sqrt(truth.shares * (1 - truth.shares) / n)).all()


def on_grid(target, *axes):
    """Return the log integral over a grid, by the midpoint rule."""
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))
    cell = sum(math.log(axis[1] - axis[0]) for axis in axes)
    return float(logsumexp(log_density(target, points))) + cell


@pytest.mark.parametrize(
    ("name", "bound", "size", "tolerance"),
    [("forty modes, 2-D", 50, 200, 1e-3), ("two moons", 1.8, 1200, 5e-3)],
)
def test_evidence_in_two_dimensions_is_that_of_a_grid(known, name, bound, size, tolerance):
    target, truth = known[name]
    axis = np.linspace(-bound, bound, size)
    assert on_grid(target, axis, axis) == pytest.approx(truth.log_evidence, abs=tolerance)


def test_evidence_of_eight_schools_is_that_of_effects_integrated_out(known):
    mu, log_tau = np.linspace(-40, 40, 401)[:, None, None], np.linspace(-12, 7, 800)[None, :, None]
    tau = np.exp(log_tau)
    log_p = norm.logpdf(EFFECTS, mu, np.sqrt(tau**2 + ERRORS**2)).sum(-1) + norm.logpdf(mu[..., 0], 0, 5)
    log_p = log_p + (np.log(2 / (5 * np.pi * (1 + (tau / 5) ** 2))) + log_tau)[..., 0]
    cell = math.log(80 / 400) + math.log(19 / 799)
    assert known["eight schools, centered"][1].log_evidence == pytest.approx(
        logsumexp(log_p) + cell, abs=1e-4
    )


def test_evidence_of_the_brownian_motion_is_that_of_its_marginal(known):
    """The observations are normal with covariance s^2 min(t, t') + r^2."""
    times = SEEN + 1.0
    paths = np.minimum(times[:, None], times)
    low, high = np.linspace(-7, 1.5, 40), np.linspace(-5, 1.5, 40)
    values = [
        multivariate_normal.logpdf(BROWNIAN, cov=math.exp(2 * a) * paths + math.exp(2 * b) * np.eye(20))
        + norm.logpdf([a, b], 0, 2).sum()
        for a in low
        for b in high
    ]
    cell = math.log(low[1] - low[0]) + math.log(high[1] - high[0])
    assert known["Brownian gap, 32-D"][1].log_evidence == pytest.approx(logsumexp(values) + cell, abs=5e-3)


def test_evidence_of_the_paper_s_models_is_that_of_the_examples(known):
    """Two importance samplings, of this formula and of the examples' programs; errors of .0025 and .0006."""
    reference = ROOT / "benchmarks" / "reference"
    modes = json.loads((reference / "hiv.json").read_text())["posteriors"].values()
    hiv = logsumexp([mode["log_evidence"] for mode in modes])
    assert known["HIV"][1].log_evidence == pytest.approx(hiv, abs=0.01)
    lorenz = json.loads((reference / "lorenz.json").read_text())["posteriors"]["0.2"]
    truth = known["Lorenz"][1]
    assert truth.log_evidence == pytest.approx(lorenz["log_evidence"], abs=0.01)
    np.testing.assert_allclose(truth.mean, lorenz["mean"], atol=0.03 * max(lorenz["sd"]))


def test_truth_of_the_lynx_is_that_of_long_chains(known):
    chains = json.loads((ROOT / "benchmarks" / "reference" / "lynx_hare_nuts.json").read_text())
    z = known["lynx and hare"][1].draw(np.random.default_rng(0), 20_000)
    for i, name in enumerate(("alpha", "beta", "gamma", "delta")):
        assert np.exp(z[:, i]).mean() == pytest.approx(chains[name]["mean"], abs=0.05 * chains[name]["sd"])


def test_truth_of_lotka_volterra_is_that_of_sbibm(known):
    """10,000 reference draws that sbibm 1.1.0 ships: means within four standard errors, sds within 5 %."""
    truth = known["Lotka-Volterra"][1]
    sds = np.array([0.0128, 0.0589, 0.0184, 0.0177])
    off = (truth.mean - np.array([-0.3806, -2.2588, -0.1094, -2.1387])) / sds
    assert np.abs(off).max() < 0.04
    np.testing.assert_allclose(truth.sd, sds, rtol=0.05)


def test_quantities_of_the_volatility_model_follow_its_recursion(known):
    """Paths by a matrix of powers in place of a loop, and the likelihood from them."""
    target, truth = known["stochastic volatility, 103-D"]
    z = target.prior_draws(5, 20)
    z[:, 0], z[:, 2] = np.linspace(-1, 4, 20), np.linspace(-3, 0.5, 20)
    found = truth.quantities(z)
    assert found.shape == (20, 103) == (20, len(truth.mean))
    returns = np.array(json.loads((REFERENCE / "stochastic_volatility.json").read_text())["returns"])
    assert (len(returns), returns.mean()) == (100, pytest.approx(0.0, abs=1e-3))
    for row, point in zip(found, z, strict=True):
        persistence = np.tanh(point[0] / 2)
        powers = np.tril(persistence ** np.abs(np.subtract.outer(np.arange(100), np.arange(100))))
        shocks = np.exp(point[2]) * point[3:]
        shocks[0] /= math.sqrt(1 - persistence**2)
        expected = [persistence, point[1], math.exp(point[2]), *(point[1] + powers @ shocks)]
        np.testing.assert_allclose(row, expected, rtol=1e-9)
        likelihood = norm.logpdf(returns, 0, np.exp(row[3:] / 2)).sum()
        assert float(target.log_likelihood(XP, point)) == pytest.approx(likelihood, rel=1e-9)
    measured = measure(target, truth, z, np.zeros(20))
    assert measured["wasserstein"] is None
    assert score(measured) > 1


@pytest.fixture(scope="module")
def answers():
    """Whether 400 students have answered 100 questions, and answered them right; one bit a pair."""
    stored = json.loads((REFERENCE / "item_response.json").read_text())
    bits = [f"{byte:08b}" for name in ("answered", "correct") for byte in base64.b64decode(stored[name])]
    return np.array(list("".join(bits))).reshape(2, 400, 100) == "1"


def test_density_of_item_response_is_that_of_a_loop_over_answers(known, answers):
    target, _ = known["item response, 501-D"]
    answered, correct = answers
    assert answered.sum() == 30_012
    assert not (correct & ~answered).any()
    # The wheel tells how the pairs were drawn, question by question.
    np.testing.assert_array_equal(answered.T, np.random.RandomState(1).binomial(1, 0.75, (100, 400)) == 1)
    z = target.prior_draws(5, 3)
    z[2] *= 5
    found = log_density(target, z)
    for value, (mean, *rest) in zip(found, z.tolist(), strict=True):
        expected = norm.logpdf(mean, 0.75, 1) + norm.logpdf(rest).sum()
        for student, question in np.argwhere(answered).tolist():
            logit = mean + rest[student] - rest[400 + question]
            expected -= math.log1p(math.exp(-logit if correct[student, question] else logit))
        assert value == pytest.approx(expected, rel=1e-10)


def test_truth_of_item_response_is_that_of_an_expansion_at_the_mode(known, answers):
    """Stan's means to a fiftieth of an sd, its sds to 3 %.

    The mean of a density exp(-f) is, to second order, the mode less C t / 2, with C the inverse of f'' and t
    the third derivatives of f contracted with C. The mode alone is off by up to .22 sd.
    """
    target, truth = known["item response, 501-D"]
    answered, correct = answers
    student, question = np.nonzero(answered)
    columns = np.stack([np.zeros_like(student), 1 + student, 401 + question], axis=1)
    signs = np.tile([1.0, 1.0, -1.0], len(student))
    design = csr_array((signs, columns.ravel(), 3 * np.arange(len(student) + 1)), (len(student), 501))
    center = np.r_[0.75, np.zeros(500)]
    mode = center
    for _ in range(8):
        share = expit(design @ mode)
        gradient = design.T @ (correct[answered] - share) - (mode - center)
        weights = share * (1 - share)
        covariance = np.linalg.inv(np.eye(501) + design.T @ design.multiply(weights[:, None]))
        mode = mode + covariance @ gradient
    assert np.abs(gradient).max() < 1e-8
    spread = design.multiply(design @ covariance).sum(1)
    third = design.T @ (weights * (1 - 2 * share) * spread)
    off = (mode - covariance @ third / 2 - truth.mean) / truth.sd
    assert np.abs(off).max() < 0.02
    np.testing.assert_allclose(np.sqrt(np.diag(covariance)), truth.sd, rtol=0.03)
    draws = np.random.default_rng(6).multivariate_normal(truth.mean, covariance, 4000)
    measured = measure(target, truth, draws, np.zeros(4000))
    assert measured["wasserstein"] is None
    assert score(measured) < 1


def test_measures_of_exact_shifted_and_weighted_draws(known):
    """The means of 20,000 exact draws are off by more than .05 sd once in 10^11."""
    target, truth = known["two modes, 50-D"]
    exact = truth.draw(np.random.default_rng(3), 20_000)
    equal = np.zeros(len(exact))
    right = measure(target, truth, exact, equal)
    assert right["mean"] < 0.05
    assert right["share"] < 0.02
    assert right["wasserstein"] < 1.5
    assert score(right) < 1
    shifted = measure(target, truth, exact + 0.5 * truth.sd, equal)
    assert shifted["mean"] == pytest.approx(0.5, abs=0.05)
    assert shifted["wasserstein"] > 3
    one_mode = exact[truth.regions(exact)[:, 0]]
    lost = measure(target, truth, one_mode, np.zeros(len(one_mode)))
    assert lost["share"] == pytest.approx(0.3, abs=1e-3)
    assert score({**lost, "evidence": 0.01}) > 5
    # One mode has half of the draws it should have, and weights that mend it.
    kept = truth.regions(exact)[:, 1] | (np.arange(len(exact)) % 2 == 0)
    log_weights = np.where(truth.regions(exact)[:, 1], 0.0, math.log(2))[kept]
    assert measure(target, truth, exact[kept], log_weights)["share"] < 0.02
    assert score(measure(target, truth, np.full((5, 50), np.nan), np.zeros(5))) is None


def row(system, mean, seconds, told=""):
    numbers = {"evidence": None, "mean": mean, "sd": 0.0, "share": None, "wasserstein": 1.0}
    return {"target": "HIV", "system": system, "seed": 1, "seconds": seconds, "told": told, **numbers}


def test_who_is_best_and_what_became_of_a_cell():
    cells = report.cells_of(
        [row("fit", 0.05, 9.0), row("natural_svi", 0.02, 20.0), row("dynesty", 0.04, 30.0)]
    )
    assert report.beaten("HIV", cells) == (["dynesty"], [])  # `fit` is right and ours at its fastest
    cells = report.cells_of([row("fit", 0.05, 9.0), row("dynesty", 0.06, 5.0), row("pocoMC", 0.3, 1.0)])
    assert report.beaten("HIV", cells) == ([], ["dynesty"])
    assert report.beaten("HIV", report.cells_of([row("fit", 0.05, 9.0), row("pocoMC", 0.3, 1.0)])) == ([], [])
    assert report.outcome([row("fit", 0.05, 9.0)]) == "right"
    assert report.outcome([row("fit", 0.05, 9.0), row("fit", 0.5, 9.0, "k-hat")]) == "told"
    assert report.outcome([row("fit", 0.5, 9.0), row("fit", 0.6, 9.0, "k-hat")]) == "quiet"
    assert report.outcome([{"target": "HIV", "system": "fit", "cannot": "not ended"}]) == "none"
    off = {**row("fit", 0.05, 9.0), "evidence": 0.15}
    assert report.outcome([{**off, "log_evidence_error": 0.08}]) == "told"
    assert report.outcome([{**off, "log_evidence_error": 0.07}]) == "quiet"
    assert report.outcome([{**off, "log_evidence_error": 0.08, "mean": 0.2}]) == "quiet"


def test_one_percent_is_the_work_times_the_square_of_the_error():
    def row(system: str, error: float) -> dict[str, object]:
        cell = {"target": "HIV", "system": system, "evidence": error, "seconds": 5.0}
        return {**cell, "num_densities": 200_000, "num_gradients": 300_000}

    rows = [row("AnnealedSMC", e) for e in (0.02, -0.02, 0.02)] + [row("pocoMC", 0.01)] * 3
    line = report.one_percent(report.cells_of(rows)).splitlines()[-1]
    assert line == "| HIV | 20 s, 2.0 million (3 seeds) |  |  | 5 s, 0.5 million (3 seeds) |"
    late = {"target": "HIV", "system": "PyMC SMC", "cannot": "not ended"}
    line = report.one_percent(report.cells_of([*rows, late, {**late, "system": "pocoMC"}])).splitlines()[-1]
    assert line == "| HIV | 20 s, 2.0 million (3 seeds) |  | not ended | 5 s, 0.5 million (3 seeds) |"
    assert "HIV" not in report.one_percent(report.cells_of([*rows, row("AnnealedSMC", 0.6)]))
    assert "HIV" not in report.one_percent(report.cells_of(rows[1:]))


def test_the_report_of_the_stored_cells():
    cells = report.cells_of(read())
    assert cells
    reasons = json.loads(report.REASONS.read_text())
    text = report.tables(cells, reasons, dict.fromkeys(TARGETS, ""))  # a missing reason is a KeyError
    for target, system in cells:
        assert f"### {target}" in text
        assert re.search(rf"^\| \**{re.escape(system)}\** \|", text, re.MULTILINE)
    assert (report.FIGURES / "summary.md").read_text() == report.summary(cells)
    assert (report.FIGURES / "one_percent.md").read_text() == report.one_percent(cells)
    page = (report.FIGURES / "tables.md").read_text()
    for line in text.splitlines():
        assert line in page, "python -m benchmarks.rivals.report"


def test_every_system_is_pinned_and_every_stored_cell_known():
    for system in SYSTEMS.values():
        module = system.function.partition(":")[0]
        assert (ROOT / "benchmarks" / "rivals" / "systems" / f"{module}.py").exists()
        if system.environment:
            pins = ROOT / "benchmarks" / "rivals" / "requirements" / f"{system.environment}.txt"
            assert all(re.fullmatch(r"[\w.\-]+==[\w.+]+", line) for line in pins.read_text().splitlines())
    assert set(QUICK) <= set(TARGETS)
    assert set(OURS) <= set(SYSTEMS)
    rows = read()
    assert len({(r["target"], r["system"], r["seed"]) for r in rows}) == len(rows)
    assert all(r["target"] in TARGETS and r["system"] in SYSTEMS for r in rows)


def test_a_cell_that_the_file_has_is_not_run_again(tmp_path, monkeypatch):
    asked = []

    def fake(system, target, seed, limit, folder, known):
        asked.append((system, seed))
        return {"target": target, "system": system, "seed": seed, "process_seconds": 70.0, "pace": 1.0}

    monkeypatch.setattr(rivals_main, "run_cell", fake)
    monkeypatch.setattr(rivals_main, "_brief", lambda row: "")
    out = tmp_path / "cells.jsonl"
    arguments = ["--targets", "HIV", "--systems", "fit", "dynesty", "--out", str(out), "--seeds"]
    rivals_main.main([*arguments, "1"])
    rivals_main.main([*arguments, "2"])
    assert asked == [("fit", 0), ("dynesty", 0), ("fit", 1), ("dynesty", 1)]
    assert len(read(out)) == 4
    # Two minutes are enough for all but `fit`.
    rivals_main.main([*arguments, "3"])
    assert asked[4:] == [("fit", 2)]


def test_what_cannot_be_run_is_not_tried_again(tmp_path, monkeypatch):
    asked = []

    def fake(system, target, seed, limit, folder, known):
        asked.append(seed)
        return {"target": target, "system": system, "seed": seed, "process_seconds": 1.0, "cannot": "a test"}

    monkeypatch.setattr(rivals_main, "run_cell", fake)
    monkeypatch.setattr(rivals_main, "_brief", lambda row: "")
    rivals_main.main(["--targets", "HIV", "--systems", "dynesty", "--out", str(tmp_path / "cells.jsonl")])
    assert asked == [0]


def test_a_system_out_of_time_and_one_that_is_not_there_are_told(tmp_path, known, monkeypatch):
    out_of_time = run_cell("fit", "two moons", 0, 1, tmp_path, known)  # importing takes longer
    assert out_of_time["cannot"] == "not ended in 1 s"
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setattr("rivals.runner.environment", lambda name, folder: failing)
    missing = run_cell("dynesty", "two moons", 0, 1, tmp_path, known)
    assert missing["cannot"]
    assert "wasserstein" not in missing
