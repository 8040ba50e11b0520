"""Patches that have failed after the switch and wait for somebody to decide: keep them, or take them back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import anyio
import anyio.to_thread

from asyncsup.errors import AsyncsupError, PatchNotFoundError
from asyncsup.patch.bookkeeping import Bookkeeping
from asyncsup.patch.execution import Execution, take_in
from asyncsup.patch.facts import INTERRUPTED, Undecided
from asyncsup.patch.history import is_called
from asyncsup.patch.jobs import Job
from asyncsup.patch.manifest import Kind
from asyncsup.patch.report import Verdict, staged_part, verdict_of
from asyncsup.patch.store import Store
from asyncsup.patch.transaction import Change
from asyncsup.patch.wish import Wish
from asyncsup.target import Target


class Decisions:
    """Those of one store that are to be made."""

    def __init__(self, store: Store, books: Bookkeeping, execution: Execution) -> None:
        self._store = store
        self._books = books
        self._execution = execution

    def on(self, target: str) -> int | None:
        """The number of the patch on a target that has failed and waits for somebody to decide about it."""
        undecided = self._books.undecided.values()
        return next((each.txn for each in undecided if target in each.targets), None)

    def find(self, reference: str) -> Undecided | None:
        """The undecided patch that a target, a transaction's number or the beginning of an id means."""
        for each in self._books.undecided.values():
            if reference in each.targets or is_called(reference, each.txn, each.patch):
                return each
        return None

    async def carry_out(
        self, undecided: Undecided, wish: Wish, keep: bool, job: Job, targets: Sequence[Target]
    ) -> Verdict:
        """Keep the patch of an undecided transaction, or take it back.

        Raises:
            PatchNotFoundError: it has been decided about meanwhile.
            RollbackFailedError: taking it back failed; if its files are still there, it stays undecided.
        """
        if undecided.txn not in self._books.undecided:
            raise PatchNotFoundError(f"transaction {undecided.txn} has been decided about meanwhile")
        files = (await anyio.to_thread.run_sync(self._store.history.transaction, undecided.txn))["files"]
        for target in targets:
            staged = next(part for part in undecided.parts if part.target == target.name)
            job.report.parts.append(
                staged_part(target, files, build_before=staged.build_before, build_after=staged.build_after)
            )
        participants = [part.participant for part in job.report.parts if part.participant is not None]
        change = Change(
            action="apply",
            kind=Kind(undecided.kind),
            patch=undecided.patch,
            probation=0.0,
            manual_commit=False,
            manual_rollback=True,
            total_bytes=0,
            participants=participants,
        )
        transaction = self._execution.transaction(undecided.txn, change, job)
        by = str(wish.actor)
        error: AsyncsupError | None = None
        try:
            if keep:
                await transaction.keep()
            else:
                if undecided.code != INTERRUPTED:
                    hold = partial(self._books.hold_first, job, undecided.patch, undecided.error)
                    with anyio.CancelScope(shield=True):
                        await anyio.to_thread.run_sync(hold)
                await transaction.take_back(f"asked for by {by}")
        except AsyncsupError as failure:
            error = failure
            raise
        finally:
            verdict: Verdict = "committed" if keep else "rolled_back"
            write_down = partial(self._books.decided, job, transaction, undecided, verdict, error)
            with anyio.CancelScope(shield=True):
                take_in(job, transaction, await anyio.to_thread.run_sync(write_down))
            transaction.publish(
                "patch.ended",
                verdict=verdict if error is None else verdict_of(error),
                audit=job.report.audit,
            )
        return verdict
