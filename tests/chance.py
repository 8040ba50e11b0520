"""How much the tests look at, and what they leave to chance.

By default a selection is looked at, the same each time: whoever lands something unrelated must not be the one
to find a rare case. ``ASYNCSUP_TESTS=all`` looks at more, and at other things each time; ``ASYNCSUP_SEED``
chooses what a run chose that had this seed, with either. The seed of a run stands in its summary.
"""

from __future__ import annotations

import os
import secrets
from random import Random
from typing import Final

VARIABLE: Final = "ASYNCSUP_SEED"
EVERYTHING: Final = os.environ.get("ASYNCSUP_TESTS") == "all"
SEED: Final = os.environ.get(VARIABLE) or (secrets.token_hex(4) if EVERYTHING else "asyncsup")
# Of a run on several cores every process chooses by the seed of the first.
os.environ[VARIABLE] = SEED


def dice(name: object) -> Random:
    """Random numbers for something; the same with the same seed, on every machine."""
    return Random(f"{SEED} {name}")
