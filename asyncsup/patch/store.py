"""The store: generations of targets' files, and the one pointer that says which of them are current.

What it promises, at every instant and after any crash or power cut: the files of a target are wholly those of
one generation, and all targets of one patch change in the same instant. The life of a patch::

    begin    a transaction has its targets to itself from here on
    stage    per target: the next generation is built beside the current one; nobody sees it
    carry    per tree target, while it is stopped: what the program wrote meanwhile
    switch   THE commit point: one rename, for all targets
    commit   confirmed; until then `switch_back` undoes everything
    finish   what became of it, for the history

Every undo is harmless when its step never ran, and may be repeated. All methods block, and may be called from
any thread. A long `stage` of one target holds up neither another target nor anybody who asks for a state.

What does not belong to that life is in files of its own: how targets become known (registration.py), what can
be asked before (preview.py) and afterwards (history.py), what is done after a crash (recovery.py), and how
generations go (pruning.py).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from asyncsup.errors import AsyncsupError, StateError, TargetBusyError, UsageError
from asyncsup.failpoints import failpoint
from asyncsup.patch import pruning
from asyncsup.patch.access import Access
from asyncsup.patch.carrying import Carrying
from asyncsup.patch.confirmed import restore_pointer
from asyncsup.patch.database import OPEN_PHASES, PartRow, Phase, Scaled, TransactionRow
from asyncsup.patch.facts import (
    INTERRUPTED,
    UNDECIDED,
    Action,
    Layout,
    PatchInfo,
    Recovered,
    StagedTarget,
    TargetRoot,
    TargetState,
    Undecided,
)
from asyncsup.patch.guarded import NOTHING_MORE, Guarded
from asyncsup.patch.history import History
from asyncsup.patch.marks import Marks, raised
from asyncsup.patch.plan import FilePlan, Policy
from asyncsup.patch.preview import Preview
from asyncsup.patch.recovery import Recovery
from asyncsup.patch.registration import Registration
from asyncsup.patch.statedir import StateDirectory, state_errors
from asyncsup.patch.target_files import PatchSource, Progress, TargetFiles

log = logging.getLogger("asyncsup.patch.store")


class Store:
    """The store in one state directory. Made by `Store.open`.

    Attributes:
        history: what was done, to be read.
        preview: what there is, and what would be done, looked at without touching anything.
    """

    def __init__(self, state: StateDirectory) -> None:
        self._state = state
        self._database = state.database
        self._access = Access(state)
        self._carrying = Carrying(self._access, self.record)
        self.history = History(state)
        self.preview = Preview(state, self._access)
        self._live: set[int] = set()
        """The transactions that somebody carries out. One that is open all the same was left half done."""
        self._unwritten: dict[int, dict[str, Any]] = {}
        """Why transactions are undecided, where that could not be written down yet."""

    @classmethod
    def open(cls, state_dir: Path) -> Store:
        """Take the state directory's lock, create what is missing, sweep what was left half done.

        Raises:
            StateLockedError: another supervisor has it; the message says which process.
            StateError: it is damaged, was moved, or belongs to another version.
        """
        with state_errors():
            state = StateDirectory.open(state_dir)
            store = cls(state)
            store.guard(NOTHING_MORE)
            try:
                store.settle()
            except BaseException:
                state.close()
                raise
        return store

    @property
    def guarded(self) -> Guarded:
        """What no patch may change."""
        return self._state.guarded

    def guard(self, guarded: Guarded) -> None:
        """From here on no patch may change these places, nor the state directory itself, and nothing else is
        guarded."""
        places = {self._state.path: "the state directory", **guarded.places}
        self._state.guarded = replace(guarded, places=places)

    def settle(self) -> None:
        """Sweep what was left half done, and set the pointer again if it is lost.

        Raises:
            StateError: it is lost, and what was last confirmed is damaged.
        """
        self._state.sweep_staging()
        self._state.pointer.sweep()
        failpoint("store.open.swept")
        restore_pointer(self._state)

    def close(self) -> None:
        """Close the database and give up the lock."""
        try:
            self._database.write_notes(durable=False)
        except StateError as error:
            log.error("the last records of the audit were not written: %s", error.message)  # noqa: TRY400
        self._state.close()

    def register(self, targets: Sequence[TargetRoot]) -> None:
        """Make the targets known, so that ``STATE/current/TARGET`` leads to a folder for each.

        A target that is not configured any more keeps its files.

        Raises:
            StateError: root or layout of a target changed while patches are applied to it, or a tree has
                another target's root in it.
            UsageError: a name that cannot be used.
        """
        with state_errors():
            Registration(self._state).register(targets)

    def state(self, target: str) -> TargetState:
        """What a target has now.

        Raises:
            TargetNotFoundError: it has no root, or does not exist.
        """
        row = self._database.target(target)
        generation = self._database.generation(target, self._state.number(target))
        return TargetState(
            name=target,
            build=generation.build,
            generation=generation.number,
            patch=generation.patch,
            root=row.root,
            layout=Layout(row.layout),
        )

    def current_link(self, target: str) -> Path:
        """``STATE/current/TARGET``: always a folder, always the current generation."""
        return self._state.current(target)

    def wanted(self, target: str) -> bool:
        """Whether an operator last wanted the target up; True when nobody has said."""
        return self._database.wanted(target)

    def stopped_alone(self, target: str) -> frozenset[int]:
        """Which of its instances, by index, an operator wanted down although the target is to be up."""
        return self._database.stopped_alone(target)

    def set_wanted(self, target: str, up: bool, stopped_alone: Collection[int] = ()) -> None:
        """Remember both beyond this supervisor's life."""
        self._database.set_wanted(target, up, stopped_alone)

    def scaled(self, target: str) -> Scaled | None:
        """How many instances an operator last wanted; None when nobody has said."""
        return self._database.scaled(target)

    def set_scaled(self, target: str, *, configured: int, instances: int) -> None:
        """Remember it beyond this supervisor's life, for as long as ``configured`` is configured."""
        self._database.set_scaled(target, Scaled(configured=configured, instances=instances))

    # --- transactions ---------------------------------------------------------------------------------------

    def begin(
        self,
        *,
        action: Action,
        patch: PatchInfo | None,
        targets: Sequence[str],
        asked_by: str,
        request: Mapping[str, Any] | None = None,
        by_hand: bool = False,
    ) -> int:
        """Open a transaction over `targets`, durably; returns its number.

        A rollback without `patch` is recorded as one of the patch that is current.

        Args:
            request: everything else about it that the audit is to hold: who asked, what was decided.
            by_hand: once it has switched, no failure and no crash undoes it: see `leave_undecided`.
        Raises:
            TargetBusyError: another transaction has one of them.
            TargetNotFoundError, UsageError: a target is not known, or none or one twice is named.
        """
        if not targets or len(set(targets)) != len(targets):
            raise UsageError(f"a transaction needs distinct targets, got {list(targets)}")
        for target in targets:
            self.tidy_up(target)
        with self._access.reporting(", ".join(targets)), self._database.write():
            sources = {}
            for target in targets:
                self._refuse_while_open(target)
                sources[target] = self.state(target).generation
            facts = self._current_patch(targets[0]) if patch is None else patch.to_facts()
            txn = self._add_transaction(
                "txn.begun",
                action,
                facts,
                asked_by=asked_by,
                sources=sources,
                request=request or {},
                started=time.time(),
                by_hand=by_hand,
            )
        with self._access.reporting(", ".join(targets)):
            failpoint("store.begin.recorded")
        self._live.add(txn)
        return txn

    def _refuse_while_open(self, target: str) -> None:
        for other in self._database.open_transactions(target):
            if other.state == UNDECIDED:
                raise waits_for_a_decision(target, other.txn)
            message = f"{target} is being changed by transaction {other.txn} ({other.action})"
            raise TargetBusyError(message, target=target, txn=other.txn)

    def write_down_attempt(
        self,
        *,
        action: Action,
        patch: PatchInfo | Mapping[str, Any],
        targets: Sequence[str],
        asked_by: str,
        verdict: str,
        error: str | None,
        code: str | None,
        request: Mapping[str, Any],
        took: float = 0.0,
    ) -> int:
        """Something was asked for that came to no transaction; durable. Returns the number it is found under.

        Args:
            patch: as much as is known of it.
            took: seconds.
        """
        facts = patch.to_facts() if isinstance(patch, PatchInfo) else patch
        sources = {target: self.state(target).generation for target in targets}
        with self._database.write():
            outcome = {"verdict": verdict, "error": error, "code": code}
            txn = self._add_transaction(
                "txn.attempted",
                action,
                facts,
                asked_by=asked_by,
                sources=sources,
                request={**request, **outcome},
                started=time.time() - took,
            )
            self._database.update_transaction(
                txn, phase=Phase.ABORTED, state=verdict, verdict=verdict, error=error, code=code, ended=True
            )
        return txn

    def _add_transaction(
        self,
        event: str,
        action: Action,
        facts: Mapping[str, Any],
        *,
        asked_by: str,
        sources: Mapping[str, int],
        request: Mapping[str, Any],
        started: float,
        by_hand: bool = False,
    ) -> int:
        txn = self._database.add_transaction(
            action=action,
            facts=facts,
            asked_by=asked_by,
            sources=sources,
            started=started,
            by_hand=by_hand,
        )
        self._database.record(
            event,
            txn=txn,
            action=action,
            asked_by=asked_by,
            sources=[{"target": target, "generation": number} for target, number in sources.items()],
            **facts,
            **request,
        )
        return txn

    def tidy_up(self, target: str) -> None:
        """Finish what an error has kept from being finished. Whoever looks at the target's files in order to
        change them has to begin with it; it costs nothing when there is nothing left to do.

        Raises:
            AsyncsupError: it cannot be done yet.
        """
        if self._database.target(target).releasing:
            self.release(target)
        else:
            self._finish_transactions(target)

    def _finish_transactions(self, target: str) -> None:
        for row in self._database.open_transactions(target):
            if row.txn in self._unwritten:
                with self._access.reporting(target):
                    self._write_undecided(row.txn)
            elif row.txn not in self._live and row.state != UNDECIDED:
                why = "an error kept it from being undone at once"
                with self._access.reporting(target):
                    self.finish(row.txn, verdict="rolled_back", error=why, code=INTERRUPTED)
        for untidy in self._database.untidy_transactions(target):
            # Its dangling links must be gone before their names can mean something else.
            with self._access.reporting(target):
                self.tidy(untidy.txn)

    def _current_patch(self, target: str) -> dict[str, Any]:
        generation = self._database.generation(target, self._state.number(target))
        if generation.txn is None:
            return {"patch": generation.patch}
        row = self._database.transaction(generation.txn)
        return {
            "patch": row.patch,
            "name": row.name,
            "version": row.version,
            "build": row.build,
            "kind": row.kind,
        }

    def stage(
        self,
        txn: int,
        target: str,
        package: PatchSource,
        progress: Progress | None = None,
        *,
        policy: Policy = "refuse",
    ) -> StagedTarget:
        """Build the next generation of a target, ready to be switched to.

        Args:
            policy: what becomes of files that are not what the patch was made for.
            progress: called with the number of bytes written since the last call.
        Raises:
            PatchRefusedError: ``gate.drift``, ``gate.base``, ``gate.conflict``, ``gate.detached``,
                ``gate.path``, ``gate.space``, ``gate.root``, ``gate.filesystem``.
            PatchMalformedError: the package's content is not what it says.
            PatchError: ``patch.io_failed``.
            In every case nothing is left of it, and the root's files are what they were.
        """
        with self._access.alone(target):
            files, part = self._access.files(target), self._part_to_stage(txn, target)
            size = sum(change.size or 0 for change in package.manifest.files)
            with self._access.reporting(target, size), self._undoing(files, part):
                planned = files.plan(package.manifest.files, policy)
                part = files.stage(part, package, planned, progress)
            return self._staged(part, tuple(files.noted(txn, item) for item in planned))

    def stage_rollback(
        self, txn: int, target: str, generation: int, *, policy: Policy = "refuse"
    ) -> StagedTarget:
        """Prepare a target for going back to a generation that is kept.

        Raises:
            PatchNotFoundError: it is not kept any more.
            PatchRefusedError: the root is in the way; nothing is left of it.
        """
        with self._access.alone(target):
            files, part = self._access.files(target), self._part_to_stage(txn, target)
            if generation == part.source:
                raise UsageError(f"{target} is at generation {generation} already", target=target)
            with self._access.reporting(target), self._undoing(files, part):
                part, planned = files.stage_rollback(part, generation, policy)
            return self._staged(part, tuple(files.noted(txn, item) for item in planned))

    def _part_to_stage(self, txn: int, target: str) -> PartRow:
        row, part = self._database.transaction(txn), self._database.part(txn, target)
        if row.phase is not Phase.BEGUN or part.destination is not None:
            raise StateError(
                f"transaction {txn} is {row.phase.value}, {target} cannot be staged in it (again)",
                code="state.order",
            )
        return part

    def _staged(self, part: PartRow, plans: tuple[FilePlan, ...]) -> StagedTarget:
        assert part.destination is not None
        return StagedTarget(
            target=part.target,
            source=part.source,
            destination=part.destination,
            build_before=self._database.generation(part.target, part.source).build,
            build_after=self._database.generation(part.target, part.destination).build,
            files=plans,
        )

    def carry(self, txn: int, target: str) -> list[str]:
        """Right before the switch, while a tree target is stopped: what the program has created, changed or
        removed since staging is brought to the next generation. Returns the paths.

        `switch` does it for whoever was not asked; so a call is only needed for the report.
        """
        with self._access.alone(target), self._access.reporting(target):
            return self._carrying.carry(self._database.part(txn, target))

    def switch(self, txn: int) -> None:
        """Move all targets of the transaction to their staged generations, in one rename.

        What a program saves meanwhile is brought along; a file of the patch itself is not: whose save came
        first nobody could say.

        Raises:
            PatchRefusedError: a root is not as it was when it was staged.
            PatchError: ``patch.io_failed``.
            After each of them the pointer may have moved: `switch_back` is needed.
        """
        with self._holding(txn) as parts:
            row = self._database.transaction(txn)
            unstaged = [part.target for part in parts if not part.staged]
            if row.phase is not Phase.BEGUN or unstaged:
                raise StateError(
                    f"transaction {txn} is {row.phase.value} and cannot switch"
                    + (f"; not staged: {', '.join(unstaged)}" if unstaged else ""),
                    code="state.order",
                )
            for part in parts:
                with self._access.reporting(part.target):
                    if not self._carrying.has_carried(part):
                        self.carry(txn, part.target)
                    self._access.files(part.target).verify(part)
            with self._access.reporting(", ".join(part.target for part in parts)):
                # From the set that is current now: other transactions may have switched in between.
                self._state.pointer.flip(
                    {part.target: self._state.entry(part.target, _destination(part)) for part in parts},
                    point="store.switch",
                )
                self._database.advance(txn, Phase.SWITCHED, "txn.switched")
                failpoint("store.switch.recorded")
            for part in parts:
                with self._access.reporting(part.target):
                    self._carrying.follow_up(part)
                    self._access.files(part.target).verify_switched(part)

    def switch_back(self, txn: int) -> None:
        """Move this transaction's targets, and no others, back to where they were; harmless if it never
        switched.

        Raises:
            StateError: it is confirmed; a rollback is a transaction of its own.
        """
        with self._holding(txn) as parts:
            row = self._database.transaction(txn)
            if row.phase is Phase.COMMITTED:
                raise StateError(f"transaction {txn} is confirmed and cannot be undone", code="state.order")
            if row.phase is Phase.ABORTED:
                return
            with self._access.reporting(", ".join(part.target for part in parts)):
                switched = self._state.shows({part.target: part.destination for part in parts})
                if switched:
                    carried = self._carrying.carry_back(parts)
                    self._state.pointer.flip(
                        {part.target: self._state.entry(part.target, part.source) for part in parts},
                        point="store.switch_back",
                    )
                    self._carrying.follow_back(carried)
                if switched or row.phase is Phase.SWITCHED:
                    self._database.advance(txn, Phase.SWITCHED_BACK, "txn.switched_back")
                    failpoint("store.switch_back.recorded")
                for part in parts:
                    self._access.files(part.target).remove_names(part)
                    failpoint("store.switch_back.unlinked")

    def commit(self, txn: int) -> None:
        """Confirm the transaction, durably: from here on nothing undoes it but a rollback.

        Raises:
            StateError: it has not switched, or the confirmation could not be written and does not count.
        """
        with self._holding(txn) as parts:
            row = self._database.transaction(txn)
            if row.phase is not Phase.SWITCHED:
                raise StateError(
                    f"transaction {txn} is {row.phase.value} and cannot be confirmed", code="state.order"
                )
            failpoint("store.commit.begun")
            self._confirm(row, parts)
            try:
                failpoint("store.commit.recorded")
                self._tidy(txn, parts)
            except (OSError, AsyncsupError) as error:
                # It is committed whatever becomes of the dangling links; the next start tries again.
                log.warning("transaction %d is committed, but tidying up failed: %s", txn, error)
                self.record(txn, "tidy", detail=f"failed: {error}")

    def _confirm(self, row: TransactionRow, parts: Sequence[PartRow]) -> None:
        builds = {
            part.target: self._database.generation(part.target, _destination(part)).build for part in parts
        }
        with self._database.write() as sql:
            self._database.update_transaction(row.txn, phase=Phase.COMMITTED, verdict="committed", ended=True)
            for part in parts:
                sql.execute(
                    "UPDATE targets SET confirmed = ? WHERE name = ?", (_destination(part), part.target)
                )
                if row.action == "apply":
                    before = self._database.marks(part.target)
                    self._database.set_marks(
                        part.target,
                        raised(before, builds[part.target], floor=row.floor, downgrade=row.downgrade),
                    )
            self._database.record(
                "txn.confirmed",
                txn=row.txn,
                targets=[
                    {
                        "target": part.target,
                        "generation": _destination(part),
                        "build": builds[part.target],
                    }
                    for part in parts
                ],
            )

    def tidy(self, txn: int) -> None:
        """Remove what is left over once a transaction is confirmed; `commit` does."""
        with self._holding(txn) as parts:
            self._tidy(txn, parts)

    def _tidy(self, txn: int, parts: Sequence[PartRow]) -> None:
        for part in parts:
            self._access.files(part.target).note_overwritten(part)
            self._access.files(part.target).tidy(part)
            failpoint("store.commit.tidied")
            self._carrying.forget(part)
        self._database.update_transaction(txn, cleaned=True, durable=False)

    def abort(self, txn: int, reason: str | None = None) -> None:
        """Remove everything the transaction has staged (switching back first if need be), and end it.

        Harmless when there is nothing to remove, or when it has ended already.

        Raises:
            StateError: it is confirmed.
        """
        with self._holding(txn) as parts:
            self.switch_back(txn)
            if self._database.transaction(txn).phase is Phase.ABORTED:
                return
            for part in parts:
                with self._access.reporting(part.target):
                    rescued = self._access.files(part.target).undo(part)
                for path in rescued:
                    copy = self._state.saved(part.target, f"{txn}-undone") / path
                    self.record(txn, "rescue", target=part.target, detail=f"{path} was written to: {copy}")
                self._carrying.forget(part)
            failpoint("store.abort.undone")
            # `finish` says it more exactly, and durably; but there may be no time for it.
            with self._database.write(durable=False):
                # One that was undecided has a reason already.
                why = reason or self._database.transaction(txn).error
                verdict = "rolled_back"
                self._database.update_transaction(
                    txn, phase=Phase.ABORTED, verdict=verdict, error=why, ended=True
                )
                self._database.record("txn.undone", txn=txn, verdict=verdict, error=why)
            failpoint("store.abort.recorded")

    def leave_undecided(
        self, txn: int, *, error: str, code: str, facts: Mapping[str, Any] | None = None
    ) -> None:
        """It has failed after the switch, and stays as it is, over any restart, until somebody decides:
        `commit` it, or `abort` it. Until then it has its targets. When that cannot be written down, it is so
        all the same, and is written down as soon as anybody wants to do something with its targets.

        Args:
            error, code: why it was not committed.
        """
        self._unwritten[txn] = {"error": error, "code": code, **(facts or {})}
        self._write_undecided(txn)
        failpoint("store.undecided.recorded")

    def _write_undecided(self, txn: int) -> None:
        why = self._unwritten[txn]
        with self._database.write():
            self._database.update_transaction(
                txn,
                phase=Phase.SWITCHED,
                state=UNDECIDED,
                verdict=UNDECIDED,
                error=why["error"],
                code=why["code"],
            )
            self._database.record("txn.undecided", txn=txn, verdict=UNDECIDED, **why)
        del self._unwritten[txn]

    def undecided(self) -> list[Undecided]:
        """The transactions that wait for a decision."""
        unwritten = dict(self._unwritten)
        return [
            Undecided(
                txn=row.txn,
                patch=row.patch or "",
                name=row.name,
                version=row.version,
                build=row.build,
                kind=row.kind or "cold",
                error=unwritten.get(row.txn, {}).get("error") or row.error or "",
                code=unwritten.get(row.txn, {}).get("code") or row.code or "",
                parts=tuple(self._staged(part, ()) for part in self._database.parts(row.txn)),
            )
            for row in self._database.open_transactions()
            if row.state == UNDECIDED or row.txn in unwritten
        ]

    def finish(
        self,
        txn: int,
        *,
        verdict: str,
        state: str | None = None,
        error: str | None = None,
        code: str | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Write down what became of a transaction. One that is neither confirmed nor aborted is aborted;
        should that fail, the next patch of its targets tries again, and so does recovery.

        Args:
            state: how it ended, where that is not what happened on disk.
            error, code: why it was not committed.
            facts: what else the audit is to hold of its end.
        """
        self._live.discard(txn)
        if self._database.transaction(txn).phase in OPEN_PHASES:
            self.abort(txn, error)
        with self._database.write():
            self._database.update_transaction(
                txn, state=state, verdict=verdict, error=error, code=code, ended=True
            )
            self._database.record(
                "txn.ended", txn=txn, verdict=verdict, error=error, code=code, **(facts or {})
            )
        failpoint("store.finish.recorded")

    # --- recovery -------------------------------------------------------------------------------------------

    def recover(self, keep: Collection[int] = ()) -> list[Recovered]:
        """After a crash, before any target is started: make every transaction either done or undone.

        May itself be killed at any point and run again.

        Args:
            keep: transactions that stay open, because whoever began them had come as far as the probation and
                somebody goes on with it. Those that had not even switched are recovered all the same.
        """
        return Recovery(self, self._state, self._access).recover(keep)

    def go_on(self, txn: int) -> None:
        """Somebody carries out a transaction that another supervisor has begun."""
        self._live.add(txn)

    # --- patches on hold ------------------------------------------------------------------------------------

    def hold(self, patch_id: str, reason: str) -> None:
        """Remember that a patch was undone, and why, so that it is not tried again by itself."""
        self._database.hold(patch_id, reason)
        failpoint("store.hold.recorded")

    def held(self, patch_id: str) -> str | None:
        """Why a patch is on hold; None when it is not."""
        return self._database.held(patch_id)

    def unhold(self, patch_id: str) -> None:
        """It may be tried again."""
        self._database.unhold(patch_id)

    # --- what is remembered for good ------------------------------------------------------------------------

    def marks(self, target: str) -> Marks | None:
        """What no patch of the target may go below; None before the first one. Neither pruning nor a release,
        another layout or another configuration makes it forget."""
        return self._database.marks(target)

    def last_seen(self) -> float:
        """The latest time that anything was written down at, in seconds since the epoch."""
        return self._database.clock()

    def trust_clock(self, *, by: Mapping[str, Any]) -> None:
        """Whatever the time was before, now is the time: somebody says so."""
        self._database.trust_clock(by=by)

    # --- letting go -----------------------------------------------------------------------------------------

    def prune(self, target: str, keep: int, *, by: Mapping[str, Any] | None = None) -> list[int]:
        """Remove old generations nobody needs or uses, as `pruning.prune`; returns what was removed.

        Args:
            by: who asked, for the audit.
        """
        with self._access.alone(target), self._access.reporting(target):
            return pruning.prune(self._state, target, keep, by=by)

    def release(self, target: str, *, by: Mapping[str, Any] | None = None) -> list[str]:
        """Make all managed files ordinary files of the root again; returns their paths.

        Generations are not gone back to afterwards. At every instant a reader finds the same content.

        Args:
            by: who asked, for the audit.
        Raises:
            TargetBusyError: a transaction has the target.
        """
        self._finish_transactions(target)
        with self._access.alone(target), self._access.reporting(target):
            self._refuse_while_open(target)
            self._set_releasing(target, True, event="target.releasing", by=by)
            failpoint("store.release.begun")
            released = self._access.files(target).release()
            failpoint("store.release.done")
            self._set_releasing(target, False, event="target.released", files=len(released))
            return released

    def _set_releasing(self, target: str, releasing: bool, *, event: str, **fields: Any) -> None:
        with self._database.write() as sql:
            sql.execute(
                "UPDATE targets SET releasing = ?, confirmed = ? WHERE name = ?",
                (releasing, self._state.number(target), target),
            )
            self._database.record(event, target=target, **fields)

    # --- what is written down -------------------------------------------------------------------------------

    def record(
        self,
        txn: int,
        step: str,
        *,
        target: str | None = None,
        instance: str | None = None,
        detail: str = "",
        took: float | None = None,
        at: str | None = None,
    ) -> None:
        """Add a step to a transaction; ``took`` in seconds. Never blocks.

        On disk with the next thing that has to be.
        """
        self.note(
            "txn.step", txn=txn, at=at, step=step, target=target, instance=instance, detail=detail, took=took
        )

    def note(self, event: str, *, txn: int | None = None, at: str | None = None, **fields: Any) -> None:
        """Have something written down in the audit with whatever is written next. Never blocks."""
        self._database.note(event, txn=txn, at=at, **fields)

    # --- helpers --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _holding(self, txn: int) -> Iterator[list[PartRow]]:
        """The parts of a transaction, their targets locked (always in the same order)."""
        parts = self._database.parts(txn)
        with contextlib.ExitStack() as stack:
            for part in parts:
                stack.enter_context(self._access.alone(part.target))
            yield self._database.parts(txn)

    @contextlib.contextmanager
    def _undoing(self, files: TargetFiles, part: PartRow) -> Iterator[None]:
        """Whatever goes wrong in the block, nothing of the part is left."""
        try:
            yield
        except BaseException as error:
            try:
                files.undo(self._database.part(part.txn, part.target))
            except (OSError, AsyncsupError) as second:
                # `abort` will try again, and so will recovery.
                error.add_note(f"and removing what was staged failed: {second}")
                log.warning("%s: removing what was staged failed: %s", part.target, second)
            raise


def _destination(part: PartRow) -> int:
    assert part.destination is not None
    return part.destination


def waits_for_a_decision(target: str, txn: int) -> TargetBusyError:
    """Why a target with an undecided transaction takes no other one."""
    return TargetBusyError(
        f"{target} waits for somebody to decide about transaction {txn}, which has failed: `asyncsup patch "
        f"abort {txn}` takes it back, `asyncsup patch commit {txn}` keeps it",
        target=target,
        txn=txn,
    )
