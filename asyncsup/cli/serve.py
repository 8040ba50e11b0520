"""`asyncsup serve`."""

from __future__ import annotations

import argparse
import gc

from asyncsup.cli.session import Session
from asyncsup.cli.settings import read_config
from asyncsup.cli.verbs import Action


def _serve(session: Session) -> int:
    args = session.args
    if args.check:
        return _check(session)
    # Nothing of what is imported becomes garbage: looking for some would be a good part of the start.
    gc.disable()
    from asyncsup.serve import serve  # noqa: PLC0415 - see above

    return serve(lambda: read_config(session), channel=args.channel, keeper_wanted=args.keeper_wanted)


def _check(session: Session) -> int:
    from asyncsup.successor import describe  # noqa: PLC0415 - serving is much more than this

    value = describe(read_config(session))
    session.out.result(value, lambda: [f"asyncsup {value['version']} would start with this configuration"])
    return 0


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-keeper",
        dest="keeper_wanted",
        action="store_false",
        help="without the process that starts it again after a crash",
    )
    parser.add_argument("--check", action="store_true", help="only say whether it would start")
    # Between the two of them.
    parser.add_argument("--keeper", dest="channel", type=int, help=argparse.SUPPRESS)


SERVE = Action(_serve, _arguments)
