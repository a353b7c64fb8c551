"""Sequential Monte Carlo on posteriors whose evidence is known: errors beside those it states, and its cost.

Three schedules at about equal numbers of evaluations: AdaAnn's rule with its default tolerance, CESS at 0.9,
and as many equal increments as AdaAnn has made. Every run is a line of a file, and is not made again. A
number is right within its limit (`Check`) or two stated errors, the worst of many within three. Run it with::

    OMP_NUM_THREADS=1 python benchmarks/smc.py --seeds 20 --schedules AdaAnn
    OMP_NUM_THREADS=1 python benchmarks/smc.py --seeds 5
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from smc_problems import Check, Problem, problems

from pyro_adaann import AdaAnnSchedule, AnnealedSMC, CESSSchedule, LinearSchedule

RESULTS = Path(__file__).resolve().parent / "results" / "smc.jsonl"
SCHEDULES = ["AdaAnn", "CESS", "linear"]


def run(problem: Problem, schedule: Any, seed: int, num_particles: int) -> dict[str, Any]:
    path = "likelihood" if problem.base is None else "bridge"
    smc = AnnealedSMC(
        problem.model, path=path, base=problem.base, schedule=schedule, num_particles=num_particles, seed=seed
    )
    start = time.process_time()
    result = smc.run(*problem.args, progress_bar=False, **problem.kwargs)
    off, off_stated = problem.check.of(result)
    return {
        "error": result.log_evidence - problem.log_evidence,
        "stated": result.log_evidence_error,
        "ess": result.ess,
        "num_stages": len(result.stages),
        "num_unforgotten": result.num_unforgotten,
        "drift": result.drift,
        "num_evaluations": result.num_evaluations,
        "cpu_seconds": time.process_time() - start,
        "off": off,
        "off_stated": off_stated,
        "told": [caution.split(":")[0] for caution in result.cautions],
    }


def mean(records: list[dict[str, Any]], key: str) -> float:
    return sum(record[key] for record in records) / len(records)


def row(name: str, schedule: str, check: Check, records: list[dict[str, Any]]) -> str:
    """Return a line of the table: errors, stated errors, and how often what is off was told."""
    num = len(records)
    rms = math.sqrt(sum(record["error"] ** 2 for record in records) / num)
    spread = math.sqrt(sum(record["off"] ** 2 for record in records) / num)
    hits = sum(abs(record["error"]) <= 2 * record["stated"] for record in records)
    is_off = [abs(r["off"]) > max(check.limit, check.num_errors * r["off_stated"]) for r in records]
    told = sum(bool(record["told"]) for record in records)
    quiet = sum(off and not record["told"] for off, record in zip(is_off, records, strict=True))
    return (
        f"| {name} | {schedule} | {mean(records, 'error'):+.3f} | {rms:.3f} | "
        f"{mean(records, 'stated'):.3f} | {hits}/{num} | {check.label} ± {spread:.3f} | "
        f"{mean(records, 'off_stated'):.3f} | {num - sum(is_off)}/{num} | {told}/{num} | {quiet} | "
        f"{mean(records, 'num_evaluations') / 1e3:,.0f} | {mean(records, 'cpu_seconds'):.1f} |"
    )


def main(argv: list[str] | None = None) -> None:
    known = problems()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--problems", nargs="+", choices=list(known), default=list(known))
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=SCHEDULES)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--num-particles", type=int, default=1024)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    print(
        "| problem | schedule | mean error | rms error | stated | within 2 | a number, ± rms error | stated ",
        "| right | told | off, not told | evaluations / 1000 | CPU seconds |\n" + "|---" * 13 + "|",
        sep="",
    )
    lines = args.results.read_text().splitlines() if args.results.exists() else []
    found: list[dict[str, Any]] = [json.loads(line) for line in lines]
    for name in args.problems:
        num_stages = 2
        for schedule in args.schedules:
            kinds = {"AdaAnn": AdaAnnSchedule(0.32), "CESS": CESSSchedule(0.9)}
            linear = LinearSchedule(num_stages - 1, initial_inverse_temperature=1 / num_stages)
            for seed in range(args.seeds):
                key = {
                    "problem": name, "schedule": schedule, "seed": seed, "num_particles": args.num_particles
                }  # fmt: skip
                if any(key.items() <= record.items() for record in found):
                    continue
                found.append(key | run(known[name], kinds.get(schedule, linear), seed, args.num_particles))
                with args.results.open("a") as file:
                    file.write(json.dumps(found[-1]) + "\n")
            key = {"problem": name, "schedule": schedule, "num_particles": args.num_particles}
            records = [record for record in found if key.items() <= record.items()]
            if schedule == "AdaAnn":
                num_stages = round(mean(records, "num_stages"))
            print(row(name, schedule, known[name].check, records), flush=True)


if __name__ == "__main__":
    main()
