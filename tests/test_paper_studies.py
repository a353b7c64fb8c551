"""The studies of the paper: fits run together are those run alone, a stopped study goes on, the page."""

from __future__ import annotations

import json
import math

import mixture_1d
import mixture_2d
import pyro
import pyro.distributions as dist
import pytest
import report
import study_bimodal
import study_mixtures
import torch
from comparison import compare
from mixture import make_svi
from records import missing_trials, read_records
from together import Planars, RealNVPs, _truncated_weights, fit_together

from pyro_adaann import AdaAnnSchedule, AutoPlanar, TraceMixedKL_ELBO
from pyro_adaann.weights import truncated_weights

MAKERS = {
    "planar, line": (lambda: Planars.make(3, 1, 9, 2.0), 1),
    "planar, plane": (lambda: Planars.make(3, 2, 9, 2.0), 2),
    "realnvp, even": (lambda: RealNVPs.make(3, 2, 4, 5), 2),
    "realnvp, odd": (lambda: RealNVPs.make(3, 3, 3, 5), 3),
}


@pytest.mark.parametrize("name", MAKERS)
def test_flows_together_are_the_flows_alone(name):
    make, dim = MAKERS[name]
    flows = make()
    with torch.no_grad():
        for values in flows.parameters.values():
            values += 0.3 * torch.randn_like(values)
    stacks = flows.write_back()
    x = torch.randn(3, 20, dim)
    y, log_det = flows(x)
    torch.testing.assert_close(flows.push(x), y.detach())
    a, b = torch.randn_like(y), torch.randn_like(log_det)
    ((a * y).sum() + (b * log_det).sum()).backward()
    for i, stack in enumerate(stacks):
        y_alone, log_det_alone = stack.forward_and_log_det(x[i])
        ((a[i] * y_alone).sum() + (b[i] * log_det_alone).sum()).backward()
        torch.testing.assert_close(y[i], y_alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(log_det[i], log_det_alone, rtol=1e-5, atol=1e-5)
        for key, parameter in stack.named_parameters():
            torch.testing.assert_close(flows.parameters[key].grad[i], parameter.grad, rtol=1e-4, atol=1e-4)


def test_score_and_weights_are_those_of_the_package():
    flows = Planars.make(2, 2, 9, 2.0)
    x = torch.randn(2, 20, 2)
    base_score = torch.randn_like(x)
    score = flows.score(x, base_score)
    log_weights = 3 * torch.randn(2, 20)
    weights = _truncated_weights(log_weights)
    for i, stack in enumerate(flows.write_back()):
        torch.testing.assert_close(score[i], stack.score(x[i], base_score[i]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weights[i], truncated_weights(log_weights[i]))


def test_every_trial_has_its_own_inverse_temperatures():
    target = mixture_1d.make_target("symmetric", 2)
    fitted = fit_together(
        Planars.make(4, 1, 5, 4.0),
        target.log_density,
        AdaAnnSchedule(5.0, initial_inverse_temperature=0.1),
        base_scale=4.0,
        learning_rate=0.01,
        num_initial_steps=3,
        num_steps_per_stage=2,
        num_variance_samples=10,
    )
    assert len({tuple(path) for path in fitted.inverse_temperatures}) == 4
    for path, num_steps in zip(fitted.inverse_temperatures, fitted.num_steps, strict=True):
        assert path[0] == 0.1
        assert path[-1] == 1
        assert num_steps == 3 + 2 * (len(path) - 1)


@pytest.mark.parametrize(
    "target", [mixture_1d.make_target("asymmetric", 3), mixture_2d.make_target(0.5), study_bimodal.Bimodal()]
)
def test_density_integrates_to_one(target):
    points, volume = target.grid()
    p = target.log_density(points).exp()
    assert float(p.sum()) * volume == pytest.approx(1, abs=1e-6)
    assert float(p[target.is_first_mode(points)].sum()) * volume == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("target", [mixture_1d.make_target("symmetric", 4), mixture_2d.make_target(0.5)])
def test_comparison_of_the_exact_density_and_of_one_mode(target):
    modes = dist.Normal(torch.tensor(target.means), target.scale).to_event(1)
    exact = compare(dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), modes), target)
    assert exact.is_captured
    assert exact.total_variation < 1e-5
    assert abs(exact.kl) < 1e-5
    assert exact.ess == pytest.approx(1, abs=1e-5)
    assert exact.log_evidence == pytest.approx(0, abs=1e-5)

    lost = compare(dist.Normal(torch.tensor(target.means[0]), target.scale).to_event(1), target)
    assert not lost.is_captured
    assert lost.total_variation == pytest.approx(0.5, abs=1e-4)
    assert lost.log_evidence == pytest.approx(math.log(0.5), abs=1e-4)


def test_stopped_study_goes_on_and_the_page_is_made(tmp_path):
    path = tmp_path / "mixture_2d.jsonl"
    arguments = [
        "mixture_2d",
        "--fast",
        "--file",
        str(path),
        "--methods",
        "none",
        "adaann_svi",
        "--layers",
        "75",
    ]
    study_mixtures.main([*arguments, "--trials", "1"])
    before = path.read_text()
    assert len(read_records(path)) == 4 * 2  # mu by methods
    path.write_text(before[:-30])  # killed while it wrote the last line
    study_mixtures.main([*arguments, "--trials", "2"])
    records = read_records(path)
    assert len(records) == 4 * 2 * 2
    assert path.read_text().startswith(before[:-200])
    cell = {"case": "plane", "mu": 0.5, "method": "none", "num_transforms": 75}
    assert missing_trials(records, cell, 3) == [2]

    # The page leaves tiny trials out.
    path.write_text("".join(json.dumps({**record, "fast": False}) + "\n" for record in records))
    report.main(["--results", str(tmp_path), "--out", str(tmp_path / "docs")])
    page = (tmp_path / "docs" / "paper.md").read_text()
    assert "of 2 |" in page
    assert "$" not in page
    assert (tmp_path / "docs" / "figures" / "paper_mixture_2d.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["paper", "covering"])
@pytest.mark.parametrize("example", ["mixture_1d", "mixture_2d"])
@pytest.mark.parametrize("seed", range(2))
def test_annealed_fit_has_both_modes(seed, example, loss):
    """The driver, seed by seed: both modes are there, and the shares right at the latest when weighted.

    With the paper's loss the shares vary (docs/paper.md: 0.03 to 0.69 in 20 trials of this example in the
    plane), with the mass-covering one they do not.
    """
    module = {"mixture_1d": mixture_1d, "mixture_2d": mixture_2d}[example]
    args = ("asymmetric", 3.0) if example == "mixture_1d" else (0.5,)
    target = module.make_target(*args)
    pyro.set_rng_seed(seed)
    guide = AutoPlanar(target.model, 75, base_loc=0.0, base_scale=module.BASE_SCALE)
    covering = TraceMixedKL_ELBO(study_mixtures.FORWARD_WEIGHT, num_particles=100)
    elbo = covering if loss == "covering" else None
    svi = make_svi(target, guide, module.learning_rate(*args), module.TOLERANCE, loss=elbo)
    svi.run(progress_bar=False)
    found = compare(guide.get_posterior(), target)
    assert abs(found.weighted_first_mode - 0.5) < 0.05
    assert abs(found.first_mode - 0.5) < (0.1 if loss == "covering" else 0.49)
