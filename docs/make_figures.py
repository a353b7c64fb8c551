"""Draw the figures of the documentation, and keep what its programs print.

    python docs/make_figures.py                 # all, a few minutes
    python docs/make_figures.py start paths     # these alone

There are two kinds. The named programs of a page are run and leave ``figures/<page>_<name>.txt`` and, if
they have drawn something, ``.png``: the page shows what its own program made. The others are made by the
functions here; two of them run the diffs and make the tables beside them. Seeds are fixed. The figures of
the examples are made by ``make_gallery.py``.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from make_gallery import shrink
from pages import PAGES, ROOT, Block, blocks, run_diff, run_page
from pyro.infer import Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor

from pyro_adaann import (
    AdaAnnSchedule,
    AdaAnnSVI,
    AnnealingSchedule,
    AutoPlanar,
    AutoRealNVP,
    CosineSchedule,
    LinearSchedule,
    diagnose,
)

FIGURES = ROOT / "docs" / "figures"


def save(figure: plt.Figure, name: str) -> None:
    """Write a figure, small."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figure.png"
        figure.savefig(path, dpi=150)
        shrink(path, FIGURES / f"{name}.png")
    plt.close("all")


def page(path: Path) -> None:
    """Run the programs of a page; keep what the named ones print and draw."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    printed = run_page(path)
    for name, text in printed.texts.items():
        if text:
            (FIGURES / f"{path.stem}_{name}.txt").write_text(text)
    for name, figure in printed.figures.items():
        save(figure, f"{path.stem}_{name}")
    plt.close("all")


GRID = torch.linspace(-6, 6, 2401, dtype=torch.float64)


def normalized(log_density: Tensor) -> Tensor:
    """Return a density on the grid."""
    return log_density.softmax(0) / (GRID[1] - GRID[0])


def paths() -> None:
    """One posterior on its way from t = 0.02 to 1, on three paths."""
    log_prior = dist.Normal(1.0, 1.5).log_prob(GRID)
    log_likelihood = dist.Normal(GRID**2, 1.0).log_prob(torch.tensor(4.0, dtype=torch.float64))
    log_base = dist.Normal(0.0, 2.0).log_prob(GRID)
    log_joint = log_prior + log_likelihood
    densities: dict[str, Callable[[float], Tensor]] = {
        "joint": lambda t: t * log_joint,
        "likelihood": lambda t: log_prior + t * log_likelihood,
        "bridge": lambda t: (1 - t) * log_base + t * log_joint,
    }
    figure, panels = plt.subplots(1, 3, figsize=(10, 3), sharey=True, layout="constrained")
    colors = plt.get_cmap("viridis")(torch.linspace(0.9, 0.1, 4).numpy())
    for panel, (name, density) in zip(panels, densities.items(), strict=True):
        for t, color in zip((0.02, 0.1, 0.3, 1.0), colors, strict=True):
            panel.plot(GRID, normalized(density(t)), color=color, label=f"t = {t:g}")
        panel.set(title=name, xlabel="z")
    panels[0].set_ylabel("density")
    panels[0].legend(frameon=False)
    save(figure, "paths")


def schedules() -> None:
    """Inverse temperatures by stage, and the divergence of every step, on the posterior of the first page."""
    log_p = dist.Normal(0.0, 3.0).log_prob(GRID) + dist.Normal(GRID**2, 1.0).log_prob(
        torch.tensor(4.0, dtype=torch.float64)
    )
    generator = torch.Generator().manual_seed(0)
    shown: dict[str, AnnealingSchedule] = {
        "AdaAnn, tolerance 0.1": AdaAnnSchedule(0.1),
        "AdaAnn, tolerance 0.3": AdaAnnSchedule(0.3),
        "linear": LinearSchedule(45),
        "cosine": CosineSchedule(45),
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    for name, schedule in shown.items():
        times, divergences = [schedule.initial_inverse_temperature], []
        while times[-1] < 1:
            p = (times[-1] * log_p).softmax(0)
            draws = log_p[torch.multinomial(p, 10_000, replacement=True, generator=generator)]
            times.append(schedule.next(times[-1], draws))
            divergences.append(float(p @ (p.log() - (times[-1] * log_p).log_softmax(0))))
        left.semilogy(times, label=name)
        right.loglog(times[:-1], divergences, ".-", markersize=3, label=name)
    left.set(xlabel="stage", ylabel="inverse temperature")
    right.set(xlabel="inverse temperature before the step", ylabel="KL divergence of the step")
    left.legend(frameon=False)
    save(figure, "schedules")


def theorem() -> None:
    """The divergence of one step of AdaAnn over tolerance squared half, on the bimodal density."""
    log_p = -(((torch.linspace(-12, 8, 20_001, dtype=torch.float64) + 2) ** 2 - 3) ** 2)
    figure, panel = plt.subplots(figsize=(6, 3.2), layout="constrained")
    times = torch.logspace(-2, math.log10(0.99), 200, dtype=torch.float64)
    for tolerance in (0.01, 0.1, 0.3, 1.0):
        ratios = []
        for t in times:
            p = (t * log_p).softmax(0)
            sd = (p @ log_p**2 - (p @ log_p) ** 2).sqrt()
            divergence = p @ ((t * log_p).log_softmax(0) - ((t + tolerance / sd) * log_p).log_softmax(0))
            ratios.append(divergence / (tolerance**2 / 2))
        panel.semilogx(times, ratios, label=f"tolerance {tolerance:g}")
    panel.axhline(1.0, color="black", linewidth=0.8)
    panel.set(xlabel="inverse temperature", ylabel="divergence / (tolerance$^2$ / 2)", ylim=(0.0, 1.1))
    panel.legend(frameon=False, ncols=2, loc="lower center")
    save(figure, "theorem")


def factors() -> None:
    """Two factors of a known product."""
    z = pyro.sample("z", dist.Normal(0.0, 1.5).expand([2]).to_event(1))
    pyro.sample("x", dist.Normal(z[..., 0] * z[..., 1], 0.4), obs=torch.tensor(1.5))


def guides() -> None:
    """Three guides on one posterior, annealed with the same number of steps."""
    axis = torch.linspace(-4.5, 4.5, 181)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
    log_p = dist.Normal(0.0, 1.5).log_prob(points).sum(-1)
    log_p = log_p + dist.Normal(points.prod(-1), 0.4).log_prob(torch.tensor(1.5))
    found = {"exact": (log_p - log_p.max()).exp()}
    makers = {
        "AutoMultivariateNormal": lambda: AutoMultivariateNormal(factors),
        "AutoPlanar, 64 layers": lambda: AutoPlanar(factors, 64, base_scale=1.5),
        "AutoRealNVP, 6 layers of width 32": lambda: AutoRealNVP(factors, 6, [32, 32], base_scale=1.5),
    }
    for name, make in makers.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = make()
        elbo = Trace_ELBO(num_particles=100, vectorize_particles=True)
        svi = AdaAnnSVI(factors, guide, pyro.optim.Adam({"lr": 0.003}), elbo, num_final_steps=1000)
        svi.run(num_steps=3500, progress_bar=False)
        with torch.no_grad():
            found[name] = guide.get_posterior().log_prob(points.reshape(-1, 2)).exp().reshape(log_p.shape)
    figure, panels = plt.subplots(1, 4, figsize=(12, 3.8), sharey=True, layout="constrained")
    for panel, (name, density) in zip(panels, found.items(), strict=True):
        panel.contourf(axis, axis, density / density.max(), levels=8, cmap="Blues")
        panel.set(title=name, xlabel="$z_1$", aspect="equal")
        panel.title.set_fontsize(10)
    panels[0].set_ylabel("$z_2$")
    save(figure, "guides")


def eight_schools() -> None:
    """The table of eight schools: before and after the diff, and exact by quadrature over mu and tau."""
    before, after = run_diff(SWAP, diffs()["eight_schools"])
    data = before["y"], before["sigma"]
    levels = torch.tensor([0.05, 0.5, 0.95])
    rows = [f"{'tau':38}{'5 %':>7}{'50 %':>7}{'95 %':>7}   log evidence   k-hat"]
    for name, side in {"SVI with AutoNormal": before, "AdaAnnSVI with AutoRealNVP": after}.items():
        draws = Predictive(side["model"], guide=side["guide"], num_samples=10_000, parallel=True)(*data)[
            "tau"
        ]
        quantiles = draws.flatten().quantile(levels).tolist()
        diagnosis = diagnose((side["model"], side["guide"]), *data)
        rows.append(row(name, quantiles, diagnosis.log_evidence) + f"{diagnosis.k_hat:11.2f}")
    log_tau = torch.linspace(-5, 6, 1101, dtype=torch.float64).unsqueeze(-1)
    mu = torch.linspace(-40, 60, 1001, dtype=torch.float64)
    tau = log_tau.exp()
    log_p = dist.Normal(0.0, 10.0).log_prob(mu) + dist.HalfCauchy(25.0 + 0 * tau).log_prob(tau) + log_tau
    for y, sigma in zip(*(values.double() for values in data), strict=True):
        log_p = log_p + dist.Normal(mu, (tau**2 + sigma**2).sqrt()).log_prob(y)
    total = log_p.flatten().logsumexp(0)
    cumulative = (log_p.logsumexp(1) - total).exp().cumsum(0)
    quantiles = [float(tau[(cumulative >= level).nonzero()[0, 0], 0]) for level in levels]
    evidence = float(total) + math.log(float((log_tau[1] - log_tau[0]) * (mu[1] - mu[0])))
    rows.append(row("exact, by quadrature over mu and tau", quantiles, evidence))
    (FIGURES / "eight_schools.txt").write_text("\n".join(rows) + "\n")


def row(name: str, quantiles: list[float], log_evidence: float) -> str:
    """Return one line of the table."""
    return f"{name:38}" + "".join(f"{value:7.1f}" for value in quantiles) + f"{log_evidence:12.1f}"


def flip_flop() -> None:
    """The table of the ODE model: the share of one mode, before and after the diff, and on a grid."""
    before, after = run_diff(SWAP, diffs()["flip_flop"])
    data = before["data"]
    rows = ["share of the draws with ka > ke"]
    for name, side in {"SVI with AutoNormal": before, "AdaAnnSVI with AutoPlanar": after}.items():
        found = Predictive(side["model"], guide=side["guide"], num_samples=10_000, parallel=True)(data)
        rows.append(f"{name:28}{(found['ka'] > found['ke']).float().mean():.3f}")
    axes = [torch.linspace(low, 3, 81) for low in (-3, -3, -2)]
    ka, ke, volume = (a.flatten() for a in torch.meshgrid(*axes, indexing="ij"))
    with torch.no_grad():
        mean = before["concentration"](ka.exp(), ke.exp(), volume.exp())
    # A trajectory that overflows has no density.
    log_p = dist.Normal(mean, 0.3, validate_args=False).log_prob(data).sum(-1)
    log_p = torch.where(torch.isfinite(log_p), log_p, -torch.inf)
    for value in (ka, ke, volume):
        log_p = log_p + dist.Normal(0.0, 0.7).log_prob(value)
    rows.append(f"{'exact, on a grid':28}{log_p.softmax(0)[ka > ke].sum():.3f}")
    (FIGURES / "flip_flop.txt").write_text("\n".join(rows) + "\n")


SWAP = ROOT / "docs" / "swap.md"


def diffs() -> dict[str, Block]:
    """Return the named diffs of the page on swapping."""
    return {block.name: block for block in blocks(SWAP) if block.language == "diff"}


DRAWN: dict[str, Callable[[], None]] = {
    "paths": paths,
    "schedules": schedules,
    "theorem": theorem,
    "guides": guides,
    "eight_schools": eight_schools,
    "flip_flop": flip_flop,
}


def main(arguments: list[str] | None = None) -> None:
    """Draw what is asked for."""
    named = {p.stem: p for p in PAGES if any(b.name and b.language == "python" for b in blocks(p))}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *DRAWN, *named], help="by default all")
    sys.path.insert(0, str(ROOT / "examples"))
    FIGURES.mkdir(exist_ok=True)
    for name in parser.parse_args(arguments).names or [*DRAWN, *named]:
        print(f"{name} ...", flush=True)
        if name in DRAWN:
            DRAWN[name]()
        else:
            page(named[name])


if __name__ == "__main__":
    main()
