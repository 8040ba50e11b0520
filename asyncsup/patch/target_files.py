"""What can be done with the files of one target; base of `OverlayFiles` and `TreeFiles`.

A *part* is one target's part in a transaction: from generation `source` to generation `destination`. Whatever
is about to be done is in the database before it is done; so `undo` works as well after a crash, from what is
found on disk, as after an error. Every method may be called again after it was cut off.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import msgspec
from msgspec.structs import replace

from asyncsup.errors import PatchNotFoundError, PatchRefusedError, StateError
from asyncsup.failpoints import failpoint
from asyncsup.patch import fs
from asyncsup.patch.database import ChangeRow, Database, FileRow, GenerationRow, KeptRow, PartRow, TargetRow
from asyncsup.patch.guarded import Guard
from asyncsup.patch.look import TEMPORARY_PREFIX, folders_of, identity, split, unusable
from asyncsup.patch.manifest import DEFAULT_MODE, FileChange, Manifest, Op
from asyncsup.patch.plan import FilePlan, Found, PlanError, Policy, Presence, judge, refuse_if_any
from asyncsup.patch.space import BLOCK_BYTES, Need, Room
from asyncsup.patch.statedir import StateDirectory

log = logging.getLogger("asyncsup.patch.store")

Progress = Callable[[int], None]

OVERWRITTEN: Final = "was changed by somebody, and what a patch had made of it is not there"


class PatchSource(Protocol):
    """What the store needs of a package."""

    @property
    def id(self) -> str: ...

    @property
    def manifest(self) -> Manifest: ...

    def extract(self, change: FileChange, fd: int, progress: Progress | None = None) -> None:
        """Write the content of one file, checking size and digest; raises PatchMalformedError."""

    def rebuild(self, change: FileChange, base: int, fd: int, progress: Progress | None = None) -> None:
        """The same for a file that comes as a delta, of its old content open at `base`; raises
        PatchRefusedError as well when that is not what the delta asks for."""


class Carried(NamedTuple):
    """What was brought from one generation to another.

    Attributes:
        seen: what the first one held then, as `follow_up` wants it.
    """

    paths: Sequence[str]
    seen: Mapping[str, str]


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    """A change, what it would find, and the verdict."""

    change: FileChange
    found: Found
    plan: FilePlan

    @property
    def kept(self) -> bool:
        """The patch is applied as if it did not name the file."""
        return self.plan.decision == "keep"

    @property
    def appears(self) -> bool:
        """A name comes into being."""
        return not self.found.exists and self.change.op is not Op.DELETED

    @property
    def stands_in_root(self) -> bool:
        """An ordinary file stands in the root, whether or not the name is managed."""
        return self.found.presence in {Presence.ORDINARY, Presence.DETACHED}


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

    @abstractmethod
    def check_root(self) -> None:
        """Refuse a root that the layout cannot work with, before anything is done to it."""

    def plan(self, changes: Sequence[FileChange], policy: Policy) -> list[Planned]:
        """What would become of each file.

        Raises:
            PatchRefusedError: the root cannot be patched at all.
        """
        self.check_root()
        found = self._refuse_guarded(changes, self.look(changes, hashed=True))
        return [
            Planned(change=change, found=there, plan=judge(change, there, policy=policy, adopts=self.adopts))
            for change, there in zip(changes, found, strict=True)
        ]

    def refuse_guarded(self, changes: Sequence[FileChange]) -> None:
        """Look once more whether a patch may change what it would: other places may be guarded by now.

        Raises:
            PatchRefusedError: it may not.
        """
        found = self.look(changes, hashed=False)
        with fs.opened(self.row.root) as root:
            guard = Guard(self.state.guarded, root, self.row.root)
            for change, there in zip(changes, found, strict=True):
                problem = guard.problem(change.path, there)
                if problem is not None:
                    raise PatchRefusedError(f"{change.path}: {problem.message}", code=problem.code)

    def _refuse_guarded(self, changes: Sequence[FileChange], found: Sequence[Found]) -> list[Found]:
        """What was found, with a problem wherever no patch may change anything."""
        with fs.opened(self.row.root) as root:
            guard = Guard(self.state.guarded, root, self.row.root)
            problems = [
                there.problem or guard.problem(change.path, there)
                for change, there in zip(changes, found, strict=True)
            ]
        return [
            there if problem is None else replace(there, problem=problem)
            for there, problem in zip(found, problems, strict=True)
        ]

    def matches(self, changes: Sequence[FileChange]) -> bool:
        """Whether the files are already what the changes would make them."""

        def fits(change: FileChange, found: Found) -> bool:
            if change.op is Op.DELETED:
                return found.presence is Presence.ABSENT and found.problem is None
            # Write bits are ours to take away, so they cannot be compared.
            mode_fits = change.mode is None or (change.mode ^ (found.mode or 0)) & 0o555 == 0
            stands = found.exists and found.presence is not Presence.DETACHED
            return stands and found.sha256 == change.sha256 and mode_fits

        # The first file usually tells: most patches that are asked about are new.
        return all(
            all(map(fits, some, self.look(some, hashed=True))) for some in (changes[:1], changes[1:]) if some
        )

    def drifted(self) -> list[FilePlan]:
        """Files of patches that are not as asyncsup has left them, and those that were kept in their place.

        Raises:
            PatchRefusedError: there is no root to look into.
        """
        number = self.state.number(self.name)
        managed = present(self.database.files(self.name, number))
        names = sorted(managed | self.database.kept(self.name, number).keys())
        looked_for = [FileChange(path=path, op=Op.MODIFIED, missing_ok=True) for path in names]
        plans = []
        for change, found in zip(looked_for, self.look(looked_for, hashed=False), strict=True):
            plan = judge(change, found, policy="keep")
            error = plan.error or plan.drift
            if error is not None:
                note = f"{error.message}; left so"
                plans.append(FilePlan(path=change.path, op="keep", note=note, drift=error))
        return plans

    # --- staging --------------------------------------------------------------------------------------------

    def stage(
        self, part: PartRow, package: PatchSource, planned: Sequence[Planned], progress: Progress | None
    ) -> PartRow:
        """Build the next generation and prepare the root for it; no reader sees a difference.

        Returns the part, with its destination. Cleaning up after a failure is `undo`.
        """
        refuse_if_any(self.name, (item.plan for item in planned))
        self._check_room(planned)
        changed = [item for item in planned if not item.kept]
        number = self.next_number()
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
                    stamp=self._stamp(changed),
                    made=tuple(self.folders_to_make(changed)),
                )
            )
            self.database.plan_part(part, number, self._change_rows(part, changed))
        failpoint("store.stage.planned")
        part = replace(part, destination=number)
        self._save(part, changed)
        self.build(part, package, planned, progress)
        failpoint("store.stage.recorded")
        return part

    def next_number(self) -> int:
        """Of a generation that never was: numbers are not used twice."""
        return max(row.number for row in self.database.generations(self.name)) + 1

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
        write: Callable[[int], Mapping[str, FileRow]],
        *,
        inherited: Mapping[str, FileRow],
        kept: Mapping[str, KeptRow],
        model: int,
        durability: fs.Durability,
    ) -> None:
        """Build the destination where nobody sees it, sync it, and give it its name.

        Args:
            fill: puts everything that stays the same into an open folder.
            write: puts what is new there, and returns what is to be known of it.
            inherited: what is known of what stays the same.
            model: an open folder whose owner and mode are used.
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
                rows = write(folder)
                durability.directory(folder)
            durability.barrier()
            failpoint("store.stage.synced")
            os.rename(name, str(part.destination), src_dir_fd=area, dst_dir_fd=home)
            os.fsync(home)
        failpoint("store.stage.placed")
        with self.database.write():
            self.database.add_files(self.name, part.destination, {**inherited, **rows}.values())
            self.database.add_kept(self.name, part.destination, kept.values())

    def kept_after(self, part: PartRow, planned: Sequence[Planned]) -> dict[str, KeptRow]:
        """What stands in the destination that is not a patch's: what did so before and is not touched, and
        what is kept now."""
        touched = {item.change.path for item in planned}
        before = self.database.kept(self.name, part.source)
        origins = self.database.origins(self.name, part.source)
        kept = {path: row for path, row in before.items() if path not in touched}
        for item in planned:
            if item.kept and item.plan.drift is not None:
                path = item.change.path
                kept[path] = KeptRow(
                    path=path, txn=part.txn, origin=origins.get(path), note=item.plan.drift.message
                )
        return kept

    def write(
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
        """Write the patch's files into the open folder; what is to be known of them, and of deleted ones.

        Args:
            model: an open folder whose owner and mode, and those of the folders in it, are used.
        """
        assert part.destination is not None
        stamp = self.database.generation(self.name, part.destination).stamp
        owner = os.fstat(model)
        am_root = os.geteuid() == 0
        rows = {}

        def make(folders: Sequence[str]) -> int:
            inner = fs.make_below(folder, folders, durability, like=model)
            durability.directory(inner)
            return inner

        with fs.LastFolder(make) as inner:
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
                delivered = mode & ~0o222 | 0o400
                fd = os.open(name, fs.CREATE, delivered, dir_fd=inner.open(folders))
                try:
                    if change.delta is None:
                        package.extract(change, fd, progress)
                    else:
                        self._rebuild(package, item, fd, progress)
                    mtime = stamp * 1_000_000_000 + position
                    os.utime(fd, ns=(mtime, mtime))
                    status = os.fstat(fd)
                    wanted = found.owner or (owner.st_uid, owner.st_gid)
                    if am_root and wanted != (status.st_uid, status.st_gid):
                        os.fchown(fd, *wanted)
                    if status.st_mode & 0o7777 != delivered:
                        os.fchmod(fd, delivered)
                    durability.file(fd)
                finally:
                    os.close(fd)
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

    def rehearse(
        self, package: PatchSource, planned: Sequence[Planned], done: set[str], progress: Progress
    ) -> None:
        """Make the content of every file that would be written, and throw it away.

        Args:
            done: paths of files that need not be made any more; added to. What a delta makes depends on what
                the target has, so that is always made.
        """
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for item in planned:
                change = item.change
                if item.kept or change.op is Op.DELETED or change.path in done:
                    continue
                if change.delta is None:
                    package.extract(change, nowhere, progress)
                    done.add(change.path)
                else:
                    self._rebuild(package, item, nowhere, progress)
        finally:
            os.close(nowhere)

    def _rebuild(self, package: PatchSource, item: Planned, fd: int, progress: Progress | None) -> None:
        with self.folder_of(item) as folder:
            base = os.open(split(item.change.path)[1], fs.READ, dir_fd=folder)
        try:
            package.rebuild(item.change, base, fd, progress)
        finally:
            os.close(base)

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

    # --- what would be lost ---------------------------------------------------------------------------------

    @abstractmethod
    def folder_of(self, item: Planned) -> AbstractContextManager[int]:
        """The open folder in which the file that was found lies."""

    def _save(self, part: PartRow, planned: Sequence[Planned]) -> None:
        """Copy what no patch has brought, before it is overwritten."""
        saved = [item for item in planned if item.plan.saves]
        if not saved:
            return
        with fs.Durability(self.state.fd) as durability, self.state.saving() as home:
            for item in saved:
                with self.folder_of(item) as folder:
                    self._copy_out(
                        item.change.path,
                        folder,
                        home,
                        str(part.txn),
                        found=item.found,
                        durability=durability,
                    )
            durability.barrier()
        failpoint("store.stage.saved")

    def _copy_out(
        self, path: str, folder: int, home: int, label: str, *, found: Found | None, durability: fs.Durability
    ) -> None:
        folders, name = split(path)
        source = os.open(name, fs.READ, dir_fd=folder)
        try:
            if found is not None and identity(os.fstat(source)) != found.identity:
                raise PatchRefusedError(
                    f"{self.name}: {path} was changed while the patch was staged",
                    code="gate.drift",
                    target=self.name,
                )
            there = fs.make_below(home, [self.name, label, *folders], durability)
            try:
                fs.unlink_quietly(name, there)
                fs.copy_regular(source, name, there, durability)
                durability.directory(there)
            finally:
                os.close(there)
        finally:
            os.close(source)

    def _rescue(self, part: PartRow) -> list[str]:
        """Copy what was written into files of a generation that is about to go; their paths."""
        assert part.destination is not None
        written = {
            path: row
            for path, row in self.database.files(self.name, part.destination).items()
            if is_file(row) and row.origin == part.destination
        }
        rescued = []
        with contextlib.ExitStack() as stack:
            try:
                generation = stack.enter_context(
                    fs.opened(self.state.generation(self.name, part.destination))
                )
            except FileNotFoundError:
                return []
            durability = stack.enter_context(fs.Durability(self.state.fd))
            for path, row in sorted(written.items()):
                folders, name = split(path)
                with (
                    contextlib.suppress(FileNotFoundError, fs.BlockedPathError),
                    fs.below(generation, folders) as folder,
                ):
                    status = fs.lstat(name, folder)
                    if status is None or not stat.S_ISREG(status.st_mode) or identity(status) == row.identity:
                        continue
                    if fs.sha256_of(name, folder) != row.sha256:
                        with self.state.saving() as home:
                            label = f"{part.txn}-undone"
                            self._copy_out(path, folder, home, label, found=None, durability=durability)
                        rescued.append(path)
            durability.barrier()
        return rescued

    # --- room -----------------------------------------------------------------------------------------------

    def needs(self, planned: Sequence[Planned]) -> list[Need]:
        """What staging the changes takes, of every file system concerned."""
        written = [item.change for item in planned if item.change.op is not Op.DELETED and not item.kept]
        saved = [item for item in planned if item.plan.saves]
        kept = present(self.database.files(self.name, self.state.number(self.name)))
        folders = folders_of([*kept, *(change.path for change in written)])
        content = sum((change.size or 0) + 2 * BLOCK_BYTES for change in written)
        return [
            Need(
                place=self.state.path,
                size=content + BLOCK_BYTES * len(folders),
                inodes=len(written) + len(folders) + 1,
            ),
            Need(
                place=self.state.path,
                size=sum(item.found.size + 2 * BLOCK_BYTES for item in saved),
                inodes=2 * len(saved),
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
        origins = [self.database.origins(self.name, number) for number in (source, destination)]
        before, after = self.database.files(self.name, source), self.database.files(self.name, destination)
        kept = self.database.kept(self.name, source)
        plans = []
        for path in sorted(origins[0].keys() | origins[1].keys()):
            if origins[0].get(path) == origins[1].get(path):
                continue
            there = path in kept or self.has(source, path, before.get(path))
            will_be = self.has(destination, path, after.get(path))
            if not there and not will_be:
                continue
            op: Op = Op.MODIFIED if there and will_be else Op.NEW if will_be else Op.DELETED
            plans.append(FilePlan(path=path, op=op.value))
        return plans

    def has(self, generation: int, path: str, row: FileRow | None) -> bool:
        """Whether a generation has the file; `row` is what the database knows of it there."""
        del generation, path
        return is_file(row)

    def plan_back(self, source: int, destination: int, policy: Policy) -> list[Planned]:
        """What going back from one generation to another would do to each file, in view of what is there."""
        becomes = self.database.files(self.name, destination)
        changes = []
        for plan in self.differences(source, destination):
            row = becomes.get(plan.path)
            # What was adopted may have been written to since: nobody knows its content without looking.
            known = row is not None and row.origin is not None
            changes.append(
                FileChange(
                    path=plan.path,
                    op=Op(plan.op),
                    sha256=row.sha256 if known and row is not None else None,
                    missing_ok=plan.op != Op.NEW.value,
                )
            )
        return self.plan(changes, policy)

    def stage_rollback(self, part: PartRow, goal: int, policy: Policy) -> tuple[PartRow, list[Planned]]:
        """Prepare the root for going back to a generation that is there already.

        Where files are kept that it has another version of, a new generation takes its place: one like it,
        but for those.
        """
        if not self.state.exists(self.name, goal):
            raise PatchNotFoundError(f"{self.name}: generation {goal} is not kept any more", target=self.name)
        planned = self.plan_back(part.source, goal, policy)
        refuse_if_any(self.name, (item.plan for item in planned))
        self._check_room(planned)
        changed = [item for item in planned if not item.kept]
        part = replace(part, destination=goal if len(changed) == len(planned) else self.next_number())
        assert part.destination is not None
        with self.database.write():
            if part.destination != goal:
                like = self.database.generation(self.name, goal)
                self.database.add_generation(replace(like, number=part.destination, txn=part.txn))
            self.database.plan_part(part, part.destination, self._change_rows(part, changed))
        failpoint("store.stage_rollback.planned")
        self._save(part, changed)
        if part.destination != goal:
            self.build_like(part, goal, planned)
        seen = self.prepare_rollback(part, changed)
        failpoint("store.stage_rollback.prepared")
        self.database.mark_staged(part.txn, self.name, seen)
        failpoint("store.stage_rollback.recorded")
        return part, planned

    def kept_back(self, part: PartRow, goal: int, planned: Sequence[Planned]) -> dict[str, KeptRow]:
        """What stands in the destination that is not a patch's, when it is one like `goal`."""
        origins = self.database.origins(self.name, goal)
        kept = self.database.kept(self.name, goal)
        for item in planned:
            if item.kept and item.plan.drift is not None:
                path, note = item.change.path, item.plan.drift.message
                kept[path] = KeptRow(path=path, txn=part.txn, origin=origins.get(path), note=note)
        return kept

    @abstractmethod
    def build_like(self, part: PartRow, goal: int, planned: Sequence[Planned]) -> None:
        """Build the destination: as `goal`, but for the files that are kept."""

    @abstractmethod
    def prepare_rollback(self, part: PartRow, planned: Sequence[Planned]) -> Mapping[int, str]:
        """The layout's share of it; identities that adoption has found anew, by position."""

    # --- around the switch ----------------------------------------------------------------------------------

    @abstractmethod
    def carry(self, part: PartRow) -> Carried:
        """Bring what the program has written since staging to the destination."""

    @abstractmethod
    def carry_back(self, part: PartRow) -> Carried:
        """Bring what the program has written in the destination back to the source."""

    @abstractmethod
    def follow_up(self, part: PartRow, seen: Mapping[str, str], *, back: bool = False) -> list[str]:
        """Right after the switch (or the switch `back`): bring what the program has written between the carry
        and the switch; the paths concerned.

        Args:
            seen: what the carry found.
        """

    @abstractmethod
    def verify(self, part: PartRow) -> None:
        """Right before the switch: everything is still as it was staged.

        Raises:
            PatchRefusedError: switching now would make a mix, or lose something the program has saved.
        """

    @abstractmethod
    def verify_switched(self, part: PartRow) -> None:
        """Right after the switch: nothing that the patch replaces was saved between `verify` and the switch.

        Raises:
            PatchRefusedError: as `verify`.
        """

    def leave(self, part: PartRow) -> Path:
        """What the program has written in the destination could not be carried back: `undo` will put the
        whole of it where this returns, also after a crash, and remove nothing."""
        place = self._left(part)
        with self.state.saving() as home, fs.Durability(self.state.fd) as durability:
            os.close(fs.make_below(home, [self.name, place.name], durability))
            durability.barrier()
        return place

    def _left(self, part: PartRow) -> Path:
        return self.state.saved(self.name, f"{part.txn}-left")

    @abstractmethod
    def remove_names(self, part: PartRow) -> None:
        """The destination is not current (any more): the root shows nothing of it."""

    @abstractmethod
    def tidy(self, part: PartRow) -> None:
        """The destination is confirmed: remove what only the source needed."""

    def note_overwritten(self, part: PartRow) -> None:
        """The destination is confirmed, and what it has overwritten is still in the generations that can be
        gone back to: note there as kept what is not as it was delivered. Harmless when repeated."""
        paths = {change.path for change in self.database.changes(part.txn, self.name) if change.note}
        if not paths:
            return
        source = self.database.origins(self.name, part.source)
        for row in self.database.generations(self.name):
            number = row.number
            if row.state != "live" or number == part.destination or not self.state.exists(self.name, number):
                continue
            origins = self.database.origins(self.name, number)
            alike = {path for path in paths if path in origins and origins[path] == source.get(path)}
            files = self.database.files(self.name, number)
            known = self.database.kept(self.name, number)
            with fs.opened(self.state.generation(self.name, number)) as folder:
                odd = [
                    KeptRow(path=path, txn=part.txn, origin=origins[path], note=OVERWRITTEN)
                    for path in sorted(alike & present(files) - known.keys())
                    if files[path].origin is not None and not _is_as_delivered(files[path], folder)
                ]
            if odd:
                with self.database.write(durable=False):  # Recovery would find it.
                    self.database.add_kept(self.name, number, odd)

    def undo(self, part: PartRow) -> list[str]:
        """Remove everything that was staged; the destination must not be current.

        Returns the paths of files that somebody has written to in the destination: of those there is a copy.
        """
        if part.destination is None:
            return []
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
        rescued = []
        if row is not None and row.txn == part.txn:
            if self._left(part).is_dir():
                self.state.move_to_saved(self.name, part.destination, self._left(part).name)
            else:
                rescued = self._rescue(part)
                failpoint("store.abort.rescued")
                # One that a reader holds stays for now, and goes with the next prune.
                self.state.discard(self.name, part.destination)
                failpoint("store.abort.discarded")
            self.database.update_generation(self.name, part.destination, state="dropped", durable=False)
        # Nothing was overwritten, so the copies are of no use.
        self.state.forget_saved(self.name, str(part.txn))
        return rescued

    # --- the end of management ------------------------------------------------------------------------------

    @abstractmethod
    def release(self) -> list[str]:
        """Make every managed file an ordinary file of the root again; the paths, relative to the root."""

    @abstractmethod
    def resume(self) -> None:
        """Finish what a crash has cut off outside of any transaction."""

    # --- helpers --------------------------------------------------------------------------------------------

    def _change_rows(self, part: PartRow, planned: Sequence[Planned]) -> list[ChangeRow]:
        return [
            ChangeRow(
                position=position,
                path=item.change.path,
                op=item.plan.op,
                note=self.noted(part.txn, item).note,
                adopts=self.adopts and item.stands_in_root,
                seen=item.found.identity,
            )
            for position, item in enumerate(planned)
        ]

    def noted(self, txn: int, item: Planned) -> FilePlan:
        """The verdict as it is reported: with the place where the copy is."""
        if not item.plan.saves:
            return item.plan
        copy = str(self.state.saved(self.name, str(txn)) / item.change.path)
        return replace(item.plan, note=f"{item.plan.note}: {copy}", saved=copy)

    def temporary(self, part: PartRow, change: ChangeRow) -> str:
        """The name used beside a file while it is swapped; recovery finds it again."""
        return f"{TEMPORARY_PREFIX}{part.txn}-{change.position}"

    def disappearing(self, part: PartRow) -> list[str]:
        """Names that the source has and the destination has not, but for those that a person has taken."""
        assert part.destination is not None
        changed = {change.path for change in self.database.changes(part.txn, self.name)}
        gone = present(self.database.files(self.name, part.source))
        gone -= present(self.database.files(self.name, part.destination))
        return sorted(gone & changed)

    def crossed(self, part: PartRow) -> list[int]:
        """The generations that going to the destination takes back, the latest first; none for a patch."""
        assert part.destination is not None
        beneath = set(self._lineage(part.destination))
        return [number for number in self._lineage(part.source) if number not in beneath]

    def _lineage(self, number: int | None) -> list[int]:
        """A generation, the one it was made from, and so on."""
        parents = {row.number: row.parent for row in self.database.generations(self.name)}
        found = []
        while number is not None and number in parents:
            found.append(number)
            number = parents[number]
        return found

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


def marked(found: Found, kept: KeptRow | None) -> Found:
    """What was found, with why it is not a patch's where it could be one."""
    return found if kept is None else replace(found, kept=kept.note)


def _is_as_delivered(row: FileRow, generation: int) -> bool:
    folders, name = split(row.path)
    try:
        with fs.below(generation, folders) as folder:
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            return stat.S_ISREG(status.st_mode) and (
                identity(status) == row.identity or fs.sha256_of(name, folder) == row.sha256
            )
    except (FileNotFoundError, fs.BlockedPathError):
        return False


def present(rows: Mapping[str, FileRow]) -> frozenset[str]:
    """The paths a generation has a file for."""
    return frozenset(path for path, row in rows.items() if is_file(row))


def is_file(row: FileRow | None) -> bool:
    return row is not None and row.sha256 is not None
