"""What runs: `status`, `show`, `start`, `stop`, `restart`, `reload`, `scale`, `signal`, `wait`."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any, Final

from asyncsup import render
from asyncsup.cli.arguments import matching, names_argument, timeout_option, wait_options
from asyncsup.cli.session import GRACE_SECONDS, Session
from asyncsup.cli.verbs import Action

EXIT_NOT_READY: Final = 3

# --- looking at them ----------------------------------------------------------------------------------------


def _status(session: Session) -> int:
    out, verbose = session.out, session.args.verbose
    value = session.ask("status", names=session.args.names, **({"usage": True} if verbose else {}))
    if verbose:
        value["isolation"] = session.ask("supervisor.info").get("isolation")
    out.result(value, lambda: render.status_lines(value, width=out.width, ink=out.ink))
    return EXIT_NOT_READY if any(render.is_down(target) for target in value["targets"]) else 0


def _status_arguments(parser: argparse.ArgumentParser) -> None:
    names_argument(parser, "*", more=", as does none at all")
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="also what each instance takes, and how it is isolated",
    )


def _show(session: Session) -> int:
    out, names = session.out, session.args.names
    if not names:
        info = session.ask("supervisor.info")
        out.result(info, lambda: render.info_lines(info, ink=out.ink))
        return 0
    found = [each["name"] for each in session.ask("status", names=names)["targets"]]
    # One after the other: each has its files looked at, and an answer of its own.
    values = [session.ask("show", name=name) for name in found]
    shown = [render.show_lines(value, width=out.width, ink=out.ink) for value in values]
    out.result(
        values[0] if len(values) == 1 else {"targets": values},
        lambda: [line for index, lines in enumerate(shown) for line in (["", *lines] if index else lines)],
    )
    return 0


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    names_argument(parser, "*", more="; without any, the supervisor itself")


def _wait(session: Session) -> int:
    args = session.args
    params = {"names": args.names, "for": args.condition, "timeout": args.timeout}
    value = session.call("wait", params, args.names, timeout=_patience(args.timeout))
    session.out.result(value, lambda: [f"{args.condition} after {render.duration(value['took'])}"])
    return 0


def _wait_arguments(parser: argparse.ArgumentParser) -> None:
    names_argument(parser, "+")
    parser.add_argument(
        "--for",
        dest="condition",
        choices=("ready", "running", "stopped"),
        default="ready",
        help="what to wait for (default: ready)",
    )
    timeout_option(parser)


# --- changing what runs -------------------------------------------------------------------------------------


def _operate(verb: str, session: Session, **more: Any) -> int:
    """`start`, `stop`, `restart`, `reload`: the same for each of several targets."""
    args, out = session.args, session.out
    params = {"names": args.names, "wait": args.wait, "timeout": args.timeout, **more}
    value = session.call(verb, params, args.names, timeout=_patience(args.timeout))
    out.result(value, lambda: render.results_lines(value, verb, ink=out.ink))
    return 0 if all(result.get("ok") for result in value["results"]) else 1


def _operation(verb: str, *, waits_for: str) -> Action:
    return Action(partial(_operate, verb), partial(_operation_arguments, waits_for))


def _operation_arguments(waits_for: str, parser: argparse.ArgumentParser) -> None:
    names_argument(parser, "+")
    wait_options(parser, waits_for)


def _restart(session: Session) -> int:
    return _operate("restart", session, **({"rolling": True} if session.args.rolling else {}))


def _restart_arguments(parser: argparse.ArgumentParser) -> None:
    _operation_arguments("ready", parser)
    parser.add_argument(
        "--rolling",
        action="store_true",
        help="some at a time, and each new one before the old one, as for a cold patch",
    )


def _patience(timeout: float | None) -> float | None:
    """How long to wait for an answer the supervisor gives within `timeout` (seconds; None: as it takes)."""
    return None if timeout is None else timeout + GRACE_SECONDS


def _scale(session: Session) -> int:
    args = session.args
    text: str = args.number
    key, value = ("by", int(text)) if text[0] in "+-" else ("instances", int(text))
    params = {"names": args.names, key: value, "wait": args.wait}
    results = session.call("scale", params, args.names, timeout=args.timeout)["results"]
    # Of a single one an error is the answer, and there is nothing more to say.
    alone = {key: results[0][key] for key in ("target", "instances")} if len(results) == 1 else None
    session.out.result(alone or {"results": results}, lambda: list(map(render.scaled_line, results)))
    return 0 if all(result["ok"] for result in results) else 1


_count: Final = matching(r"[+-]?[0-9]{1,5}", "not a number of instances, such as 3, +2 or -1", str)


def _scale_arguments(parser: argparse.ArgumentParser) -> None:
    names_argument(parser, "+")
    parser.add_argument("number", metavar="N|+N|-N", type=_count, help="how many, or how many more or fewer")
    wait_options(parser, "ready")


def _signal(session: Session) -> int:
    value = session.ask("signal", names=session.args.names, signal=session.args.signal)
    text = render.clean(session.args.signal)
    session.out.result(
        value,
        lambda: [
            f"sent {text} to {render.clean(sent['instance'])} (pid {sent['pid']})" for sent in value["sent"]
        ],
    )
    return 0


def _signal_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("signal", metavar="SIGNAL", help="HUP, SIGUSR1, 15 ...")
    names_argument(parser, "+")


STATUS = Action(_status, _status_arguments)
SHOW = Action(_show, _show_arguments)
WAIT = Action(_wait, _wait_arguments)
START = _operation("start", waits_for="ready")
STOP = _operation("stop", waits_for="the end")
RESTART = Action(_restart, _restart_arguments)
RELOAD = _operation("reload", waits_for="the answer")
SCALE = Action(_scale, _scale_arguments)
SIGNAL = Action(_signal, _signal_arguments)
