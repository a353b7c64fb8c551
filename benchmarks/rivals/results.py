"""The result file: one line of JSON a cell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "read"]

RESULTS = Path(__file__).resolve().parents[1] / "results" / "rivals.jsonl"


def read(path: Path = RESULTS) -> list[dict[str, Any]]:
    """Return the cells of a result file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
