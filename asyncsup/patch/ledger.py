"""Reads the audit of a state directory, or an export of it, and judges it. Changes nothing.

Works beside a running supervisor: everything is read in one SQLite snapshot.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec.structs import asdict

from asyncsup.errors import StateError
from asyncsup.patch.audit import MOST_FAULTS, Examiner, Fault, Head, Row, decode
from asyncsup.patch.database import Database, Phase
from asyncsup.patch.replay import Replay

BATCH: Final = 1000
"""Records that are in memory at once."""

MOST_BYTES: Final = 512 << 10
"""What one answer carries at most."""


class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """What became of an examination.

    Attributes:
        head: the last record; keep its hash elsewhere, and what comes before it can be vouched for.
        at: the time of the last record.
    """

    records: int
    head: Head | None
    at: str | None
    faults: tuple[Fault, ...]

    @property
    def ok(self) -> bool:
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "records": self.records,
            "head": None if self.head is None else self.head.to_json(),
            "at": self.at,
            "faults": [fault.to_json() for fault in self.faults[:MOST_FAULTS]],
            "fault_count": len(self.faults),
        }


def examine_state(state_dir: Path, anchors: Collection[str] = ()) -> Judgement:
    """Judge the audit of a state directory, and hold the rest of its state.db against it.

    Args:
        anchors: hashes that were kept elsewhere.
    Raises:
        StateError: there is no state.db, or it cannot be read.
    """
    database = Database.open_to_read(state_dir / "state.db")
    try:
        with database.snapshot():
            return examine(database, anchors)
    finally:
        database.close()


def examine(database: Database, anchors: Collection[str] = ()) -> Judgement:
    """The same of an open database, in a snapshot."""
    examiner, replay = Examiner(anchors), Replay()
    for row in _rows(database):
        fields = examiner.take(row)
        if fields is not None:
            replay.take(fields)
    examiner.finish()
    examiner.compare(database.noted_head())
    faults = list(examiner.faults)
    if not faults:
        # Whatever follows from a record that was changed says nothing about the rest.
        history = {
            row.txn: {**asdict(row), "committed": row.phase is Phase.COMMITTED}
            for row in database.transactions(None, -1)
        }
        clock = None
        try:
            clock = datetime.fromtimestamp(database.clock(), UTC)
        except StateError as error:
            if error.error_code != "state.clock":
                raise
            faults.append(Fault(code="audit.clock", message=error.message))
        faults += replay.compare(history, database.all_held(), database.all_marks(), clock)
    return _judgement(examiner, faults)


def examine_export(lines: Iterable[bytes], anchors: Collection[str] = ()) -> Judgement:
    """Judge what `asyncsup audit export` wrote: one record a line."""
    examiner = Examiner(anchors)
    for line in lines:
        fields: Mapping[str, Any] = decode(line.rstrip(b"\n")) or {}
        seq, txn = fields.get("seq"), fields.get("txn")
        last = 0 if examiner.head is None else examiner.head.seq
        examiner.take(
            Row(
                seq=seq if isinstance(seq, int) else last + 1,
                txn=txn if isinstance(txn, int) else None,
                line=line.rstrip(b"\n"),
                hash=None,
            )
        )
    examiner.finish()
    return _judgement(examiner, examiner.faults)


def read_records(
    database: Database, *, after: int | None = None, txn: int | None = None, limit: int
) -> list[Row]:
    """Records in their order: those that follow on number `after`, or else the last ones; of one transaction
    only, if it is named. At most `limit`, and no more than fits a message."""
    if after is None:
        head = database.head()
        after = max(0, head.seq - limit) if head is not None and txn is None else 0
    rows: list[Row] = []
    size = 0
    for row in database.records(after=after, txn=txn, limit=limit):
        size += len(row.line)
        if rows and size > MOST_BYTES:
            break
        rows.append(row)
    return rows


def _rows(database: Database) -> Iterator[Row]:
    after = -1
    while rows := database.records(after=after, limit=BATCH):
        yield from rows
        after = rows[-1].seq


def _judgement(examiner: Examiner, faults: Collection[Fault]) -> Judgement:
    return Judgement(records=examiner.count, head=examiner.head, at=examiner.last_at, faults=tuple(faults))
