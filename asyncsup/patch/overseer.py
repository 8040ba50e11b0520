"""The Patch Overseer: from "here is a zip" to a report of what became of it.

Verifies, finds the targets, takes hold of them, asks the gates, runs the transaction, and says what happened.
Each apply and each rollback is a job in a task of its own: it is finished, also on disk, whatever becomes of
the client that asked for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeGuard

import anyio
import anyio.abc
import anyio.to_thread
import msgspec
from msgspec.structs import replace

from asyncsup.actor import Actor
from asyncsup.config import PatchLimits
from asyncsup.errors import (
    AllowedSignersError,
    AsyncsupError,
    CancelledByRequestError,
    PatchError,
    PatchMalformedError,
    PatchNotFoundError,
    PatchRefusedError,
    PatchRolledBackError,
    PatchTargetRefusedError,
    PatchUndecidedError,
    RequestError,
    RollbackFailedError,
    ShuttingDownError,
    TargetBusyError,
    TargetNotFoundError,
    TrustUnavailableError,
    UsageError,
)
from asyncsup.failpoints import step_failpoint
from asyncsup.patch import delta, fs
from asyncsup.patch.aftermath import bring_back
from asyncsup.patch.audit import Head
from asyncsup.patch.checksum import has_checksum, read_checksum
from asyncsup.patch.clock import SeenClock
from asyncsup.patch.facts import INTERRUPTED, PatchInfo, StagedTarget, Undecided
from asyncsup.patch.gates import Assessment, Gate, TargetFacts, assess, expiry_gate, files_gate, space_gate
from asyncsup.patch.history import MIN_PREFIX
from asyncsup.patch.manifest import Kind, Manifest
from asyncsup.patch.package import Package, open_package
from asyncsup.patch.plan import FilePlan, PlanError, Policy
from asyncsup.patch.prototype import with_root_name
from asyncsup.patch.report import (
    PackageView,
    Part,
    Report,
    Verdict,
    describe_package,
    file_json,
    gate_json,
    summary,
    verdict_of,
)
from asyncsup.patch.space import Need
from asyncsup.patch.transaction import Change, Participant, Progress, Standing, Transaction, io_failed
from asyncsup.patch.uploads import Uploads
from asyncsup.patch.way_back import Extent, Stacks, goals_of_patch, goals_of_target
from asyncsup.record import PartRecord, PatchRecord
from asyncsup.target import Target, hold_all

if TYPE_CHECKING:
    from asyncsup.patch.trust import Endorsement
    from asyncsup.supervisor import Supervisor

log = logging.getLogger("asyncsup.patch")

_TRUST_DETAILS: Final = ("required", "signers", "uncounted", "signature")
"""What an error about signatures says of them."""


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Where a package is, and what its checksum should be.

    Attributes:
        identity: of the file, to know it again: see `identity_of`.
        sidecar: ``sha256`` is what a file beside the package says, not whoever asks.
        in_inbox: it lies there, to be moved away once it has been dealt with.
    """

    path: Path
    sha256: str | None = None
    crc32: int | None = None
    sidecar: bool = False
    identity: tuple[int, ...] | None = None
    in_inbox: bool = False

    @property
    def checked_against(self) -> str | None:
        """What says that it is the package that is meant."""
        if self.sha256 is not None:
            return "sha256 beside it" if self.sidecar else "sha256"
        return None if self.crc32 is None else "crc32"


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What the sender of a patch wants besides having it applied.

    Attributes:
        target: the only target to patch, or the one that a prototype package is for.
        wait_busy: wait for targets that something else is being done to, instead of refusing.
        retry_held: apply it although it was rolled back before.
        trust_clock: the clock is right, whatever the time has been before.
        drift: what becomes of files that are not what the patch was made for; None: as configured.
    """

    actor: Actor
    target: str | None = None
    wait_busy: bool = True
    retry_held: bool = False
    trust_clock: bool = False
    drift: Policy | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "retry_held": self.retry_held,
            "trust_clock": self.trust_clock,
            "drift": self.drift,
        }

    def policy_for(self, target: Target) -> Policy:
        return target.config.patch.drift if self.drift is None else self.drift


class WayBack(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be taken back.

    Attributes:
        reference: a target; or a patch, by a transaction's number or the beginning of its id.
        extent: how far, for a target.
        only: on no other target, though what is taken back covers others.
        together: on every other target as well.
    """

    reference: str
    extent: Extent
    only: bool = False
    together: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "reference": self.reference,
            "build": self.extent.build,
            "generation": self.extent.generation,
            "only": self.only,
            "together": self.together,
        }


class _Job(msgspec.Struct, eq=False):
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

    def cancel(self, because: str) -> None:
        log.info("%s %s: to be ended, %s", self.report.action, self.report.txn or "(not begun)", because)
        self.because = because
        if self.transaction is not None:
            self.transaction.cancel_reason = because
        self.scope.cancel()

    def is_called(self, reference: str) -> bool:
        """Whether a transaction's number, or the beginning of a patch's id, means this job."""
        return _is_called(reference, self.report.txn, self.report.patch)


class _Arriving(msgspec.Struct, eq=False, kw_only=True):
    """A package of the inbox that is being applied, or waits for others that share targets with it.

    Attributes:
        file: what lay there when it was begun with.
        changed: something else does by now, and wants to be looked at.
        done: applied or refused, or waiting for its commit.
    """

    targets: frozenset[str]
    file: tuple[Any, ...]
    changed: bool = False
    done: asyncio.Event = msgspec.field(default_factory=asyncio.Event)


Work = Callable[[_Job, Sequence[Target]], Awaitable[Verdict]]


