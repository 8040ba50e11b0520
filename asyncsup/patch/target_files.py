"""What can be done with the files of one target; base of `OverlayFiles` and `TreeFiles`.

A *part* is one target's part in a transaction: from generation `source` to generation `destination`. Whatever
is about to be done is in the database before it is done; so `undo` works as well after a crash, from what is
found on disk, as after an error. Every method may be called again after it was cut off.
"""

from __future__ import annotations

import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from asyncsup.errors import PatchNotFoundError, PatchRefusedError, StateError
from asyncsup.failpoints import failpoint
from asyncsup.patch import fs
from asyncsup.patch.database import ChangeRow, Database, FileRow, GenerationRow, PartRow, TargetRow
from asyncsup.patch.look import TEMPORARY_PREFIX, folders_of, identity, split, unusable
from asyncsup.patch.manifest import DEFAULT_MODE, FileChange, Manifest, Op
from asyncsup.patch.plan import FilePlan, Found, PlanError, Presence, judge, refuse_if_any
from asyncsup.patch.space import BLOCK_BYTES, Need, Room
from asyncsup.patch.statedir import StateDirectory

log = logging.getLogger("asyncsup.patch.store")

Progress = Callable[[int], None]


class PatchSource(Protocol):
    """What the store needs of a package."""

    @property
    def id(self) -> str: ...

    @property
    def manifest(self) -> Manifest: ...

    def extract(self, change: FileChange, fd: int, progress: Progress | None = None) -> None:
        """Write the content of one file, checking size and digest; raises PatchMalformedError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A change, what it would find, and the verdict."""

    change: FileChange
    found: Found
    plan: FilePlan

    @property
    def appears(self) -> bool:
        """A name comes into being."""
        return not self.found.exists and self.change.op is not Op.DELETED


