"""Letting go of generations that nobody needs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from asyncsup.failpoints import failpoint
from asyncsup.patch import bytecode, fs
from asyncsup.patch.database import Database, GenerationRow
from asyncsup.patch.statedir import StateDirectory


def prune(state: StateDirectory, target: str, keep: int, *, by: Mapping[str, Any] | None) -> list[int]:
    """Remove old generations, but for `keep` on the way back from the current one; while a transaction is
    open, from the one it began with, since it may yet be undone.

    Never one that is in use: the current one, those of an open transaction, those that a reader holds by
    a shared ``flock`` on the folder. Returns what was removed.

    Args:
        by: who asked, for the audit.
    """
    database = state.database
    state.sweep_discarded(target)
    rows = {row.number: row for row in database.generations(target)}
    number = state.number(target)
    kept = {number}
    for row in database.open_transactions(target):
        part = database.part(row.txn, target)
        number = part.source
        kept |= {part.source} | ({part.destination} if part.destination is not None else set())
    # What is left to tidy is known from what these hold.
    untidy = database.untidy_transactions(target)
    kept |= {database.part(row.txn, target).source for row in untidy}
    for _ in range(max(keep, 0)):
        parent = rows[number].parent
        if parent is None or parent not in rows:
            break
        kept.add(parent)
        number = parent
    pruned = []
    for number in sorted(rows.keys() - kept):
        record = partial(_record_pruned, database, rows[number], keep, by)
        if not state.exists(target, number):
            record()
        elif state.discard(target, number, before=record):
            pruned.append(number)
            failpoint("store.prune.discarded")
    return pruned


def _record_pruned(database: Database, row: GenerationRow, keep: int, by: Mapping[str, Any] | None) -> None:
    """Written down before anything is removed, so that no half of it is gone back to."""
    if row.state == "live" and row.place == "store":
        with database.write():
            database.update_generation(row.target, row.number, state="pruned")
            database.record(
                "target.pruned",
                target=row.target,
                generation=row.number,
                build=row.build,
                keep=keep,
                by=by,
            )
    failpoint("store.prune.recorded")


def sweep_generations(state: StateDirectory, target: str) -> None:
    """Remove generations that were dropped while a reader held them, and folders nobody knows of.

    Unless the database is an older copy, which knows less than there is.
    """
    database = state.database
    if database.find_generation(target, state.number(target)) is None:
        return
    live = {row.number for row in database.generations(target) if row.state == "live"}
    with fs.opened(state.generations(target)) as folder:
        found = {int(name) for name in fs.names(folder) if name.isdecimal()}
    for number in found - live:
        state.discard(target, number)
    bytecode.sweep(state.path, target, live)
