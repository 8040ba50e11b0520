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
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
from msgspec.structs import replace

from asyncsup.errors import (
    AsyncsupError,
    PatchError,
    PatchNotFoundError,
    PatchRefusedError,
    StateError,
    TargetBusyError,
    UsageError,
)
from asyncsup.failpoints import failpoint
from asyncsup.patch import audit, bytecode, fs
from asyncsup.patch.audit import Head, Row
from asyncsup.patch.database import (
    OPEN_PHASES,
    GenerationRow,
    PartRow,
    Phase,
    Scaled,
    TargetRow,
    TransactionRow,
    timestamp,
)
from asyncsup.patch.guarded import NOTHING_MORE, Guarded
from asyncsup.patch.ledger import Judgement, examine_state, read_records
from asyncsup.patch.look import identity
from asyncsup.patch.manifest import Manifest
from asyncsup.patch.marks import Marks, raised
from asyncsup.patch.overlay_files import OverlayFiles
from asyncsup.patch.plan import FilePlan, Policy
from asyncsup.patch.space import Need
from asyncsup.patch.statedir import StateDirectory
from asyncsup.patch.target_files import Carried, PatchSource, Progress, TargetFiles, present
from asyncsup.patch.tree_files import TreeFiles
from asyncsup.patch.way_back import Layer

__all__ = [
    "FilePlan",
    "Layout",
    "PatchInfo",
    "PatchSource",
    "Recovered",
    "RollbackPlan",
    "StagedTarget",
    "Store",
    "Survey",
    "TargetRoot",
    "TargetState",
    "Undecided",
]

log = logging.getLogger("asyncsup.patch.store")

Action = Literal["apply", "rollback"]

UNDECIDED: Final = "undecided"
"""State and verdict of a transaction that only an operator may end."""

INTERRUPTED: Final = "patch.interrupted"
"""The code of a transaction that a crash has cut off."""

MIN_PREFIX: Final = 4
"""Hex digits it takes to name a patch."""


class Layout(StrEnum):
    """How a target's root and its generations belong together."""

    OVERLAY = "overlay"
    TREE = "tree"


class TargetRoot(msgspec.Struct, frozen=True, kw_only=True):
    """A target as configured.

    Attributes:
        persist: paths below the root that stay outside of generations (tree layout).
        build: counts until the first patch; afterwards the store knows better.
    """

    name: str
    root: Path
    layout: Layout
    persist: tuple[str, ...] = ()
    build: int = 0


class TargetState(msgspec.Struct, frozen=True, kw_only=True):
    """What a target has now; `patch` is the id of the patch its generation came from."""

    name: str
    build: int
    generation: int
    patch: str | None
    root: Path
    layout: Layout


class PatchInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The patch of a transaction, for the history, and for what is remembered of it for good."""

    id: str
    name: str
    version: str
    build: int
    kind: str
    build_floor: int | None = None
    downgrade: bool = False


class Survey(msgspec.Struct, frozen=True, kw_only=True):
    """What a patch would do to the files of one target, and what room it needs for that."""

    files: tuple[FilePlan, ...]
    needs: tuple[Need, ...]


class StagedTarget(msgspec.Struct, frozen=True, kw_only=True):
    """A generation that is ready to be switched to."""

    target: str
    source: int
    destination: int
    build_before: int
    build_after: int
    files: tuple[FilePlan, ...]


class Undecided(msgspec.Struct, frozen=True, kw_only=True):
    """A transaction that waits for somebody to decide about it; `error` says why."""

    txn: int
    patch: str
    name: str | None
    version: str | None
    build: int | None
    kind: str
    error: str
    code: str
    parts: tuple[StagedTarget, ...]

    @property
    def targets(self) -> list[str]:
        return [part.target for part in self.parts]


class RollbackPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What going back would do; `kind` is cold as soon as one of the patches undone was."""

    generation: int
    build: int
    kind: str
    files: tuple[FilePlan, ...]


class Recovered(msgspec.Struct, frozen=True, kw_only=True):
    """What recovery did about one transaction.

    Attributes:
        action: ``dropped`` (it had not switched), ``switched_back``, ``undecided`` (it had switched, and only
            an operator may decide about it), ``kept`` (nothing: it is on probation, and somebody goes on with
            it), ``completed`` (it was confirmed; only tidying was left), ``lost`` (confirmed, yet the
            pointer says otherwise: the disk lied; the files are wholly those of the generation before),
            ``released`` (a release, finished).
    """

    txn: int | None
    action: Literal["dropped", "switched_back", "undecided", "completed", "lost", "released", "kept"]
    targets: tuple[str, ...]
    patch: str | None