class PatchOverseer:
    """What the control socket can ask about patches."""

    def __init__(self, supervisor: Supervisor, tasks: anyio.abc.TaskGroup) -> None:
        self._supervisor = supervisor
        self._store = supervisor.store
        self._tasks = tasks
        self._jobs: set[_Job] = set()
        self._undecided = {each.txn: each for each in self._store.undecided()}
        self._refusing = False
        self._clock = SeenClock(self._store.last_seen())
        self.uploads = Uploads(supervisor.config.supervisor.state_dir / "uploads", lambda: self._limits)

    def refuse_new(self) -> None:
        """The supervisor ends: take no new patch. Those under way are ended by the stop of their targets."""
        self._refusing = True

    def refuse_while_patching(self) -> None:
        """Raises TargetBusyError when a patch is under way."""
        for job in self._jobs:
            which = job.report.file or job.report.patch or "a patch"
            raise TargetBusyError(f"{which} is under way (transaction {job.report.txn}); nothing has changed")

    async def finished(self) -> None:
        """Wait until every job has ended and been written down."""
        while self._jobs:
            await asyncio.wait([job.end for job in self._jobs])

    # --- what comes in --------------------------------------------------------------------------------------

    def source(
        self, *, path: str | None, upload: str | None, name: str | None, sha256: str | None, crc32: int | None
    ) -> Source:
        """Find the package a request means.

        Raises:
            RequestError: none or several ways to name it were given, or the path is not absolute.
            PatchNotFoundError: nothing there.
            UsageError: the checksum file beside it is of no use.
        """
        if sum(value is not None for value in (path, upload, name)) != 1:
            raise RequestError("give exactly one of path, upload and name")
        if upload is not None:
            return Source(path=self.uploads.path(upload), sha256=sha256, crc32=crc32)
        if name is not None:
            found, in_inbox = self._supervisor.inbox.find(name), True
        else:
            found = Path(path or "")
            if not found.is_absolute():
                raise RequestError("path: must be absolute, the supervisor has another working directory")
            try:
                is_file = found.is_file()
            except OSError as error:
                raise PatchNotFoundError(f"{found}: {error.strerror}", path=str(found)) from None
            if not is_file:
                raise PatchNotFoundError(f"{found}: no such file", path=str(found))
            in_inbox = found.parent == self._supervisor.config.patch.inbox
        beside = read_checksum(found) if sha256 is None else None
        return Source(
            path=found,
            sha256=sha256 or beside,
            crc32=crc32,
            sidecar=beside is not None,
            in_inbox=in_inbox,
            identity=identity_of(found),
        )

    # --- questions ------------------------------------------------------------------------------------------

    async def verify(self, source: Source) -> dict[str, Any]:
        """Everything about a package that can be said without a target."""
        with await self._open(source) as package:
            trust = await self._judge_signatures(package)
            return {**describe_package(package), "signed": None if trust is None else gate_json(trust)}

    async def plan(self, source: Source, wish: Wish) -> dict[str, Any]:
        """What `apply` would do, without doing it. Nothing is touched and nobody is asked."""
        with await self._open(source) as package:
            trust = await self._judge_signatures(package)
            targets = self._targets_of(package.manifest, wish.target)
            parts = await self._assess_all(package, targets, wish, trust)
            refused = any(part.assessment.refused for part in parts)
            already = all(part.assessment.already for part in parts)
            return {
                **describe_package(package),
                "signed": None if trust is None else gate_json(trust),
                "verdict": "refused" if refused else "already" if already else "apply",
                "targets": [
                    {
                        "target": part.target.name,
                        "state": part.target.state,
                        "build": part.build_before,
                        "already": part.assessment.already,
                        "refused": gate_json(part.assessment.refused) if part.assessment.refused else None,
                        "gates": [gate_json(gate) for gate in part.assessment.gates],
                        "files": [file_json(plan) for plan in part.files],
                        "instances": [
                            {
                                "name": instance.name,
                                "pid": instance.pid,
                                "told_by": "restart"
                                if package.manifest.kind is Kind.COLD
                                else instance.told_by,
                            }
                            for instance in part.target.instances
                            if instance.pid is not None
                        ],
                    }
                    for part in parts
                ],
            }

    async def inbox(self) -> dict[str, Any]:
        """What lies in the inbox, and what can be read of it."""
        found = []
        for arrival in self._supervisor.inbox.arrivals():
            entry: dict[str, Any] = {
                "file": arrival.path.name,
                "size": arrival.size,
                "checksum": has_checksum(arrival.path),
                "state": "incomplete",
            }
            if arrival.complete:
                try:
                    with await self._open(Source(path=arrival.path, in_inbox=True)) as package:
                        entry |= {"state": "complete", **summary(package)}
                except AsyncsupError as error:
                    entry |= {"state": "malformed", "detail": error.message, "code": error.error_code}
                except Exception as error:
                    # Whatever it was, it says nothing about the others.
                    log.exception("%s cannot be looked at", arrival.path)
                    entry |= {"state": "malformed", "detail": type(error).__name__, "code": "internal"}
            found.append(entry)
        return {"inbox": found, "folder": str(self._supervisor.inbox.folder), "trust": self._trust}

    async def history(self, target: str | None, limit: int) -> list[dict[str, Any]]:
        found = await anyio.to_thread.run_sync(partial(self._store.history.latest, target, limit=limit))
        return [self._up_to_now(entry) for entry in found]

    async def show(self, reference: str) -> dict[str, Any]:
        """A transaction by its number, or the latest of a patch by (a prefix of) its id.

        Raises:
            PatchNotFoundError
        """
        return self._up_to_now(await anyio.to_thread.run_sync(self._store.history.find, reference))

    async def examine_audit(self, anchors: Sequence[str]) -> dict[str, Any]:
        """Whether the audit is as it was written; `anchors` are hashes that were kept elsewhere."""
        return (await anyio.to_thread.run_sync(self._store.history.examine, anchors)).to_json()

    async def audit(self, *, after: int | None, txn: int | None, limit: int) -> dict[str, Any]:
        """Records of the audit, each as the very line that its hash is of."""
        read = partial(self._store.history.records, after=after, txn=txn, limit=limit)
        rows = await anyio.to_thread.run_sync(read)
        head = await anyio.to_thread.run_sync(self._store.history.head)
        return {"records": [row.to_json() for row in rows], "head": head.to_json()}

    def _up_to_now(self, entry: dict[str, Any]) -> dict[str, Any]:
        """What the store knows of a transaction, and what it cannot know."""
        for job in self._jobs:
            mine = job.transaction is not None and job.transaction.txn == entry["txn"]
            if mine and job.transaction is not None and job.transaction.waits_for_commit:
                entry["verdict"] = "uncommitted"
        return entry

    @property
    def _limits(self) -> PatchLimits:
        return self._supervisor.config.patch.limits

    def uncommitted(self, target: str) -> int | None:
        """The number of the patch on a target that waits for `commit` or `abort`."""
        for job in self._jobs:
            waits = job.transaction is not None and job.transaction.waits_for_commit
            if waits and any(part.target.name == target for part in job.report.parts):
                return job.report.txn
        return None

    def marks(self, target: str) -> dict[str, Any] | None:
        """What no patch of a target may go below; None before the first one."""
        marks = self._store.marks(target)
        return None if marks is None else {"highest": marks.highest, "floor": marks.floor}

    def undecided(self, target: str) -> int | None:
        """The number of the patch on a target that has failed and waits for somebody to decide about it."""
        return next((each.txn for each in self._undecided.values() if target in each.targets), None)

    # --- doing ----------------------------------------------------------------------------------------------

    async def apply(self, source: Source, wish: Wish) -> dict[str, Any]:
        """Verify, check and apply a package; returns the report. With ``commit = "manual"`` it returns when
        the patch waits for its commit.

        Raises:
            AsyncsupError: it was not applied; ``details["report"]`` is the report.
        """
        job = self._new_job("apply", wish)
        job.report.file = None if self.uploads.has(source.path) else source.path.name
        job.request["package"] = {"file": job.report.file}
        job.inbox_name = source.path.name if source.in_inbox else None
        self._tasks.start_soon(self._apply_job, job, source, wish)
        return await self._answer(job)

    async def rollback(self, way: WayBack, wish: Wish) -> dict[str, Any]:
        """Bring targets back to earlier generations, all in one transaction; returns the report.

        Raises:
            AsyncsupError: as `apply` does, and as `goals_of_target` and `goals_of_patch` do.
        """
        undecided = self._undecided_patch(way.reference)
        if undecided is not None:
            if way.only or way.extent != Extent():
                raise UsageError(
                    f"transaction {undecided.txn} on {', '.join(undecided.targets)} was never committed, and "
                    "is taken back as a whole",
                    txn=undecided.txn,
                )
            return await self._decide(undecided, wish, keep=False)
        job = self._new_job("rollback", wish)
        job.request["back"] = way.to_json()
        self._tasks.start_soon(self._finish_job, job, self._take_back(job, way, wish))
        return await self._answer(job)

    async def _take_back(self, job: _Job, way: WayBack, wish: Wish) -> dict[str, Any]:
        goals = await anyio.to_thread.run_sync(self._goals, way)
        targets = [self._supervisor.targets[name] for name in goals]
        job.report.patch = self._store.state(targets[0].name).patch
        return await self._carry_out(job, targets, partial(self._roll_back, way, wish), wish)

    async def commit(self, reference: str, *, actor: Actor) -> dict[str, Any]:
        """Commit a patch that waits for it; returns its report.

        Raises:
            PatchNotFoundError: no such patch waits.
            PatchRolledBackError: it failed in this very moment.
        """
        undecided = self._undecided_patch(reference)
        if undecided is not None:
            return await self._decide(undecided, Wish(actor=actor), keep=True)
        job = self._job(reference, "commit")
        if job.transaction is None or not job.transaction.waits_for_commit:
            raise PatchNotFoundError(f"patch {reference} does not wait for a commit (yet)", id=reference)
        self._store.note("txn.commit_asked", txn=job.report.txn, by=actor.to_json())
        job.transaction.commit_requested.set()
        return await asyncio.shield(job.end)

    async def abort(self, reference: str, *, actor: Actor) -> dict[str, Any]:
        """End a patch that is under way, at whatever step it is, and put everything back; returns its report.

        Raises:
            PatchNotFoundError: no such patch is under way.
        """
        undecided = self._undecided_patch(reference)
        if undecided is not None:
            return await self._decide(undecided, Wish(actor=actor), keep=False)
        job = self._job(reference, "abort")
        self._store.note("txn.abort_asked", txn=job.report.txn, by=actor.to_json())
        job.cancel(f"aborted by {actor}")
        await asyncio.wait([job.end])
        error = job.end.exception()
        if isinstance(error, AsyncsupError):
            report: dict[str, Any] = error.details["report"]
            return report
        return job.end.result()

    def _undecided_patch(self, reference: str) -> Undecided | None:
        """The undecided patch that a target, a transaction's number or the beginning of an id means."""
        for each in self._undecided.values():
            if reference in each.targets or _is_called(reference, each.txn, each.patch):
                return each
        return None

    async def _decide(self, undecided: Undecided, wish: Wish, *, keep: bool) -> dict[str, Any]:
        """Commit a patch that has failed, or take it back; returns its report.

        Raises:
            RollbackFailedError: taking it back failed; if its files are still there, it stays undecided.
        """
        job = self._new_job("apply", wish)
        report = job.report
        report.txn, report.patch = undecided.txn, undecided.patch
        report.name, report.version = undecided.name, undecided.version
        report.build, report.kind = undecided.build, undecided.kind
        event = "txn.commit_asked" if keep else "txn.abort_asked"
        self._store.note(event, txn=undecided.txn, by=wish.actor.to_json())
        targets = [t for t in self._supervisor.targets.values() if t.name in undecided.targets]
        work = partial(self._carry_out_decision, undecided, wish, keep)
        self._tasks.start_soon(self._finish_job, job, self._carry_out(job, targets, work, wish))
        return await self._answer(job)

    async def _carry_out_decision(
        self, undecided: Undecided, wish: Wish, keep: bool, job: _Job, targets: Sequence[Target]
    ) -> Verdict:
        if undecided.txn not in self._undecided:
            raise PatchNotFoundError(f"transaction {undecided.txn} has been decided about meanwhile")
        files = (await anyio.to_thread.run_sync(self._store.history.transaction, undecided.txn))["files"]
        for target in targets:
            staged = next(part for part in undecided.parts if part.target == target.name)
            job.report.parts.append(_part_of(target, staged, files))
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
        transaction = self._transaction(undecided.txn, change, job)
        by = str(wish.actor)
        error: AsyncsupError | None = None
        try:
            if keep:
                await transaction.keep()
            else:
                if undecided.code != INTERRUPTED:
                    hold = partial(self._hold_first, job, undecided.patch, undecided.error)
                    with anyio.CancelScope(shield=True):
                        await anyio.to_thread.run_sync(hold)
                await transaction.take_back(f"asked for by {by}")
        except AsyncsupError as failure:
            error = failure
            raise
        finally:
            verdict: Verdict = "committed" if keep else "rolled_back"
            write_down = partial(self._write_down_decision, job, transaction, undecided, verdict, error)
            with anyio.CancelScope(shield=True):
                failures, head = await anyio.to_thread.run_sync(write_down)
            transaction.note_failures("write down", failures)
            job.report.audit = None if head is None else head.to_json()
            transaction.publish(
                "patch.ended",
                verdict=verdict if error is None else verdict_of(error),
                audit=job.report.audit,
            )
        return verdict

    def _write_down_decision(
        self,
        job: _Job,
        transaction: Transaction,
        undecided: Undecided,
        verdict: Verdict,
        error: AsyncsupError | None,
    ) -> tuple[list[Exception], Head | None]:
        """As `_write_down`."""
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

    async def drift(self, target: str | None) -> list[dict[str, Any]]:
        """Files of one target, or of all, that are not as patches have left them."""
        known = [self._known(target)] if target is not None else self._with_root()
        return [
            {"target": each.name, "policy": each.config.patch.drift, "files": await self.drift_of(each)}
            for each in known
        ]

    async def drift_of(self, target: Target) -> list[dict[str, Any]]:
        """The files of one target, which need not have a root."""
        if target.config.root is None:
            return []
        try:
            plans = await anyio.to_thread.run_sync(self._store.preview.drifted, target.name)
        except PatchRefusedError as error:
            # It has no root folder (any more): nothing is as it should be.
            root = PlanError(code=error.error_code, message=error.message)
            plans = [FilePlan(path=".", op="keep", note=error.message, drift=root)]
        return [file_json(plan) for plan in plans]

    async def prune(self, target: str | None, keep: int | None, *, actor: Actor) -> dict[str, list[int]]:
        """Remove old generations nobody reads; returns their numbers by target."""
        known = [self._known(target)] if target is not None else self._with_root()
        limit = keep if keep is not None else self._supervisor.config.patch.keep
        prune = partial(self._store.prune, keep=limit, by=actor.to_json())
        return {each.name: await anyio.to_thread.run_sync(prune, each.name) for each in known}

    async def release(self, name: str, *, actor: Actor) -> list[str]:
        """Turn a target's managed files back into ordinary ones; returns their paths."""
        target = self._known(name)
        release = partial(self._store.release, target.name, by=actor.to_json())
        try:
            async with hold_all([target], "release", str(actor), on_preempt=lambda _: None):
                return await anyio.to_thread.run_sync(release)
        except AsyncsupError as error:
            self._store.note(
                "target.release_failed",
                target=target.name,
                error=error.message,
                code=error.error_code,
                by=actor.to_json(),
            )
            raise

    async def apply_arrivals(self) -> None:
        """Apply what comes into the inbox until cancelled (``[patch] auto``): in order of build what shares
        targets, and side by side what does not.
        """
        under_way: dict[str, _Arriving] = {}
        async with anyio.create_task_group() as tasks:
            while True:
                await self._supervisor.inbox.changed()
                try:
                    listing = await self.inbox()
                except OSError as error:
                    log.warning("the inbox cannot be read: %s", error)
                    continue
                ready = [entry for entry in listing["inbox"] if entry["state"] == "complete"]
                for entry in sorted(ready, key=lambda entry: int(entry["build"])):
                    name = entry["file"]
                    file = (identity_of(self._supervisor.inbox.folder / name), entry["checksum"])
                    if name in under_way:
                        under_way[name].changed |= under_way[name].file != file
                        continue
                    targets = frozenset(entry["targets"] or [target.name for target in self._with_root()])
                    before = [other.done for other in under_way.values() if other.targets & targets]
                    under_way[name] = _Arriving(targets=targets, file=file)
                    tasks.start_soon(self._apply_in_turn, name, before, under_way)

    async def _apply_in_turn(
        self, name: str, before: Sequence[asyncio.Event], under_way: dict[str, _Arriving]
    ) -> None:
        try:
            for other in before:
                await other.wait()
            await self._apply_arrival(name)
        except (AsyncsupError, OSError) as error:
            log.warning("%s: %s", name, error)
        except Exception:
            log.exception("%s was not applied", name)
        finally:
            mine = under_way.pop(name)
            mine.done.set()
            if mine.changed:
                self._supervisor.inbox.look_again()

    async def _apply_arrival(self, name: str) -> None:
        source = self.source(path=None, upload=None, name=name, sha256=None, crc32=None)
        if self._trust == "digest" and source.sha256 is None:
            log.warning("%s waits in the inbox for %s.sha256", name, name)
            return
        await self.apply(source, Wish(actor=Actor.of_file(source.path)))

    # --- after a crash --------------------------------------------------------------------------------------

    def go_on(self, record: PatchRecord) -> None:
        """Go on with a patch that an earlier supervisor had brought as far as its probation."""
        wish = Wish(actor=Actor(**record.by))
        job = self._new_job(record.action, wish)
        job.report.file = job.inbox_name = record.file
        targets = [self._supervisor.targets[part.target] for part in record.parts]
        work = self._carry_out(job, targets, partial(self._go_on, record), wish)
        self._tasks.start_soon(self._finish_job, job, work, partial(self._settle_by_name, record.file))

    async def _go_on(self, record: PatchRecord, job: _Job, targets: Sequence[Target]) -> Verdict:
        known = await anyio.to_thread.run_sync(self._store.history.transaction, record.txn)
        report, kind = job.report, Kind(record.kind)
        report.patch, report.build, report.kind = record.patch or None, known["build"], record.kind
        for target, part in zip(targets, record.parts, strict=True):
            participant = Participant(
                target=target,
                build_before=part.build_before,
                build_after=part.build_after,
                changed=part.changed,
                stage=lambda txn, _: None,  # it is staged
            )
            report.parts.append(
                Part(
                    target=target,
                    package=None,
                    assessment=Assessment(target=target.name, gates=(), already=False),
                    files=tuple(
                        FilePlan(path=entry["path"], op=entry["op"], note=entry["note"])
                        for entry in known["files"]
                        if entry["target"] == target.name
                    ),
                    build_before=part.build_before,
                    kind=kind,
                    participant=participant,
                )
            )
        change = Change(
            action="rollback" if record.action == "rollback" else "apply",
            kind=kind,
            patch=record.patch,
            probation=max(0.0, record.probation_until - time.monotonic()),
            manual_commit=record.manual_commit,
            manual_rollback=record.manual_rollback,
            total_bytes=0,
            participants=[part.participant for part in report.parts if part.participant is not None],
        )
        info = None
        if change.action == "apply":
            facts = {name: known[name] for name in ("name", "version", "build", "kind")}
            info = PatchInfo(id=record.patch, **facts)
        standing = [(self._supervisor.instance(name), pid) for name, pid in record.standing or ()]
        await self._see_through(job, record.txn, change, info, lambda t: t.go_on(standing))
        return "committed"

    async def _settle_by_name(self, name: str | None, outcome: dict[str, Any] | AsyncsupError) -> None:
        """As `_settle`, for a package of which only the name is known any more."""
        if name is None:
            return
        try:
            source = self.source(path=None, upload=None, name=name, sha256=None, crc32=None)
            self._settle(source, outcome)
        except (AsyncsupError, OSError) as error:
            log.warning("%s stays where it is: %s", name, error)

    def bring_back(
        self, txn: int, names: Sequence[str], patch: str | None, record: PatchRecord | None
    ) -> None:
        """Recovery has taken back the files of a patch: so must whoever may have taken them up."""
        changed: dict[str, tuple[str, ...]]
        if record is not None:
            kind, changed = record.kind, {part.target: part.changed for part in record.parts}
        else:
            # One that somebody was about to take back.
            known = self._store.history.transaction(txn)
            kind, files = known["kind"], known["files"]
            changed = {name: tuple(f["path"] for f in files if f["target"] == name) for name in names}
        cold = kind != Kind.WARM.value
        targets = [self._supervisor.targets[name] for name in names if name in self._supervisor.targets]

        async def all_of_them() -> None:
            async with anyio.create_task_group() as tasks:
                for target in targets:
                    work = partial(
                        bring_back,
                        target,
                        store=self._store,
                        txn=txn,
                        patch=patch,
                        cold=cold,
                        changed=changed[target.name],
                    )
                    tasks.start_soon(work)
            self._supervisor.journal.drop(f"transaction {txn}")

        self._tasks.start_soon(all_of_them)

    # --- jobs -----------------------------------------------------------------------------------------------

    def _new_job(self, action: Any, wish: Wish) -> _Job:
        if self._refusing:
            raise ShuttingDownError("the supervisor is stopping and takes no new patch")
        loop = asyncio.get_running_loop()
        report = Report(
            action=action, asked_by=str(wish.actor), trust=self._trust, facts=self._supervisor.root_facts
        )
        request = {"by": wish.actor.to_json(), "wish": wish.to_json()}
        job = _Job(report, request, loop.create_future(), loop.create_future())
        self._jobs.add(job)
        return job

    def _job(self, reference: str, verb: str) -> _Job:
        """The job that is meant: of several that wait with the same patch, the one that has begun."""
        called = [job for job in self._jobs if job.is_called(reference)]
        begun = [job for job in called if job.transaction is not None]
        waiting = [job for job in begun if job.transaction is not None and job.transaction.waits_for_commit]
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
            under_way = ", ".join(str(job.report.txn) for job in self._jobs if job.report.txn is not None)
            raise PatchNotFoundError(
                f"there is no patch {reference} to {verb}; under way: {under_way or 'none'}", id=reference
            )
        return found[0]

    async def _answer(self, job: _Job) -> dict[str, Any]:
        """Wait for what the client is to be told; a client that gives up before takes its patch with it."""
        try:
            return await asyncio.shield(job.answer)
        except asyncio.CancelledError:
            job.cancel("its client gave up")
            with anyio.CancelScope(shield=True):
                await asyncio.wait([job.end])
            raise

    async def _apply_job(self, job: _Job, source: Source, wish: Wish) -> None:
        async def settle(outcome: dict[str, Any] | AsyncsupError) -> None:
            try:
                await step_failpoint("overseer.settle")
                self._settle(source, outcome)
                self.uploads.drop(source.path)
            except OSError as error:
                log.warning("%s stays where it is: %s", source.path, error)

        await self._finish_job(job, self._apply_package(job, source, wish), settle)

    async def _finish_job(
        self,
        job: _Job,
        work: Awaitable[dict[str, Any]],
        settle: Callable[[dict[str, Any] | AsyncsupError], Awaitable[None]] | None = None,
    ) -> None:
        """Do the work of a job, tidy up after it, and resolve its futures, whatever happens."""
        outcome: dict[str, Any] | AsyncsupError
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
                await self._write_down_attempt(job, outcome)
            if settle is not None:
                await settle(outcome)
            _resolve(job, outcome)
        finally:
            for future in (job.end, job.answer):
                future.cancel()  # unless it is resolved: the supervisor itself is being torn down
            self._jobs.discard(job)

    async def _until_cancelled(self, job: _Job, work: Awaitable[dict[str, Any]]) -> dict[str, Any]:
        with job.scope:
            return await work
        raise PatchTargetRefusedError(
            f"ended before anything was changed: {job.because}", code="request.cancelled"
        )

    async def _write_down_attempt(self, job: _Job, outcome: dict[str, Any] | AsyncsupError) -> None:
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
            request={**job.request, "gates": _gates(job.report)},
            took=answer["took"],
        )
        try:
            with anyio.CancelScope(shield=True):
                answer["txn"] = await anyio.to_thread.run_sync(write)
                answer["audit"] = (await anyio.to_thread.run_sync(self._store.history.head)).to_json()
        except AsyncsupError as failure:
            log.error("what was asked for could not be written down: %s", failure.message)  # noqa: TRY400 - foreseen

    async def _apply_package(self, job: _Job, source: Source, wish: Wish) -> dict[str, Any]:
        await step_failpoint("overseer.verify")
        if wish.trust_clock:
            await anyio.to_thread.run_sync(partial(self._store.trust_clock, by=wish.actor.to_json()))
            self._clock.trust(time.time())
        job.request["trust"] = {"mode": self._trust, "checked_against": source.checked_against}
        with await self._open(source, must_be_trusted=True) as package:
            job.report.patch = package.id
            if source.in_inbox and package.owner is not None:
                # Of the very file that was read, whatever lies there under its name by now.
                owner = Actor.of_owner(*package.owner).to_json()
                job.request["package"]["owner"] = owner
                if wish.actor.via == "inbox":
                    job.request["by"] = owner
            job.request["package"] |= {
                "id": package.id,
                "format": package.format,
                "size": package.size,
                "signatures": sorted(package.signatures),
            }
            # Before anything else in it is believed.
            await anyio.to_thread.run_sync(self._endorse, job, package)
            job.report.manifest = package.manifest
            targets = self._targets_of(package.manifest, wish.target)
            return await self._carry_out(job, targets, partial(self._apply_to, package, wish), wish)

    def _endorse(self, job: _Job, package: Package) -> Gate | None:
        """Who signed a package, as of now, noted for the report and the audit; in a worker thread.

        Raises:
            AsyncsupError: as `_check_signatures`.
        """
        trust = job.request["trust"]
        try:
            endorsement = self._check_signatures(package)
        except PatchMalformedError as error:
            trust |= {key: error.details[key] for key in _TRUST_DETAILS if key in error.details}
            raise
        if endorsement is not None:
            trust |= endorsement.to_json()
            job.report.signers = trust["signers"]
        return _trust_gate(endorsement)

    def _confirm(self, job: _Job, package: Package) -> None:
        """A patch may have waited for long: what counts is whether it may be applied now. In a worker thread.

        Raises:
            AsyncsupError: as `_check_signatures`.
            PatchRefusedError: it has expired.
        """
        self._endorse(job, package)
        now, seen = self._time()
        gate = expiry_gate(package.manifest, now, seen)
        if not gate.ok:
            raise PatchRefusedError(gate.detail, code=gate.code)

    async def _carry_out(
        self, job: _Job, targets: Sequence[Target], work: Work, wish: Wish
    ) -> dict[str, Any]:
        """Hold the targets, do the work, and turn its end into a report."""
        label = "rollback" if job.report.action == "rollback" else "patch"
        verdict: Verdict = "refused"
        job.targets = [target.name for target in targets]
        async with AsyncExitStack() as holds:
            for target in targets:
                holds.callback(self._supervisor.end_if_essential_is_down, target)
            await holds.enter_async_context(
                hold_all(targets, label, str(wish.actor), on_preempt=job.cancel, wait_busy=wish.wait_busy)
            )
            for target in targets:
                await anyio.to_thread.run_sync(self._store.tidy_up, target.name)
            await step_failpoint("overseer.gates")
            verdict = await work(job, targets)
        return job.report.to_json(verdict)

    async def _apply_to(self, package: Package, wish: Wish, job: _Job, targets: Sequence[Target]) -> Verdict:
        report, manifest = job.report, package.manifest
        # Again: a key may have been revoked while something else had the targets.
        trust = await anyio.to_thread.run_sync(self._endorse, job, package)
        report.parts += await self._assess_all(package, targets, wish, trust)
        for part in report.parts:
            if part.assessment.refused is not None:
                gate = part.assessment.refused
                raise PatchRefusedError(gate.detail, code=gate.code, target=part.target.name)
        parts = [part for part in report.parts if not part.assessment.already]
        if not parts:
            return "already"
        for part in parts:
            assert part.package is not None
            part.participant = Participant(
                target=part.target,
                build_before=part.build_before,
                build_after=manifest.build,
                changed=part.changed,
                stage=partial(self._stage, part, wish.policy_for(part.target)),
            )
        settings = [part.target.config.patch for part in parts]
        longest = max(setting.probation for setting in settings)
        change = Change(
            action="apply",
            kind=manifest.kind,
            patch=package.id,
            probation=longest if manifest.probation is None else manifest.probation,
            manual_commit=any(setting.commit == "manual" for setting in settings),
            manual_rollback=any(setting.rollback == "manual" for setting in settings),
            total_bytes=sum(change.size or 0 for change in manifest.files) * len(parts),
            participants=[part.participant for part in parts if part.participant is not None],
            confirm=partial(self._confirm, job, package),
        )
        info = PatchInfo(
            id=package.id,
            name=manifest.name,
            version=manifest.version,
            build=manifest.build,
            kind=manifest.kind.value,
            build_floor=manifest.build_floor,
            downgrade=manifest.downgrade,
        )
        await self._run(job, change, info)
        return "committed"

    def _stage(self, part: Part, policy: Policy, txn: int, progress: Progress) -> None:
        assert part.package is not None
        part.take_in(self._store.stage(txn, part.target.name, part.package, progress, policy=policy))

    def _goals(self, way: WayBack) -> dict[str, int]:
        """Which targets go back to which generation; in a worker thread."""
        named = [target for target in self._with_root() if target.name == way.reference]
        stacks = {target.name: self._store.preview.stack(target.name) for target in self._with_root()}
        if not named and _may_be_an_id(way.reference):
            if way.only or way.together or way.extent != Extent():
                raise UsageError(
                    f"{way.reference} is a patch, and is taken back as a whole; how far to go, and on which "
                    "targets, is said of a target",
                    reference=way.reference,
                )
            return self._goals_of_patch(way.reference, stacks)
        target = self._known(way.reference)
        return goals_of_target(stacks, target.name, way.extent, only=way.only, together=way.together)

    def _goals_of_patch(self, reference: str, stacks: Stacks) -> dict[str, int]:
        found = self._store.history.find(reference)
        by_number = reference.isdecimal() and found["txn"] == int(reference)
        if by_number and found["action"] != "apply":
            raise UsageError(
                f"transaction {reference} is a rollback itself; apply the patch again", txn=found["txn"]
            )
        if found["patch"] is None:
            raise PatchNotFoundError(f"transaction {reference} applied no patch", reference=reference)
        among = [name for name in stacks if not by_number or name in found["targets"]]
        title = " ".join(str(found[key]) for key in ("name", "version") if found[key])
        return goals_of_patch(stacks, found["patch"], f"{title} (build {found['build']})", among)

    async def _roll_back(self, way: WayBack, wish: Wish, job: _Job, targets: Sequence[Target]) -> Verdict:
        goals = await anyio.to_thread.run_sync(self._goals, way)
        if goals.keys() != {target.name for target in targets}:
            raise TargetBusyError("what is to be taken back has changed meanwhile; look again")
        report = job.report
        for target in targets:
            back = partial(self._part_back, target, goals[target.name], wish.policy_for(target))
            report.parts.append(await anyio.to_thread.run_sync(back))
        participants = [part.participant for part in report.parts if part.participant is not None]
        builds = {participant.build_after for participant in participants}
        kinds = {part.kind for part in report.parts}
        report.patch = self._store.state(targets[0].name).patch
        report.build = builds.pop() if len(builds) == 1 else None
        report.kind = (Kind.WARM if kinds == {Kind.WARM} else Kind.COLD).value
        change = Change(
            action="rollback",
            kind=Kind(report.kind),
            patch=report.patch or "",
            probation=max(target.config.patch.probation for target in targets),
            manual_commit=False,
            manual_rollback=False,
            total_bytes=0,
            participants=participants,
        )
        await self._run(job, change, None)
        return "committed"

    def _part_back(self, target: Target, generation: int, policy: Policy) -> Part:
        before = self._store.state(target.name)
        ahead = self._store.preview.describe_rollback(target.name, generation, policy)
        part = Part(
            target=target,
            package=None,
            assessment=Assessment(target=target.name, gates=(), already=False),
            files=ahead.files,
            build_before=before.build,
            kind=Kind(ahead.kind),
        )

        def stage(txn: int, _: Progress) -> None:
            part.take_in(self._store.stage_rollback(txn, target.name, generation, policy=policy))

        part.participant = Participant(
            target=target,
            build_before=before.build,
            build_after=ahead.build,
            changed=part.changed,
            stage=stage,
        )
        return part

    def _transaction(self, txn: int, change: Change, job: _Job) -> Transaction:
        for participant in change.participants:
            participant.enlist()
        transaction = Transaction(
            txn, change, self._store, self._supervisor.events, asked_by=job.report.asked_by
        )
        transaction.cancel_reason = job.because
        job.report.txn, job.report.steps, job.transaction = txn, transaction.steps, transaction
        return transaction

    async def _run(self, job: _Job, change: Change, info: PatchInfo | None) -> None:
        names = [participant.target.name for participant in change.participants]
        begin = partial(
            self._store.begin,
            action=change.action,
            patch=info,
            targets=names,
            asked_by=job.report.asked_by,
            request={**job.request, "gates": _gates(job.report)},
            by_hand=change.manual_rollback,
        )
        with anyio.CancelScope(shield=True):
            txn = await anyio.to_thread.run_sync(begin)
        await self._see_through(job, txn, change, info, Transaction.run)

    async def _see_through(
        self,
        job: _Job,
        txn: int,
        change: Change,
        info: PatchInfo | None,
        way: Callable[[Transaction], Awaitable[None]],
    ) -> None:
        transaction = self._transaction(txn, change, job)
        transaction.on_uncommitted = partial(self._uncommitted, job)
        if info is not None:
            transaction.before_undo = partial(self._hold_first, job, info.id)
        record = self._record_of(job, txn, change)
        self._supervisor.journal.put(f"transaction {txn}", record)
        transaction.on_standing = partial(self._keep_record, record, change)
        error: AsyncsupError | None = None
        try:
            await way(transaction)
        except AsyncsupError as failure:
            error = failure
            raise
        finally:
            verdict: Verdict = "committed" if error is None else verdict_of(error)
            write_down = partial(self._write_down, job, transaction, verdict, error, info)
            with anyio.CancelScope(shield=True):
                failures, head = await anyio.to_thread.run_sync(write_down)
            transaction.note_failures("write down", failures)
            job.report.audit = None if head is None else head.to_json()
            self._supervisor.journal.drop(f"transaction {txn}")
            transaction.publish("patch.ended", verdict=verdict, audit=job.report.audit)

    def _record_of(self, job: _Job, txn: int, change: Change) -> PatchRecord:
        """What the next supervisor must know of a transaction that has begun."""
        return PatchRecord(
            txn=txn,
            action=change.action,
            kind=change.kind.value,
            patch=change.patch,
            by=job.request["by"],
            file=job.inbox_name,
            manual_commit=change.manual_commit,
            manual_rollback=change.manual_rollback,
            parts=tuple(
                PartRecord(
                    target=participant.target.name,
                    build_before=participant.build_before,
                    build_after=participant.build_after,
                    changed=tuple(participant.changed),
                    instances=tuple(instance.name for instance in participant.instances),
                )
                for participant in change.participants
            ),
        )

    def _keep_record(self, record: PatchRecord, change: Change, standing: Standing | None) -> None:
        """The files are about to be switched, or somebody is on probation from now on, or nobody any more."""
        names = None
        if standing is not None:
            names = tuple((instance.name, pid) for instance, pid in standing if pid is not None)
        until = time.monotonic() + change.probation
        record = replace(record, switched=True, standing=names, probation_until=until)
        self._supervisor.journal.put(f"transaction {record.txn}", record)

    def _uncommitted(self, job: _Job) -> None:
        if not job.answer.done():
            job.answer.set_result(job.report.to_json("uncommitted"))

    def _write_down(
        self,
        job: _Job,
        transaction: Transaction,
        verdict: Verdict,
        error: AsyncsupError | None,
        info: PatchInfo | None,
    ) -> tuple[list[Exception], Head | None]:
        """Everything the store is to remember of a transaction that has ended, and what it is to forget; in a
        worker thread. What has become of the targets is settled, and nothing that goes wrong now may be
        reported as if it had not.

        Returns what failed, and the audit's last record of the transaction, if it was written.
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

    def _do_all(
        self, transaction: Transaction, todo: Sequence[Callable[[], object]]
    ) -> tuple[list[Exception], Head | None]:
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
        self._undecided = {each.txn: each for each in self._store.undecided()}

    def _hold_first(self, job: _Job, patch: str, why: AsyncsupError | str) -> None:
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

    def _to_let_go(self, patch: str | None, targets: Sequence[str]) -> list[Callable[[], object]]:
        """Of what a patch that is committed makes superfluous."""
        keep, by = self._supervisor.config.patch.keep, Actor(via="supervisor").to_json()
        todo: list[Callable[[], object]] = [partial(self._store.prune, name, keep, by=by) for name in targets]
        return todo if patch is None else [partial(self._store.unhold, patch), *todo]

    def _settle(self, source: Source, outcome: dict[str, Any] | AsyncsupError) -> None:
        """Move a zip out of the inbox, with its report, once it has been dealt with."""
        if not source.in_inbox or identity_of(source.path) != source.identity:
            return  # it has gone, or is another one by now that came under the same name
        if not isinstance(outcome, AsyncsupError):
            self._supervisor.inbox.settle(source.path, outcome, outcome="applied")
        elif isinstance(outcome, PatchUndecidedError):
            self._supervisor.inbox.settle(source.path, outcome.details["report"], outcome="applied")
        elif not _was_not_tried(source, outcome):
            self._supervisor.inbox.settle(source.path, outcome.details["report"], outcome="rejected")

    # --- looking at a package -------------------------------------------------------------------------------

    @property
    def _trust(self) -> str:
        return self._supervisor.config.patch.trust

    async def _open(self, source: Source, *, must_be_trusted: bool = False) -> Package:
        package = await anyio.to_thread.run_sync(
            partial(
                open_package,
                source.path,
                limits=self._limits,
                sha256=source.sha256,
                crc32=source.crc32,
                follow=not source.in_inbox,
                private_copies=self.uploads.folder if must_be_trusted else None,
            )
        )
        # Afterwards: whatever else is wrong with it is not mended by a checksum.
        weak = source.crc32 is not None and package.format == "prototype"
        if must_be_trusted and source.sha256 is None and not weak and self._trust == "digest":
            package.close()
            raise PatchMalformedError(
                f'{source.path.name}: nothing to verify it by; trust = "digest" wants its SHA-256 '
                f"(or the CRC-32 of a prototype package), or a file {source.path.name}.sha256 beside it",
                code="trust.digest_missing",
            )
        if must_be_trusted and source.sha256 is None and source.crc32 is None and self._trust == "none":
            log.warning('%s is applied without any verification: trust = "none"', source.path.name)
        return package

    def _check_signatures(self, package: Package) -> Endorsement | None:
        """Who signed a package; None where the configuration does not ask. In a worker thread.

        Raises:
            PatchMalformedError: it is not signed as the configuration asks for.
            AllowedSignersError, TrustUnavailableError: that cannot be told.
        """
        settings = self._supervisor.config.patch
        if settings.trust != "required":
            return None
        assert settings.allowed_signers is not None, "the configuration was checked"
        # Loaded with such a configuration already, by its check.
        from asyncsup.patch.trust import check_package, load_signers  # noqa: PLC0415

        # Read each time: a key that is taken out of the file counts no longer.
        signers = load_signers(settings.allowed_signers)
        now, seen = self._time()
        # Were the clock set back, keys that are not valid any more would come back to life.
        return check_package(package, signers, required=settings.signatures_required, now=seen or now)

    def _time(self) -> tuple[datetime, datetime | None]:
        """Now by the clock, and when the clock is behind it the latest time that was seen."""
        behind = self._clock.behind()
        return datetime.now(UTC), None if behind is None else datetime.fromtimestamp(behind, UTC)

    async def _judge_signatures(self, package: Package) -> Gate | None:
        """As `_check_signatures`, where a refusal is an answer as well."""
        try:
            return _trust_gate(await anyio.to_thread.run_sync(self._check_signatures, package))
        except PatchMalformedError as error:
            return Gate(name="trust", ok=False, detail=error.message, code=error.error_code)

    def _with_root(self) -> list[Target]:
        return [target for target in self._supervisor.targets.values() if target.config.root is not None]

    def _targets_of(self, manifest: Manifest, named: str | None) -> list[Target]:
        """Which targets a patch concerns.

        Raises:
            PatchRefusedError: it names none that is here.
        """
        targets = self._supervisor.targets
        with_root = self._with_root()
        if not manifest.targets:
            if named is not None:
                return [self._known(named)]
            if len(with_root) == 1:
                return with_root
            raise PatchRefusedError(
                "the patch does not say which target it is for; name one of "
                f"{', '.join(target.name for target in with_root) or 'none here with a root'} (--target)",
                code="gate.target",
            )
        missing = [name for name in manifest.targets if name not in targets]
        if named is not None:
            target = self._known(named)
            if target.name not in manifest.targets:
                raise PatchRefusedError(
                    f"the patch is for {', '.join(manifest.targets)}, not for {named}", code="gate.target"
                )
            return [target]
        if missing:
            raise PatchRefusedError(
                f"the patch is for {', '.join(manifest.targets)}; here there is no {', '.join(missing)}",
                code="gate.target",
            )
        return [self._known(name) for name in manifest.targets]

    def _known(self, name: str) -> Target:
        selection = self._supervisor.select([name])
        if len(selection) != 1:
            raise TargetNotFoundError(f"{name!r} means {len(selection)} targets; name one", name=name)
        target = selection[0].target
        if target.config.root is None:
            raise PatchRefusedError(
                f"{target.name} has no root, so there is nothing a patch could change; set `root`",
                code="gate.target",
            )
        return target

    async def _assess_all(
        self, package: Package, targets: Sequence[Target], wish: Wish, trust: Gate | None
    ) -> list[Part]:
        """Judge every gate for every target. The room that one needs is not there for the next."""
        needs: list[Need] = []
        return [await self._assess(package, target, wish, trust, needs) for target in targets]

    async def _assess(
        self, package: Package, target: Target, wish: Wish, trust: Gate | None, needs: list[Need]
    ) -> Part:
        assert target.config.root is not None
        manifest = package.manifest
        if package.format == "prototype":
            manifest = with_root_name(manifest, target.config.root.name)
        state = self._store.state(target.name)
        known = [instance.hello for instance in target.instances if instance.hello is not None]
        matches = await anyio.to_thread.run_sync(self._store.preview.content_matches, target.name, manifest)
        marks = self._store.marks(target.name)
        facts = TargetFacts(
            name=target.name,
            region=target.config.region,
            build=max([state.build, *(hello.build for hello in known if hello.build is not None)]),
            patch=state.patch,
            content_matches=matches,
            allow=target.config.patch.allow,
            held=self._store.held(package.id),
            highest=marks.highest if marks is not None else None,
            build_floor=marks.floor if marks is not None else None,
            reads_deltas=delta.available(),
        )
        signed = trust is not None and trust.ok
        now, seen = self._time()
        assessment = assess(
            manifest, package.id, facts, now=now, seen=seen, signed=signed, retry_held=wish.retry_held
        )
        if trust is not None:
            assessment = replace(
                assessment, gates=(trust, *assessment.gates), already=assessment.already and trust.ok
            )
        elsewhere = {hello.region for hello in known if hello.region is not None}
        elsewhere -= {target.config.region, *manifest.regions}
        if elsewhere:
            regions = ", ".join(manifest.regions)
            detail = f"patch is for {regions}, {target.name} says it runs in {elsewhere.pop()}"
            gate = Gate(name="region", ok=False, detail=detail, code="gate.region")
            assessment = Assessment(target=target.name, gates=(*assessment.gates, gate), already=False)
        files = tuple(FilePlan(path=change.path, op=change.op.value) for change in manifest.files)
        if assessment.refused is None and not assessment.already:
            look = partial(self._store.preview.survey, target.name, manifest, wish.policy_for(target))
            survey = await anyio.to_thread.run_sync(look)
            files = survey.files
            needs += survey.needs
            gates = (*assessment.gates, files_gate(survey.files), space_gate(fs.rooms(needs)))
            assessment = Assessment(target=target.name, gates=gates, already=False)
        return Part(
            target=target,
            package=PackageView(package, manifest),
            assessment=assessment,
            files=files,
            build_before=state.build,
        )


def _is_called(reference: str, txn: int | None, patch: str | None) -> bool:
    return reference == str(txn) or (len(reference) >= MIN_PREFIX and (patch or "").startswith(reference))


def _part_of(target: Target, staged: StagedTarget, files: Sequence[Mapping[str, Any]]) -> Part:
    """One target's part in a patch that was applied some time ago."""
    part = Part(
        target=target,
        package=None,
        assessment=Assessment(target=target.name, gates=(), already=False),
        files=tuple(
            FilePlan(path=file["path"], op=file["op"], note=file["note"])
            for file in files
            if file["target"] == target.name
        ),
        build_before=staged.build_before,
    )
    part.participant = Participant(
        target=target,
        build_before=staged.build_before,
        build_after=staged.build_after,
        changed=part.changed,
        stage=lambda txn, progress: None,
    )
    return part


