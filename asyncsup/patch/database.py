"""state.db: what is known about targets, generations and transactions. Rows in, rows out; no files here.

SQLite in WAL mode with ``synchronous=FULL``: when a write returns, it survives a power cut. It is not the
truth about which generation a target has (the pointer is); it is what a generation holds, what a transaction
meant to do, and whether the result was confirmed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import msgspec

from asyncsup.errors import PatchNotFoundError, StateError, TargetNotFoundError
from asyncsup.patch import audit
from asyncsup.patch.audit import Head, Row
from asyncsup.patch.marks import Marks

SCHEMA_VERSION: Final = 3

_SCHEMA: Final = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE targets (
    name TEXT PRIMARY KEY,
    root TEXT NOT NULL,
    layout TEXT NOT NULL,
    persist TEXT NOT NULL,             -- JSON array of paths
    confirmed INTEGER NOT NULL,        -- the generation last known to be good
    releasing INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE wanted (
    target TEXT PRIMARY KEY,           -- or NAME:INDEX, one instance that is to be down
    up INTEGER NOT NULL
);
CREATE TABLE scaled (target TEXT PRIMARY KEY, configured INTEGER NOT NULL, instances INTEGER NOT NULL);
CREATE TABLE generations (
    target TEXT NOT NULL,
    number INTEGER NOT NULL,
    parent INTEGER,                    -- where a rollback from here leads
    build INTEGER NOT NULL,
    patch TEXT,
    txn INTEGER,
    place TEXT NOT NULL,               -- 'store', or 'root': the root itself, not converted
    state TEXT NOT NULL,               -- 'live', 'dropped', 'pruned'
    stamp INTEGER NOT NULL,            -- mtime second of the files written for it
    made TEXT NOT NULL,                -- JSON array: folders made in the root for it
    created TEXT NOT NULL,
    PRIMARY KEY (target, number)
) WITHOUT ROWID;
CREATE TABLE files (
    target TEXT NOT NULL,
    generation INTEGER NOT NULL,
    path TEXT NOT NULL,
    sha256 TEXT,                       -- NULL: a patch deleted it
    size INTEGER NOT NULL,
    mode INTEGER NOT NULL,             -- with write bits, for the day it becomes an ordinary file again
    origin INTEGER,                    -- the generation it was written for; NULL: adopted, the program's own
    identity TEXT NOT NULL,            -- inode:size:mtime_ns
    PRIMARY KEY (target, generation, path)
) WITHOUT ROWID;
CREATE TABLE kept (                    -- names under which something stands that is not a patch's
    target TEXT NOT NULL,
    generation INTEGER NOT NULL,
    path TEXT NOT NULL,
    txn INTEGER NOT NULL,              -- the transaction that left it, or moved it into the generation
    managed INTEGER NOT NULL,          -- whether a patch has ever touched the name, as of this generation
    origin INTEGER,                    -- as in files: what would be there otherwise
    note TEXT NOT NULL,
    PRIMARY KEY (target, generation, path)
) WITHOUT ROWID;
CREATE TABLE transactions (
    txn INTEGER PRIMARY KEY AUTOINCREMENT,
    action TEXT NOT NULL,
    patch TEXT, name TEXT, version TEXT, build INTEGER, kind TEXT,
    phase TEXT NOT NULL,
    state TEXT NOT NULL,
    verdict TEXT,
    error TEXT,
    code TEXT,
    asked_by TEXT NOT NULL,
    started REAL NOT NULL,
    ended REAL,
    cleaned INTEGER NOT NULL DEFAULT 0,
    floor INTEGER,                     -- the patch's build_floor
    downgrade INTEGER NOT NULL DEFAULT 0,
    by_hand INTEGER NOT NULL DEFAULT 0 -- once it has switched, only an operator decides what becomes of it
);
CREATE INDEX transactions_by_patch ON transactions (patch);
CREATE TABLE parts (
    txn INTEGER NOT NULL,
    target TEXT NOT NULL,
    source INTEGER NOT NULL,
    destination INTEGER,
    staged INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (txn, target)
) WITHOUT ROWID;
CREATE INDEX parts_by_target ON parts (target);
CREATE TABLE changes (
    txn INTEGER NOT NULL,
    target TEXT NOT NULL,
    position INTEGER NOT NULL,
    path TEXT NOT NULL,
    op TEXT NOT NULL,
    note TEXT NOT NULL,
    adopts INTEGER NOT NULL,
    seen TEXT,                         -- identity of the file when the patch was staged; '' absent
    PRIMARY KEY (txn, target, position)
) WITHOUT ROWID;
CREATE TABLE held (patch TEXT PRIMARY KEY, reason TEXT NOT NULL, at TEXT NOT NULL);
CREATE TABLE marks (                   -- of every target there ever was, whatever becomes of its generations
    target TEXT PRIMARY KEY,
    highest INTEGER NOT NULL,          -- the highest build that was confirmed, or what a downgrade made of it
    floor INTEGER                      -- the highest build_floor of a confirmed patch
);
CREATE TABLE audit (
    seq INTEGER PRIMARY KEY,
    txn INTEGER,
    record TEXT NOT NULL,              -- a line as audit.py makes it
    hash TEXT NOT NULL
);
CREATE INDEX audit_by_txn ON audit (txn);
"""


