"""What tests tell at the end of a run, in its summary: how many cases there were, and what became of them.

What they print is seen by nobody when they run on several cores; this is handed on with their reports.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Final

import chance
import pytest

Tell = Callable[[str], None]

TOLD: Final = "told"


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Tell:
    return functools.partial(record_property, TOLD)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    told = sorted(_told(terminalreporter), key=itemgetter(0))
    if not told:
        return
    terminalreporter.section("what was looked at")
    choice = "everything" if chance.EVERYTHING else "a selection"
    terminalreporter.line(f"{choice}, with {chance.VARIABLE}={chance.SEED}")
    for test, text in told:
        terminalreporter.line(f"{test}: {text}")


def _told(terminalreporter: pytest.TerminalReporter) -> Iterator[tuple[str, str]]:
    for reports in terminalreporter.stats.values():
        for report in reports:
            # Setting up and clearing away have reports of their own, with the same in them.
            if isinstance(report, pytest.TestReport) and report.when == "call":
                for name, text in report.user_properties:
                    if name == TOLD:
                        yield report.nodeid.rpartition("/")[2], str(text)
