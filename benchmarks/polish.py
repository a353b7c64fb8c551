"""Chains of `polish` on two funnels, in the coordinates of a spline fitted by natural steps.

Prints R-hat, effective numbers of draws, what they cost, and a number of the posterior that is known. Run it
with::

    OMP_NUM_THREADS=1 python benchmarks/polish.py
"""

from __future__ import annotations

import argparse
import itertools
import time
from typing import Any

import arviz
import pyro
from smc_problems import eight_schools, eight_schools_exactly, funnel

from pyro_adaann import AutoSpline, natural_svi, polish

#: Draws of a step. A guide of fewer loses the neck in one fit of five, and chains do not find it again.
NUM_PARTICLES = 2000


def fitted(name: str, seed: int, num_particles: int) -> Any:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    if name == "funnel":
        svi = natural_svi(funnel, AutoSpline(funnel, base_scale=3.0), num_particles=num_particles)
    else:
        svi = natural_svi(eight_schools, num_particles=num_particles)
    svi.run(progress_bar=False)
    return svi


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="+", default=["funnel", "eight schools"])
    parser.add_argument("--num-samples", type=int, default=500)
    parser.add_argument("--num-particles", type=int, default=NUM_PARTICLES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args(argv)
    for name, seed in itertools.product(args.targets, args.seeds):
        start = time.process_time()
        svi = fitted(name, seed, args.num_particles)
        fit_seconds = time.process_time() - start
        chains = polish(svi, num_samples=args.num_samples, seed=seed, progress_bar=False)
        seconds = time.process_time() - start - fit_seconds
        data = chains.to_arviz()
        bulk, tail = (float(arviz.ess(data, method=kind).to_array().min()) for kind in ("bulk", "tail"))
        if name == "funnel":
            known = f"P(v < -6) {float((chains.samples['v'] < -6).float().mean()):.4f}, exactly 0.0228"
        else:
            exact = eight_schools_exactly()[1]
            known = f"mean log tau {float(chains.samples['tau'].log().mean()):.3f}, exactly {exact:.3f}"
        cost = f"{seconds:.0f} CPU seconds and {fit_seconds:.0f} of the fit"
        print(
            f"{name}, seed {seed}: R-hat {chains.max_r_hat:.4f}, ESS {bulk:.0f} and in tails {tail:.0f}, "
            f"{cost}, {chains.num_evaluations:,} evaluations, {known}",
            flush=True,
        )


if __name__ == "__main__":
    main()
