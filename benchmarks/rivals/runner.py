"""Run one cell in the environment of its system, under a limit of processor time, and measure it."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import numpy as np

from .measures import measure
from .pace import Pace
from .systems import SYSTEMS
from .targets import TARGETS, Target, Truth

__all__ = ["environment", "run_cell"]

HERE = Path(__file__).resolve().parent
#: Of wall time by the limit of processor time: the machine may be busy.
PATIENCE = 8
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "TQDM_DISABLE": "1",
}


def environment(name: str | None, folder: Path) -> Path:
    """Return the Python of an environment; make it from its pinned requirements if there is none."""
    if name is None:
        return Path(sys.executable)
    place = folder / name
    python = place / "bin" / "python"
    if not (place / "complete").exists():
        print(f"making the environment {place}", flush=True)
        venv.create(place, with_pip=True)
        pins = HERE / "requirements" / f"{name}.txt"
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", pins], check=True)
        (place / "complete").touch()
    return python


def run_cell(
    system: str, target: str, seed: int, limit: int, folder: Path, known: dict[str, tuple[Target, Truth]]
) -> dict[str, Any]:
    """Return the record of one cell.

    :param limit: seconds of the processor, imports included, times the pace at the start
        (:class:`~rivals.pace.Pace`).
    :param folder: of the environments.
    :param known: targets with their truths, filled here.
    """
    row: dict[str, Any] = {"target": target, "system": system, "seed": seed}
    python = environment(SYSTEMS[system].environment, folder)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "draws.npz"
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with Pace() as pace:
            command = [str(python), "-m", "rivals.cell", system, target, str(seed), str(path)]
            text, error = _run_child(command, limit, pace.value)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        row |= {"process_seconds": round(used, 2), "pace": round(pace.value, 2)}
        if error:
            return {**row, "cannot": error}
        row |= json.loads(text.splitlines()[-1])
        saved = np.load(path)
        if target not in known:
            made = TARGETS[target]()
            known[target] = (made, made.truth())
        row |= measure(*known[target], saved["draws"], saved["log_weights"])
    exact = known[target][1].log_evidence
    if row["log_evidence"] is not None and exact is not None:
        row["evidence"] = row["log_evidence"] - exact
    return row


def _run_child(command: list[str], limit: int, slowness: float) -> tuple[str, str]:
    """Return what a command prints, and in a few words why it failed, empty if it did not.

    :param slowness: by how much more time it has than the limit says.
    """
    most = math.ceil(limit * slowness)
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]

    def limit_processor() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (most, most + 5))

    with tempfile.TemporaryDirectory() as scratch:
        # PyTensor keeps what it has compiled; here every cell compiles for itself.
        own = {"PYTHONPATH": os.pathsep.join(paths), "PYTENSOR_FLAGS": f"compiledir={scratch}"}
        try:
            done = subprocess.run(
                command,
                env={**os.environ, **ONE_THREAD, **own},
                cwd=scratch,
                capture_output=True,
                text=True,
                preexec_fn=limit_processor,
                timeout=PATIENCE * most,
            )
        except subprocess.TimeoutExpired:
            return "", f"not ended in {PATIENCE * most} s of wall time"
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return "", f"not ended in {limit} s"
    if done.returncode:
        return "", _message(done.stderr)
    return done.stdout, ""


def _message(errors: str) -> str:
    """Return the line of the last exception; some libraries write more lines behind it."""
    lines = errors.strip().splitlines() or ["no message"]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (named or lines)[-1][:200]
