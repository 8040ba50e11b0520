"""Carry out a command line: its errors and Ctrl-C become text and an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TextIO

from asyncsup.cli.command_line import parse
from asyncsup.cli.session import EXIT_INTERRUPTED, Session, output_for
from asyncsup.errors import AsyncsupError
from asyncsup.terminal import Output


def carry_out(argv: Sequence[str]) -> int:
    """Do what the arguments say and return the exit status."""
    _open_what_is_closed()
    for stream in (sys.stdout, sys.stderr):
        _never_fail(stream)
    out = Output(json_wanted="--json" in argv)
    try:
        verb, args = parse(argv)
        out = output_for(args)
        session = Session(args, out)
        try:
            status = verb.run(session)
        except AsyncsupError as error:
            raise session.explain(error) from None
        finally:
            session.close()
    except AsyncsupError as error:
        return out.error(error)
    except KeyboardInterrupt:
        out.clear_bar()
        return EXIT_INTERRUPTED
    except SystemExit as stop:  # argparse, after --help
        out.flush()
        status = stop.code if isinstance(stop.code, int) else 0
    return status or int(out.failed)


def _open_what_is_closed() -> None:
    """Have standard streams that whoever started this has closed lead nowhere.

    Else the next files that are opened, a socket or a database, would be what writes to them goes to.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def _never_fail(stream: TextIO) -> None:
    """A name that the terminal's encoding has no letters for is no reason to fail."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")
