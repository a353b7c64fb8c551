"""A one-parameter logistic model of item response: Inference Gym's 400 students and 100 questions.

Answers and moments are those of `SyntheticItemResponseTheory` in the wheel `inference_gym` 0.0.5: 30,012
answers that were simulated from the model, with a quarter of the pairs left out at random, and means and
standard deviations of 50,000 draws of Stan. These are of the coordinates themselves.
"""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import numpy as np

from ..namespaces import Namespace
from .base import Array, Target, Truth, normal_prior
from .importance import REFERENCE

__all__ = ["item_response"]

NUM_STUDENTS, NUM_QUESTIONS = 400, 100


def _table(text: str) -> Array:
    """Return the bits of a base64 text as numbers, a row for every student."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), dtype=np.uint8))
    return bits.reshape(NUM_STUDENTS, NUM_QUESTIONS).astype(np.float64)


def item_response() -> Target:
    """Mean ability, what 400 students have above it, difficulties of 100 questions; logits are their sums."""
    stored = json.loads((REFERENCE / "item_response.json").read_text())
    answered, correct = _table(stored["answered"]), _table(stored["correct"])
    # 1 for a right answer, -1 for a wrong one, 0 for none: then the term is log 2 whatever the point.
    signs = answered * (2 * correct - 1)
    without = math.log(2) * float((1 - answered).sum())
    dim = 1 + NUM_STUDENTS + NUM_QUESTIONS
    log_prior, from_normal = normal_prior(dim, [0.75] + [0.0] * (dim - 1), 1.0)

    def log_likelihood(xp: Namespace, z: Any) -> Any:
        ability = z[..., 0][..., None] + z[..., 1 : 1 + NUM_STUDENTS]
        logits = ability[..., None] - z[..., None, 1 + NUM_STUDENTS :]
        return without - xp.sum(xp.sum(xp.softplus(-xp.array(signs) * logits)))

    def truth() -> Truth:
        return Truth(None, None, np.array(stored["mean"]), np.array(stored["sd"]), "50,000 draws of Stan")

    source = "Inference Gym, SyntheticItemResponseTheory"
    return Target(dim, log_prior, log_likelihood, from_normal, truth, source)