class Phase(StrEnum):
    """How far a transaction has got on disk."""

    BEGUN = "begun"
    SWITCHED = "switched"
    SWITCHED_BACK = "switched_back"
    COMMITTED = "committed"
    ABORTED = "aborted"


OPEN_PHASES: Final = (Phase.BEGUN, Phase.SWITCHED, Phase.SWITCHED_BACK)
"""A transaction in one of these has its targets to itself."""


class TargetRow(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    root: Path
    layout: str
    persist: tuple[str, ...]
    confirmed: int
    releasing: bool


class Scaled(msgspec.Struct, frozen=True, kw_only=True):
    """How many instances an operator wanted, and how many were configured when that was said."""

    configured: int
    instances: int


class GenerationRow(msgspec.Struct, frozen=True, kw_only=True):
    target: str
    number: int
    parent: int | None
    build: int
    patch: str | None
    txn: int | None
    place: str
    state: str
    stamp: int
    made: tuple[str, ...]


class FileRow(msgspec.Struct, frozen=True, kw_only=True):
    """A managed file of a generation; without `sha256` the record that a patch deleted it."""

    path: str
    sha256: str | None
    size: int
    mode: int
    origin: int | None
    identity: str


Origin = tuple[int | None] | None
"""Which version of a file a generation has, as far as patches go: in the tuple the generation it was written
for, or None when it was adopted. None where no patch has ever touched the name."""


class KeptRow(msgspec.Struct, frozen=True, kw_only=True):
    """Something stands under a name in a generation that is not what a patch has for it.

    Attributes:
        origin: of what would stand there otherwise.
        note: why, as a clause about the file.
    """

    path: str
    txn: int
    origin: Origin
    note: str


class ChangeRow(msgspec.Struct, frozen=True, kw_only=True):
    """What a transaction does to one path of a target; `position` makes its temporary names unique."""

    position: int
    path: str
    op: str
    note: str
    adopts: bool
    seen: str | None


class PartRow(msgspec.Struct, frozen=True, kw_only=True):
    """One target's part in a transaction: from generation `source` to `destination`."""

    txn: int
    target: str
    source: int
    destination: int | None
    staged: bool


class TransactionRow(msgspec.Struct, frozen=True, kw_only=True):
    txn: int
    action: str
    patch: str | None
    name: str | None
    version: str | None
    build: int | None
    kind: str | None
    phase: Phase
    state: str
    verdict: str | None
    error: str | None
    code: str | None
    asked_by: str
    started: float
    ended: float | None
    cleaned: bool
    floor: int | None
    downgrade: bool
    by_hand: bool


class _Note(msgspec.Struct, frozen=True, kw_only=True):
    """Something to be written down in the audit."""

    event: str
    txn: int | None
    at: str
    fields: Mapping[str, Any]


def timestamp(seconds: float | None = None) -> str:
    """RFC 3339 in UTC, with milliseconds; now, unless `seconds` since the epoch are given."""
    moment = datetime.fromtimestamp(time.time() if seconds is None else seconds, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Database:
    """Two connections, used from any thread: one writer at a time, and readers that do not wait for it. A
    disk that takes long over a write holds up nobody who only asks.

    Every method may raise `StateError`: ``state.database``, or ``state.full`` when the disk is.
    """

    def __init__(self, connection: sqlite3.Connection, reader: sqlite3.Connection, path: Path) -> None:
        self._lock = threading.RLock()
        self._connection = connection
        self._reading = threading.RLock()
        self._reader = reader
        self._path = path
        self._depth = 0
        self._notes: deque[_Note] = deque()
        self._written_notes = 0
        """How many of them the write that is under way takes along."""
        self._newest: Head | None = None
        """The last record of the write that is under way."""
        self._writing: int | None = None
        """The thread that writes: what it reads meanwhile is to hold what it has written."""
        self._loose = False
        """Whether the last write was not a durable one."""

    @classmethod
    def open(cls, path: Path) -> Database:
        """Open the database, creating it when there is none.

        What is read from it from now on is on disk: of a process that was killed the last words may be in
        memory only, and nothing may be done on the strength of what a power cut would take back.
        """
        with contextlib.suppress(FileNotFoundError):
            log = os.open(f"{path}-wal", os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(log)
            finally:
                os.close(log)
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
        with contextlib.ExitStack() as undo:
            try:
                connection = undo.enter_context(contextlib.closing(_connect(path)))
                reader = undo.enter_context(contextlib.closing(_connect(path)))
                database = cls(connection, reader, path)
                database._prepare()
            except sqlite3.Error as error:
                raise _state_error(path, error) from error
            undo.pop_all()
        return database

    @classmethod
    def open_to_read(cls, path: Path) -> Database:
        """Open a database that is there and write nothing to it, whether a supervisor has it open or not."""
        if not path.is_file():
            raise StateError(f"there is no {path}", code="state.database_missing")
        connection = None
        try:
            connection = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None, check_same_thread=False
            )
            connection.row_factory = sqlite3.Row
            (version,) = connection.execute("PRAGMA user_version").fetchone()
        except sqlite3.Error as error:
            if connection is not None:
                connection.close()
            raise _state_error(path, error) from error
        if version != SCHEMA_VERSION:
            connection.close()
            raise _wrong_version(path, version)
        return cls(connection, connection, path)

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Everything that is read in the block is as it was at one instant."""
        with self._reading, self._translated():
            self._reader.execute("BEGIN")
            try:
                yield
            finally:
                self._reader.execute("ROLLBACK")

    def complaints(self) -> list[str]:
        """What SQLite's own check of the file finds."""
        found = [str(row[0]) for row in self._all("PRAGMA integrity_check")]
        return [] if found == ["ok"] else found

    def rebuild_indexes(self) -> None:
        """Make all indexes anew, from the tables."""
        with self._lock, self._translated():
            self._connection.execute("REINDEX")

    def _prepare(self) -> None:
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=FULL")
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version == 0:
            self._connection.executescript(
                f"BEGIN IMMEDIATE;{_SCHEMA}PRAGMA user_version={SCHEMA_VERSION};COMMIT;"
            )
        elif version != SCHEMA_VERSION:
            raise _wrong_version(self._path, version)
        self.clock()
        if self.head() is None:
            self.record("chain.begun", format=audit.FORMAT, chain=secrets.token_hex(16))

    def close(self) -> None:
        with self._lock, self._reading:
            self._reader.close()
            self._connection.close()

    @contextlib.contextmanager
    def write(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """All changes in the block, or none of them; nested blocks belong to the outermost. What was noted
        for the audit goes along.

        Args:
            durable: on disk when the block ends. Otherwise the next durable write takes this one along, and a
                power cut before it takes it back: for what recovery would find out by itself.
        """
        with self._lock:
            if self._depth:
                yield self._connection
                return
            with self._translated():
                if not durable:
                    self._connection.execute("PRAGMA synchronous=NORMAL")
                self._depth += 1
                self._writing = threading.get_ident()
                try:
                    self._connection.execute("BEGIN IMMEDIATE")
                    try:
                        yield self._connection
                        self._write_notes()
                        if self._newest is not None:
                            self.set_meta("head", f"{self._newest.seq} {self._newest.hash}")
                            self.set_meta("clock", repr(max(self.clock(), time.time())))
                        self._connection.execute("COMMIT")
                    except BaseException:
                        if self._connection.in_transaction:
                            self._connection.execute("ROLLBACK")
                        raise
                    self._loose = not durable
                    for _ in range(self._written_notes):
                        self._notes.popleft()
                finally:
                    self._written_notes, self._newest = 0, None
                    self._writing = None
                    self._depth -= 1
                    if not durable:
                        self._connection.execute("PRAGMA synchronous=FULL")

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise _state_error(self._path, error) from error

    def _all(self, sql: str, *values: object) -> list[sqlite3.Row]:
        if self._writing == threading.get_ident():
            with self._translated():
                return self._connection.execute(sql, values).fetchall()
        with self._reading, self._translated():
            return self._reader.execute(sql, values).fetchall()

    def _one(self, sql: str, *values: object) -> sqlite3.Row | None:
        rows = self._all(sql, *values)
        return rows[0] if rows else None

    # --- meta -----------------------------------------------------------------------------------------------

    def meta(self, key: str) -> str | None:
        row = self._one("SELECT value FROM meta WHERE key = ?", key)
        return None if row is None else str(row["value"])

    def set_meta(self, key: str, value: str) -> None:
        with self.write() as sql:
            sql.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    # --- the audit ------------------------------------------------------------------------------------------

    def note(self, event: str, *, txn: int | None = None, at: str | None = None, **fields: Any) -> None:
        """Have something written down with the next write, whatever that is about. Never blocks, and so may
        be called from an event loop; a process that is killed before the next write takes it along."""
        self._notes.append(_Note(event=event, txn=txn, at=at or timestamp(), fields=fields))

    def record(self, event: str, *, txn: int | None = None, at: str | None = None, **fields: Any) -> None:
        """Write something down together with what the surrounding `write` changes: both or neither."""
        with self.write():
            self._write_notes()
            self._append([_Note(event=event, txn=txn, at=at or timestamp(), fields=fields)])

    def write_notes(self, *, durable: bool = True) -> None:
        """Write down what was noted; `durable`: after this everything that is written is."""
        if self._notes or (durable and self._loose):
            with self.write(durable=durable):
                # Something has to change for it, or nothing is written and nothing synced.
                self.set_meta("clock", repr(max(self.clock(), time.time())))

    def _write_notes(self) -> None:
        # One at a time by its number: an event loop may add to them meanwhile.
        first, last = self._written_notes, len(self._notes)
        self._append([self._notes[position] for position in range(first, last)])
        self._written_notes = last

    def _append(self, notes: Sequence[_Note]) -> None:
        before = self._newest or (self.head() if notes else None)
        rows = []
        for note in notes:
            fields = note.fields if note.txn is None else {**note.fields, "txn": note.txn}
            line = audit.encode(before, note.event, note.at, fields)
            before = Head(seq=1 if before is None else before.seq + 1, hash=audit.digest(line))
            rows.append((before.seq, note.txn, line.decode(), before.hash))
        self._connection.executemany("INSERT INTO audit VALUES (?, ?, ?, ?)", rows)
        self._newest = before

    def clock(self) -> float:
        """The latest time at which anything was written down; 0.0 when nothing was.

        Raises:
            StateError: ``state.clock``: what is remembered is no time, so whether a patch has expired cannot
                be told.
        """
        text = self.meta("clock")
        if text is None:
            return 0.0
        try:
            seconds = float(text)
            datetime.fromtimestamp(seconds, UTC)
        except (ValueError, OverflowError, OSError):
            seconds = -1.0
        if seconds < 0:
            raise StateError(
                f"{self._path} remembers {text[:80]!r} as the latest time, which is no time; it was changed "
                "or is damaged: put a copy of it back",
                code="state.clock",
            )
        return seconds

    def trust_clock(self, **fields: Any) -> None:
        """Whatever the time was before, now is the time."""
        with self.write():
            self.record("clock.trusted", before=timestamp(self.clock()), **fields)
            self.set_meta("clock", "0.0")

    def head(self) -> Head | None:
        """The newest record. What is noted counts as well as what is there: were the last ones removed, the
        next one leaves the gap to be seen."""
        row = self._one("SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1")
        last = None if row is None else Head(seq=row["seq"], hash=row["hash"])
        noted = self.noted_head()
        return max(
            (head for head in (noted, last) if head is not None), key=lambda head: head.seq, default=None
        )

    def noted_head(self) -> Head | None:
        """The newest record by what is noted apart from the records."""
        seq, _, digest = (self.meta("head") or "").partition(" ")
        return Head(seq=int(seq), hash=digest) if seq.isdecimal() else None

    def records(self, *, after: int = 0, txn: int | None = None, limit: int = -1) -> list[Row]:
        """Records with higher numbers than `after`, in their order; of one transaction only."""
        only, values = ("", ()) if txn is None else ("AND txn = ?", (txn,))
        rows = self._all(
            f"SELECT seq, txn, CAST(record AS BLOB) AS line, hash FROM audit WHERE seq > ? {only} "
            "ORDER BY seq LIMIT ?",
            after,
            *values,
            limit,
        )
        return [Row(**row) for row in rows]

    # --- targets --------------------------------------------------------------------------------------------

    def targets(self) -> list[TargetRow]:
        return [_target(row) for row in self._all("SELECT * FROM targets ORDER BY name")]

    def find_target(self, name: str) -> TargetRow | None:
        row = self._one("SELECT * FROM targets WHERE name = ?", name)
        return None if row is None else _target(row)

    def target(self, name: str) -> TargetRow:
        found = self.find_target(name)
        if found is None:
            raise TargetNotFoundError(f"there is no target {name} with a root", target=name)
        return found

    def put_target(self, row: TargetRow) -> None:
        with self.write() as sql:
            sql.execute(
                "INSERT OR REPLACE INTO targets VALUES (?, ?, ?, ?, ?, ?)",
                (row.name, str(row.root), row.layout, json.dumps(row.persist), row.confirmed, row.releasing),
            )

    def wanted(self, target: str) -> bool:
        row = self._one("SELECT up FROM wanted WHERE target = ?", target)
        return row is None or bool(row["up"])

    def stopped_alone(self, target: str) -> frozenset[int]:
        # A supervisor that knows of no such rows writes the target's anew: what is older counts no more.
        rows = self._all(
            "SELECT target FROM wanted WHERE target > ? AND target < ?"
            " AND rowid > (SELECT rowid FROM wanted WHERE target = ?)",
            *_instances_of(target),
            target,
        )
        return frozenset(int(row["target"].rpartition(":")[2]) for row in rows)

    def set_wanted(self, target: str, up: bool, stopped_alone: Collection[int]) -> None:
        with self.write() as sql:
            sql.execute("INSERT OR REPLACE INTO wanted VALUES (?, ?)", (target, up))
            sql.execute("DELETE FROM wanted WHERE target > ? AND target < ?", _instances_of(target))
            sql.executemany(
                "INSERT INTO wanted VALUES (?, 0)", [(f"{target}:{index}",) for index in stopped_alone]
            )

    def scaled(self, target: str) -> Scaled | None:
        row = self._one("SELECT configured, instances FROM scaled WHERE target = ?", target)
        return None if row is None else Scaled(**row)

    def set_scaled(self, target: str, scaled: Scaled) -> None:
        with self.write() as sql:
            sql.execute(
                "INSERT OR REPLACE INTO scaled VALUES (?, ?, ?)",
                (target, scaled.configured, scaled.instances),
            )

    # --- generations and their files ------------------------------------------------------------------------

    def add_generation(self, row: GenerationRow) -> None:
        with self.write() as sql:
            sql.execute(
                "INSERT INTO generations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    row.target, row.number, row.parent, row.build, row.patch, row.txn, row.place, row.state,
                    row.stamp, json.dumps(row.made), timestamp(),
                ),
            )  # fmt: skip

    def generations(self, target: str) -> list[GenerationRow]:
        rows = self._all("SELECT * FROM generations WHERE target = ? ORDER BY number", target)
        return [_generation(row) for row in rows]

    def find_generation(self, target: str, number: int) -> GenerationRow | None:
        row = self._one("SELECT * FROM generations WHERE target = ? AND number = ?", target, number)
        return None if row is None else _generation(row)

    def generation(self, target: str, number: int) -> GenerationRow:
        found = self.find_generation(target, number)
        if found is None:
            raise StateError(f"generation {number} of {target} is not known", code="state.generation")
        return found

    def update_generation(
        self,
        target: str,
        number: int,
        *,
        state: str | None = None,
        place: str | None = None,
        build: int | None = None,
        durable: bool = True,
    ) -> None:
        """Change what is given. A generation that is dropped or pruned has no files any more."""
        with self.write(durable=durable) as sql:
            sql.execute(
                "UPDATE generations SET state = coalesce(?, state), place = coalesce(?, place), "
                "build = coalesce(?, build) WHERE target = ? AND number = ?",
                (state, place, build, target, number),
            )
            if state in {"dropped", "pruned"}:
                for table in ("files", "kept"):
                    sql.execute(f"DELETE FROM {table} WHERE target = ? AND generation = ?", (target, number))

    def files(self, target: str, generation: int) -> dict[str, FileRow]:
        rows = self._all(
            "SELECT path, sha256, size, mode, origin, identity FROM files "
            "WHERE target = ? AND generation = ?",
            target,
            generation,
        )
        return {row["path"]: FileRow(**row) for row in rows}

    def add_files(self, target: str, generation: int, rows: Iterable[FileRow]) -> None:
        """What a generation holds; durable with the next thing that is."""
        with self.write(durable=False) as sql:
            sql.executemany(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [(target, generation, r.path, r.sha256, r.size, r.mode, r.origin, r.identity) for r in rows],
            )

    def remove_files(self, target: str, generation: int, paths: Iterable[str]) -> None:
        with self.write() as sql:
            sql.executemany(
                "DELETE FROM files WHERE target = ? AND generation = ? AND path = ?",
                [(target, generation, path) for path in paths],
            )

    def kept(self, target: str, generation: int) -> dict[str, KeptRow]:
        rows = self._all(
            "SELECT path, txn, managed, origin, note FROM kept WHERE target = ? AND generation = ?",
            target,
            generation,
        )
        return {
            row["path"]: KeptRow(
                path=row["path"],
                txn=row["txn"],
                origin=(row["origin"],) if row["managed"] else None,
                note=row["note"],
            )
            for row in rows
        }

    def add_kept(self, target: str, generation: int, rows: Iterable[KeptRow]) -> None:
        with self.write() as sql:
            sql.executemany(
                "INSERT OR REPLACE INTO kept VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (target, generation, r.path, r.txn, bool(r.origin), r.origin and r.origin[0], r.note)
                    for r in rows
                ],
            )

    def origins(self, target: str, generation: int) -> dict[str, Origin]:
        """Of every name that a patch has touched, as of this generation. Two generations differ by a patch
        where these do; everything else is the program's own."""
        origins: dict[str, Origin] = {
            path: (row.origin,) for path, row in self.files(target, generation).items()
        }
        origins.update({path: row.origin for path, row in self.kept(target, generation).items()})
        return {path: origin for path, origin in origins.items() if origin is not None}

    def files_with(self, sha256: str) -> list[tuple[str, int, str]]:
        """Where a content should be: target, generation and path of each file that has it."""
        rows = self._all("SELECT target, generation, path FROM files WHERE sha256 = ?", sha256)
        return [(row["target"], row["generation"], row["path"]) for row in rows]

    def set_identity(self, target: str, generation: int, path: str, identity: str) -> None:
        with self.write() as sql:
            sql.execute(
                "UPDATE files SET identity = ? WHERE target = ? AND generation = ? AND path = ?",
                (identity, target, generation, path),
            )

    # --- transactions ---------------------------------------------------------------------------------------

    def add_transaction(
        self,
        *,
        action: str,
        facts: Mapping[str, Any],
        asked_by: str,
        sources: Mapping[str, int],
        started: float,
        by_hand: bool = False,
    ) -> int:
        """A new transaction over the targets in `sources` (which generation each has now)."""
        facts = {k: audit.plain_text(v) if isinstance(v, str) else v for k, v in facts.items()}
        with self.write() as sql:
            cursor = sql.execute(
                "INSERT INTO transactions (action, patch, name, version, build, kind, floor, downgrade, "
                "phase, state, asked_by, started, by_hand) VALUES (:action, :patch, :name, :version, :build, "
                ":kind, :floor, :downgrade, :phase, :phase, :asked_by, :started, :by_hand)",
                {
                    "patch": None, "name": None, "version": None, "build": None, "kind": None, "floor": None,
                    "downgrade": False, **facts, "action": action, "phase": Phase.BEGUN.value,
                    "asked_by": asked_by, "started": started, "by_hand": by_hand,
                },
            )  # fmt: skip
            txn = cursor.lastrowid
            assert txn is not None
            sql.executemany(
                "INSERT INTO parts (txn, target, source) VALUES (?, ?, ?)",
                [(txn, target, source) for target, source in sources.items()],
            )
        return txn

    def transaction(self, txn: int) -> TransactionRow:
        row = self._one("SELECT * FROM transactions WHERE txn = ?", txn)
        if row is None:
            raise PatchNotFoundError(f"there is no transaction {txn}", txn=txn)
        return _transaction(row)

    def open_transactions(self, target: str | None = None) -> list[TransactionRow]:
        """Those that hold targets; of one target at most one."""
        marks = ", ".join("?" * len(OPEN_PHASES))
        only = "" if target is None else "AND txn IN (SELECT txn FROM parts WHERE target = ?)"
        values: tuple[object, ...] = (*OPEN_PHASES, *(() if target is None else (target,)))
        rows = self._all(
            f"SELECT * FROM transactions WHERE phase IN ({marks}) {only} ORDER BY txn",
            *values,
        )
        return [_transaction(row) for row in rows]

    def unfinished_transactions(self) -> list[TransactionRow]:
        """Those that recovery has to look at: open ones, committed ones with things left to tidy, and those
        without a verdict."""
        rows = self._all(
            "SELECT * FROM transactions WHERE phase != ? AND NOT (phase = ? AND cleaned) OR verdict IS NULL "
            "ORDER BY txn",
            Phase.ABORTED,
            Phase.COMMITTED,
        )
        return [_transaction(row) for row in rows]

    def untidy_transactions(self, target: str) -> list[TransactionRow]:
        """Confirmed ones of a target that have left things behind."""
        rows = self._all(
            "SELECT * FROM transactions WHERE phase = ? AND NOT cleaned "
            "AND txn IN (SELECT txn FROM parts WHERE target = ?) ORDER BY txn",
            Phase.COMMITTED,
            target,
        )
        return [_transaction(row) for row in rows]

    def transactions(self, target: str | None, limit: int) -> list[TransactionRow]:
        """The newest ones, newest first."""
        if target is None:
            rows = self._all("SELECT * FROM transactions ORDER BY txn DESC LIMIT ?", limit)
        else:
            rows = self._all(
                "SELECT * FROM transactions WHERE txn IN (SELECT txn FROM parts WHERE target = ?) "
                "ORDER BY txn DESC LIMIT ?",
                target,
                limit,
            )
        return [_transaction(row) for row in rows]

    def transactions_of_patch(self, prefix: str) -> list[TransactionRow]:
        """Those of patches whose id begins with `prefix` (hex digits), newest first."""
        rows = self._all(
            "SELECT * FROM transactions WHERE patch >= ? AND patch < ? ORDER BY txn DESC",
            prefix,
            prefix + "g",
        )
        return [_transaction(row) for row in rows]

    def apply_of_patch(self, patch: str) -> TransactionRow | None:
        """The newest transaction that applied a patch, by its whole id."""
        row = self._one(
            "SELECT * FROM transactions WHERE patch = ? AND action = 'apply' ORDER BY txn DESC LIMIT 1", patch
        )
        return None if row is None else _transaction(row)

    def advance(self, txn: int, phase: Phase, event: str) -> None:
        """A transaction has come to another phase. Not durable: recovery can tell it by the pointer."""
        with self.write(durable=False):
            self.update_transaction(txn, phase=phase)
            self.record(event, txn=txn)

    def update_transaction(
        self,
        txn: int,
        *,
        phase: Phase | None = None,
        state: str | None = None,
        verdict: str | None = None,
        error: str | None = None,
        code: str | None = None,
        ended: bool = False,
        cleaned: bool = False,
        durable: bool = True,
    ) -> None:
        """Change what is given; the first `ended` sets the time."""
        error = None if error is None else audit.plain_text(error)
        with self.write(durable=durable) as sql:
            sql.execute(
                "UPDATE transactions SET phase = coalesce(:phase, phase), "
                "state = coalesce(:state, :phase, state), verdict = coalesce(:verdict, verdict), "
                "error = coalesce(:error, error), code = coalesce(:code, code), "
                "cleaned = max(cleaned, :cleaned), "
                "ended = CASE WHEN :ended AND ended IS NULL THEN :now ELSE ended END WHERE txn = :txn",
                {
                    "phase": phase, "state": state, "verdict": verdict, "error": error, "code": code,
                    "cleaned": cleaned, "ended": ended, "now": time.time(), "txn": txn,
                },
            )  # fmt: skip

    def parts(self, txn: int) -> list[PartRow]:
        rows = self._all("SELECT * FROM parts WHERE txn = ? ORDER BY target", txn)
        return [
            PartRow(
                txn=row["txn"],
                target=row["target"],
                source=row["source"],
                destination=row["destination"],
                staged=bool(row["staged"]),
            )
            for row in rows
        ]

    def part(self, txn: int, target: str) -> PartRow:
        for row in self.parts(txn):
            if row.target == target:
                return row
        raise TargetNotFoundError(f"transaction {txn} has no part in {target}", target=target, txn=txn)

    def plan_part(self, part: PartRow, destination: int, changes: Sequence[ChangeRow]) -> None:
        """What is about to be done for one target; before anything is done, so that it can be undone."""
        with self.write() as sql:
            sql.execute(
                "UPDATE parts SET destination = ? WHERE txn = ? AND target = ?",
                (destination, part.txn, part.target),
            )
            sql.executemany(
                "INSERT OR REPLACE INTO changes VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (part.txn, part.target, c.position, c.path, c.op, c.note, c.adopts, c.seen)
                    for c in changes
                ],
            )

    def mark_staged(self, txn: int, target: str, seen: Mapping[int, str] | None = None) -> None:
        """The part is ready to be switched to; `seen`: identities that adoption has found anew. Durable with
        the next thing that is."""
        with self.write(durable=False) as sql:
            sql.execute("UPDATE parts SET staged = 1 WHERE txn = ? AND target = ?", (txn, target))
            sql.executemany(
                "UPDATE changes SET seen = ? WHERE txn = ? AND target = ? AND position = ?",
                [(identity, txn, target, position) for position, identity in (seen or {}).items()],
            )

    def changes(self, txn: int, target: str) -> list[ChangeRow]:
        rows = self._all(
            "SELECT position, path, op, note, adopts, seen FROM changes WHERE txn = ? AND target = ? "
            "ORDER BY position",
            txn,
            target,
        )
        return [ChangeRow(**{**dict(row), "adopts": bool(row["adopts"])}) for row in rows]

    # --- held patches, marks --------------------------------------------------------------------------------

    def hold(self, patch: str, reason: str) -> None:
        reason = audit.plain_text(reason)
        with self.write() as sql:
            sql.execute("INSERT OR REPLACE INTO held VALUES (?, ?, ?)", (patch, reason, timestamp()))
            self.record("patch.held", patch=patch, reason=reason)

    def held(self, patch: str) -> str | None:
        row = self._one("SELECT reason FROM held WHERE patch = ?", patch)
        return None if row is None else str(row["reason"])

    def all_held(self) -> dict[str, str]:
        """Every patch that is on hold, and why."""
        return {row["patch"]: row["reason"] for row in self._all("SELECT patch, reason FROM held")}

    def unhold(self, patch: str) -> None:
        if self.held(patch) is None:
            return
        with self.write() as sql:
            sql.execute("DELETE FROM held WHERE patch = ?", (patch,))
            self.record("patch.unheld", patch=patch)

    def marks(self, target: str) -> Marks | None:
        row = self._one("SELECT highest, floor FROM marks WHERE target = ?", target)
        return None if row is None else Marks(highest=row["highest"], floor=row["floor"])

    def all_marks(self) -> dict[str, Marks]:
        rows = self._all("SELECT target, highest, floor FROM marks")
        return {row["target"]: Marks(highest=row["highest"], floor=row["floor"]) for row in rows}

    def set_marks(self, target: str, marks: Marks) -> None:
        with self.write() as sql:
            sql.execute("INSERT OR REPLACE INTO marks VALUES (?, ?, ?)", (target, marks.highest, marks.floor))


