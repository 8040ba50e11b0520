"""Carry out a command line: its errors and Ctrl-C become text and an exit status."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

from asyncsup.cli.command_line import parse
from asyncsup.cli.session import EXIT_INTERRUPTED, Session, output_for
from asyncsup.errors import AsyncsupError
from asyncsup.terminal import Output


def carry_out(argv: Sequence[str]) -> int:
    """Do what the arguments say and return the exit status."""
    for stream in (sys.stdout, sys.stderr):
        _never_fail(stream)
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
