"""The files of a target with the overlay layout: patches in generations, the program's own in the root."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from asyncsup.errors import PatchRefusedError
from asyncsup.failpoints import failpoint
from asyncsup.patch import fs
from asyncsup.patch.database import FileRow, PartRow
from asyncsup.patch.look import TEMPORARY_PREFIX, identity, split
from asyncsup.patch.manifest import FileChange
from asyncsup.patch.overlay import Home, OverlayRoot
from asyncsup.patch.plan import FilePlan, Found, Presence
from asyncsup.patch.space import BLOCK_BYTES, Need
from asyncsup.patch.target_files import (
    PatchSource,
    Planned,
    Progress,
    TargetFiles,
    is_file,
    present,
    problem_with,
)

_RELEASED: Final = f"{TEMPORARY_PREFIX}released"


class OverlayFiles(TargetFiles):
    adopts = True

    # --- looking --------------------------------------------------------------------------------------------

    def look(self, changes: Iterable[FileChange], *, hashed: bool) -> list[Found]:
        number = self.state.number(self.name)
        rows = self.database.files(self.name, number)
        with self._root() as root, fs.opened(self.state.generation(self.name, number)) as generation:
            return [
                problem_with(change.path)
                or root.look(change.path, rows.get(change.path), generation, hashed=hashed)
                for change in changes
            ]

    def oddities(self, named: frozenset[str]) -> list[FilePlan]:
        number = self.state.number(self.name)
        odd = []
        with self._root() as root, fs.opened(self.state.generation(self.name, number)) as generation:
            for path, row in sorted(self.database.files(self.name, number).items()):
                if path in named or not is_file(row):
                    continue
                found = root.look(path, row, generation, hashed=False)
                if found.presence is not Presence.MANAGED:
                    odd.append(
                        FilePlan(path=path, op="keep", note="replaced or removed by the program; left so")
                    )
                elif found.drifted:
                    odd.append(FilePlan(path=path, op="keep", note="changed in place by somebody; left so"))
        return odd

    def folders_to_make(self, planned: Sequence[Planned]) -> list[str]:
        made: dict[str, None] = {}
        with self._root() as root:
            for item in planned:
                if item.appears:
                    made.update(dict.fromkeys(fs.missing_folders(root.fd, split(item.change.path)[0])))
        return list(made)

    def needs_of_layout(self, planned: Sequence[Planned]) -> list[Need]:
        """Links in the root; and from another file system, copies of the files that are adopted."""
        adopted = [item.found for item in planned if item.found.presence is Presence.ORDINARY]
        with self._root() as root:
            far = os.fstat(root.fd).st_dev != self.state.path.stat().st_dev
        links = len(adopted) + sum(item.appears for item in planned) + len(self.folders_to_make(planned))
        needs = [Need(place=self.row.root, size=links * BLOCK_BYTES, inodes=links)]
        if far and adopted:
            homes = sum(row.state == "live" for row in self.database.generations(self.name))
            size = sum(found.size + 2 * BLOCK_BYTES for found in adopted)
            needs.append(Need(place=self.state.path, size=size * homes, inodes=len(adopted) * homes))
        return needs

    # --- staging --------------------------------------------------------------------------------------------

    def build(
        self, part: PartRow, package: PatchSource, planned: Sequence[Planned], progress: Progress | None
    ) -> None:
        changed = {item.change.path for item in planned}
        rows = self.database.files(self.name, part.source)
        unchanged = sorted(present(rows) - changed)
        with self._root() as root, fs.Durability(self.state.fd, root.fd) as durability:

            def fill(folder: int) -> None:
                with fs.opened(self.state.generation(self.name, part.source)) as source:
                    for path in unchanged:
                        self._share(path, source, folder, durability)

            self.place(part, fill, package, planned, progress, model=root.fd, durability=durability)
            seen = self._adopt(part, root, planned, durability)
            for item in planned:
                if item.appears:
                    root.link(item.change.path, durability)
            durability.barrier()
            failpoint("store.stage.linked")
            self.database.mark_staged(part.txn, self.name, seen)

    def _share(self, path: str, source: int, destination: int, durability: fs.Durability) -> None:
        folders, name = split(path)
        try:
            with fs.below(source, folders) as here:
                there = fs.make_below(destination, folders, durability, like=source)
                try:
                    fs.link_or_copy(name, here, name, there, durability)
                    durability.directory(there)
                finally:
                    os.close(there)
        except FileNotFoundError:
            raise PatchRefusedError(
                f"{self.name}: {path} is missing from the current generation in {self.state.path}",
                code="gate.drift",
                target=self.name,
            ) from None

    def _adopt(
        self, part: PartRow, root: OverlayRoot, planned: Sequence[Planned], durability: fs.Durability
    ) -> dict[int, str]:
        """Adopt what the patch touches for the first time; identities by position in the plan."""
        adopting = {item.change.path: item for item in planned if item.found.presence is Presence.ORDINARY}
        if not adopting:
            return {}
        changes = {change.path: change for change in self.database.changes(part.txn, self.name)}
        kept = self._kept(part)
        rows = {number: self.database.files(self.name, number) for number in kept}
        with contextlib.ExitStack() as stack:
            folders = {
                number: stack.enter_context(fs.opened(self.state.generation(self.name, number)))
                for number in kept
            }
            homes = [Home(fd=folders[number], taken=present(rows[number])) for number in kept]
            adopted = root.adopt(
                {path: self.temporary(part, changes[path]) for path in adopting}, homes, durability
            )
            durability.barrier()
            new_rows = {}
            for path, item in adopting.items():
                new_rows[path] = row = _adopted_row(path, adopted[path], item.found, folders[part.source])
                base = item.change.base_sha256
                if base is not None and row.sha256 != base:
                    raise PatchRefusedError(
                        f"{self.name}: {path} was changed by the program while the patch was staged",
                        code="gate.base",
                        target=self.name,
                    )
        self._record_adopted(new_rows, rows)
        failpoint("store.adopt.recorded")
        return {changes[path].position: row.identity for path, row in new_rows.items()}

    def _record_adopted(
        self, new_rows: Mapping[str, FileRow], rows: Mapping[int, Mapping[str, FileRow]]
    ) -> None:
        with self.database.write():
            for number, existing in rows.items():
                taken = present(existing)
                self.database.add_files(
                    self.name, number, [row for path, row in new_rows.items() if path not in taken]
                )

    def _kept(self, part: PartRow) -> list[int]:
        """The generations an adopted file belongs into: all that can be gone back to, the source first."""
        others = [
            row.number
            for row in self.database.generations(self.name)
            if row.state == "live"
            and row.number not in {part.source, part.destination}
            and self.state.exists(self.name, row.number)
        ]
        return [part.source, *others]

    def prepare_rollback(self, part: PartRow) -> None:
        assert part.destination is not None
        rows = self.database.files(self.name, part.destination)
        with self._root() as root, fs.Durability(self.state.fd, root.fd) as durability:
            with fs.opened(self.state.generation(self.name, part.destination)) as destination:
                for path in sorted(present(rows)):
                    folders, name = split(path)
                    try:
                        with fs.below(destination, folders) as folder:
                            os.stat(name, dir_fd=folder, follow_symlinks=False)
                    except FileNotFoundError:
                        raise PatchRefusedError(
                            f"{self.name}: generation {part.destination} is damaged, it has no {path}",
                            code="gate.drift",
                            target=self.name,
                        ) from None
            for path in self.appearing(part):
                root.link(path, durability)
            durability.barrier()

    # --- around the switch ----------------------------------------------------------------------------------

    def carry(self, part: PartRow) -> list[str]:
        return []  # What the program writes stays in the root, whatever the generation.

    def carry_back(self, part: PartRow) -> list[str]:
        return []

    def verify(self, part: PartRow) -> None:
        assert part.destination is not None
        before = self.database.files(self.name, part.source)
        there = present(before)
        involved = there | present(self.database.files(self.name, part.destination))
        seen = {change.path: change.seen for change in self.database.changes(part.txn, self.name)}
        with self._root() as root, fs.opened(self.state.generation(self.name, part.source)) as source:
            for path in sorted(involved & seen.keys()):
                if not root.has_link(path):
                    raise PatchRefusedError(
                        f"{self.name}: {path} was replaced or removed since the patch was staged",
                        code="gate.detached",
                        target=self.name,
                    )
                found = _identity_in(source, path)
                row = before.get(path)
                adopted = row is not None and is_file(row) and row.origin is None
                if path not in there and found is not None:
                    raise PatchRefusedError(
                        f"{self.name}: {path} was created by the program after the patch was staged",
                        code="gate.conflict",
                        target=self.name,
                    )
                if adopted and seen[path] is not None and found != seen[path]:
                    raise PatchRefusedError(
                        f"{self.name}: {path} was written to by the program after the patch was staged",
                        code="gate.drift",
                        target=self.name,
                    )

    def remove_names(self, part: PartRow) -> None:
        if part.destination is None:
            return
        changes = self.database.changes(part.txn, self.name)
        with contextlib.ExitStack() as stack:
            try:
                root = stack.enter_context(self._root())
                source = stack.enter_context(fs.opened(self.state.generation(self.name, part.source)))
            except (FileNotFoundError, PatchRefusedError):
                return  # No root, no names in it.
            durability = stack.enter_context(fs.Durability(self.state.fd, root.fd))
            for change in changes:
                if change.adopts:
                    root.settle(change.path, self.temporary(part, change), source)
            self._settle_adoption([change.path for change in changes if change.adopts], part, root, source)
            there = present(self.database.files(self.name, part.source))
            for change in changes:
                if change.path not in there:
                    root.bring_home(change.path, source, durability)
                    root.unlink(change.path, durability)
            generation = self.database.find_generation(self.name, part.destination)
            if generation is not None and generation.txn == part.txn:
                root.remove_folders(generation.made)
            durability.barrier()

    def _settle_adoption(self, paths: Sequence[str], part: PartRow, root: OverlayRoot, source: int) -> None:
        """Bring database and generations into line with how far adoption got: a link is managed, a file is
        not."""
        kept = self._kept(part)
        rows = {number: self.database.files(self.name, number) for number in kept}
        open_paths = [path for path in paths if path not in present(rows[part.source])]
        new_rows = {}
        for path in open_paths:
            folders, name = split(path)
            if root.has_link(path) and _identity_in(source, path) is not None:
                with fs.below(source, folders) as folder:
                    status = os.stat(name, dir_fd=folder, follow_symlinks=False)
                new_rows[path] = _adopted_row(path, status, None, source)
                continue
            for number in kept:
                if path in present(rows[number]):
                    continue
                with (
                    contextlib.suppress(FileNotFoundError),
                    fs.opened(self.state.generation(self.name, number)) as generation,
                    fs.below(generation, folders) as folder,
                ):
                    fs.unlink_quietly(name, folder)
        if new_rows:
            self._record_adopted(new_rows, rows)

    def tidy(self, part: PartRow) -> None:
        assert part.destination is not None
        gone = self.disappearing(part)
        with self._root() as root, fs.Durability(self.state.fd, root.fd) as durability:
            with fs.opened(self.state.generation(self.name, part.destination)) as destination:
                for path in gone:
                    root.bring_home(path, destination, durability)
                    root.unlink(path, durability)
            source = self.database.find_generation(self.name, part.source)
            if source is not None and source.parent == part.destination:
                root.remove_folders(source.made)
            durability.barrier()

    # --- the end of management ------------------------------------------------------------------------------

    def release(self) -> list[str]:
        number = self.state.number(self.name)
        released = []
        with self._root() as root, fs.Durability(self.state.fd, root.fd) as durability:
            with fs.opened(self.state.generation(self.name, number)) as generation:
                for path, row in sorted(self.database.files(self.name, number).items()):
                    if is_file(row) and root.make_ordinary(path, _RELEASED, generation, row.mode, durability):
                        released.append(path)
                        failpoint("store.release.file")
            durability.barrier()
            new = max(row.number for row in self.database.generations(self.name)) + 1
            self.create_empty(new)
        self.database.add_generation(self.new_generation_row(new, like=number, place="store"))
        with self.database.lock:
            self.state.pointer.flip({self.name: self.state.entry(self.name, new)}, point="store.release")
        return released

    def resume(self) -> None:
        """Nothing to do: outside of transactions nothing is ever half done but a release."""

    def create_empty(self, number: int) -> None:
        """A generation in which nothing is managed: whatever the root holds is the program's own."""
        with fs.opened(self.state.generations(self.name)) as home:
            try:
                model = self.row.root.stat()
            except FileNotFoundError:
                model = None
            with contextlib.suppress(FileExistsError):
                os.mkdir(str(number), 0o755, dir_fd=home)
            with fs.below(home, [str(number)]) as folder:
                if model is None:
                    os.fchmod(folder, 0o755)
                else:
                    fs.mirror_directory(model, folder)
            os.fsync(home)

    @contextlib.contextmanager
    def _root(self) -> Iterator[OverlayRoot]:
        try:
            fd = os.open(self.row.root, fs.DIRECTORY)
        except (FileNotFoundError, NotADirectoryError):
            raise self.no_root() from None
        try:
            yield self.state.overlay(self.row, fd)
        finally:
            os.close(fd)


def _adopted_row(path: str, status: os.stat_result, found: Found | None, generation: int) -> FileRow:
    seen = identity(status)
    folders, name = split(path)
    if found is not None and found.identity == seen and found.sha256 is not None:
        digest = found.sha256
    else:
        with fs.below(generation, folders) as folder:
            digest = fs.sha256_of(name, folder)
    return FileRow(
        path=path,
        sha256=digest,
        size=status.st_size,
        mode=status.st_mode & 0o7777,
        origin=None,
        identity=_identity_in(generation, path) or seen,
    )


def _identity_in(generation: int, path: str) -> str | None:
    folders, name = split(path)
    try:
        with fs.below(generation, folders) as folder:
            status = fs.lstat(name, folder)
    except (FileNotFoundError, fs.BlockedPathError):
        return None
    return None if status is None else identity(status)