def _wrong_version(path: Path, version: int) -> StateError:
    return StateError(
        f"{path} has schema version {version}, this asyncsup knows {SCHEMA_VERSION}", code="state.version"
    )


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    return connection


def _state_error(path: Path, error: sqlite3.Error) -> StateError:
    code = getattr(error, "sqlite_errorcode", None)
    if code == sqlite3.SQLITE_FULL:
        return StateError(f"{path}: {os.strerror(errno.ENOSPC)}", code="state.full")
    return StateError(f"{path}: {error}", code="state.database")


def _instances_of(target: str) -> tuple[str, str]:
    """What the names of its instances lie between; a target's name has no colon in it."""
    return f"{target}:", f"{target};"


def _target(row: sqlite3.Row) -> TargetRow:
    return TargetRow(
        name=row["name"],
        root=Path(row["root"]),
        layout=row["layout"],
        persist=tuple(json.loads(row["persist"])),
        confirmed=row["confirmed"],
        releasing=bool(row["releasing"]),
    )


def _generation(row: sqlite3.Row) -> GenerationRow:
    return GenerationRow(
        target=row["target"],
        number=row["number"],
        parent=row["parent"],
        build=row["build"],
        patch=row["patch"],
        txn=row["txn"],
        place=row["place"],
        state=row["state"],
        stamp=row["stamp"],
        made=tuple(json.loads(row["made"])),
    )


def _transaction(row: sqlite3.Row) -> TransactionRow:
    values = dict(row)
    values |= {name: bool(values[name]) for name in ("cleaned", "downgrade", "by_hand")}
    return TransactionRow(**{**values, "phase": Phase(values["phase"])})
