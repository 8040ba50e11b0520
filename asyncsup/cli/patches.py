"""What patches have left: the inbox, the history, the files of targets, which may be given up.

Each asks one question; so unlike `applying.py` it does without libzmq.
"""

from __future__ import annotations

import argparse

from asyncsup import render
from asyncsup.cli.arguments import names_argument, natural
from asyncsup.cli.session import Session
from asyncsup.cli.verbs import Action

# --- packages and transactions ------------------------------------------------------------------------------


def _list(session: Session) -> int:
    value, out = session.ask("patch.list"), session.out
    out.result(value, lambda: render.inbox_lines(value, width=out.width, ink=out.ink))
    return 0


def _history(session: Session) -> int:
    args, out = session.args, session.out
    value = session.ask("patch.history", target=args.target, limit=args.limit)
    out.result(value, lambda: render.history_lines(value, width=out.width, ink=out.ink))
    return 0


def _history_arguments(parser: argparse.ArgumentParser) -> None:
    _target_argument(parser, "only transactions of this target")
    parser.add_argument("-n", "--limit", type=int, default=50, metavar="N", help="at most N (50)")


def _show(session: Session) -> int:
    value, out = session.ask("patch.show", id=session.args.id), session.out
    out.result(value, lambda: render.transaction_lines(value, ink=out.ink))
    return 0


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", help="number of a transaction, or the beginning of a patch's id")


# --- files of targets ---------------------------------------------------------------------------------------


def _drift(session: Session) -> int:
    names, out = session.args.names, session.out
    value = session.ask("patch.drift", **({"names": names} if names else {}))
    out.result(value, lambda: render.drift_lines(value, ink=out.ink))
    return 1 if any(target["files"] for target in value["targets"]) else 0


def _drift_arguments(parser: argparse.ArgumentParser) -> None:
    names_argument(parser, "*", more=", as does none at all")


def _prune(session: Session) -> int:
    value = session.ask("patch.prune", target=session.args.target, keep=session.args.keep)
    session.out.result(value, lambda: render.pruned_lines(value))
    return 0


def _prune_arguments(parser: argparse.ArgumentParser) -> None:
    _target_argument(parser, "only of this target")
    parser.add_argument("--keep", type=natural, metavar="N", help="how many stay (default: as configured)")


def _release(session: Session) -> int:
    value = session.ask("target.release", target=session.args.target)
    session.out.result(value, lambda: render.released_lines(value))
    return 0


def _release_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", help="its managed files become ordinary ones again")


def _target_argument(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("target", nargs="?", metavar="TARGET", help=text)


LIST = Action(_list)
HISTORY = Action(_history, _history_arguments)
SHOW = Action(_show, _show_arguments)
DRIFT = Action(_drift, _drift_arguments)
PRUNE = Action(_prune, _prune_arguments)
RELEASE = Action(_release, _release_arguments)