class Store:
    """The store in one state directory. Made by `Store.open`."""

    def __init__(self, state: StateDirectory) -> None:
        self._state = state
        self._database = state.database
        self._locks: defaultdict[str, threading.RLock] = defaultdict(threading.RLock)
        self._carried: dict[tuple[int, str], Carried] = {}
        self._live: set[int] = set()
        """The transactions that somebody carries out. One that is open all the same was left half done."""
        self._unwritten: dict[int, dict[str, Any]] = {}
        """Why transactions are undecided, where that could not be written down yet."""

    @classmethod
    def open(cls, state_dir: Path, *, guarded: Guarded = NOTHING_MORE) -> Store:
        """Take the state directory's lock, create what is missing, sweep what was left half done.

        Args:
            guarded: what no patch may change besides the state directory itself.
        Raises:
            StateLockedError: another supervisor has it; the message says which process.
            StateError: it is damaged, was moved, or belongs to another version.
        """
        with _state_errors():
            state = StateDirectory.open(state_dir)
            places = {state.path: "the state directory", **guarded.places}
            state.guarded = replace(guarded, places=places)
            store = cls(state)
            try:
                store.settle()
            except BaseException:
                state.close()
                raise
        return store

    def settle(self) -> None:
        """Sweep what was left half done, and set the pointer again if it is lost.

        Raises:
            StateError: it is lost, and what was last confirmed is damaged.
        """
        self._state.sweep_staging()
        self._state.pointer.sweep()
        failpoint("store.open.swept")
        self._check_pointer()

    def close(self) -> None:
        """Close the database and give up the lock."""
        try:
            self._database.write_notes(durable=False)
        except StateError as error:
            log.error("the last records of the audit were not written: %s", error.message)  # noqa: TRY400
        self._state.close()

    def _check_pointer(self) -> None:
        """A pointer that is lost is set again to what was last confirmed, if that is still whole."""
        try:
            never_set = self._state.pointer.number() is None and self._state.pointer.is_new()
            if never_set or self._state.pointer.number() is not None:
                return
            log.warning("the pointer %s is missing", self._state.path / "current")
        except StateError as error:
            log.warning("%s", error.message)
        rows = self._database.targets()
        for row in rows:
            place = self._database.generation(row.name, row.confirmed).place
            if place == "store" and not self.is_whole(row.name, row.confirmed):
                raise StateError(
                    f"the pointer {self._state.path / 'current'} is lost, and generation {row.confirmed} of "
                    f"{row.name}, the last that was confirmed, is damaged",
                    code="state.pointer",
                )
        log.warning("the pointer is set to the generations that were last confirmed")
        self._state.pointer.replace(
            {row.name: self.confirmed_entry(row) for row in rows}, point="store.repair"
        )

    def is_whole(self, target: str, number: int) -> bool:
        """Whether every file that patches have delivered to a generation is there as it was delivered."""
        if not self._state.exists(target, number):
            return False
        with fs.opened(self._state.generation(target, number)) as folder:
            for path, row in self._database.files(target, number).items():
                if row.sha256 is None or row.origin is None:
                    continue
                *folders, name = path.split("/")
                try:
                    with fs.below(folder, folders) as inner:
                        status = os.stat(name, dir_fd=inner, follow_symlinks=False)
                        if identity(status) != row.identity and fs.sha256_of(name, inner) != row.sha256:
                            return False
                except (FileNotFoundError, fs.BlockedPathError):
                    return False
        return True

    # --- targets --------------------------------------------------------------------------------------------

    def register(self, targets: Sequence[TargetRoot]) -> None:
        """Make the targets known, so that ``STATE/current/TARGET`` leads to a folder for each.

        A target that is not configured any more keeps its files.

        Raises:
            StateError: root or layout of a target changed while patches are applied to it, or a tree has
                another target's root in it.
            UsageError: a name that cannot be used.
        """
        with _state_errors():
            self._state.make_target_folders(target.name for target in targets)
            with self._database.write():
                rows = [self._register(target) for target in targets]
            _check_overlaps(rows)
            failpoint("store.register.recorded")
            current = self._state.pointer.entries()
            self._check_known(rows, current)
            moved = {
                row.name: self.confirmed_entry(row) for row in rows if not self._is_settled(row, current)
            }
            if moved:
                self._state.pointer.flip(moved, point="store.register")

    def _register(self, target: TargetRoot) -> TargetRow:
        known = self._database.find_target(target.name)
        row = TargetRow(
            name=target.name,
            root=self._real_root(target.root),
            layout=target.layout.value,
            persist=target.persist,
            confirmed=0 if known is None else known.confirmed,
            releasing=known is not None and known.releasing,
        )
        if known is not None and (known.root, known.layout) != (row.root, row.layout):
            self._check_move(known, row)
        if known is None or known.layout != row.layout:
            row = self._begin_anew(row, target.build)
        elif (
            self._never_patched(row.name)
            and self._database.generation(row.name, row.confirmed).build != target.build
        ):
            self._database.update_generation(row.name, row.confirmed, build=target.build)
        if row != known:
            self._database.put_target(row)
            self._database.record(
                "target.registered",
                target=row.name,
                root=str(row.root),
                layout=row.layout,
                persist=list(row.persist),
                build=self._database.generation(row.name, row.confirmed).build,
            )
        return row

    def _check_known(self, rows: Sequence[TargetRow], current: Mapping[str, str]) -> None:
        """What the pointer shows must be in the database. An older copy of it, put back, would have the
        pointer moved, and what is newer removed."""
        for row in rows:
            entry = current.get(row.name, "")
            if not entry.startswith("../"):
                continue
            number = self._state.number_in(row.name, entry)
            if self._database.find_generation(row.name, number) is None:
                raise StateError(
                    f"the pointer shows generation {number} of {row.name}, which state.db does not know; is "
                    "it an older copy? Put the right one back",
                    code="state.generation",
                    target=row.name,
                )

    def _begin_anew(self, row: TargetRow, build: int) -> TargetRow:
        """A generation in which nothing is managed yet, for a target that is new or has another layout.

        The layout changes no file, so one that was patched keeps its build.
        """
        before = self._database.generations(row.name)
        number = max((old.number for old in before), default=-1) + 1
        if before and not self._never_patched(row.name):
            build = self._database.generation(row.name, row.confirmed).build
        overlay = row.layout == Layout.OVERLAY.value
        if overlay:
            OverlayFiles(self._state, row).create_empty(number)
        self._database.add_generation(
            GenerationRow(
                target=row.name,
                number=number,
                parent=None,
                build=build,
                patch=None,
                txn=None,
                place="store" if overlay else "root",
                state="live",
                stamp=0,
                made=(),
            )
        )
        return replace(row, confirmed=number)

    def confirmed_entry(self, row: TargetRow) -> str:
        """What the pointer's set should say about a target in which nothing is under way."""
        if self._database.generation(row.name, row.confirmed).place == "root":
            return str(row.root)
        return self._state.entry(row.name, row.confirmed)

    def _is_settled(self, row: TargetRow, current: Mapping[str, str]) -> bool:
        """Whether the pointer needs no change for a target, or it is `recover` that has to decide."""
        entry = current.get(row.name)
        if entry is None:
            return False
        if row.releasing or any(
            row.name == part.target
            for transaction in self._database.unfinished_transactions()
            for part in self._database.parts(transaction.txn)
        ):
            return True
        if not entry.startswith("../"):
            return entry == self.confirmed_entry(row)
        # Numbers, not texts: a conversion that was cut off has moved the pointer before saying so.
        return self._state.number_in(row.name, entry) == row.confirmed

    def _never_patched(self, target: str) -> bool:
        return all(
            (row.txn is None and row.patch is None) or row.state == "dropped"
            for row in self._database.generations(target)
        )

    def _check_move(self, known: TargetRow, row: TargetRow) -> None:
        """Root or layout are not what they were. Fine as long as nothing is managed, or if the root was
        moved with all that is in it."""
        number = (
            self._state.number(row.name) if row.name in self._state.pointer.entries() else known.confirmed
        )
        managed = present(self._database.files(row.name, number))
        in_store = known.layout == Layout.TREE.value and not self._state.is_in_root(row.name)
        if known.layout == row.layout and not known.root.exists() and row.root.is_dir():
            if row.layout == Layout.TREE.value:
                if not in_store or os.path.realpath(row.root) == os.path.realpath(
                    self._state.current(row.name)
                ):
                    return
            else:
                with fs.opened(row.root) as fd:
                    overlay = self._state.overlay(row, fd)
                    if all(overlay.has_link(path) for path in managed):
                        return
        if managed or in_store:
            what = "layout" if known.root == row.root else "root"
            raise StateError(
                f"the {what} of {row.name} was {known.root} ({known.layout}) and is now {row.root} "
                f"({row.layout}), but files of it are managed; `asyncsup target release {row.name}` with the "
                "old configuration makes them ordinary files first",
                code=f"state.{what}_changed",
                target=row.name,
            )

    def _real_root(self, root: Path) -> Path:
        """The root without links on the way, except for the one that the tree layout puts in its place."""
        path = root if root.is_absolute() else Path.cwd() / root
        for _ in range(40):
            path = Path(os.path.realpath(path.parent)) / path.name
            try:
                text = path.parent / path.readlink()
            except OSError:
                return path
            if self._state.path in Path(os.path.normpath(text)).parents:
                return path
            path = text
        raise StateError(f"{root}: too many symbolic links", code="state.root")

    def _files(self, target: str) -> TargetFiles:
        row = self._database.target(target)
        return (OverlayFiles if row.layout == Layout.OVERLAY.value else TreeFiles)(self._state, row)

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

    def set_wanted(self, target: str, up: bool) -> None:
        """Remember it beyond this supervisor's life."""
        self._database.set_wanted(target, up)

    def scaled(self, target: str) -> Scaled | None:
        """How many instances an operator last wanted; None when nobody has said."""
        return self._database.scaled(target)

    def set_scaled(self, target: str, *, configured: int, instances: int) -> None:
        """Remember it beyond this supervisor's life, for as long as ``configured`` is configured."""
        self._database.set_scaled(target, Scaled(configured=configured, instances=instances))

    # --- looking --------------------------------------------------------------------------------------------

    def content_matches(self, target: str, manifest: Manifest) -> bool:
        """Whether the target's files already are what the patch would make them."""
        with self._reporting(target):
            return self._files(target).matches(manifest.files)

    def plan(self, target: str, manifest: Manifest, policy: Policy = "refuse") -> list[FilePlan]:
        """What the patch would do to each file, in the manifest's order; what stands in the way is in
        `FilePlan.error`. Files it does not name follow where there is something to say about them.

        Raises:
            PatchRefusedError: the target has no root folder.
        """
        return list(self.survey(target, manifest, policy).files)

    def survey(self, target: str, manifest: Manifest, policy: Policy = "refuse") -> Survey:
        """What `plan` says, and what staging the patch takes.

        Raises:
            PatchRefusedError: the target has no root folder.
        """
        files = self._files(target)
        with self._reporting(target):
            planned = files.plan(manifest.files, policy)
            named = {change.path for change in manifest.files}
            odd = [plan for plan in files.drifted() if plan.path not in named]
            return Survey(
                files=(*(item.plan for item in planned), *odd),
                needs=tuple(files.needs([item for item in planned if item.plan.error is None])),
            )

    def drifted(self, target: str) -> list[FilePlan]:
        """Files of a target that are not as patches have left them, and why.

        Raises:
            PatchRefusedError: the target has no root folder.
        """
        with self._reporting(target):
            return self._files(target).drifted()

    def stack(self, target: str) -> tuple[Layer, ...]:
        """The target's current generation, the one that was made from, and so on."""
        number: int | None = self._state.number(target)
        rows = {row.number: row for row in self._database.generations(target)}
        layers = []
        while number is not None and number in rows:
            row = rows[number]
            layers.append(
                Layer(
                    generation=number,
                    build=row.build,
                    patch=row.patch,
                    title=self._title(row),
                    kept=row.state == "live" and (row.place == "root" or self._state.exists(target, number)),
                    bottom=row.parent is None,
                )
            )
            number = row.parent
        return tuple(layers)

    def _title(self, row: GenerationRow) -> str:
        applied = None if row.patch is None else self._database.apply_of_patch(row.patch)
        if applied is None:
            return f"build {row.build}"
        return f"{applied.name} {applied.version} (build {applied.build})"

    def rollback_target(self, target: str) -> int | None:
        """The generation a rollback leads to: the one the current one was made from, while it is kept."""
        generation = self._database.generation(target, self._state.number(target))
        if generation.parent is None or not self._state.exists(target, generation.parent):
            return None
        return generation.parent

    def describe_rollback(self, target: str, generation: int, policy: Policy = "refuse") -> RollbackPlan:
        """What `stage_rollback` to `generation` would do.

        Raises:
            StateError: there is no such generation.
        """
        now = self._state.number(target)
        rows = {row.number: row for row in self._database.generations(target)}
        goal = self._database.generation(target, generation)
        kinds, number = set(), now
        while number != generation:
            row = rows[number]
            applied = None if row.patch is None else self._database.apply_of_patch(row.patch)
            kinds.add(None if applied is None else applied.kind)
            if row.parent is None:
                break
            number = row.parent
        return RollbackPlan(
            generation=generation,
            build=goal.build,
            kind="warm" if kinds == {"warm"} else "cold",
            files=tuple(item.plan for item in self._files(target).plan_back(now, generation, policy)),
        )

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
        with self._reporting(", ".join(targets)), self._database.write():
            sources = {}
            for target in targets:
                self._refuse_while_open(target)
                sources[target] = self.state(target).generation
            facts = self._current_patch(targets[0]) if patch is None else _facts(patch)
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
        with self._reporting(", ".join(targets)):
            failpoint("store.begin.recorded")
        self._live.add(txn)
        return txn

    def _refuse_while_open(self, target: str) -> None:
        for other in self._database.open_transactions(target):
            if other.state == UNDECIDED:
                message = (
                    f"{target} waits for somebody to decide about transaction {other.txn}, which has failed: "
                    f"`asyncsup patch abort {other.txn}` takes it back, `asyncsup patch commit {other.txn}` "
                    "keeps it"
                )
            else:
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
        facts = _facts(patch) if isinstance(patch, PatchInfo) else patch
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
                with self._reporting(target):
                    self._write_undecided(row.txn)
            elif row.txn not in self._live and row.state != UNDECIDED:
                why = "an error kept it from being undone at once"
                with self._reporting(target):
                    self.finish(row.txn, verdict="rolled_back", error=why, code=INTERRUPTED)
        for untidy in self._database.untidy_transactions(target):
            # Its dangling links must be gone before their names can mean something else.
            with self._holding(untidy.txn) as parts, self._reporting(target):
                self._tidy(untidy.txn, parts)

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
        with self._locks[target]:
            files, part = self._files(target), self._part_to_stage(txn, target)
            size = sum(change.size or 0 for change in package.manifest.files)
            with self._reporting(target, size), self._undoing(files, part):
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
        with self._locks[target]:
            files, part = self._files(target), self._part_to_stage(txn, target)
            if generation == part.source:
                raise UsageError(f"{target} is at generation {generation} already", target=target)
            with self._reporting(target), self._undoing(files, part):
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
        with self._locks[target], self._reporting(target):
            carried = self._files(target).carry(self._database.part(txn, target))
            self._carried[txn, target] = carried
            # A program's file names are any bytes; these are for people and for JSON.
            return [os.fsencode(path).decode(errors="replace") for path in carried.paths]

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
                with self._reporting(part.target):
                    if (txn, part.target) not in self._carried:
                        self.carry(txn, part.target)
                    self._files(part.target).verify(part)
            with self._reporting(", ".join(part.target for part in parts)):
                # From the set that is current now: other transactions may have switched in between.
                self._state.pointer.flip(
                    {part.target: self._state.entry(part.target, _destination(part)) for part in parts},
                    point="store.switch",
                )
                self._advance(txn, Phase.SWITCHED, "txn.switched")
                failpoint("store.switch.recorded")
            for part in parts:
                with self._reporting(part.target):
                    files = self._files(part.target)
                    late = files.follow_up(part, self._carried.pop((txn, part.target)).seen)
                    if late:
                        self.record(txn, "carry", target=part.target, detail=f"{len(late)} files, late")
                    files.verify_switched(part)

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
            with self._reporting(", ".join(part.target for part in parts)):
                switched = self._is_switched(parts)
                if switched:
                    carried = self._carry_back(parts)
                    self._state.pointer.flip(
                        {part.target: self._state.entry(part.target, part.source) for part in parts},
                        point="store.switch_back",
                    )
                    self._follow_back(carried)
                if switched or row.phase is Phase.SWITCHED:
                    self._advance(txn, Phase.SWITCHED_BACK, "txn.switched_back")
                    failpoint("store.switch_back.recorded")
                for part in parts:
                    self._files(part.target).remove_names(part)
                    failpoint("store.switch_back.unlinked")

    def _advance(self, txn: int, phase: Phase, event: str) -> None:
        # Recovery asks the pointer.
        with self._database.write(durable=False):
            self._database.update_transaction(txn, phase=phase)
            self._database.record(event, txn=txn)

    def _carry_back(self, parts: Sequence[PartRow]) -> list[tuple[PartRow, Carried]]:
        done = []
        for part in parts:
            try:
                carried = self._files(part.target).carry_back(part)
            except (OSError, AsyncsupError) as error:
                self._leave(part, error)
                continue
            done.append((part, carried))
            if carried.paths:
                self.record(part.txn, "carry back", target=part.target, detail=f"{len(carried.paths)} files")
        return done

    def _follow_back(self, carried: Sequence[tuple[PartRow, Carried]]) -> None:
        for part, found in carried:
            try:
                late = self._files(part.target).follow_up(part, found.seen, back=True)
            except (OSError, AsyncsupError) as error:
                self._leave(part, error)
                continue
            if late:
                self.record(part.txn, "carry back", target=part.target, detail=f"{len(late)} files, late")

    def _leave(self, part: PartRow, why: Exception) -> None:
        """Going back does not depend on what could not be brought along; it is said, and kept."""
        place = self._files(part.target).leave(part)
        detail = f"failed: {why}; all of it is in {place}"
        log.error("%s: carrying back what the program wrote %s", part.target, detail)
        self.record(part.txn, "carry back", target=part.target, detail=detail)

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

    def _tidy(self, txn: int, parts: Sequence[PartRow]) -> None:
        for part in parts:
            self._files(part.target).note_overwritten(part)
            self._files(part.target).tidy(part)
            failpoint("store.commit.tidied")
            self._carried.pop((txn, part.target), None)
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
                with self._reporting(part.target):
                    rescued = self._files(part.target).undo(part)
                for path in rescued:
                    copy = self._state.saved(part.target, f"{txn}-undone") / path
                    self.record(txn, "rescue", target=part.target, detail=f"{path} was written to: {copy}")
                self._carried.pop((txn, part.target), None)
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

        The pointer is the truth. What had not switched is dropped, what had switched without being confirmed
        is switched back. May itself be killed at any point and run again.

        Args:
            keep: transactions that stay open, because whoever began them had come as far as the probation and
                somebody goes on with it. Those that had not even switched are recovered all the same.
        """
        recovered = []
        kept: set[str] = set()
        for row in self._database.unfinished_transactions():
            if row.txn in keep and row.phase is Phase.SWITCHED:
                parts = [part.target for part in self._database.parts(row.txn)]
                kept.update(parts)
                self._live.add(row.txn)
                recovered.append(Recovered(txn=row.txn, action="kept", targets=tuple(parts), patch=row.patch))
                continue
            with _state_errors():
                recovered.append(self._recover(row))
                failpoint("store.recover.one")
        for target in self._database.targets():
            if target.name in kept:
                continue
            try:
                if target.releasing:
                    self.release(target.name)
                    done = Recovered(txn=None, action="released", targets=(target.name,), patch=None)
                    recovered.append(done)
                else:
                    self._files(target.name).resume()
                    failpoint("store.recover.resumed")
                self._sweep_generations(target.name)
                failpoint("store.recover.swept")
            except (OSError, AsyncsupError) as error:
                # Its files are right all the same; it is no reason for the others not to start.
                log.error("%s: could not be tidied up: %s", target.name, error)  # noqa: TRY400 - foreseen
        self._database.write_notes(durable=False)
        return recovered

    def _recover(self, row: TransactionRow) -> Recovered:
        parts = self._database.parts(row.txn)
        targets = tuple(part.target for part in parts)

        def does(action: Literal["dropped", "switched_back", "undecided", "completed", "lost"]) -> Recovered:
            """Say what is about to be done: it is written down together with that."""
            log.warning("transaction %d on %s: %s", row.txn, ", ".join(targets), action)
            self.record(row.txn, "recover", detail=action.replace("_", " "))
            return Recovered(txn=row.txn, action=action, targets=targets, patch=row.patch)

        try:
            if row.phase is Phase.COMMITTED and not self._is_at(parts, [part.source for part in parts]):
                done = does("completed")
                self._tidy(row.txn, parts)
                return done
            if row.phase is Phase.COMMITTED:
                # Only a disk that lied about a sync can bring this about.
                done = does("lost")
                self._advance(row.txn, Phase.SWITCHED_BACK, "txn.switched_back")
                why = "it was confirmed, but the disk had not kept the switch"
                self.finish(row.txn, verdict="rolled_back", error=why, code="state.lost")
                return done
            if row.by_hand and self._is_switched(parts):
                done = does("undecided")
                if row.state != UNDECIDED:
                    why = "the supervisor ended before it was confirmed"
                    self.leave_undecided(row.txn, error=why, code=INTERRUPTED)
                return done
            switched = row.phase is not Phase.BEGUN or self._is_switched(parts)
            why = "the supervisor ended " + ("before it was confirmed" if switched else "before the switch")
            done = does("switched_back" if switched else "dropped")
            self.finish(row.txn, verdict="rolled_back", error=why, code=INTERRUPTED)
            return done
        except (OSError, AsyncsupError) as error:
            if row.phase is not Phase.COMMITTED and self._is_switched(parts):
                raise  # The files are those of a patch nobody has confirmed.
            # The files are right; what is left over keeps the targets from being patched, no more.
            log.error("transaction %d: could not be tidied up: %s", row.txn, error)  # noqa: TRY400 - foreseen
            self.record(row.txn, "recover", detail=f"could not be tidied up: {error}")
            return Recovered(
                txn=row.txn,
                action="completed" if row.phase is Phase.COMMITTED else "dropped",
                targets=targets,
                patch=row.patch,
            )

    def _is_switched(self, parts: Sequence[PartRow]) -> bool:
        """What the pointer says. All targets of a transaction move together."""
        return self._is_at(parts, [part.destination for part in parts])

    def _is_at(self, parts: Sequence[PartRow], numbers: Sequence[int | None]) -> bool:
        return [self._state.number(part.target) for part in parts] == list(numbers)

    def _sweep_generations(self, target: str) -> None:
        """Remove generations that were dropped while a reader held them, and folders nobody knows of.

        Unless the database is an older copy, which knows less than there is.
        """
        if self._database.find_generation(target, self._state.number(target)) is None:
            return
        live = {row.number for row in self._database.generations(target) if row.state == "live"}
        with fs.opened(self._state.generations(target)) as folder:
            found = {int(name) for name in fs.names(folder) if name.isdecimal()}
        for number in found - live:
            self._state.discard(target, number)
        bytecode.sweep(self._state.path, target, live)

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

    # --- keeping and letting go -----------------------------------------------------------------------------

    def prune(self, target: str, keep: int, *, by: Mapping[str, Any] | None = None) -> list[int]:
        """Remove old generations, but for `keep` on the way back from the current one; while a transaction is
        open, from the one it began with, since it may yet be undone.

        Never one that is in use: the current one, those of an open transaction, those that a reader holds by
        a shared ``flock`` on the folder. Returns what was removed.

        Args:
            by: who asked, for the audit.
        """
        with self._locks[target], self._reporting(target):
            self._state.sweep_discarded(target)
            rows = {row.number: row for row in self._database.generations(target)}
            number = self._state.number(target)
            kept = {number}
            for row in self._database.open_transactions(target):
                part = self._database.part(row.txn, target)
                number = part.source
                kept |= {part.source} | ({part.destination} if part.destination is not None else set())
            # What is left to tidy is known from what these hold.
            untidy = self._database.untidy_transactions(target)
            kept |= {self._database.part(row.txn, target).source for row in untidy}
            for _ in range(max(keep, 0)):
                parent = rows[number].parent
                if parent is None or parent not in rows:
                    break
                kept.add(parent)
                number = parent
            pruned = []
            for number in sorted(rows.keys() - kept):
                record = partial(self._record_pruned, rows[number], keep, by)
                if not self._state.exists(target, number):
                    record()
                elif self._state.discard(target, number, before=record):
                    pruned.append(number)
                    failpoint("store.prune.discarded")
            return pruned

    def _record_pruned(self, row: GenerationRow, keep: int, by: Mapping[str, Any] | None) -> None:
        """Written down before anything is removed, so that no half of it is gone back to."""
        if row.state == "live" and row.place == "store":
            with self._database.write():
                self._database.update_generation(row.target, row.number, state="pruned")
                self._database.record(
                    "target.pruned",
                    target=row.target,
                    generation=row.number,
                    build=row.build,
                    keep=keep,
                    by=by,
                )
        failpoint("store.prune.recorded")

    def release(self, target: str, *, by: Mapping[str, Any] | None = None) -> list[str]:
        """Make all managed files ordinary files of the root again; returns their paths.

        Generations are not gone back to afterwards. At every instant a reader finds the same content.

        Args:
            by: who asked, for the audit.
        Raises:
            TargetBusyError: a transaction has the target.
        """
        self._finish_transactions(target)
        with self._locks[target], self._reporting(target):
            self._refuse_while_open(target)
            self._set_releasing(target, True, event="target.releasing", by=by)
            failpoint("store.release.begun")
            released = self._files(target).release()
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

    # --- history --------------------------------------------------------------------------------------------

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

    def head(self) -> Head:
        """The newest record of the audit, with everything noted so far, durable: it may be told to others."""
        self._database.write_notes()
        found = self._database.head()
        assert found is not None, "a chain begins with the database"
        return found

    def examine(self, anchors: Sequence[str] = ()) -> Judgement:
        """Whether the audit is as it was written, and the rest of the database as the audit says.

        Args:
            anchors: hashes of records that were kept elsewhere.
        """
        self._database.write_notes()
        return examine_state(self._state.path, anchors)

    def records(self, *, after: int | None = None, txn: int | None = None, limit: int) -> list[Row]:
        """Records of the audit, as `read_records`."""
        self._database.write_notes()
        return read_records(self._database, after=after, txn=txn, limit=limit)

    def history(self, target: str | None = None, limit: int = 50) -> list[dict[str, Any]]:
        """The newest transactions, newest first."""
        return [self._describe(row) for row in self._database.transactions(target, limit)]

    def transaction(self, txn: int) -> dict[str, Any]:
        """One transaction, with ``steps``, ``files``, ``request`` (who asked for what, and what was decided
        before it began) and ``audit`` (the records about it).

        Raises:
            PatchNotFoundError: there is none of that number.
        """
        row = self._database.transaction(txn)
        self._database.write_notes()
        records = [(found, audit.decode(found.line) or {}) for found in self._database.records(txn=txn)]
        files = []
        for part in self._database.parts(txn):
            files += [
                {"target": part.target, "path": change.path, "op": change.op, "note": change.note}
                for change in self._database.changes(txn, part.target)
            ]
            if part.destination is not None:
                files += [
                    {"target": part.target, "path": kept.path, "op": "keep", "note": kept.note}
                    for kept in self._database.kept(part.target, part.destination).values()
                    if kept.txn == txn
                ]
        return {
            **self._describe(row),
            "request": next((_request(fields) for _, fields in records if "asked_by" in fields), {}),
            "steps": [_step(fields) for _, fields in records if fields.get("event") == "txn.step"],
            "files": files,
            "audit": _span([found for found, _ in records]),
        }

    def is_undone(self, txn: int) -> bool:
        """Whether a transaction was taken back; not so if it is not known."""
        try:
            return self._database.transaction(txn).phase is Phase.ABORTED
        except PatchNotFoundError:
            return False

    def find_transaction(self, reference: str) -> dict[str, Any]:
        """A transaction by its number, or the newest of a patch by the beginning of its id.

        Raises:
            PatchNotFoundError: there is none.
            UsageError: the beginning fits several patches.
        """
        reference = reference.strip().lower()
        if reference.isdecimal() and len(reference) < MIN_PREFIX * 3:
            with contextlib.suppress(PatchNotFoundError):
                return self.transaction(int(reference))
        if len(reference) < MIN_PREFIX or not set(reference) <= set("0123456789abcdef"):
            raise PatchNotFoundError(
                f"{reference!r} is neither the number of a transaction nor the beginning ({MIN_PREFIX} hex "
                "digits or more) of a patch id",
                reference=reference,
            )
        found = self._database.transactions_of_patch(reference)
        if not found:
            raise PatchNotFoundError(f"no patch {reference} was ever applied here", reference=reference)
        patches = sorted({row.patch or "" for row in found})
        if len(patches) > 1:
            raise UsageError(
                f"{reference} fits {len(patches)} patches: {', '.join(patch[:16] for patch in patches)}",
                patches=patches,
            )
        return self.transaction(found[0].txn)

    def _describe(self, row: TransactionRow) -> dict[str, Any]:
        return {
            "txn": row.txn,
            "action": row.action,
            "patch": row.patch,
            "name": row.name,
            "version": row.version,
            "build": row.build,
            "kind": row.kind,
            "targets": [part.target for part in self._database.parts(row.txn)],
            "state": row.state,
            "verdict": row.verdict,
            "started": timestamp(row.started),
            "took": None if row.ended is None else round(max(0.0, row.ended - row.started), 6),
            "asked_by": row.asked_by,
            "error": row.error,
            "code": row.code,
        }

    # --- helpers --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _holding(self, txn: int) -> Iterator[list[PartRow]]:
        """The parts of a transaction, their targets locked (always in the same order)."""
        parts = self._database.parts(txn)
        with contextlib.ExitStack() as stack:
            for part in parts:
                stack.enter_context(self._locks[part.target])
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

    @contextlib.contextmanager
    def _reporting(self, target: str, size: int = 0) -> Iterator[None]:
        """Turn what the system says into errors with a code."""
        try:
            yield
        except fs.BlockedPathError as error:
            raise PatchRefusedError(
                f"{target}: {error}, and only real folders are followed", code="gate.path", target=target
            ) from error
        except OSError as error:
            if error.errno in fs.NO_SPACE:
                raise self._no_room(target, size) from error
            where = f" ({error.filename})" if error.filename else ""
            raise PatchError(
                f"{target}: {error.strerror or error}{where}", code="patch.io_failed", target=target
            ) from error
        except StateError as error:
            if error.error_code == "state.full":
                raise self._no_room(target, size) from error
            raise

    def _no_room(self, target: str, size: int) -> PatchRefusedError:
        files = self._files(target.partition(",")[0])
        places = [place for place in (self._state.path, files.row.root) if place.is_dir()]
        # Whichever of them it was, the system does not say.
        tightest = min(
            fs.rooms(Need(place=place, size=size, inodes=0) for place in places), key=lambda room: room.free
        )
        return files.no_room(tightest)


def _destination(part: PartRow) -> int:
    assert part.destination is not None
    return part.destination


def _check_overlaps(rows: Sequence[TargetRow]) -> None:
    """A tree moves as a whole, so nobody else's root may be in it."""
    for tree in rows:
        if tree.layout != Layout.TREE.value:
            continue
        for other in rows:
            if other is not tree and (
                other.root.is_relative_to(tree.root) or tree.root.is_relative_to(other.root)
            ):
                raise StateError(
                    f"the roots of {tree.name} ({tree.root}, layout tree) and {other.name} ({other.root}) "
                    "overlap; a tree needs a root of its own",
                    code="state.roots_overlap",
                )


@contextlib.contextmanager
def _state_errors() -> Iterator[None]:
    """What the system says about the state directory, as an error with a code."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise StateError(
            f"the state directory cannot be used: {error.strerror or error}{where}", code="state.unusable"
        ) from error


def _facts(patch: PatchInfo) -> dict[str, Any]:
    return {
        "patch": patch.id,
        "name": patch.name,
        "version": patch.version,
        "build": patch.build,
        "kind": patch.kind,
        "floor": patch.build_floor,
        "downgrade": patch.downgrade,
    }


def _request(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Who asked for what, and what was decided, out of the first record of a transaction."""
    return {key: fields[key] for key in ("by", "package", "trust", "wish", "gates") if key in fields}


def _span(records: Sequence[Row]) -> dict[str, Any] | None:
    """Which records are about a transaction."""
    if not records:
        return None
    return {
        "first": records[0].seq,
        "last": records[-1].seq,
        "count": len(records),
        "hash": records[-1].hash,
    }


def _step(fields: Mapping[str, Any]) -> dict[str, Any]:
    took = fields.get("took_us")
    named = {key: fields.get(key) for key in ("seq", "at", "step", "target", "instance", "detail")}
    return {**named, "took": None if took is None else took / 1e6}
