"""The command line: arguments in; text and an exit status out. Speaks to a supervisor only through client.py.

`verbs.py` is the table of all verbs; `command_line.py` finds the one that was asked for and reads its
arguments. What a verb does is in the module of its area, and only that one is imported: `asyncsup status`
runs in shell prompts and health checks. All of them share `arguments.py`, `session.py` and, where they read
the configuration themselves, `settings.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

from asyncsup.cli.command_line import parse
from asyncsup.cli.session import EXIT_INTERRUPTED, Session, output_for
from asyncsup.errors import AsyncsupError
from asyncsup.terminal import Output

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out a command line and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        _never_fail(stream)
    argv = sys.argv[1:] if argv is None else list(argv)
    out = Output(json_wanted="--json" in argv)
    try:
        verb, args = parse(argv)
        out = output_for(args)
        session = Session(args, out)
        try:
            return verb.run(session)
        finally:
            session.close()
    except AsyncsupError as error:
        return out.error(error)
    except KeyboardInterrupt:
        out.clear_bar()
        return EXIT_INTERRUPTED
    except SystemExit as stop:  # argparse, after --help
        out.flush()
        return stop.code if isinstance(stop.code, int) else 0


def _never_fail(stream: TextIO) -> None:
    """A name that the terminal's encoding has no letters for is no reason to fail."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")
