"""Making targets known: their roots, their layouts, and the first generation of each.

What the configuration says may differ from what it said when files were patched. Where nothing of a target is
managed that is fine; where something is, it must not be lost sight of.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec.structs import replace

from asyncsup.errors import StateError
from asyncsup.failpoints import failpoint
from asyncsup.patch import fs
from asyncsup.patch.confirmed import confirmed_entry
from asyncsup.patch.database import GenerationRow, TargetRow
from asyncsup.patch.facts import Layout, TargetRoot
from asyncsup.patch.overlay_files import OverlayFiles
from asyncsup.patch.statedir import StateDirectory
from asyncsup.patch.target_files import present


class Registration:
    """Enters targets into one state directory."""

    def __init__(self, state: StateDirectory) -> None:
        self._state = state
        self._database = state.database

    def register(self, targets: Sequence[TargetRoot]) -> None:
        """What `Store.register` promises; the errors of the database are not put into words yet."""
        self._state.make_target_folders(target.name for target in targets)
        with self._database.write():
            rows = [self._register(target) for target in targets]
        _check_overlaps(rows)
        failpoint("store.register.recorded")
        current = self._state.pointer.entries()
        self._check_known(rows, current)
        moved = {
            row.name: confirmed_entry(self._state, row) for row in rows if not self._is_settled(row, current)
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
            self._refuse_while_patched(known, row)
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

    def _is_settled(self, row: TargetRow, current: Mapping[str, str]) -> bool:
        """Whether the pointer needs no change for a target, or it is recovery that has to decide."""
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
            return entry == confirmed_entry(self._state, row)
        # Numbers, not texts: a conversion that was cut off has moved the pointer before saying so.
        return self._state.number_in(row.name, entry) == row.confirmed

    def _never_patched(self, target: str) -> bool:
        return all(
            (row.txn is None and row.patch is None) or row.state == "dropped"
            for row in self._database.generations(target)
        )

    def _refuse_while_patched(self, known: TargetRow, row: TargetRow) -> None:
        """Where nothing is managed yet, a patch may be about to change that: it goes on, or is taken back, in
        the root and the layout that it was begun with. (A root may be moved while nobody runs: what was begun
        in it is there too.)"""
        if known.layout == row.layout and not known.root.exists():
            return
        what = "layout" if known.root == row.root else "root"
        for other in self._database.open_transactions(row.name):
            raise StateError(
                f"the {what} of {row.name} was {known.root} ({known.layout}) and is now {row.root} "
                f"({row.layout}), but transaction {other.txn} has begun with the old one; keep that until it "
                "has ended",
                code="state.transaction_open",
                target=row.name,
                txn=other.txn,
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
