"""`asyncsup events`: what happens, from a number on, and what was missed in between."""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from asyncsup import render
from asyncsup.cli.arguments import names_argument, serial
from asyncsup.cli.following import follow
from asyncsup.cli.session import Session
from asyncsup.cli.verbs import Action
from asyncsup.client import Event, Gap
from asyncsup.errors import SupervisorUnreachableError
from asyncsup.terminal import Output


class _Wanted:
    """Which events are about what was named: targets, groups, instances, patterns; without names, all are.

    What a patch does as a whole, such as its end, is about each of its targets.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._names: Sequence[str] = [] if "all" in session.args.names else session.args.names
        self._groups: Mapping[str, Sequence[str]] = {}
        self._transactions: set[object] = set()
        if self._names:
            self._groups = self._ask_for_groups()

    def __call__(self, event: Mapping[str, Any]) -> bool:
        if not self._names:
            return True
        if event["type"] in {"config.applied", "supervisor.started"}:
            # One that ends at this moment does not keep its last events from being shown.
            with contextlib.suppress(SupervisorUnreachableError):
                self._groups = self._ask_for_groups()
        target, instance = event.get("target"), event.get("instance")
        is_meant = target is not None and any(self._means(name, target, instance) for name in self._names)
        transaction = event.get("txn")
        if is_meant and transaction is not None:
            self._transactions.add(transaction)
        return is_meant or (target is None and transaction in self._transactions)

    def _means(self, pattern: str, target: str, instance: str | None) -> bool:
        name, colon, index = pattern.partition(":")
        groups = fnmatch.filter(self._groups, name)
        if not fnmatch.fnmatchcase(target, name) and not any(
            target in self._groups[group] for group in groups
        ):
            return False
        # What happens to a whole target happens to each of its instances.
        return not colon or instance is None or index in {"", "*", instance.rpartition(":")[2]}

    def _ask_for_groups(self) -> Mapping[str, Sequence[str]]:
        groups: Mapping[str, Sequence[str]] = self._session.ask("supervisor.info").get("groups", {})
        return groups


def _events(session: Session) -> int:
    if session.args.follow:
        _follow(session)
    else:
        _print_kept(session)
    return 0


def _print_kept(session: Session) -> None:
    since, out = session.args.since, session.out
    wanted = _Wanted(session)
    # Without --since nothing in particular is expected, so nothing can be missing.
    heard = None if since is None else lambda gap: _report_gap(out, gap)
    with session.client.subscribe(since=since or 0, on_gap=heard) as events:
        for event in events.catch_up():
            if wanted(event.data):
                _show(out, event)


def _follow(session: Session) -> None:
    args, out = session.args, session.out
    since = args.since
    wanted = _Wanted(session)
    # An unknown name is refused, whatever has been heard of it before.
    snapshot = session.ask("status", **({"names": args.names} if args.names else {}))
    if since is None:
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
            if wanted(event.data):
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
    names_argument(parser, "*", more=", and without any everything that happens is shown")
    parser.add_argument(
        "--since", type=serial, metavar="SEQ", help="first what happened after event number SEQ"
    )
    parser.add_argument("--no-follow", dest="follow", action="store_false", help="what is kept, and end")
    parser.add_argument(
        "--keep-going", action="store_true", help="also when the supervisor is shut down, until Ctrl-C"
    )


EVENTS = Action(_events, _arguments)
