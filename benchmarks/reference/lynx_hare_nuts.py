"""A long NUTS run of ``examples/lynx_hare.py``, the reference for the annealed posterior.

The posterior has a second, flat mode (noise sds of 0.65 instead of 0.25, about 40 nats lower) in which a
chain from a random start adapts and then stalls. The chains therefore start at the posterior means
of the Stan case study, with a dense mass matrix.

    python benchmarks/reference/lynx_hare_nuts.py --seed 0 --out chain_0.json

Each chain is one process; ``--merge chain_*.json`` pools them into ``lynx_hare_nuts.json`` with
the posterior means and sds, the bulk effective sample sizes and R-hat by ArviZ.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import arviz as az
import numpy as np
import pyro
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import init_to_value

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from lynx_hare import PELTS, model

HERE = Path(__file__).resolve().parent
START = {
    "alpha": 0.55,
    "beta": 0.028,
    "gamma": 0.80,
    "delta": 0.024,
    "initial": [34.0, 5.9],
    "sigma": [0.25, 0.25],
}


def run_chain(seed: int, num_samples: int, num_warmup: int) -> dict[str, list]:
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(seed)
    start = {name: torch.tensor(value) for name, value in START.items()}
    kernel = NUTS(
        model,
        init_strategy=init_to_value(values=start),
        full_mass=True,
        target_accept_prob=0.9,
    )
    mcmc = MCMC(kernel, num_samples=num_samples, warmup_steps=num_warmup)
    mcmc.run(PELTS.double())
    return {name: value.tolist() for name, value in mcmc.get_samples().items()}


def merge(paths: list[Path]) -> dict[str, dict[str, list]]:
    chains = [json.loads(path.read_text()) for path in paths]
    reference = {}
    for name in chains[0]:
        draws = np.stack([np.asarray(chain[name]) for chain in chains])
        data = az.convert_to_dataset({name: draws})
        flat = draws.reshape(-1, *draws.shape[2:])
        reference[name] = {
            "mean": flat.mean(0).tolist(),
            "sd": flat.std(0, ddof=1).tolist(),
            "ess_bulk": az.ess(data)[name].values.tolist(),
            "r_hat": az.rhat(data)[name].values.tolist(),
        }
    return reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-samples", type=int, default=1500)
    parser.add_argument("--num-warmup", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("chain.json"))
    parser.add_argument("--merge", type=Path, nargs="+", default=None)
    args = parser.parse_args()
    if args.merge:
        (HERE / "lynx_hare_nuts.json").write_text(json.dumps(merge(args.merge), indent=1) + "\n")
    else:
        chain = run_chain(args.seed, args.num_samples, args.num_warmup)
        args.out.write_text(json.dumps(chain))


if __name__ == "__main__":
    main()
