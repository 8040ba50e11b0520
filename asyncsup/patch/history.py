"""What was done to targets, read back: the transactions, and the audit's records of them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

from asyncsup.errors import PatchNotFoundError, UsageError
from asyncsup.patch import audit
from asyncsup.patch.audit import Head, Row
from asyncsup.patch.database import Phase, TransactionRow, timestamp
from asyncsup.patch.ledger import Judgement, examine_state, read_records
from asyncsup.patch.statedir import StateDirectory

MIN_PREFIX: Final = 4
"""Hex digits it takes to name a patch."""


class History:
    """Reads what one state directory remembers. Where the audit is read, what was noted is written first."""

    def __init__(self, state: StateDirectory) -> None:
        self._state = state
        self._database = state.database

    def head(self) -> Head:
        """The newest record of the audit, with everything noted so far, durable: it may be told to others."""
        self._database.write_notes()
        found = self._database.head()
        assert found is not None, "a chain begins with the database"
        return found

    def examine(self, anchors: Sequence[str] = ()) -> Judgement:
        """Whether the audit is as it was written, and the rest of the database as the audit says.

        Args:
            anchors: hashes of records that were kept elsewhere.
        """
        self._database.write_notes()
        return examine_state(self._state.path, anchors)

    def records(self, *, after: int | None = None, txn: int | None = None, limit: int) -> list[Row]:
        """Records of the audit, as `read_records`."""
        self._database.write_notes()
        return read_records(self._database, after=after, txn=txn, limit=limit)

    def latest(self, target: str | None = None, limit: int = 50) -> list[dict[str, Any]]:
        """The newest transactions, newest first."""
        return [self._describe(row) for row in self._database.transactions(target, limit)]

    def transaction(self, txn: int) -> dict[str, Any]:
        """One transaction, with ``steps``, ``files``, ``request`` (who asked for what, and what was decided
        before it began) and ``audit`` (the records about it).

        Raises:
            PatchNotFoundError: there is none of that number.
        """
        row = self._database.transaction(txn)
        self._database.write_notes()
        records = [(found, audit.decode(found.line) or {}) for found in self._database.records(txn=txn)]
        files = []
        for part in self._database.parts(txn):
            files += [
                {"target": part.target, "path": change.path, "op": change.op, "note": change.note}
                for change in self._database.changes(txn, part.target)
            ]
            if part.destination is not None:
                files += [
                    {"target": part.target, "path": kept.path, "op": "keep", "note": kept.note}
                    for kept in self._database.kept(part.target, part.destination).values()
                    if kept.txn == txn
                ]
        return {
            **self._describe(row),
            "request": next((_request(fields) for _, fields in records if "asked_by" in fields), {}),
            "steps": [_step(fields) for _, fields in records if fields.get("event") == "txn.step"],
            "files": files,
            "audit": _span([found for found, _ in records]),
        }

    def is_undone(self, txn: int) -> bool:
        """Whether a transaction was taken back; not so if it is not known."""
        try:
            return self._database.transaction(txn).phase is Phase.ABORTED
        except PatchNotFoundError:
            return False

    def find(self, reference: str) -> dict[str, Any]:
        """A transaction by its number, or the newest of a patch by the beginning of its id.

        Raises:
            PatchNotFoundError: there is none.
            UsageError: the beginning fits several patches.
        """
        reference = reference.strip().lower()
        if reference.isdecimal() and len(reference) < MIN_PREFIX * 3:
            with contextlib.suppress(PatchNotFoundError):
                return self.transaction(int(reference))
        if len(reference) < MIN_PREFIX or not set(reference) <= set("0123456789abcdef"):
            raise PatchNotFoundError(
                f"{reference!r} is neither the number of a transaction nor the beginning ({MIN_PREFIX} hex "
                "digits or more) of a patch id",
                reference=reference,
            )
        found = self._database.transactions_of_patch(reference)
        if not found:
            raise PatchNotFoundError(f"no patch {reference} was ever applied here", reference=reference)
        patches = sorted({row.patch or "" for row in found})
        if len(patches) > 1:
            raise UsageError(
                f"{reference} fits {len(patches)} patches: {', '.join(patch[:16] for patch in patches)}",
                patches=patches,
            )
        return self.transaction(found[0].txn)

    def _describe(self, row: TransactionRow) -> dict[str, Any]:
        return {
            "txn": row.txn,
            "action": row.action,
            "patch": row.patch,
            "name": row.name,
            "version": row.version,
            "build": row.build,
            "kind": row.kind,
            "targets": [part.target for part in self._database.parts(row.txn)],
            "state": row.state,
            "verdict": row.verdict,
            "started": timestamp(row.started),
            "took": None if row.ended is None else round(max(0.0, row.ended - row.started), 6),
            "asked_by": row.asked_by,
            "error": row.error,
            "code": row.code,
        }

    # --- helpers --------------------------------------------------------------------------------------------


def _request(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Who asked for what, and what was decided, out of the first record of a transaction."""
    return {key: fields[key] for key in ("by", "package", "trust", "wish", "gates") if key in fields}


def _span(records: Sequence[Row]) -> dict[str, Any] | None:
    """Which records are about a transaction."""
    if not records:
        return None
    return {
        "first": records[0].seq,
        "last": records[-1].seq,
        "count": len(records),
        "hash": records[-1].hash,
    }


def _step(fields: Mapping[str, Any]) -> dict[str, Any]:
    took = fields.get("took_us")
    named = {key: fields.get(key) for key in ("seq", "at", "step", "target", "instance", "detail")}
    return {**named, "took": None if took is None else took / 1e6}


def may_be_called(reference: str) -> bool:
    """Whether it looks like a transaction's number, or the beginning of a patch's id."""
    text = reference.strip().lower()
    return text.isdecimal() or (len(text) >= MIN_PREFIX and set(text) <= set("0123456789abcdef"))


def is_called(reference: str, txn: int | None, patch: str | None) -> bool:
    """Whether a transaction is meant: by its number, or the beginning of its patch's id."""
    return reference == str(txn) or (len(reference) >= MIN_PREFIX and (patch or "").startswith(reference))
