"""What the store is to remember of a request that has ended, and what it is to forget.

What has become of the targets is settled by then, and nothing that goes wrong here may be reported as if it
had not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeGuard

import anyio
import anyio.to_thread

from asyncsup.actor import Actor
from asyncsup.errors import (
    AsyncsupError,
    CancelledByRequestError,
    PatchError,
    PatchRolledBackError,
    PatchUndecidedError,
    RollbackFailedError,
)
from asyncsup.patch.audit import Head
from asyncsup.patch.facts import INTERRUPTED, PatchInfo, Undecided
from asyncsup.patch.jobs import Job, Outcome
from asyncsup.patch.report import Report, Verdict, gate_json, verdict_of
from asyncsup.patch.store import Store
from asyncsup.patch.transaction import Transaction

log = logging.getLogger("asyncsup.patch")

Written = tuple[list[Exception], Head | None]
"""What failed, and the audit's last record of the transaction, if it was written."""


class Bookkeeping:
    """Writes down in one store. What blocks is for worker threads.

    Args:
        keep: how many generations are kept on the way back.
    Attributes:
        undecided: the transactions that wait for somebody to decide about them, by number.
    """

    def __init__(self, store: Store, keep: Callable[[], int]) -> None:
        self._store = store
        self._keep = keep
        self.undecided: dict[int, Undecided] = {}
        self._look_for_undecided()

    async def attempted(self, job: Job, outcome: Outcome) -> None:
        """Nothing was begun, but it was asked for, and by whom and why it came to nothing is remembered."""
        error = outcome if isinstance(outcome, AsyncsupError) else None
        answer: dict[str, Any] = outcome if isinstance(outcome, dict) else outcome.details["report"]
        facts = {key: answer[key] for key in ("patch", "name", "version", "build", "kind")}
        write = partial(
            self._store.write_down_attempt,
            action=job.report.action,
            patch=facts,
            targets=job.targets,
            asked_by=job.report.asked_by,
            verdict=answer["verdict"],
            error=error.message if error is not None else None,
            code=error.error_code if error is not None else None,
            request={**job.request, "gates": gates_of(job.report)},
            took=answer["took"],
        )
        try:
            with anyio.CancelScope(shield=True):
                answer["txn"] = await anyio.to_thread.run_sync(write)
                answer["audit"] = (await anyio.to_thread.run_sync(self._store.history.head)).to_json()
        except AsyncsupError as failure:
            log.error("what was asked for could not be written down: %s", failure.message)  # noqa: TRY400 - foreseen

    def hold_first(self, job: Job, patch: str, why: AsyncsupError | str) -> None:
        """Put a patch on hold before it is undone: whatever cuts that short, it will not be tried again."""
        if isinstance(why, AsyncsupError):
            if why.error_code == CancelledByRequestError.code:
                return  # somebody merely stopped it
            why = why.message
        try:
            self._store.hold(patch, why)
            job.held = True
        except (OSError, AsyncsupError) as failure:
            log.error("patch %s: not on hold yet: %s", patch[:12], failure)  # noqa: TRY400 - foreseen

    def ended(
        self,
        job: Job,
        transaction: Transaction,
        verdict: Verdict,
        error: AsyncsupError | None,
        info: PatchInfo | None,
    ) -> Written:
        """A transaction has been carried out, or was undone.

        Args:
            info: of the patch that was to be applied.
        """
        facts = {"instances": _answers(transaction)}
        todo: list[Callable[[], object]] = []
        if isinstance(error, PatchUndecidedError):
            cause = error.__cause__
            assert isinstance(cause, AsyncsupError)
            todo.append(
                partial(
                    self._store.leave_undecided,
                    transaction.txn,
                    error=cause.message,
                    code=cause.error_code,
                    facts=facts,
                )
            )
        else:
            if _is_the_patchs_fault(error) and info is not None and not job.held:
                # First, so that one that is known to have ended is also known to be on hold.
                todo.append(partial(self._store.hold, info.id, error.message))
            todo.append(
                partial(
                    self._store.finish,
                    transaction.txn,
                    verdict=verdict,
                    error=error.message if error else None,
                    code=error.error_code if error else None,
                    facts=facts,
                )
            )
        if verdict == "committed":
            targets = [participant.target.name for participant in transaction.change.participants]
            todo += self._to_let_go(None if info is None else info.id, targets)
        return self._do_all(transaction, todo)

    def decided(
        self,
        job: Job,
        transaction: Transaction,
        undecided: Undecided,
        verdict: Verdict,
        error: AsyncsupError | None,
    ) -> Written:
        """Somebody has decided about an undecided transaction, and `error` says what went wrong with that."""
        txn = undecided.txn
        facts, code, why = {"instances": _answers(transaction)}, undecided.code, undecided.error
        todo: list[Callable[[], object]] = []
        if error is not None and self._is_undecided(txn):
            why = f"{why}; and then: {error.message}"
            todo.append(partial(self._store.leave_undecided, txn, error=why, code=code, facts=facts))
        else:
            if verdict == "rolled_back" and code != INTERRUPTED and not job.held:
                todo.append(partial(self._store.hold, undecided.patch, why))
            outcome = verdict if error is None else verdict_of(error)
            todo.append(partial(self._store.finish, txn, verdict=outcome, error=why, code=code, facts=facts))
            if verdict == "committed":
                todo += self._to_let_go(undecided.patch, undecided.targets)
        return self._do_all(transaction, todo)

    def _is_undecided(self, txn: int) -> bool:
        try:
            return any(each.txn == txn for each in self._store.undecided())
        except (OSError, AsyncsupError) as failure:
            log.error("transaction %d: %s", txn, failure)  # noqa: TRY400 - foreseen
            return True  # as it was before; whoever decides again will see

    def _do_all(self, transaction: Transaction, todo: Sequence[Callable[[], object]]) -> Written:
        failures: list[Exception] = []
        head: Head | None = None
        for do in (*todo, self._look_for_undecided, self._store.history.head):
            try:
                done = do()
                head = done if isinstance(done, Head) else None
            except (OSError, AsyncsupError) as failure:
                log.error("transaction %d: %s", transaction.txn, failure)  # noqa: TRY400 - foreseen
                failures.append(failure)
        return failures, head

    def _look_for_undecided(self) -> None:
        self.undecided = {each.txn: each for each in self._store.undecided()}

    def _to_let_go(self, patch: str | None, targets: Sequence[str]) -> list[Callable[[], object]]:
        """Of what a patch that is committed makes superfluous."""
        keep, by = self._keep(), Actor(via="supervisor").to_json()
        todo: list[Callable[[], object]] = [partial(self._store.prune, name, keep, by=by) for name in targets]
        return todo if patch is None else [partial(self._store.unhold, patch), *todo]


def _answers(transaction: Transaction) -> list[dict[str, Any]]:
    """What became of every instance, for the audit."""
    participants = transaction.change.participants
    return [record.to_json() for each in participants for record in each.records.values()]


def gates_of(report: Report) -> list[dict[str, Any]]:
    """What was decided about each target, for the audit."""
    return [
        {
            "target": part.target.name,
            "build": part.build_before,
            "gates": [gate_json(gate) for gate in part.assessment.gates],
        }
        for part in report.parts
        if part.assessment.gates
    ]


def _is_the_patchs_fault(error: AsyncsupError | None) -> TypeGuard[PatchError]:
    """Whether an undone patch must not be tried again as it is; not when somebody merely stopped it."""
    undone = isinstance(error, PatchRolledBackError | RollbackFailedError)
    return undone and error is not None and error.details.get("cause") != "request.cancelled"