def _answers(transaction: Transaction) -> list[dict[str, Any]]:
    """What became of every instance, for the audit."""
    participants = transaction.change.participants
    return [record.to_json() for each in participants for record in each.records.values()]


def _may_be_an_id(reference: str) -> bool:
    """Whether it looks like a transaction's number, or the beginning of a patch's id."""
    text = reference.strip().lower()
    return text.isdecimal() or (len(text) >= MIN_PREFIX and set(text) <= set("0123456789abcdef"))


def _was_not_tried(source: Source, error: AsyncsupError) -> bool:
    """Whether nothing is known to be wrong with a package, so that it may be tried again as it lies: a target
    was busy, its signatures could not be judged, or the checksum is missing, or was mistyped. (One beside the
    package that disagrees is another matter.)"""
    if error.exit_status == TargetBusyError.exit_status or error.error_code == "trust.digest_missing":
        return True
    if isinstance(error, AllowedSignersError | TrustUnavailableError):
        return True
    opened = error.details["report"]["patch"] is not None
    mistyped = {"digest.crc32"} if source.sidecar else {"digest.crc32", "digest.sha256"}
    return not opened and error.error_code in mistyped


def _gates(report: Report) -> list[dict[str, Any]]:
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


def _trust_gate(endorsement: Endorsement | None) -> Gate | None:
    return None if endorsement is None else Gate(name="trust", ok=True, detail=str(endorsement))


def identity_of(path: Path) -> tuple[int, ...] | None:
    """Device, inode, size and time of the last change; None when there is nothing.

    The inode alone is not enough: its number is given out again as soon as the file is gone.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _resolve(job: _Job, outcome: dict[str, Any] | AsyncsupError) -> None:
    for future in (job.end, job.answer):
        if future.done():
            continue
        if isinstance(outcome, AsyncsupError):
            future.set_exception(outcome)
            future.exception()  # whoever wants it asks again; nobody has to
        else:
            future.set_result(outcome)


def _is_the_patchs_fault(error: AsyncsupError | None) -> TypeGuard[PatchError]:
    """Whether an undone patch must not be tried again as it is; not when somebody merely stopped it."""
    undone = isinstance(error, PatchRolledBackError | RollbackFailedError)
    return undone and error is not None and error.details.get("cause") != "request.cancelled"
