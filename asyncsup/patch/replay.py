"""What the audit says the rest of state.db should hold. Pure.

The history, the patches on hold and the marks are in tables of their own, which the chain does not cover. But
every change of them is written down together with it; so going through the records finds out who has changed
them behind the supervisor's back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any, Final

from asyncsup.patch.audit import Fault
from asyncsup.patch.marks import Marks, raised

Facts = dict[str, Any]

_ASKED: Final = ("action", "patch", "name", "version", "build", "kind", "asked_by", "floor")
_ENDED: Final = ("verdict", "error", "code")
COMPARED: Final = (*_ASKED, "downgrade", *_ENDED, "committed")
"""What is compared of each transaction."""


class Replay:
    """Goes through the records, and compares what they come to with what there is."""

    def __init__(self) -> None:
        self._transactions: dict[int, Facts] = {}
        self._held: set[str] = set()
        self._marks: dict[str, Marks] = {}
        self._latest: datetime | None = None

    def take(self, fields: Mapping[str, Any]) -> None:
        """The next record."""
        event, txn = str(fields.get("event")), fields.get("txn")
        at = _time(fields.get("at"))
        if self._latest is None or event == "clock.trusted" or (at is not None and at > self._latest):
            self._latest = at
        if event == "patch.held":
            self._held.add(str(fields.get("patch")))
        elif event == "patch.unheld":
            self._held.discard(str(fields.get("patch")))
        elif isinstance(txn, int):
            known = self._transactions.setdefault(txn, {})
            self._take_transaction(event, known, fields)

    def _take_transaction(self, event: str, known: Facts, fields: Mapping[str, Any]) -> None:
        if event in {"txn.begun", "txn.attempted"}:
            known |= {**dict.fromkeys(COMPARED), "downgrade": False, "committed": False}
            known |= {key: fields[key] for key in (*_ASKED, "downgrade") if key in fields}
        if event == "txn.confirmed":
            known |= {"committed": True, "verdict": "committed"}
            if known.get("action") == "apply":
                self._raise_marks(known, fields)
        if event == "txn.switched_back":
            known["committed"] = False
        if event in {"txn.attempted", "txn.undecided", "txn.undone", "txn.ended"}:
            known |= {key: fields[key] for key in _ENDED if key in fields}

    def _raise_marks(self, known: Facts, fields: Mapping[str, Any]) -> None:
        targets, floor = fields.get("targets"), known["floor"]
        for each in targets if isinstance(targets, list) else ():
            # A record that was forged may hold anything.
            if isinstance(each, dict) and isinstance(build := each.get("build"), int):
                name = str(each.get("target"))
                self._marks[name] = raised(
                    self._marks.get(name),
                    build,
                    floor=floor if isinstance(floor, int) else None,
                    downgrade=bool(known["downgrade"]),
                )

    def compare(
        self,
        transactions: Mapping[int, Mapping[str, Any]],
        held: Mapping[str, str],
        marks: Mapping[str, Marks],
        clock: datetime | None,
    ) -> list[Fault]:
        """What is not as the records say it should be.

        Args:
            transactions: the history, by number; of each what is in `COMPARED`.
            clock: the latest time that is remembered; None where that is no time.
        """
        faults = [
            *self._compare_transactions(transactions),
            *self._compare_held(held),
            *self._compare_marks(marks),
        ]
        # Records have milliseconds.
        if self._latest is not None and clock is not None and clock < self._latest - timedelta(seconds=0.001):
            message = f"the latest time is remembered as {clock}, by the records it is {self._latest}"
            faults.append(Fault(code="audit.clock", message=message))
        return faults

    def _compare_transactions(self, rows: Mapping[int, Mapping[str, Any]]) -> Iterator[Fault]:
        for txn in sorted(self._transactions.keys() | rows.keys()):
            should, row = self._transactions.get(txn), rows.get(txn)
            if row is None:
                yield Fault(code="audit.history", message=f"transaction {txn} is missing from the history")
            elif should is None:
                yield Fault(code="audit.history", message=f"no record knows of transaction {txn}")
            else:
                for key in COMPARED:
                    if row[key] != should.get(key):
                        message = (
                            f"transaction {txn} has {key} = {row[key]!r} in the history, by the records "
                            f"it is {should.get(key)!r}"
                        )
                        yield Fault(code="audit.history", message=message)

    def _compare_held(self, held: Mapping[str, str]) -> Iterator[Fault]:
        for patch in sorted(self._held - held.keys()):
            message = f"patch {patch} was on hold, and is not any more without anybody having let it go"
            yield Fault(code="audit.held", message=message)
        for patch in sorted(held.keys() - self._held):
            yield Fault(code="audit.held", message=f"patch {patch} is on hold, and no record says why")

    def _compare_marks(self, marks: Mapping[str, Marks]) -> Iterator[Fault]:
        for name in sorted(self._marks.keys() | marks.keys()):
            should, there = self._marks.get(name), marks.get(name)
            if should != there:
                message = (
                    f"the highest build of {name} is remembered as {there or 'none'}, by the records it is "
                    f"{should or 'none'}"
                )
                yield Fault(code="audit.marks", message=message)


def _time(text: object) -> datetime | None:
    try:
        time = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return time if time.tzinfo is not None else None