class TargetFiles(ABC):
    """The files of one target, in its root and in the store."""

    adopts = False
    """Whether an ordinary file becomes a link when a patch touches it."""

    def __init__(self, state: StateDirectory, row: TargetRow) -> None:
        self.state = state
        self.row = row
        self.name = row.name

    @property
    def database(self) -> Database:
        return self.state.database

    # --- looking --------------------------------------------------------------------------------------------

    @abstractmethod
    def look(self, changes: Iterable[FileChange], *, hashed: bool) -> list[Found]:
        """What stands at each path. ``hashed``: SHA-256 of everything that exists.

        Raises:
            PatchRefusedError: there is no root to look into.
        """

    def plan(self, changes: Sequence[FileChange]) -> list[Planned]:
        """What would become of each file."""
        found = self.look(changes, hashed=True)
        return [
            Planned(change=change, found=there, plan=judge(change, there, adopts=self.adopts))
            for change, there in zip(changes, found, strict=True)
        ]

    def matches(self, changes: Sequence[FileChange]) -> bool:
        """Whether the files are already what the changes would make them."""

        def fits(change: FileChange, found: Found) -> bool:
            if change.op is Op.DELETED:
                return found.presence is Presence.ABSENT and found.problem is None
            # Write bits are ours to take away, so they cannot be compared.
            mode_fits = change.mode is None or (change.mode ^ (found.mode or 0)) & 0o555 == 0
            return found.exists and found.sha256 == change.sha256 and mode_fits

        return all(map(fits, changes, self.look(changes, hashed=True)))

    @abstractmethod
    def oddities(self, named: frozenset[str]) -> list[FilePlan]:
        """Managed files other than the `named` ones that are not as asyncsup has left them."""

    # --- staging --------------------------------------------------------------------------------------------

    def stage(
        self, part: PartRow, package: PatchSource, planned: Sequence[Planned], progress: Progress | None
    ) -> PartRow:
        """Build the next generation and prepare the root for it; no reader sees a difference.

        Returns the part, with its destination. Cleaning up after a failure is `undo`.
        """
        refuse_if_any(self.name, (item.plan for item in planned))
        self._check_room(planned)
        number = max(row.number for row in self.database.generations(self.name)) + 1
        with self.database.write():
            self.database.add_generation(
                GenerationRow(
                    target=self.name,
                    number=number,
                    parent=part.source,
                    build=package.manifest.build,
                    patch=package.id,
                    txn=part.txn,
                    place="store",
                    state="live",
                    stamp=self._stamp(planned),
                    made=tuple(self.folders_to_make(planned)),
                )
            )
            self.database.plan_part(
                part, number, [self._change_row(position, item) for position, item in enumerate(planned)]
            )
        failpoint("store.stage.planned")
        part = replace(part, destination=number)
        self.build(part, package, planned, progress)
        failpoint("store.stage.recorded")
        return part

    @abstractmethod
    def build(
        self, part: PartRow, package: PatchSource, planned: Sequence[Planned], progress: Progress | None
    ) -> None:
        """The layout's share of `stage`; ends with the part marked as staged."""

    @abstractmethod
    def folders_to_make(self, planned: Sequence[Planned]) -> list[str]:
        """Folders in the root that have to be made before the switch."""

    def place(
        self,
        part: PartRow,
        fill: Callable[[int], None],
        package: PatchSource,
        planned: Sequence[Planned],
        progress: Progress | None,
        *,
        model: int,
        durability: fs.Durability,
    ) -> None:
        """Build the destination where nobody sees it, sync it, and give it its name.

        Args:
            fill: puts everything that stays the same into an open folder.
            model: an open folder whose owner and mode (and those of the folders in it) are used.
        """
        assert part.destination is not None
        name = f"{part.txn}-{self.name}"
        with fs.opened(self.state.staging) as area, fs.opened(self.state.generations(self.name)) as home:
            fs.remove_tree(name, area)
            os.mkdir(name, 0o700, dir_fd=area)
            with fs.below(area, [name]) as folder:
                fs.mirror_directory(os.fstat(model), folder)
                fill(folder)
                failpoint("store.stage.cloned")
                rows = self._write(
                    part, package, planned, progress, folder=folder, model=model, durability=durability
                )
                durability.directory(folder)
            durability.barrier()
            failpoint("store.stage.synced")
            os.rename(name, str(part.destination), src_dir_fd=area, dst_dir_fd=home)
            os.fsync(home)
        failpoint("store.stage.placed")
        kept = self.database.files(self.name, part.source)
        self.database.add_files(self.name, part.destination, {**kept, **rows}.values())

    def _write(
        self,
        part: PartRow,
        package: PatchSource,
        planned: Sequence[Planned],
        progress: Progress | None,
        *,
        folder: int,
        model: int,
        durability: fs.Durability,
    ) -> dict[str, FileRow]:
        assert part.destination is not None
        stamp = self.database.generation(self.name, part.destination).stamp
        owner = os.fstat(model)
        rows = {}
        for position, item in enumerate(planned):
            change, found = item.change, item.found
            if change.op is Op.DELETED:
                rows[change.path] = FileRow(
                    path=change.path, sha256=None, size=0, mode=0, origin=part.destination, identity=""
                )
                continue
            mode = change.mode if change.mode is not None else found.mode
            mode = (DEFAULT_MODE if mode is None else mode) & 0o777
            folders, name = split(change.path)
            inner = fs.make_below(folder, folders, durability, like=model)
            try:
                fd = os.open(name, fs.CREATE, 0o600, dir_fd=inner)
                try:
                    package.extract(change, fd, progress)
                    if os.geteuid() == 0:
                        os.fchown(fd, *(found.owner or (owner.st_uid, owner.st_gid)))
                    os.fchmod(fd, mode & ~0o222 | 0o400)
                    mtime = stamp * 1_000_000_000 + position
                    os.utime(fd, ns=(mtime, mtime))
                    durability.file(fd)
                    status = os.fstat(fd)
                finally:
                    os.close(fd)
                durability.directory(inner)
            finally:
                os.close(inner)
            failpoint("store.stage.written")
            rows[change.path] = FileRow(
                path=change.path,
                sha256=change.sha256,
                size=status.st_size,
                mode=mode,
                origin=part.destination,
                identity=identity(status),
            )
        return rows

    def _stamp(self, planned: Iterable[Planned]) -> int:
        """The mtime second of the files to be written: one no earlier file of the target was written in.

        Python takes a ``.pyc`` for up to date when size and mtime second of the source are unchanged.
        """
        used = {row.stamp for row in self.database.generations(self.name)}
        stamp = max(int(time.time()), max(used, default=0) + 1)
        replaced = {
            int(item.found.identity.rpartition(":")[2]) // 10**9 for item in planned if item.found.exists
        }
        while stamp in replaced:
            stamp += 1
        return stamp

    # --- room -----------------------------------------------------------------------------------------------

    def needs(self, planned: Sequence[Planned]) -> list[Need]:
        """What staging the changes takes, of every file system concerned."""
        written = [item.change for item in planned if item.change.op is not Op.DELETED]
        kept = present(self.database.files(self.name, self.state.number(self.name)))
        folders = folders_of([*kept, *(change.path for change in written)])
        content = sum((change.size or 0) + 2 * BLOCK_BYTES for change in written)
        return [
            Need(
                place=self.state.path,
                size=content + BLOCK_BYTES * len(folders),
                inodes=len(written) + len(folders) + 1,
            ),
            *self.needs_of_layout(planned),
        ]

    @abstractmethod
    def needs_of_layout(self, planned: Sequence[Planned]) -> list[Need]:
        """What it takes besides the delivered files themselves."""

    def _check_room(self, planned: Sequence[Planned]) -> None:
        for room in fs.rooms(self.needs(planned)):
            if room.short is not None:
                raise self.no_room(room)

    def no_room(self, room: Room) -> PatchRefusedError:
        """The refusal for want of room."""
        return PatchRefusedError(
            f"{self.name}: there is not enough room in {room.place}: {room.short or room.sizes}",
            code="gate.space",
            target=self.name,
            place=str(room.place),
            needed=room.needed,
            free=room.free,
            needed_inodes=room.needed_inodes,
            free_inodes=room.free_inodes,
        )

    # --- going back to an earlier generation ----------------------------------------------------------------

    def differences(self, source: int, destination: int) -> list[FilePlan]:
        """What going from one generation to another does to managed files."""
        before, after = self.database.files(self.name, source), self.database.files(self.name, destination)
        plans = []
        for path in sorted(before.keys() | after.keys()):
            was, becomes = before.get(path), after.get(path)
            if was is not None and becomes is not None and was.origin == becomes.origin:
                continue
            there, will_be = self.has(source, path, was), self.has(destination, path, becomes)
            if not there and not will_be:
                continue
            op: Op = Op.MODIFIED if there and will_be else Op.NEW if will_be else Op.DELETED
            plans.append(FilePlan(path=path, op=op.value))
        return plans

    def has(self, generation: int, path: str, row: FileRow | None) -> bool:
        """Whether a generation has the file; `row` is what the database knows of it there."""
        del generation, path
        return is_file(row)

    def stage_rollback(self, part: PartRow, destination: int) -> PartRow:
        """Prepare the root for a generation that is there already."""
        if not self.state.exists(self.name, destination):
            raise PatchNotFoundError(
                f"{self.name}: generation {destination} is not kept any more", target=self.name
            )
        plans = self.differences(part.source, destination)
        self.database.plan_part(
            part,
            destination,
            [
                ChangeRow(position=n, path=plan.path, op=plan.op, note="", adopts=False, seen=None)
                for n, plan in enumerate(plans)
            ],
        )
        failpoint("store.stage_rollback.planned")
        part = replace(part, destination=destination)
        self.prepare_rollback(part)
        failpoint("store.stage_rollback.prepared")
        self.database.mark_staged(part.txn, self.name)
        failpoint("store.stage_rollback.recorded")
        return part

    @abstractmethod
    def prepare_rollback(self, part: PartRow) -> None: ...

    # --- around the switch ----------------------------------------------------------------------------------

    @abstractmethod
    def carry(self, part: PartRow) -> list[str]:
        """Bring what the program has written since staging to the destination; the paths concerned."""

    @abstractmethod
    def carry_back(self, part: PartRow) -> list[str]:
        """Bring what the program has written in the destination back to the source."""

    @abstractmethod
    def verify(self, part: PartRow) -> None:
        """Right before the switch: everything is still as it was staged.

        Raises:
            PatchRefusedError: switching now would make a mix, or lose something the program has saved.
        """

    @abstractmethod
    def remove_names(self, part: PartRow) -> None:
        """The destination is not current (any more): the root shows nothing of it."""

    @abstractmethod
    def tidy(self, part: PartRow) -> None:
        """The destination is confirmed: remove what only the source needed."""

    def undo(self, part: PartRow) -> None:
        """Remove everything that was staged; the destination must not be current."""
        if part.destination is None:
            return
        if self.state.number(self.name) == part.destination:
            raise StateError(
                f"generation {part.destination} of {self.name} is the current one and cannot be removed",
                code="state.pointer",
            )
        self.remove_names(part)
        failpoint("store.abort.unlinked")
        with fs.opened(self.state.staging) as area:
            fs.remove_tree(f"{part.txn}-{self.name}", area)
        row = self.database.find_generation(self.name, part.destination)
        if row is not None and row.txn == part.txn:
            # One that a reader holds stays for now, and goes with the next prune.
            self.state.discard(self.name, part.destination)
            failpoint("store.abort.discarded")
            self.database.update_generation(self.name, part.destination, state="dropped")

    # --- the end of management ------------------------------------------------------------------------------

    @abstractmethod
    def release(self) -> list[str]:
        """Make every managed file an ordinary file of the root again; the paths, relative to the root."""

    @abstractmethod
    def resume(self) -> None:
        """Finish what a crash has cut off outside of any transaction."""

    # --- helpers --------------------------------------------------------------------------------------------

    def _change_row(self, position: int, item: Planned) -> ChangeRow:
        return ChangeRow(
            position=position,
            path=item.change.path,
            op=item.plan.op,
            note=item.plan.note,
            adopts=self.adopts and item.found.presence is Presence.ORDINARY,
            seen=item.found.identity,
        )

    def temporary(self, part: PartRow, change: ChangeRow) -> str:
        """The name used beside a file while it is swapped; recovery finds it again."""
        return f"{TEMPORARY_PREFIX}{part.txn}-{change.position}"

    def appearing(self, part: PartRow) -> list[str]:
        """Names that the destination has and the source has not."""
        assert part.destination is not None
        return _only_in(self.database, self.name, part.destination, part.source)

    def disappearing(self, part: PartRow) -> list[str]:
        """Names that the source has and the destination has not."""
        assert part.destination is not None
        return _only_in(self.database, self.name, part.source, part.destination)

    def new_generation_row(self, number: int, *, like: int, place: str) -> GenerationRow:
        """A generation without a way back, of the same build as another."""
        return replace(
            self.database.generation(self.name, like),
            number=number,
            parent=None,
            txn=None,
            place=place,
            state="live",
            made=(),
        )

    def no_root(self) -> PatchRefusedError:
        return PatchRefusedError(
            f"{self.name}: its root {self.row.root} does not exist or is no folder",
            code="gate.root",
            target=self.name,
            root=str(self.row.root),
        )


def problem_with(path: str) -> Found | None:
    """For `look`: a path that may not be looked at."""
    problem: PlanError | None = unusable(path)
    return None if problem is None else Found(presence=Presence.ABSENT, problem=problem)


def present(rows: Mapping[str, FileRow]) -> frozenset[str]:
    """The paths a generation has a file for."""
    return frozenset(path for path, row in rows.items() if is_file(row))


def is_file(row: FileRow | None) -> bool:
    return row is not None and row.sha256 is not None


def _only_in(database: Database, target: str, generation: int, other: int) -> list[str]:
    return sorted(present(database.files(target, generation)) - present(database.files(target, other)))
