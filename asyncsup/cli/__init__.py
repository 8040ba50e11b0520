"""The command line: arguments in; text and an exit status out. A supervisor is reached only by client.py.

`carrying_out.py` turns errors into an exit status; `verbs.py` is the table of all verbs; `command_line.py`
finds the one that was asked for and reads its arguments. What a verb does is in the module of its area, and
only that one is imported: `asyncsup status` runs in shell prompts and health checks. All of them share
`arguments.py`, `session.py` and, where they read the configuration themselves, `settings.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out a command line and return its exit status."""
    try:
        # Loading it takes long enough for a Ctrl-C, which is no reason for a traceback.
        from asyncsup.cli.carrying_out import carry_out  # noqa: PLC0415

        return carry_out(sys.argv[1:] if argv is None else list(argv))
    except KeyboardInterrupt:
        return 130  # EXIT_INTERRUPTED, which may not be loaded yet
