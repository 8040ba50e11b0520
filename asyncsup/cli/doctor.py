"""`asyncsup doctor`: what is wrong with a state directory, and mending it."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from asyncsup.cli.session import Session
from asyncsup.cli.settings import read_config
from asyncsup.cli.verbs import Action
from asyncsup.errors import UsageError
from asyncsup.patch.doctor import diagnose
from asyncsup.patch.repair import repair
from asyncsup.render_audit import doctor_lines


def _doctor(session: Session) -> int:
    args, out = session.args, session.out
    if args.state_dir is not None:
        state_dir, runtime_dir = Path(args.state_dir), None
    else:
        settings = read_config(session).supervisor
        state_dir, runtime_dir = settings.state_dir, settings.runtime_dir
    # What the store would say to a supervisor's log is in the findings.
    logging.getLogger("asyncsup").addHandler(logging.NullHandler())
    if args.repair:
        value = repair(
            state_dir,
            runtime_dir=runtime_dir,
            packages=[Path(package) for package in args.packages],
            overwrite=args.drift == "overwrite",
            progress=out.bar,
        ).to_json()
    elif args.packages or args.drift == "overwrite":
        raise UsageError("--package and --drift say how to mend: they need --repair")
    else:
        value = diagnose(state_dir, runtime_dir=runtime_dir, progress=out.bar).to_json()
    out.clear_bar()
    out.result(value, lambda: doctor_lines(value, ink=out.ink))
    return 0 if value["ok"] else 1


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--state-dir", metavar="DIR", help="this state directory, not the one of the configuration")
    add("--repair", action="store_true", help="mend what can be mended; not while a supervisor runs")
    add(
        "--package",
        dest="packages",
        action="append",
        default=[],
        metavar="FILE",
        help="take files from this patch to mend with; may be repeated",
    )
    add(
        "--drift",
        choices=("keep", "overwrite"),
        default="keep",
        help="what becomes of files that somebody has written to or removed (default: keep)",
    )


DOCTOR = Action(_doctor, _arguments)
