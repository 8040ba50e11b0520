"""What is done to a supervisor that runs: `shutdown` and `reexec`."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import time
from collections.abc import Mapping
from typing import Any, Final

from asyncsup import render
from asyncsup.cli.arguments import timeout_option, wait_options
from asyncsup.cli.session import GRACE_SECONDS, QUERY_SECONDS, Session
from asyncsup.cli.verbs import Action
from asyncsup.client import ControlClient
from asyncsup.errors import RemoteError, SupervisorUnreachableError, TimeoutExpiredError

SLOW_SECONDS: Final = 2.0
"""How often it is looked who is still there while a supervisor ends."""

LOOK_SECONDS: Final = 0.02
"""How often it is looked whether another supervisor is there."""


def _shutdown(session: Session) -> int:
    out, args = session.out, session.args
    info = session.client.call("supervisor.info", timeout=QUERY_SECONDS)
    process = -1
    # The number of a process on another machine may be that of another one here.
    if not session.client.endpoint.startswith("tcp://"):
        with contextlib.suppress(OSError):  # of another pid namespace, say
            process = os.pidfd_open(int(info.get("keeper") or info["pid"]))
    try:
        stopping = session.ask("shutdown")["stopping"]
        word = "stopping" if stopping else "nothing to stop"
        out.lines([f"{word} {render.plural(stopping, 'instance')}" if stopping else word])
        if args.wait and not _wait_gone(session, process, args.timeout):
            raise TimeoutExpiredError(
                f"the supervisor has not ended within {args.timeout:g} s; it goes on stopping"
            )
    finally:
        if process >= 0:
            os.close(process)
    out.result({"stopping": stopping, "ended": args.wait}, lambda: ["the supervisor has ended"] * args.wait)
    return 0


def _wait_gone(session: Session, process: int, timeout: float | None) -> bool:
    """The connection goes first, and right after it the process: what is held by it is free only then."""
    deadline = None if timeout is None else time.monotonic() + timeout
    said = ""
    while True:
        left = SLOW_SECONDS if deadline is None else min(SLOW_SECONDS, deadline - time.monotonic())
        if session.client.wait_closed(max(0.0, left)):
            break
        if deadline is not None and time.monotonic() >= deadline:
            return False
        said = _say_who_is_left(session, said)
    if process >= 0:
        poller = select.poll()
        poller.register(process, select.POLLIN)
        poller.poll(GRACE_SECONDS * 1000)
    return True


def _say_who_is_left(session: Session, said: str) -> str:
    """Once more only if it is not what was `said` the last time; returns what has been said by then."""
    if not session.out.is_live:
        return said
    try:
        # Not over the connection whose end is waited for.
        with ControlClient(session.client.endpoint) as client:
            left = render.left_line(client.call("status", timeout=QUERY_SECONDS))
    except (SupervisorUnreachableError, RemoteError, TimeoutExpiredError):
        return said  # it ends, or has other things to do
    if left and left != said:
        session.out.note(f"still there: {left}")
        return left
    return said


def _shutdown_arguments(parser: argparse.ArgumentParser) -> None:
    wait_options(parser, "the end of the supervisor")


def _reexec(session: Session) -> int:
    out, args = session.out, session.args
    before = session.client.call("supervisor.info", timeout=QUERY_SECONDS)
    # It has to mean the same to a supervisor that works elsewhere.
    program = None if args.program is None else os.path.abspath(args.program)  # noqa: PTH100 - without ".."
    session.client.call("supervisor.reexec", {"program": program})
    info = _wait_replaced(session, before, args.timeout)
    if info is None:
        raise TimeoutExpiredError(
            f"no other supervisor has come within {args.timeout:g} s; see the log of `serve`"
        )
    value = {name: info[name] for name in ("version", "pid", "keeper", "adopted")}
    adopted = render.plural(info["adopted"], "instance")
    out.result(value, lambda: [f"asyncsup {info['version']} (pid {info['pid']}) has taken over {adopted}"])
    return 0


def _wait_replaced(session: Session, before: Mapping[str, Any], timeout: float) -> Mapping[str, Any] | None:
    """The description of the supervisor that comes after another one; None if none does in time."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            with ControlClient(session.client.endpoint) as client:
                info: Mapping[str, Any] = client.call("supervisor.info", timeout=QUERY_SECONDS)
        except SupervisorUnreachableError:
            info = before
        if info["started"] != before["started"]:
            return info
        time.sleep(LOOK_SECONDS)
    return None


def _reexec_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--program", metavar="PATH", help="this asyncsup instead of the one that runs, as it is installed now"
    )
    timeout_option(parser, "how long to wait for it (30s)", default=30.0)


SHUTDOWN = Action(_shutdown, _shutdown_arguments)
REEXEC = Action(_reexec, _reexec_arguments)
