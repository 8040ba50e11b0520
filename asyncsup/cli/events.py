"""`asyncsup events`: what happens, from a number on, and what was missed in between."""

from __future__ import annotations

import argparse

from asyncsup import render
from asyncsup.cli.arguments import serial
from asyncsup.cli.following import follow
from asyncsup.cli.session import Session
from asyncsup.cli.verbs import Action
from asyncsup.client import Event, Gap
from asyncsup.errors import SupervisorUnreachableError
from asyncsup.terminal import Output


def _events(session: Session) -> int:
    if session.args.follow:
        _follow(session)
    else:
        _print_kept(session)
    return 0


def _print_kept(session: Session) -> None:
    since, out = session.args.since, session.out
    # Without --since nothing in particular is expected, so nothing can be missing.
    heard = None if since is None else lambda gap: _report_gap(out, gap)
    with session.client.subscribe(since=since or 0, on_gap=heard) as events:
        for event in events.catch_up():
            _show(out, event)


def _follow(session: Session) -> None:
    args, out = session.args, session.out
    since = args.since
    if since is None:
        snapshot = session.ask("status")
        since = snapshot["seq"]
        lines = render.status_lines(snapshot, width=out.width, ink=out.ink)
        out.row({"type": "snapshot", **snapshot}, lambda: lines)
    ending = False
    with session.client.subscribe(since=since, on_gap=lambda gap: _report_gap(out, gap)) as events:

        def step() -> bool:
            nonlocal ending
            try:
                event = next(events)
            except SupervisorUnreachableError:
                if ending and not args.keep_going:
                    out.note("the supervisor has ended")
                    return False
                raise
            _show(out, event)
            ending = event.type == "supervisor.stopping" or (ending and event.type != "supervisor.started")
            return True

        follow(session, step)


def _show(out: Output, event: Event) -> None:
    out.row(event.data, lambda: [render.event_line(event.data, ink=out.ink)])


def _report_gap(out: Output, gap: Gap) -> None:
    if out.json_wanted:
        out.row({"type": "gap", **gap._asdict()}, list)
    if gap.restarted:
        out.note("the supervisor was started again: events are numbered from 1")
    if gap.lost:
        out.note(f"{render.plural(gap.lost, 'event')} from number {gap.first} on lost: no longer kept")
    if not (gap.restarted or gap.lost):
        out.note(f"events {gap.first} to {gap.last} did not arrive by themselves and were fetched")


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--since", type=serial, metavar="SEQ", help="first what happened after event number SEQ"
    )
    parser.add_argument("--no-follow", dest="follow", action="store_false", help="what is kept, and end")
    parser.add_argument(
        "--keep-going", action="store_true", help="also when the supervisor is shut down, until Ctrl-C"
    )


EVENTS = Action(_events, _arguments)
