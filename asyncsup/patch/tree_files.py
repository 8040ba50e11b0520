"""The files of a target with the tree layout: every generation is the whole tree."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Final

from asyncsup.errors import PatchRefusedError
from asyncsup.failpoints import failpoint
from asyncsup.patch import fs
from asyncsup.patch.database import FileRow, PartRow
from asyncsup.patch.look import split
from asyncsup.patch.manifest import FileChange
from asyncsup.patch.plan import Found, PlanError, Presence
from asyncsup.patch.space import BLOCK_BYTES, Need
from asyncsup.patch.target_files import (
    Carried,
    PatchSource,
    Planned,
    Progress,
    TargetFiles,
    is_file,
    marked,
    present,
    problem_with,
)
from asyncsup.patch.tree import (
    Form,
    TreeRoot,
    bring,
    follow_up,
    look,
    reconcile,
    survey,
    tally,
    without_inode,
)

ENTRY_BYTES: Final = 64
"""What a name takes in its folder."""

FOLLOW_UPS: Final = 5
"""How often the tree that was left is looked at. A program comes to the new one by the next path it opens;
what goes on after that holds the old folder open."""


class TreeFiles(TargetFiles):
    @property
    def _tree(self) -> TreeRoot:
        return self.state.tree(self.row)

    # --- looking --------------------------------------------------------------------------------------------

    def check_root(self) -> None:
        content = os.path.realpath(self.state.content(self.row))
        mounted = sorted(
            point for point in fs.mount_points() if point == content or point.startswith(f"{content}/")
        )
        if mounted:
            where = (
                "is a mount point" if mounted[0] == content else f"has something mounted in it ({mounted[0]})"
            )
            raise PatchRefusedError(
                f"{self.name}: {self.row.root} {where}, and the tree layout cannot move that from one "
                "generation to the next; mount it elsewhere, and put a symbolic link in its place",
                code="gate.filesystem",
                target=self.name,
                root=str(self.row.root),
            )

    def look(self, changes: Iterable[FileChange], *, hashed: bool) -> list[Found]:
        number = self.state.number(self.name)
        rows, kept = self.database.files(self.name, number), self.database.kept(self.name, number)
        with self._content() as content, fs.LastFolder(partial(fs.open_below, content)) as here:
            return [
                problem_with(change.path)
                or self._problem_with_persistent(change.path)
                or marked(
                    look(change.path, rows.get(change.path), here, hashed=hashed), kept.get(change.path)
                )
                for change in changes
            ]

    @contextlib.contextmanager
    def folder_of(self, item: Planned) -> Iterator[int]:
        with self._content() as content, fs.below(content, split(item.change.path)[0]) as folder:
            yield folder

    def _problem_with_persistent(self, path: str) -> Found | None:
        for kept in self.row.persist:
            if path == kept or path.startswith(f"{kept}/") or kept.startswith(f"{path}/"):
                message = f"is in the way of {kept}, which is persistent: the program's own, not for patches"
                return Found(
                    presence=Presence.ABSENT, problem=PlanError(code="gate.conflict", message=message)
                )
        return None

    def folders_to_make(self, planned: Sequence[Planned]) -> list[str]:
        return []  # They are made in the clone.

    def needs_of_layout(self, planned: Sequence[Planned]) -> list[Need]:
        """The clone: a folder for each folder and a name for each file, and at first from another file system
        the files as well."""
        with self._content() as content:
            there = tally(content)
            moves_in = self.state.is_in_root(self.name)
            copied = moves_in and os.fstat(content).st_dev != self.state.path.stat().st_dev
        entries = (there.files + there.folders) * ENTRY_BYTES
        clone = Need(place=self.state.path, size=there.folders * BLOCK_BYTES + entries, inodes=there.folders)
        if not copied:
            return [clone]
        copy = Need(place=self.state.path, size=there.size, inodes=there.files + there.folders)
        return [clone, copy]

    def has(self, generation: int, path: str, row: FileRow | None) -> bool:
        if row is not None:
            return is_file(row)
        folders, name = split(path)
        try:
            with (
                fs.opened(self.state.generation(self.name, generation)) as base,
                fs.below(base, folders) as folder,
            ):
                return fs.lstat(name, folder) is not None
        except (FileNotFoundError, fs.BlockedPathError):
            return False

    # --- staging --------------------------------------------------------------------------------------------

    def build(
        self, part: PartRow, package: PatchSource, planned: Sequence[Planned], progress: Progress | None
    ) -> None:
        changed = [item for item in planned if not item.kept]
        with fs.Durability(self.state.fd) as durability:
            self._convert(part.source, durability)
            skip = {item.change.path for item in changed}
            with fs.opened(self.state.generation(self.name, part.source)) as source:
                self._keep_replaced(changed, source, durability)

                def fill(folder: int) -> None:
                    reconcile(source, folder, skip=skip, durability=durability)

                def deliver(folder: int) -> Mapping[str, FileRow]:
                    return self.write(
                        part, package, changed, progress, folder=folder, model=source, durability=durability
                    )

                self.place(
                    part,
                    fill,
                    deliver,
                    inherited=self.database.files(self.name, part.source),
                    kept=self.kept_after(part, planned),
                    model=source,
                    durability=durability,
                )
            self.database.mark_staged(part.txn, self.name)

    def _keep_replaced(self, planned: Sequence[Planned], source: int, durability: fs.Durability) -> None:
        """What the program has saved and not synced is on disk before a patch replaces it: it is what a
        rollback goes back to."""
        for item in planned:
            if item.found.presence is not Presence.ORDINARY:
                continue
            folders, name = split(item.change.path)
            # One that has gone meanwhile is found before the switch.
            with contextlib.suppress(FileNotFoundError), fs.below(source, folders) as folder:
                fd = os.open(name, fs.READ, dir_fd=folder)
                try:
                    durability.file(fd)
                finally:
                    os.close(fd)

    def build_like(self, part: PartRow, goal: int, planned: Sequence[Planned]) -> None:
        """What is kept is brought along, as everything else that is the program's own."""
        changed = {item.change.path for item in planned if not item.kept}
        with (
            fs.Durability(self.state.fd) as durability,
            fs.opened(self.state.generation(self.name, part.source)) as source,
            fs.opened(self.state.generation(self.name, goal)) as model,
        ):

            def fill(folder: int) -> None:
                reconcile(source, folder, skip=changed, durability=durability)
                bring(changed, model, folder, durability)

            self.place(
                part,
                fill,
                lambda folder: {},
                inherited=self.database.files(self.name, goal),
                kept=self.kept_back(part, goal, planned),
                model=model,
                durability=durability,
            )

    def prepare_rollback(self, part: PartRow, planned: Sequence[Planned]) -> Mapping[int, str]:
        return {}  # The whole tree is there, and `carry` brings it up to date.

    # --- conversion -----------------------------------------------------------------------------------------

    def _convert(self, number: int, durability: fs.Durability) -> None:
        """At the first patch: the root's folder becomes generation `number`, the root a link."""
        form, direct = self._tree.form()
        if form in {Form.MISSING, Form.OTHER}:
            raise self.no_root()
        if self.state.path.is_relative_to(self.row.root):
            raise PatchRefusedError(
                f"{self.name}: the state directory {self.state.path} lies inside the root {self.row.root}, "
                "which therefore cannot be moved into it; set state_dir to a folder elsewhere",
                code="gate.root",
                target=self.name,
                root=str(self.row.root),
            )
        if form is Form.FOLDER and not self.state.is_in_root(self.name):
            raise PatchRefusedError(
                f"{self.name}: {self.row.root} has become an ordinary folder again behind asyncsup's back",
                code="gate.detached",
                target=self.name,
            )
        if form is Form.FOLDER:
            if self._tree.move_in(number):
                form, direct = Form.DIRECT, number
            else:
                self._copy_in(number, durability)
        if form is Form.DIRECT and direct is not None:
            self._settle_root(direct)
        if not self.state.is_in_root(self.name):
            with fs.opened(self.state.content(self.row)) as content:
                self._tree.move_persistent_out(content, self.row.persist, durability)
                durability.barrier()

    def _settle_root(self, number: int) -> None:
        """The root links straight to generation `number`: from now on through the pointer."""
        entry = self.state.entry(self.name, number)
        if self.state.pointer.entries().get(self.name) != entry:
            self.state.pointer.flip({self.name: entry}, point="store.convert")
        self._tree.point_through_current()
        self.database.update_generation(self.name, number, place="store", durable=False)

    def _copy_in(self, number: int, durability: fs.Durability) -> None:
        """The root is on another file system: copy it now; `carry` brings the copy up to date and makes it
        the root's."""
        with (
            fs.opened(self.row.root) as root,
            fs.opened(self.state.staging) as area,
            fs.opened(self.state.generations(self.name)) as home,
        ):
            if not self.state.exists(self.name, number):
                name = f"{self.name}-{number}.copy"
                fs.remove_tree(name, area)
                os.mkdir(name, 0o700, dir_fd=area)
                with fs.below(area, [name]) as folder:
                    fs.mirror_directory(os.fstat(root), folder)
                    reconcile(root, folder, durability=durability)
                durability.barrier()
                failpoint("store.convert.copied")
                os.rename(name, str(number), src_dir_fd=area, dst_dir_fd=home)
                with fs.below(home, [str(number)]) as folder:
                    self._tree.move_persistent_out(folder, self.row.persist, durability)
            else:
                self._refresh_copy(root, number, durability)

    def _refresh_copy(self, folder: int, number: int, durability: fs.Durability) -> None:
        with fs.opened(self.state.generation(self.name, number)) as copy:
            moved = [path for path in self.row.persist if self._tree.is_moved_out(copy, path)]
            reconcile(folder, copy, skip=set(moved), durability=durability)
        self._tree.refresh_persistent(folder, moved, durability)
        durability.barrier()

    def _take_over_copy(self, number: int, durability: fs.Durability) -> None:
        """Make the copy of a root on another file system the real one."""
        with fs.opened(self.row.root) as folder:
            self._refresh_copy(folder, number, durability)
            self._tree.swap_for_link(number)
            # What a program that still runs has written since; from here on it finds the copy.
            self._refresh_copy(folder, number, durability)
        self._settle_root(number)

    # --- around the switch ----------------------------------------------------------------------------------

    def carry(self, part: PartRow) -> Carried:
        assert part.destination is not None
        with fs.Durability(self.state.fd) as durability:
            with self._content() as content:
                self._check_unchanged(part, content)
            if self.state.is_in_root(self.name):
                self._take_over_copy(part.source, durability)
            with fs.opened(self.state.generation(self.name, part.source)) as source:
                self._tree.move_persistent_out(source, self.row.persist, durability)
            return self._reconcile(part, part.source, part.destination, durability)

    def carry_back(self, part: PartRow) -> Carried:
        assert part.destination is not None
        with fs.Durability(self.state.fd) as durability:
            return self._reconcile(part, part.destination, part.source, durability)

    def _reconcile(self, part: PartRow, source: int, destination: int, durability: fs.Durability) -> Carried:
        skip = self._patched(part)
        with (
            fs.opened(self.state.generation(self.name, source)) as here,
            fs.opened(self.state.generation(self.name, destination)) as there,
        ):
            seen = survey(here)
            carried = reconcile(here, there, skip=skip, durability=durability)
            failpoint("store.carry.linked")
            durability.barrier()
        return Carried(carried, seen)

    def follow_up(self, part: PartRow, seen: Mapping[str, str], *, back: bool = False) -> list[str]:
        assert part.destination is not None
        old, new = (part.destination, part.source) if back else (part.source, part.destination)
        skip = self._patched(part)
        followed: set[str] = set()
        with (
            fs.Durability(self.state.fd) as durability,
            fs.opened(self.state.generation(self.name, old)) as here,
            fs.opened(self.state.generation(self.name, new)) as there,
        ):
            for _ in range(FOLLOW_UPS):
                before, seen = seen, survey(here)
                found = follow_up(here, there, before, seen, skip=skip, durability=durability)
                followed.update(found)
                if not found:
                    break
            durability.barrier()
        return sorted(followed)

    def _patched(self, part: PartRow) -> set[str]:
        """The paths in which patches make the two generations differ; all others are the program's."""
        assert part.destination is not None
        before = self.database.origins(self.name, part.source)
        after = self.database.origins(self.name, part.destination)
        differ = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
        kept = self.database.kept(self.name, part.destination)
        return differ - {path for path, row in kept.items() if row.txn == part.txn}

    def verify(self, part: PartRow) -> None:
        form, _ = self._tree.form()
        if form is not Form.LINKED:
            raise PatchRefusedError(
                f"{self.name}: {self.row.root} is not the link that asyncsup has put there",
                code="gate.detached",
                target=self.name,
            )
        with self._content() as content:
            self._check_unchanged(part, content)

    def verify_switched(self, part: PartRow) -> None:
        with fs.opened(self.state.generation(self.name, part.source)) as source:
            self._check_unchanged(part, source)

    def _check_unchanged(self, part: PartRow, content: int) -> None:
        with fs.LastFolder(partial(fs.open_below, content)) as here:
            for change in self.database.changes(part.txn, self.name):
                if change.seen is None:
                    continue
                found = look(change.path, None, here, hashed=False)
                # Not the inode: a root from another file system has been copied since.
                if found.problem is not None or without_inode(found.identity) != without_inode(change.seen):
                    what, code = ("changed", "gate.drift") if change.seen else ("created", "gate.conflict")
                    raise PatchRefusedError(
                        f"{self.name}: {change.path} was {what} by the program after the patch was staged",
                        code=code,
                        target=self.name,
                    )

    def remove_names(self, part: PartRow) -> None:
        """Nothing to do: a tree that is not current is not seen."""

    def tidy(self, part: PartRow) -> None:
        self._tree.remove_aside()

    # --- the end of management ------------------------------------------------------------------------------

    def release(self) -> list[str]:
        form, number = self._tree.form()
        if form is Form.LINKED:
            number = self.state.number(self.name)
        if form is Form.FOLDER or number is None:
            self._tree.remove_aside()
            return []
        with fs.Durability(self.state.fd) as durability:
            rows = self.database.files(self.name, number)
            with fs.opened(self.state.generation(self.name, number)) as content:
                self._tree.move_persistent_in(content, self.row.persist, durability)
                self._give_write_bits(content, rows.values(), durability)
            durability.barrier()
            known = self.database.generations(self.name)
            if not any(row.place == "root" and row.number > number for row in known):
                new = max(row.number for row in known) + 1
                self.database.add_generation(self.new_generation_row(new, like=number, place="root"))
            self._tree.point_straight(number)
            self.state.pointer.flip({self.name: str(self.row.root)}, point="store.release")
            self._tree.move_out(number, durability)
            self._tree.remove_aside()
        return sorted(present(rows))

    def _give_write_bits(self, content: int, rows: Iterable[FileRow], durability: fs.Durability) -> None:
        for row in rows:
            if not is_file(row):
                continue
            folders, name = split(row.path)
            with (
                contextlib.suppress(FileNotFoundError, fs.BlockedPathError),
                fs.below(content, folders) as folder,
            ):
                fd = os.open(name, fs.READ, dir_fd=folder)
                try:
                    os.fchmod(fd, row.mode)
                    durability.file(fd)
                finally:
                    os.close(fd)

    def resume(self) -> None:
        form, number = self._tree.form()
        if form is Form.DIRECT and number is not None:
            self._settle_root(number)
        if form is not Form.MISSING:
            self._tree.remove_aside()
        if form is Form.LINKED:
            with self._content() as content:
                self._tree.settle_persistent(content, self.row.persist)

    def _content(self) -> contextlib.AbstractContextManager[int]:
        path = self.state.content(self.row)
        if not path.is_dir():
            raise self.no_root()
        return fs.opened(path)
