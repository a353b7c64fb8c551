"""`fit` with no setting on models with known answers: are moments right, or does the verdict say no?

One line a model, kept in a file, so that a run goes on where it ended::

    python benchmarks/fit_models.py                       # all that the file does not have yet
    python benchmarks/fit_models.py collinear rosenbrock  # these, again
    python benchmarks/fit_models.py --table               # the table of the file, also for docs/fit.md

Errors of means are in exact standard deviations, those of standard deviations relative, each the largest
of all numbers of a model; both of weighted draws, without the sds of which the verdict says that the draws
do not determine them. Seconds are those of the processor, divided by its pace at that time (`rivals/pace.py`)
where it is known.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import fit_targets
import fit_targets_hierarchies
import fit_targets_long
import fit_targets_more
import fit_targets_new
import fit_targets_shapes
import fit_targets_users
import torch
from fit_targets import FitTarget
from rivals.pace import Pace

from pyro_adaann import FitResult, fit
from pyro_adaann.diagnostics.numbers import labels
from pyro_adaann.fitting.moments import measure_moments

#: What counts as right.
MAX_MEAN_ERROR, MAX_SD_ERROR, MAX_SHARE_ERROR = 0.1, 0.1, 0.05
#: From the cheapest to the dearest.
NAMES = {
    fit_targets: """far_normal square_root half_cauchy beta_binomial gamma_poisson dirichlet regression
        collinear ill_scaled line rosenbrock small_funnel student funnel wide_regression""",
    fit_targets_more: """flat frequency decay separation correlation mixture gaussian_process hidden_markov
        two_modes wells eight_schools many_rows""",
    fit_targets_shapes: "outliers ring product",
    fit_targets_new: """zero_inflated survival growth saturation autoregression ordinal three_labels
        sparse_means random_walk""",
    fit_targets_users: """factor_and_deterministic two_explanations eight_schools_decentered offset
        large_numbers sparse_shares families nested_plates horseshoe flat_shares""",
    fit_targets_hierarchies: "pumps counties",
    fit_targets_long: "kinetics network",
}
TARGETS = {name: getattr(module, name) for module, names in NAMES.items() for name in names.split()}


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "fit_models.jsonl"
TABLE = ROOT / "docs" / "figures" / "fit_models.md"


def errors(target: FitTarget, result: FitResult) -> dict[str, float | None]:
    """Return the largest errors of means, sds and shares, and that of the log evidence.

    A standard deviation of which the verdict says that the draws do not determine it is not judged.
    """
    mean_error = sd_error = share_error = 0.0
    moments = measure_moments(result.draws.samples, result.draws.log_weights)
    is_known = dict(zip(moments.names, moments.is_determined.tolist(), strict=True))
    for name, (mean, sd) in target.moments.items():
        off = (result.mean(name) - mean).abs() / sd
        ratio = (result.sd(name) / sd - 1).abs().reshape(-1)
        names = labels(name, result.sd(name).shape)
        ratio = ratio[torch.tensor([is_known.get(label, True) for label in names])]
        mean_error = max(mean_error, float(off[~off.isnan()].max()))
        ratio = ratio[~ratio.isnan()]
        sd_error = max(sd_error, float(ratio.max()) if len(ratio) else 0.0)
    weights = result.draws.log_weights.softmax(0)
    for name, share in target.shares.items():
        seen = float((weights * target.events[name](result.draws.samples)).sum())
        share_error = max(share_error, abs(seen - share))
    known = target.log_evidence
    evidence = None if known is None else result.log_evidence - known
    return {"mean": mean_error, "sd": sd_error, "share": share_error, "evidence": evidence}


def is_right(found: dict[str, Any]) -> bool:
    """Whether moments and shares are close enough."""
    return bool(
        found["mean"] <= MAX_MEAN_ERROR and found["sd"] <= MAX_SD_ERROR and found["share"] <= MAX_SHARE_ERROR
    )


def run(name: str, seed: int) -> dict[str, Any]:
    """Fit one model and return what is found."""
    target = TARGETS[name]()
    with Pace() as pace:
        result = fit(target.model, *target.args, seed=seed, progress_bar=False)
    return {
        "name": name,
        "seed": seed,
        "dim": result.guides[0].latent_dim,
        **errors(target, result),
        "verdict": result.level.headline,
        "ess": result.draws.ess / len(result.draws.log_weights),
        "k_hat": result.draws.k_hat,
        "fits": len(result.fits),
        "seconds": pace.seconds,
        "pace": round(pace.value, 2),
        "text": result.verdict,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table in Markdown."""
    lines = [
        "| model | latents | means, sds off | sds off, % | shares off | log evidence off | verdict | ESS "
        "| fits | CPU s | |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        evidence = "" if row["evidence"] is None else f"{row['evidence']:+.3f}"
        lines.append(
            f"| {row['name'].replace('_', ' ')} | {row['dim']} | {row['mean']:.3f} | {100 * row['sd']:.1f} | "
            f"{row['share']:.3f} | {evidence} | {row['verdict']} | {row['ess']:.2f} | {row['fits']} | "
            f"{row['seconds'] / row.get('pace', 1.0):.0f} | {mark(row)} |"
        )
    return "\n".join(lines)


def mark(row: dict[str, Any]) -> str:
    """Return whether a fit is right, and whether its verdict says so."""
    is_usable = row["verdict"] in ("GOOD", "USABLE WITH WEIGHTS")
    if is_right(row):
        return "right" if is_usable else "right, false alarm"
    return "**quietly wrong**" if is_usable else "wrong, says so"


def main(arguments: list[str] | None = None) -> None:
    """Run the models that are asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="MODEL", help=", ".join(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="run nothing, write the table of the page")
    args = parser.parse_args(arguments)
    unknown = [name for name in args.names if name not in TARGETS]
    if unknown:
        parser.error(f"no model {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    done = {(row["name"], row["seed"]): row for row in rows}
    todo = args.names or [name for name in TARGETS if (name, args.seed) not in done]
    for name in [] if args.table else todo:
        row = done[name, args.seed] = run(name, args.seed)
        print(table([row]).splitlines()[-1], flush=True)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
    text = table([done[name, args.seed] for name in TARGETS if (name, args.seed) in done])
    print(text)
    missing = [name.replace("_", " ") for name in TARGETS if (name, args.seed) not in done]
    if missing:
        text += f"\n\nNot run yet: {', '.join(missing)}."
        print(text.splitlines()[-1])
    if args.table:
        TABLE.write_text(text + "\n")


if __name__ == "__main__":
    main()
