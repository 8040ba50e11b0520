"""The supervisor's own log, on its standard error: what anybody says stays within its line.

Programs, clients, packages and file names have their words in it. None of them may end a line and begin one
that looks like ours, or play with the terminal that shows it.
"""

from __future__ import annotations

import logging
import sys

from asyncsup.printable import printable

FORMAT = "%(asctime)s %(levelname)-7s %(message)s"


class OneLineFormatter(logging.Formatter):
    """A message is one line; a traceback's lines are set in, so that none of them looks like a message."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return printable(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        line, *traceback = super().format(record).split("\n")
        return "\n  ".join((line, *map(printable, traceback)))


def begin(level: str) -> None:
    """Args:
    level: name of the lowest one that is shown.
    """
    # What no line of ours says nobody has to find out for each of them.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLineFormatter(FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler])
