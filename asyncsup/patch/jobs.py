"""What is under way: each apply and each rollback is a job, in a task of its own.

It is finished, also on disk, whatever becomes of the client that asked for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import anyio
import anyio.abc
import msgspec

from asyncsup.errors import (
    AsyncsupError,
    PatchError,
    PatchNotFoundError,
    PatchTargetRefusedError,
    ShuttingDownError,
    TargetBusyError,
    UsageError,
)
from asyncsup.patch.history import is_called
from asyncsup.patch.report import Report, verdict_of
from asyncsup.patch.transaction import Transaction, io_failed

log = logging.getLogger("asyncsup.patch")

Outcome = dict[str, Any] | AsyncsupError
"""Of a job: its report, or why it failed, with the report in the error's details."""


class Job(msgspec.Struct, eq=False):
    """An apply or a rollback under way.

    Attributes:
        answer: what the client is told: the report, also of a patch that waits for its commit.
        end: the report at the end.
        request: who asked for what, and what was decided so far; for the audit.
    """

    report: Report
    request: dict[str, Any]
    answer: asyncio.Future[dict[str, Any]]
    end: asyncio.Future[dict[str, Any]]
    scope: anyio.CancelScope = msgspec.field(default_factory=anyio.CancelScope)
    transaction: Transaction | None = None
    targets: Sequence[str] = ()
    because: str = "cancelled"
    held: bool = False
    """Its patch is on hold already, since before it was undone."""
    inbox_name: str | None = None
    """The package's, if it lies in the inbox."""
    inbox_file: tuple[int, ...] | None = None
    """The package itself, to know it again (`intake.identity_of`); None if that is not known."""
    outlasted: bool = False
    """The supervisor began to end while it was under way, and nobody else had ended it."""

    def cancel(self, because: str) -> None:
        log.info("%s %s: to be ended, %s", self.report.action, self.report.txn or "(not begun)", because)
        self.because = because
        if self.transaction is not None:
            self.transaction.cancel_reason = because
            self.transaction.rest.cancel()
        self.scope.cancel()

    def is_called(self, reference: str) -> bool:
        """Whether it is meant: by its transaction's number, the beginning of its patch's id, or (all that is
        known while that is still being computed) the name of the package's file."""
        return reference == self.report.file or is_called(reference, self.report.txn, self.report.patch)

    @property
    def shown_as(self) -> str:
        """What somebody can call it by."""
        report = self.report
        if report.txn is not None:
            return str(report.txn)
        return report.file or (report.patch or "")[:12] or f"one for {report.asked_by}, still to be verified"

    @property
    def waits_for_commit(self) -> bool:
        return self.transaction is not None and self.transaction.waits_for_commit

    def resolve(self, outcome: Outcome) -> None:
        """It has ended: whoever waits for it is told."""
        for future in (self.end, self.answer):
            if future.done():
                continue
            if isinstance(outcome, AsyncsupError):
                future.set_exception(outcome)
                future.exception()  # whoever wants it asks again; nobody has to
            else:
                future.set_result(outcome)


