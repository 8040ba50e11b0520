"""What programs write while a transaction is under way: brought along to the next generation, and back."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Protocol

from asyncsup.errors import AsyncsupError
from asyncsup.patch.access import Access
from asyncsup.patch.database import PartRow
from asyncsup.patch.target_files import Carried

log = logging.getLogger("asyncsup.patch.store")


class Record(Protocol):
    """As `Store.record`."""

    def __call__(self, txn: int, step: str, *, target: str, detail: str) -> None: ...


class Carrying:
    """Carries for all transactions of one store, and knows what each has carried.

    Each way takes two steps: most is carried before the pointer moves, and what was written at the last
    moment follows right after it.
    """

    def __init__(self, access: Access, record: Record) -> None:
        self._access = access
        self._record = record
        self._carried: dict[tuple[int, str], Carried] = {}

    def carry(self, part: PartRow) -> list[str]:
        """Right before the switch; returns the paths."""
        carried = self._access.files(part.target).carry(part)
        self._carried[part.txn, part.target] = carried
        # A program's file names are any bytes; these are for people and for JSON.
        return [os.fsencode(path).decode(errors="replace") for path in carried.paths]

    def has_carried(self, part: PartRow) -> bool:
        return (part.txn, part.target) in self._carried

    def follow_up(self, part: PartRow) -> None:
        """Right after the switch."""
        carried = self._carried.pop((part.txn, part.target))
        late = self._access.files(part.target).follow_up(part, carried.seen)
        if late:
            self._record(part.txn, "carry", target=part.target, detail=f"{len(late)} files, late")

    def carry_back(self, parts: Sequence[PartRow]) -> list[tuple[PartRow, Carried]]:
        """Right before switching back; returns what `follow_back` is to be told."""
        done = []
        for part in parts:
            try:
                carried = self._access.files(part.target).carry_back(part)
            except (OSError, AsyncsupError) as error:
                self._leave(part, error)
                continue
            done.append((part, carried))
            if carried.paths:
                detail = f"{len(carried.paths)} files"
                self._record(part.txn, "carry back", target=part.target, detail=detail)
        return done

    def follow_back(self, carried: Sequence[tuple[PartRow, Carried]]) -> None:
        """Right after switching back."""
        for part, found in carried:
            try:
                late = self._access.files(part.target).follow_up(part, found.seen, back=True)
            except (OSError, AsyncsupError) as error:
                self._leave(part, error)
                continue
            if late:
                self._record(part.txn, "carry back", target=part.target, detail=f"{len(late)} files, late")

    def forget(self, part: PartRow) -> None:
        """The transaction is confirmed or undone."""
        self._carried.pop((part.txn, part.target), None)

    def _leave(self, part: PartRow, why: Exception) -> None:
        """Going back does not depend on what could not be brought along; it is said, and kept."""
        place = self._access.files(part.target).leave(part)
        detail = f"failed: {why}; all of it is in {place}"
        log.error("%s: carrying back what the program wrote %s", part.target, detail)
        self._record(part.txn, "carry back", target=part.target, detail=detail)
