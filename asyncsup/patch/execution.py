"""A job's transaction from its beginning in the store to its end: in the journal while it lasts, and written
down once it is over."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import anyio
import anyio.to_thread

from asyncsup.errors import AsyncsupError
from asyncsup.events import EventStream
from asyncsup.journal import Journal
from asyncsup.patch.bookkeeping import Bookkeeping, Written, gates_of
from asyncsup.patch.facts import PatchInfo
from asyncsup.patch.jobs import Job
from asyncsup.patch.relay import on_standing, record_of
from asyncsup.patch.report import Verdict, verdict_of
from asyncsup.patch.store import Store
from asyncsup.patch.transaction import Change, Standing, Transaction
from asyncsup.record import PatchRecord


class Execution:
    """Runs transactions on targets that the caller holds."""

    def __init__(self, store: Store, books: Bookkeeping, events: EventStream, journal: Journal) -> None:
        self._store = store
        self._books = books
        self._events = events
        self._journal = journal

    async def run(self, job: Job, change: Change, info: PatchInfo | None) -> None:
        """Begin a transaction, and carry it out.

        Args:
            info: of the patch, where one is applied.
        Raises:
            AsyncsupError: as `Store.begin` and `Transaction.run` do.
        """
        names = [participant.target.name for participant in change.participants]
        begin = partial(
            self._store.begin,
            action=change.action,
            patch=info,
            targets=names,
            asked_by=job.report.asked_by,
            request={**job.request, "gates": gates_of(job.report)},
            by_hand=change.manual_rollback,
        )
        with anyio.CancelScope(shield=True):
            txn = await anyio.to_thread.run_sync(begin)
        await self.see_through(job, txn, change, info, Transaction.run)

    async def see_through(
        self,
        job: Job,
        txn: int,
        change: Change,
        info: PatchInfo | None,
        way: Callable[[Transaction], Awaitable[None]],
    ) -> None:
        """Go the given way with a transaction that has begun, and write down what has become of it."""
        transaction = self.transaction(txn, change, job)
        transaction.on_uncommitted = partial(_tell_uncommitted, job)
        if info is not None:
            transaction.before_undo = partial(self._books.hold_first, job, info.id)
        record = record_of(job, txn, change)
        self._journal.put(f"transaction {txn}", record)
        transaction.on_standing = partial(self._keep_record, record, change)
        error: AsyncsupError | None = None
        try:
            await way(transaction)
        except AsyncsupError as failure:
            error = failure
            raise
        finally:
            verdict: Verdict = "committed" if error is None else verdict_of(error)
            write_down = partial(self._books.ended, job, transaction, verdict, error, info)
            with anyio.CancelScope(shield=True):
                take_in(job, transaction, await anyio.to_thread.run_sync(write_down))
            self._journal.drop(f"transaction {txn}")
            transaction.publish("patch.ended", verdict=verdict, audit=job.report.audit)

    def transaction(self, txn: int, change: Change, job: Job) -> Transaction:
        """The transaction of a job from here on."""
        for participant in change.participants:
            participant.enlist()
        transaction = Transaction(txn, change, self._store, self._events, asked_by=job.report.asked_by)
        transaction.cancel_reason = job.because
        if job.scope.cancel_called:
            transaction.rest.cancel()
        job.report.txn, job.report.steps, job.transaction = txn, transaction.steps, transaction
        return transaction

    def _keep_record(self, record: PatchRecord, change: Change, standing: Standing | None) -> None:
        self._journal.put(f"transaction {record.txn}", on_standing(record, change, standing))


def take_in(job: Job, transaction: Transaction, written: Written) -> None:
    """Have what was written down, and what could not be, in the report."""
    failures, head = written
    transaction.note_failures("write down", failures)
    job.report.audit = None if head is None else head.to_json()


def _tell_uncommitted(job: Job) -> None:
    if not job.answer.done():
        job.answer.set_result(job.report.to_json("uncommitted"))
