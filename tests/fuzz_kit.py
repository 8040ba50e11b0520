"""What fuzzing shares: random inputs that can be made again, verdicts counted, and findings that can be kept.

The same random numbers make the same mutant, on every machine.
"""

from __future__ import annotations

import base64
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Final

from asyncsup.errors import AsyncsupError

DOCS: Final = Path(__file__).parent.parent / "docs"
DOCUMENTED: Final = frozenset(
    re.findall(
        r"`((?:zip|manifest|digest|delta|trust|usage)\.[a-z0-9_]+)`",
        "".join((DOCS / name).read_text() for name in ("patch-format.md", "trust.md")),
    )
)
SLOWEST_SECONDS: Final = 5.0
"""CPU time for one input of a few kilobytes; what takes longer would take for ever on a larger one."""


class FindingError(AssertionError):
    """An input that breaks a promise; the message has it."""

    def __init__(self, what: str, data: bytes) -> None:
        super().__init__(f"{what}\n{len(data)} bytes: {base64.b85encode(zlib.compress(data)).decode()}")


@dataclass
class Tally:
    """How many inputs there were, and what became of them."""

    verdicts: Counter[str] = field(default_factory=Counter)
    compared: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0

    def judge(self, judge: Callable[[bytes], str], data: bytes) -> None:
        began = time.process_time()
        try:
            verdict = judge(data)
        except FindingError:
            raise
        except Exception as error:
            raise FindingError(f"{type(error).__name__}: {error}", data) from error
        took = time.process_time() - began
        self.slowest = max(self.slowest, took)
        if took > SLOWEST_SECONDS:
            raise FindingError(f"took {took:.1f} s", data)
        self.verdicts[verdict] += 1

    def __str__(self) -> str:
        total = self.verdicts.total()
        accepted = self.verdicts["accepted"]
        compared = "".join(f", {count} as {tool} reads it" for tool, count in sorted(self.compared.items()))
        reasons = len(self.verdicts) - ("accepted" in self.verdicts)
        return (
            f"{total} mutants: {accepted} accepted{compared}; {total - accepted} refused, "
            f"for {reasons} reasons; slowest {self.slowest * 1000:.0f} ms"
        )


def foreseen(error: AsyncsupError, data: bytes) -> str:
    """The code of an error, which is a documented one with a message for people."""
    if error.error_code not in DOCUMENTED:
        raise FindingError(f"undocumented code {error.error_code}", data)
    if not error.message.isprintable() or len(error.message) > 5000:
        raise FindingError(f"a message for nobody: {error.message[:200]!r}", data)
    return error.error_code


def numbered(seed: str, count: int) -> Iterator[Random]:
    """Random numbers for `count` mutants, each of which can be made again by itself."""
    for index in range(count):
        yield Random(f"{seed}-{index}")
