"""`asyncsup demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from asyncsup.cli.session import Session
from asyncsup.cli.verbs import Action
from asyncsup.demo import run_demo


def _demo(session: Session) -> int:
    out, keep = session.out, session.args.keep
    return run_demo(
        as_json=out.json_wanted, colour=out.ink.enabled, keep=None if keep is None else Path(keep)
    )


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keep", metavar="DIR", help="play in this folder and leave it there")


DEMO = Action(_demo, _arguments)
