"""`asyncsup audit`: what was written down, from a supervisor, a state directory or an export."""

from __future__ import annotations

import argparse
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Final

from asyncsup.cli.arguments import matching, natural, serial
from asyncsup.cli.session import QUERY_SECONDS, Session, file_error
from asyncsup.cli.verbs import Action
from asyncsup.patch.database import Database
from asyncsup.patch.ledger import examine_export, examine_state, read_records
from asyncsup.render_audit import judgement_lines, record_lines

PAGE: Final = 1000
"""So many records are read at a time."""

Record = Mapping[str, Any]
"""``line`` as it is hashed, ``seq`` and ``hash``."""


def _verify(session: Session) -> int:
    args, out = session.args, session.out
    if args.file is not None:
        try:
            with Path(args.file).open("rb") as file:
                value = examine_export(file, args.heads).to_json()
        except OSError as error:
            raise file_error(error) from None
    elif args.state_dir is not None:
        value = examine_state(Path(args.state_dir), args.heads).to_json()
    else:
        value = session.client.call("audit.verify", heads=args.heads)
    out.result(value, lambda: judgement_lines(value, ink=out.ink))
    return 0 if value["ok"] else 1


_matching_hash: Final = matching(r"[0-9a-fA-F]{64}", "no SHA-256 of 64 hexadecimal digits", str.lower)


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--head",
        dest="heads",
        action="append",
        default=[],
        type=_matching_hash,
        metavar="HASH",
        help="of a record, kept elsewhere: it must be among them; may be repeated",
    )
    where = parser.add_mutually_exclusive_group()
    _state_dir_option(where)
    where.add_argument("--file", metavar="FILE", help="what `audit export` wrote, instead")


def _list(session: Session) -> int:
    args, out = session.args, session.out
    for record in _records(session, after=args.after, txn=args.txn, limit=args.limit):
        value = _as_value(record)
        out.row(value, partial(record_lines, value, ink=out.ink))
    return 0


def _as_value(record: Record) -> dict[str, Any]:
    """One that was tampered with need not be JSON any more."""
    try:
        value = json.loads(record["line"])
    except ValueError:
        value = None
    known = value if isinstance(value, dict) else {"event": "unreadable", "line": record["line"]}
    return {**known, "seq": record["seq"], "hash": record["hash"]}


def _list_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-n", "--limit", type=natural, default=50, metavar="N", help="the last N (50)")
    add("--after", type=serial, metavar="SEQ", help="N from the one behind record number SEQ on, instead")
    add("--txn", type=serial, metavar="N", help="only of this transaction")
    _state_dir_option(parser)


def _export(session: Session) -> int:
    for record in _records(session, after=0, txn=None, limit=None):
        session.out.verbatim(record["line"] + "\n")
        if session.out.closed:
            break
    return 0


def _state_dir_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--state-dir", metavar="DIR", help="read a state directory, without a supervisor")


# --- page by page -------------------------------------------------------------------------------------------


def _records(session: Session, *, after: int | None, txn: int | None, limit: int | None) -> Iterator[Record]:
    """Records of a supervisor, or of a state directory; without a limit all there are."""
    state_dir = session.args.state_dir
    if state_dir is None:

        def ask(after: int | None, most: int) -> Sequence[Record]:
            params = {"after": after, "txn": txn, "limit": min(most, PAGE)}
            records: list[Record] = session.client.call("audit.list", params, timeout=QUERY_SECONDS)[
                "records"
            ]
            return records

        if after is None and limit is not None and limit > PAGE:
            # A page is of the last ones or goes on behind a number, so there is no second one of the last.
            yield from deque(_paged(ask, 0, None), maxlen=limit)
        else:
            yield from _paged(ask, after, limit)
        return
    with closing(Database.open_to_read(Path(state_dir, "state.db"))) as database:

        def read(after: int | None, most: int) -> Sequence[Record]:
            return [row.to_json() for row in read_records(database, after=after, txn=txn, limit=most)]

        yield from _paged(read, after, limit)


def _paged(
    read: Callable[[int | None, int], Sequence[Record]], after: int | None, limit: int | None
) -> Iterator[Record]:
    """What `read` gives for a number to go on behind and how many at most, until there is nothing more."""
    left = limit
    while left is None or left > 0:
        page = read(after, PAGE if left is None else left)
        if not page:
            return
        yield from page
        after = int(page[-1]["seq"])
        left = None if left is None else left - len(page)


VERIFY = Action(_verify, _verify_arguments)
LIST = Action(_list, _list_arguments)
EXPORT = Action(_export, _state_dir_option)
