"""The Patch Overseer: from "here is a zip" to a report of what became of it.

Verifies, finds the targets, takes hold of them, asks the gates, runs the transaction, and says what happened.
Each of these is a part of its own; here they are put in their order::

    intake        where a package is, and whether it is to be trusted
    patchable     which targets it is for
    jobs          what is under way, and whoever waits for it
    examination   every gate, for every target; for a way back: rollback
    planning      all of that for somebody who only wants to know
    execution     the transaction, from its beginning to what is written down of it (bookkeeping)
    decisions     patches that have failed and wait for somebody
    arrivals      packages that nobody but the inbox asks for
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

import anyio
import anyio.abc
import anyio.to_thread

from asyncsup.actor import Actor
from asyncsup.errors import (
    AsyncsupError,
    PatchMalformedError,
    PatchNotFoundError,
    PatchRefusedError,
    TargetBusyError,
    UsageError,
)
from asyncsup.failpoints import step_failpoint
from asyncsup.patch.aftermath import bring_all_back
from asyncsup.patch.arrivals import Arrivals
from asyncsup.patch.bookkeeping import Bookkeeping
from asyncsup.patch.clock import SeenClock
from asyncsup.patch.decisions import Decisions
from asyncsup.patch.examination import Examination
from asyncsup.patch.execution import Execution
from asyncsup.patch.facts import PatchInfo, Undecided
from asyncsup.patch.forecast import terms_of
from asyncsup.patch.gates import Gate
from asyncsup.patch.intake import Intake, Source, trust_gate
from asyncsup.patch.jobs import Job, Jobs, Outcome
from asyncsup.patch.manifest import Kind
from asyncsup.patch.package import Package
from asyncsup.patch.patchable import Patchable
from asyncsup.patch.plan import FilePlan, PlanError, Policy
from asyncsup.patch.planning import Planning
from asyncsup.patch.relay import change_of
from asyncsup.patch.report import Part, Report, Verdict, describe_package, file_json, gate_json, staged_part
from asyncsup.patch.rollback import Rollback
from asyncsup.patch.transaction import Change, Participant, Progress
from asyncsup.patch.uploads import Uploads
from asyncsup.patch.way_back import Extent
from asyncsup.patch.wish import WayBack, Wish
from asyncsup.record import PatchRecord
from asyncsup.target import Target, hold_all

if TYPE_CHECKING:
    from asyncsup.supervisor import Supervisor

log = logging.getLogger("asyncsup.patch")

_TRUST_DETAILS: Final = ("required", "signers", "uncounted", "signature")
"""What an error about signatures says of them."""

Work = Callable[[Job, Sequence[Target]], Awaitable[Verdict]]


class PatchOverseer:
    """What the control socket can ask about patches.

    Attributes:
        uploads: packages that are sent in pieces.
        intake: finds the package that a request means.
        jobs: what is under way.
        arrivals: the packages of the inbox.
        decisions: what waits for somebody to decide.
        planning: says what `apply` would do.
    """

    def __init__(self, supervisor: Supervisor, tasks: anyio.abc.TaskGroup) -> None:
        self._supervisor = supervisor
        self._store = supervisor.store
        self._tasks = tasks
        self._clock = SeenClock(self._store.last_seen())
        self._books = Bookkeeping(self._store, lambda: supervisor.config.patch.keep)
        self._patchable = Patchable(supervisor)
        self._examination = Examination(self._store, self._clock)
        self._execution = Execution(self._store, self._books, supervisor.events, supervisor.journal)
        self._rollback = Rollback(self._store, self._patchable)
        self.uploads = Uploads(
            supervisor.config.supervisor.state_dir / "uploads", lambda: supervisor.config.patch.limits
        )
        self.intake = Intake(lambda: supervisor.config.patch, supervisor.inbox, self.uploads, self._clock)
        self.jobs = Jobs(tasks, self._books.attempted)
        self.arrivals = Arrivals(supervisor.inbox, self.intake, self._patchable, self.jobs, self.apply)
        self.decisions = Decisions(self._store, self._books, self._execution)
        self.planning = Planning(self.intake, self._patchable, self._examination, self.decisions, self.jobs)

    # --- questions ------------------------------------------------------------------------------------------

    async def verify(self, source: Source) -> dict[str, Any]:
        """Everything about a package that can be said without a target."""
        with await self.intake.open(source) as package:
            trust = await self.intake.judge_signatures(package)
            return {**describe_package(package), "signed": None if trust is None else gate_json(trust)}

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
        if any(job.waits_for_commit and job.report.txn == entry["txn"] for job in self.jobs):
            entry["verdict"] = "uncommitted"
        return entry

    def marks(self, target: str) -> dict[str, Any] | None:
        """What no patch of a target may go below; None before the first one."""
        marks = self._store.marks(target)
        return None if marks is None else {"highest": marks.highest, "floor": marks.floor}

    async def drift(
        self, target: str | None, *, among: Collection[str] | None = None
    ) -> list[dict[str, Any]]:
        """Files of one target, or of all that have a root (``among`` these names), that are not as patches
        have left them."""
        known = [each for each in self._those(target) if among is None or each.name in among]
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
        job.inbox_file = source.identity
        work = partial(self._apply_package, job, source, wish)
        self.jobs.start(job, work, partial(self._settle, job, source))
        return await self.jobs.answer(job)

    async def _settle(self, job: Job, source: Source, outcome: Outcome) -> None:
        try:
            await step_failpoint("overseer.settle")
            self.arrivals.settle(job, source, outcome)
            self.uploads.drop(source.path)
        except OSError as error:
            log.warning("%s stays where it is: %s", source.path, error)

    async def rollback(self, way: WayBack, wish: Wish) -> dict[str, Any]:
        """Bring targets back to earlier generations, all in one transaction; returns the report.

        Raises:
            AsyncsupError: as `apply` does, and as `goals_of_target` and `goals_of_patch` do.
        """
        undecided = self.decisions.find(way.reference)
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
        self.jobs.start(job, partial(self._take_back, job, way, wish))
        return await self.jobs.answer(job)

    async def _take_back(self, job: Job, way: WayBack, wish: Wish) -> dict[str, Any]:
        goals = await anyio.to_thread.run_sync(self._rollback.goals, way)
        targets = [self._supervisor.targets[name] for name in goals]
        job.report.patch = self._store.state(targets[0].name).patch
        return await self._carry_out(job, targets, partial(self._roll_back, way, wish), wish)

    async def commit(self, reference: str, *, actor: Actor) -> dict[str, Any]:
        """Commit a patch that waits for it; returns its report.

        Raises:
            PatchNotFoundError: no such patch waits.
            PatchRolledBackError: it failed in this very moment.
        """
        undecided = self.decisions.find(reference)
        if undecided is not None:
            return await self._decide(undecided, Wish(actor=actor), keep=True)
        job = self.jobs.find(reference, "commit")
        if job.transaction is None or not job.waits_for_commit:
            raise PatchNotFoundError(f"patch {reference} does not wait for a commit (yet)", id=reference)
        self._store.note("txn.commit_asked", txn=job.report.txn, by=actor.to_json())
        job.transaction.commit_requested.set()
        return await asyncio.shield(job.end)

    async def abort(self, reference: str, *, actor: Actor) -> dict[str, Any]:
        """End a patch that is under way, at whatever step it is, and put everything back; returns its report.

        Raises:
            PatchNotFoundError: no such patch is under way.
        """
        undecided = self.decisions.find(reference)
        if undecided is not None:
            return await self._decide(undecided, Wish(actor=actor), keep=False)
        job = self.jobs.find(reference, "abort")
        self._store.note("txn.abort_asked", txn=job.report.txn, by=actor.to_json())
        job.outlasted = False
        job.cancel(f"aborted by {actor}")
        await asyncio.wait([job.end])
        error = job.end.exception()
        if isinstance(error, AsyncsupError):
            report: dict[str, Any] = error.details["report"]
            return report
        return job.end.result()

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
        work = partial(self.decisions.carry_out, undecided, wish, keep)
        self.jobs.start(job, partial(self._carry_out, job, targets, work, wish))
        return await self.jobs.answer(job)

    async def prune(self, target: str | None, keep: int | None, *, actor: Actor) -> dict[str, list[int]]:
        """Remove old generations nobody reads; returns their numbers by target."""
        known = self._those(target)
        limit = keep if keep is not None else self._supervisor.config.patch.keep
        prune = partial(self._store.prune, keep=limit, by=actor.to_json())
        return {each.name: await anyio.to_thread.run_sync(prune, each.name) for each in known}

    async def release(self, name: str, *, actor: Actor) -> list[str]:
        """Turn a target's managed files back into ordinary ones; returns their paths."""
        target = self._patchable.named(name)
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

    def _those(self, target: str | None) -> list[Target]:
        return self._patchable.all() if target is None else [self._patchable.named(target)]

    # --- after a crash --------------------------------------------------------------------------------------

    def go_on(self, record: PatchRecord) -> None:
        """Go on with a patch that an earlier supervisor had brought as far as its probation."""
        wish = Wish(actor=Actor(**record.by))
        job = self._new_job("rollback" if record.action == "rollback" else "apply", wish)
        job.report.file = job.inbox_name = record.file
        job.inbox_file = record.inbox_file
        targets = [self._supervisor.targets[part.target] for part in record.parts]
        work = partial(self._carry_out, job, targets, partial(self._go_on, record), wish)
        self.jobs.start(job, work, partial(self.arrivals.settle_by_name, job))

    async def _go_on(self, record: PatchRecord, job: Job, targets: Sequence[Target]) -> Verdict:
        known = await anyio.to_thread.run_sync(self._store.history.transaction, record.txn)
        report = job.report
        report.patch, report.build, report.kind = record.patch or None, known["build"], record.kind
        report.parts += [
            staged_part(
                target,
                known["files"],
                build_before=part.build_before,
                build_after=part.build_after,
                kind=Kind(record.kind),
                changed=part.changed,
            )
            for target, part in zip(targets, record.parts, strict=True)
        ]
        participants = [part.participant for part in report.parts if part.participant is not None]
        change = change_of(record, participants)
        info = None
        if change.action == "apply":
            facts = {name: known[name] for name in ("name", "version", "build", "kind")}
            info = PatchInfo(id=record.patch, **facts)
        standing = [(self._supervisor.instance(name), pid) for name, pid in record.standing or ()]
        await self._execution.see_through(job, record.txn, change, info, lambda t: t.go_on(standing))
        return "committed"

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
            await bring_all_back(targets, store=self._store, txn=txn, patch=patch, cold=cold, changed=changed)
            self._supervisor.journal.drop(f"transaction {txn}")

        self._tasks.start_soon(all_of_them)

    # --- from a job to a transaction ------------------------------------------------------------------------

    def _new_job(self, action: Literal["apply", "rollback"], wish: Wish) -> Job:
        report = Report(
            action=action,
            asked_by=str(wish.actor),
            trust=self.intake.trust,
            facts=self._supervisor.root_facts,
        )
        return self.jobs.new(report, {"by": wish.actor.to_json(), "wish": wish.to_json()})

    async def _apply_package(self, job: Job, source: Source, wish: Wish) -> dict[str, Any]:
        await step_failpoint("overseer.verify")
        if wish.trust_clock:
            await anyio.to_thread.run_sync(partial(self._store.trust_clock, by=wish.actor.to_json()))
            self._clock.trust(time.time())
        job.request["trust"] = {"mode": self.intake.trust, "checked_against": source.checked_against}
        with await self.intake.open(source, must_be_trusted=True) as package:
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
            targets = self._patchable.of(package.manifest, wish.target)
            return await self._carry_out(job, targets, partial(self._apply_to, package, wish), wish)

    def _endorse(self, job: Job, package: Package) -> Gate | None:
        """Who signed a package, as of now, noted for the report and the audit; in a worker thread.

        Raises:
            AsyncsupError: as `Intake.check_signatures`.
        """
        trust = job.request["trust"]
        try:
            endorsement = self.intake.check_signatures(package)
        except PatchMalformedError as error:
            trust |= {key: error.details[key] for key in _TRUST_DETAILS if key in error.details}
            raise
        if endorsement is not None:
            trust |= endorsement.to_json()
            job.report.signers = trust["signers"]
        return trust_gate(endorsement)

    def _confirm(self, job: Job, package: Package) -> None:
        """A patch may have waited for long: what counts is whether it may be applied now. In a worker thread.

        Raises:
            AsyncsupError: as `Intake.check_signatures`.
            PatchRefusedError: it has expired, or another configuration guards what it would change.
        """
        self._endorse(job, package)
        self.intake.refuse_expired(package)
        for part in job.report.parts:
            if part.participant is not None and part.package is not None:
                self._store.preview.refuse_guarded(part.target.name, part.package.manifest)

    async def _carry_out(self, job: Job, targets: Sequence[Target], work: Work, wish: Wish) -> dict[str, Any]:
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

    async def _apply_to(self, package: Package, wish: Wish, job: Job, targets: Sequence[Target]) -> Verdict:
        report, manifest = job.report, package.manifest
        # Again: a key may have been revoked while something else had the targets.
        trust = await anyio.to_thread.run_sync(self._endorse, job, package)
        report.parts += await self._examination.examine(package, targets, wish, trust)
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
        terms = terms_of(manifest, [part.target for part in parts])
        change = Change(
            action="apply",
            kind=manifest.kind,
            patch=package.id,
            probation=terms.probation,
            manual_commit=terms.manual_commit,
            manual_rollback=terms.manual_rollback,
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
        await self._execution.run(job, change, info)
        return "committed"

    def _stage(self, part: Part, policy: Policy, txn: int, progress: Progress) -> None:
        assert part.package is not None
        part.take_in(self._store.stage(txn, part.target.name, part.package, progress, policy=policy))

    async def _roll_back(self, way: WayBack, wish: Wish, job: Job, targets: Sequence[Target]) -> Verdict:
        goals = await anyio.to_thread.run_sync(self._rollback.goals, way)
        if goals.keys() != {target.name for target in targets}:
            raise TargetBusyError("what is to be taken back has changed meanwhile; look again")
        report = job.report
        for target in targets:
            back = partial(self._rollback.part, target, goals[target.name], wish.policy_for(target))
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
        await self._execution.run(job, change, None)
        return "committed"