class Jobs:
    """All jobs of one supervisor.

    Args:
        unbegun: writes down what became of a job whose transaction was never begun.
    """

    def __init__(
        self, tasks: anyio.abc.TaskGroup, unbegun: Callable[[Job, Outcome], Awaitable[None]]
    ) -> None:
        self._tasks = tasks
        self._unbegun = unbegun
        self._jobs: set[Job] = set()
        self._refusing = False

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs)

    def has_package(self, name: str) -> bool:
        """Whether a package of the inbox is being applied, or waits for its turn or its commit."""
        return any(job.inbox_name == name for job in self._jobs)

    def uncommitted(self, target: str) -> int | None:
        """The number of the patch on a target that waits for `commit` or `abort`."""
        for job in self._jobs:
            if job.waits_for_commit and any(part.target.name == target for part in job.report.parts):
                return job.report.txn
        return None

    def refuse_new(self) -> None:
        """The supervisor ends: take no new patch. Those under way are ended by the stop of their targets."""
        self._refusing = True
        for job in self._jobs:
            job.outlasted = not job.scope.cancel_called

    def let_go(self) -> None:
        """The tasks of the supervisor end, and with them whoever would bring a job to its end."""
        for job in self._jobs:
            if job.transaction is not None:
                job.transaction.rest.shield = False

    def refuse_while_patching(self) -> None:
        """Raises TargetBusyError when a patch is under way."""
        for job in self._jobs:
            which = job.report.file or job.report.patch or "a patch"
            raise TargetBusyError(f"{which} is under way (transaction {job.report.txn}); nothing has changed")

    async def finished(self) -> None:
        """Wait until every job has ended and been written down."""
        while self._jobs:
            await asyncio.wait([job.end for job in self._jobs])

    def new(self, report: Report, request: dict[str, Any]) -> Job:
        """Take one on; `start` it next.

        Raises:
            ShuttingDownError: none are taken any more.
        """
        if self._refusing:
            raise ShuttingDownError("the supervisor is stopping and takes no new patch")
        loop = asyncio.get_running_loop()
        job = Job(report, request, loop.create_future(), loop.create_future())
        self._jobs.add(job)
        return job

    def start(
        self,
        job: Job,
        work: Callable[[], Awaitable[dict[str, Any]]],
        settle: Callable[[Outcome], Awaitable[None]] | None = None,
    ) -> None:
        """Have its work done, which returns the report, and then what is to be done after it."""
        self._tasks.start_soon(self._finish, job, work, settle)

    def find(self, reference: str, verb: str) -> Job:
        """The job that is meant: of several that wait with the same patch, the one that has begun.

        Raises:
            PatchNotFoundError, UsageError: there is none, or several.
        """
        called = [job for job in self._jobs if job.is_called(reference)]
        begun = [job for job in called if job.transaction is not None]
        waiting = [job for job in begun if job.waits_for_commit]
        found = (waiting if verb == "commit" else []) or begun or called
        if len(found) > 1:
            which = ", ".join(
                f"transaction {job.report.txn}"
                if job.report.txn is not None
                else f"one for {job.report.asked_by}"
                for job in found
            )
            raise UsageError(
                f"{len(found)} patches under way are called {reference}: {which}", code="patch.several"
            )
        if not found:
            under_way = ", ".join(sorted(job.shown_as for job in self._jobs))
            raise PatchNotFoundError(
                f"there is no patch {reference} to {verb}; under way: {under_way or 'none'}", id=reference
            )
        return found[0]

    async def answer(self, job: Job) -> dict[str, Any]:
        """Wait for what the client is to be told; a client that gives up before takes its patch with it."""
        try:
            return await asyncio.shield(job.answer)
        except asyncio.CancelledError:
            job.cancel("its client gave up")
            with anyio.CancelScope(shield=True):
                await asyncio.wait([job.end])
            raise

    async def _finish(
        self,
        job: Job,
        work: Callable[[], Awaitable[dict[str, Any]]],
        settle: Callable[[Outcome], Awaitable[None]] | None,
    ) -> None:
        """Do the work of a job, tidy up after it, and resolve its futures, whatever happens."""
        outcome: Outcome
        try:
            try:
                outcome = await self._until_cancelled(job, work)
            except AsyncsupError as error:
                outcome = error
            except OSError as error:
                outcome = io_failed(error)
            except Exception as error:
                log.exception("a patch failed unexpectedly")
                outcome = PatchError(f"{type(error).__name__}: {error}", code="internal")
            if isinstance(outcome, AsyncsupError):
                outcome.details.setdefault("report", job.report.to_json(verdict_of(outcome), outcome))
            if job.report.txn is None:
                await _done_after(self._unbegun(job, outcome))
            if settle is not None:
                await _done_after(settle(outcome))
            job.resolve(outcome)
        finally:
            for future in (job.end, job.answer):
                future.cancel()  # unless it is resolved: the supervisor itself is being torn down
            self._jobs.discard(job)

    async def _until_cancelled(
        self, job: Job, work: Callable[[], Awaitable[dict[str, Any]]]
    ) -> dict[str, Any]:
        with job.scope:
            return await work()
        raise PatchTargetRefusedError(
            f"ended before anything was changed: {job.because}", code="request.cancelled"
        )


async def _done_after(work: Awaitable[None]) -> None:
    """The patch is over by then: nothing that goes wrong keeps its client from hearing so, or ends others."""
    try:
        await work
    except Exception:
        log.exception("not everything was done after a patch")
