"""The audit: what is written down about every patch, and the chain that shows when it was changed. Pure.

A record is a line of canonical JSON (RFC 8785, numbers are integers) that carries the SHA-256 of the line
before it; ``docs/audit.md`` is the specification. Whoever changes, removes, inserts or moves a line breaks
the chain behind it, and `Examiner` says where. That the last lines were cut off is only seen by whoever knows
the hash of one of them: state.db notes the newest, and an operator can keep one elsewhere, as an anchor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Any, Final

import msgspec
import orjson

FORMAT: Final = "asyncsup.audit/1"
NOTHING_BEFORE: Final = "0" * 64
"""What the first record carries as the hash of the one before it."""

MAX_TEXT: Final = 16 << 10
"""Characters of one text in a record: what somebody else has worded must not fill the disk."""

MOST_FAULTS: Final = 100
"""No judgement lists more; it says how many there were."""


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """A record by its number and its hash: whoever knows it knows everything before it."""

    seq: int
    hash: str

    def to_json(self) -> dict[str, Any]:
        return {"seq": self.seq, "hash": self.hash}


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A record as it is kept: its line, and beside it what the line says or comes to.

    Attributes:
        txn: the transaction it is filed under.
        hash: None where nothing is kept beside the lines, as in an export.
    """

    seq: int
    txn: int | None
    line: bytes
    hash: str | None

    def to_json(self) -> dict[str, Any]:
        """With the line as it is, which is JSON itself, unless it was tampered with."""
        return {"seq": self.seq, "hash": self.hash, "line": self.line.decode(errors="replace")}


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is not as it was written; `seq` is the record where that shows."""

    code: str
    message: str
    seq: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {"code": self.code, "message": self.message, "seq": self.seq}


def encode(head: Head | None, event: str, at: str, fields: Mapping[str, Any]) -> bytes:
    """The line of the record that follows on `head`. Fields that are None are left out, durations (floats, in
    seconds) become integers of microseconds under a name that ends in ``_us``."""
    seq, before = (1, NOTHING_BEFORE) if head is None else (head.seq + 1, head.hash)
    return _canonical({**_plain(fields), "seq": seq, "prev": before, "at": at, "event": event})


def digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def decode(line: bytes) -> dict[str, Any] | None:
    """A record's fields; None for a line that no record can be."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) and _canonical(value) == line else None


def plain_text(text: str) -> str:
    """What can be written down of a text: a file's name in it may be any bytes, and it may have no end."""
    text = text[: MAX_TEXT + 1].encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"


def _canonical(value: Mapping[str, Any]) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            f"{key}_us" if isinstance(item, float) else key: _plain(item)
            for key, item in value.items()
            if item is not None
        }
    if isinstance(value, str):
        return plain_text(value)
    if isinstance(value, float):
        return round(value * 1e6)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


class Examiner:
    """Judges a chain, record by record.

    Args:
        anchors: hashes that were kept elsewhere; each must be one of the chain's.
    """

    def __init__(self, anchors: Collection[str] = ()) -> None:
        self.faults: list[Fault] = []
        self.count = 0
        self.head: Head | None = None
        self.last_at: str | None = None
        self._missing_anchors = dict.fromkeys(anchors)
        self._accepted: set[str] = {NOTHING_BEFORE}
        """What the next record may carry as the hash of the one before."""

    def take(self, row: Row) -> dict[str, Any] | None:
        """Judge the next record, in the order in which they are kept; its fields, where it can be read."""
        self.count += 1
        computed = digest(row.line)
        if row.hash is not None and row.hash != computed:
            self._fault(
                "audit.changed",
                f"record {row.seq} is not what was written: it has the hash {computed}, noted is {row.hash}",
                row.seq,
            )
        expected = 1 if self.head is None else self.head.seq + 1
        whole = row.seq == expected
        if row.seq > expected:
            self._fault("audit.missing", f"{_gone(expected, row.seq - 1)} missing", expected)
        elif row.seq < expected:
            self._fault("audit.order", f"record {row.seq} stands behind record {expected - 1}", row.seq)
        fields = decode(row.line)
        if fields is None:
            if row.hash is None or row.hash == computed:
                self._fault("audit.changed", f"record {row.seq} is no record", row.seq)
        else:
            self._check_fields(row, fields, whole=whole)
        self._accepted = {computed} if row.hash is None else {computed, row.hash}
        self.head = Head(seq=row.seq, hash=computed)
        self._missing_anchors.pop(computed, None)
        return fields

    def _check_fields(self, row: Row, fields: Mapping[str, Any], *, whole: bool) -> None:
        if fields.get("seq") != row.seq:
            self._fault("audit.order", f"record {fields.get('seq')!r} stands where {row.seq} should", row.seq)
        elif whole and str(fields.get("prev")) not in self._accepted:
            before = f"record {row.seq - 1}" if row.seq > 1 else "nothing, as the first one should"
            self._fault("audit.chain", f"record {row.seq} does not follow on {before}", row.seq)
        if fields.get("txn") != row.txn:
            self._fault(
                "audit.filed",
                f"record {row.seq} is filed under transaction {row.txn}, it is of {fields.get('txn')}",
                row.seq,
            )
        at = fields.get("at")
        self.last_at = at if isinstance(at, str) else self.last_at

    def finish(self) -> None:
        """All records have been taken."""
        if self.head is None:
            self._fault("audit.missing", "there is no record at all")
        for anchor in self._missing_anchors:
            self._fault(
                "audit.anchor",
                f"no record has the hash {anchor}: the chain was cut off before it, or written anew",
            )

    def compare(self, noted: Head | None) -> None:
        """Whether the last record is the one that was noted, apart from the chain, as the newest."""
        last = 0 if self.head is None else self.head.seq
        if noted is None:
            self._fault("audit.head", "which record is the newest is not noted any more")
        elif noted.seq > last:
            self._fault("audit.truncated", f"{_gone(last + 1, noted.seq)} missing from the end", last + 1)
        elif noted != self.head and not any(fault.seq == last for fault in self.faults):
            self._fault(
                "audit.head",
                f"the last record is {last}, but noted as the newest is {noted.seq}, hash {noted.hash}",
                last,
            )

    def _fault(self, code: str, message: str, seq: int | None = None) -> None:
        self.faults.append(Fault(code=code, message=message, seq=seq))


def _gone(first: int, last: int) -> str:
    return f"record {first} is" if first == last else f"records {first} to {last} are"
