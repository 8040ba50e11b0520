"""The files of a target with the overlay layout: patches in generations, the program's own in the root."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import partial
from typing import Final

from msgspec.structs import replace

from asyncsup.errors import PatchRefusedError
from asyncsup.failpoints import failpoint
from asyncsup.patch import fs
from asyncsup.patch.database import FileRow, KeptRow, PartRow
from asyncsup.patch.look import aside, identity, same_file, split
from asyncsup.patch.manifest import DEFAULT_MODE, FileChange
from asyncsup.patch.overlay import Home, OverlayRoot
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

MOUNTED: Final = Found(
    presence=Presence.ABSENT,
    problem=PlanError(code="gate.filesystem", message="is a mount point, and nothing can take its place"),
)
PUT_IN_PLACE: Final = "was put there by somebody, in place of what a patch had made of it"
REMOVED: Final = "was delivered by a patch and has since been removed"


class OverlayFiles(TargetFiles):
    adopts = True

    # --- looking --------------------------------------------------------------------------------------------

    def check_root(self) -> None:
        """Any folder will do: each name in it is judged for itself."""

    def look(self, changes: Iterable[FileChange], *, hashed: bool) -> list[Found]:
        number = self.state.number(self.name)
        rows, kept = self.database.files(self.name, number), self.database.kept(self.name, number)
        mounted, where = fs.mount_points(), os.path.realpath(self.row.root)
        with (
            self._root() as root,
            fs.opened(self.state.generation(self.name, number)) as generation,
            fs.LastFolder(partial(fs.open_below, root.fd)) as here,
            fs.LastFolder(partial(fs.open_below, generation)) as current,
        ):
            return [
                problem_with(change.path)
                or (MOUNTED if f"{where}/{change.path}" in mounted else None)
                or marked(
                    root.look(change.path, rows.get(change.path), here=here, current=current, hashed=hashed),
                    kept.get(change.path),
                )
                for change in changes
            ]

    @contextlib.contextmanager
    def folder_of(self, item: Planned) -> Iterator[int]:
        folders, _ = split(item.change.path)
        generation = self.state.generation(self.name, self.state.number(self.name))
        with (
            self._root() as root,
            fs.opened(generation) as current,
            fs.below(root.fd if item.stands_in_root else current, folders) as folder,
        ):
            yield folder

    def folders_to_make(self, planned: Sequence[Planned]) -> list[str]:
        made: dict[str, None] = {}
        folders = {tuple(split(item.change.path)[0]): None for item in planned if item.appears}
        with self._root() as root:
            for parts in folders:
                made.update(dict.fromkeys(fs.missing_folders(root.fd, parts)))
        return list(made)

    def needs_of_layout(self, planned: Sequence[Planned]) -> list[Need]:
        """Links in the root; and from another file system, copies of the files that are adopted."""
        changed = [item for item in planned if not item.kept]
        adopted = [item.found for item in changed if item.stands_in_root]
        with self._root() as root:
            far = os.fstat(root.fd).st_dev != self.state.path.stat().st_dev
        links = len(adopted) + sum(item.appears for item in changed) + len(self.folders_to_make(changed))
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
        changed = [item for item in planned if not item.kept]
        # What stands in the root in place of a link is read there, and is nowhere else.
        left = {
            item.change.path for item in planned if item.kept and item.found.presence is not Presence.MANAGED
        }
        rows = self.database.files(self.name, part.source)
        inherited = {path: row for path, row in rows.items() if path not in left}
        unchanged = sorted(present(inherited) - {item.change.path for item in changed})
        with self._root() as root, fs.Durability(self.state.fd, root.fd) as durability:

            def fill(folder: int) -> None:
                self._share_all(unchanged, part.source, folder, durability)

            def deliver(folder: int) -> Mapping[str, FileRow]:
                return self.write(
                    part, package, changed, progress, folder=folder, model=root.fd, durability=durability
                )

            self.place(
                part,
                fill,
                deliver,
                inherited=inherited,
                kept=self.kept_after(part, planned),
                model=root.fd,
                durability=durability,
            )
            seen = self._make_way(part, root, changed, durability)
            failpoint("store.stage.linked")
            self.database.mark_staged(part.txn, self.name, seen)

    def _make_way(
        self, part: PartRow, root: OverlayRoot, planned: Sequence[Planned], durability: fs.Durability
    ) -> dict[int, str]:
        """Make every name of the destination a leaf link that shows, until the switch, what is there now.

        Returns the identities of what was adopted for that, by position in the plan.
        """
        seen = self._adopt(part, root, planned, durability)
        self._forget(part, planned, durability)
        root.link((item.change.path for item in planned if item.appears), durability)
        durability.barrier()
        return seen

    def build_like(self, part: PartRow, goal: int, planned: Sequence[Planned]) -> None:
        """What is kept becomes an ordinary file of the root, where it is not one already."""
        kept = [item for item in planned if item.kept]
        inherited = self.database.files(self.name, goal)
        for item in kept:
            inherited.pop(item.change.path, None)
        with self._root() as root, fs.Durability(self.state.fd, root.fd) as durability:

            def fill(folder: int) -> None:
                self._share_all(sorted(present(inherited)), goal, folder, durability)

            self.place(
                part,
                fill,
                lambda folder: {},
                inherited=inherited,
                kept=self.kept_back(part, goal, planned),
                model=root.fd,
                durability=durability,
            )
            modes = {
                item.change.path: DEFAULT_MODE if item.found.mode is None else item.found.mode
                for item in kept
                if item.found.presence is Presence.MANAGED
            }
            for _ in self._make_ordinary(root, part.source, modes, durability):
                failpoint("store.stage_rollback.kept")
            durability.barrier()

    def _make_ordinary(
        self,
        root: OverlayRoot,
        number: int,
        modes: Mapping[str, int],
        durability: fs.Durability,
        *,
        own: Set[str] = frozenset(),
    ) -> Iterator[str]:
        """Put files of a generation in place of their leaf links, each whole and on disk before that.

        Args:
            modes: what each is to have, by path.
            own: those that are the program's.
        Yields:
            Each that has been put; not where something of the program's was there instead.
        """
        links = {}
        with fs.opened(self.state.generation(self.name, number)) as generation:
            for path, mode in modes.items():
                link = root.copy_beside(
                    path, aside("released", path), generation, mode, durability, own=path in own
                )
                if link is not None:
                    links[path] = link
        durability.barrier()
        failpoint("store.release.copied")
        for path, link in links.items():
            if root.put_copy(path, aside("released", path), link, durability):
                yield path

    def _share_all(
        self, paths: Sequence[str], generation: int, destination: int, durability: fs.Durability
    ) -> None:
        with fs.opened(self.state.generation(self.name, generation)) as source:
            for path in paths:
                self._share(path, source, destination, durability)

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
                f"{self.name}: {path} is missing from its generation in {self.state.path}",
                code="gate.drift",
                target=self.name,
            ) from None

    def _adopt(
        self, part: PartRow, root: OverlayRoot, planned: Sequence[Planned], durability: fs.Durability
    ) -> dict[int, str]:
        """Adopt the ordinary files that stand where links have to be; identities by position in the plan.

        A file goes into every kept generation that has, as far as patches go, the same version of it as the
        current one: going back to any of them would have left it standing.
        """
        adopting = {item.change.path: item for item in planned if item.stands_in_root}
        if not adopting:
            return {}
        changes = {change.path: change for change in self.database.changes(part.txn, self.name)}
        alike = self._alike(part, adopting.keys())
        with contextlib.ExitStack() as stack:
            folders = {
                number: stack.enter_context(fs.opened(self.state.generation(self.name, number)))
                for number in alike
            }
            homes = [Home(fd=folders[number], taken=adopting.keys() - same) for number, same in alike.items()]
            adopted = root.adopt(
                {path: self.temporary(part, changes[path]) for path in adopting}, homes, durability
            )
            durability.barrier()
            new_rows = {}
            for path, item in adopting.items():
                new_rows[path] = row = _adopted_row(path, adopted[path], item.found, folders[part.source])
                made_for = item.found.sha256 if item.plan.drift is not None else item.change.base_sha256
                if made_for is not None and row.sha256 != made_for:
                    raise PatchRefusedError(
                        f"{self.name}: {path} was changed by the program while the patch was staged",
                        code="gate.base",
                        target=self.name,
                    )
        self._record_adopted(part, new_rows, alike)
        failpoint("store.adopt.recorded")
        return {changes[path].position: row.identity for path, row in new_rows.items()}

    def _record_adopted(
        self, part: PartRow, new_rows: Mapping[str, FileRow], alike: Mapping[int, Set[str]]
    ) -> None:
        """The name stays one of a patch where it was one: what stands there now is noted as kept."""
        origins = self.database.origins(self.name, part.source)
        with self.database.write(durable=False):  # Recovery would find it.
            for number, same in alike.items():
                paths = same & new_rows.keys()
                before = self.database.kept(self.name, number)
                self.database.add_files(self.name, number, [new_rows[path] for path in paths])
                self.database.add_kept(
                    self.name,
                    number,
                    [
                        before.get(path)
                        or KeptRow(path=path, txn=part.txn, origin=origins[path], note=PUT_IN_PLACE)
                        for path in paths & origins.keys()
                    ],
                )
                # One that no patch has touched is from now on adopted, here as everywhere.
                self.database.add_kept(
                    self.name,
                    number,
                    [
                        replace(before[path], origin=(None,))
                        for path in paths & before.keys() - origins.keys()
                    ],
                )

    def _forget(self, part: PartRow, planned: Sequence[Planned], durability: fs.Durability) -> None:
        """Names that were removed from the root: generations whose file would show again behind a new link
        lose it first."""
        gone = {item.change.path for item in planned if item.found.presence is Presence.REMOVED}
        empty = gone | {item.change.path for item in planned if item.found.kept and not item.found.exists}
        if not empty:
            return
        alike = self._alike(part, empty)
        origins = self.database.origins(self.name, part.source)
        if gone:
            with self.database.write():
                for number, same in alike.items():
                    self.database.remove_files(self.name, number, same & gone)
                    self.database.add_kept(
                        self.name,
                        number,
                        [
                            KeptRow(path=path, txn=part.txn, origin=origins[path], note=REMOVED)
                            for path in same & gone
                        ],
                    )
            failpoint("store.forget.recorded")
        self._remove_unknown(alike, durability)

    def _remove_unknown(self, alike: Mapping[int, Set[str]], durability: fs.Durability) -> None:
        """Remove files from generations that the database knows nothing of."""
        for number, paths in alike.items():
            unknown = paths - present(self.database.files(self.name, number))
            with fs.opened(self.state.generation(self.name, number)) as generation:
                for path in unknown:
                    folders, name = split(path)
                    with (
                        contextlib.suppress(FileNotFoundError, fs.BlockedPathError),
                        fs.below(generation, folders) as folder,
                    ):
                        fs.unlink_quietly(name, folder)
                        # Also where it is gone: see `OverlayRoot.settle`.
                        durability.directory(folder)
        durability.barrier()

    def _alike(self, part: PartRow, paths: Set[str]) -> dict[int, Set[str]]:
        """The kept generations, the source first, each with those of the paths of which it has the same
        version as the source as far as patches go."""
        source = self.database.origins(self.name, part.source)
        found: dict[int, Set[str]] = {}
        for number in self._kept(part):
            origins = self.database.origins(self.name, number)
            found[number] = {path for path in paths if origins.get(path) == source.get(path)}
        return found

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

    def prepare_rollback(self, part: PartRow, planned: Sequence[Planned]) -> Mapping[int, str]:
        assert part.destination is not None
        rows = self.database.files(self.name, part.destination)
        with self._root() as root, fs.Durability(self.state.fd, root.fd) as durability:
            with fs.opened(self.state.generation(self.name, part.destination)) as destination:
                for path in sorted(present(rows)):
                    if _identity_in(destination, path) is None:
                        raise PatchRefusedError(
                            f"{self.name}: generation {part.destination} is damaged, it has no {path}",
                            code="gate.drift",
                            target=self.name,
                        )
            return self._make_way(part, root, planned, durability)

    # --- around the switch ----------------------------------------------------------------------------------

    def carry(self, part: PartRow) -> Carried:
        return Carried([], {})  # What the program writes stays in the root, whatever the generation.

    def carry_back(self, part: PartRow) -> Carried:
        return Carried([], {})

    def follow_up(self, part: PartRow, seen: Mapping[str, str], *, back: bool = False) -> list[str]:
        return []

    def verify_switched(self, part: PartRow) -> None:
        self.verify(part)

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
                if path not in there and found is not None:
                    raise PatchRefusedError(
                        f"{self.name}: {path} was created by the program after the patch was staged",
                        code="gate.conflict",
                        target=self.name,
                    )
                if path in there and found != seen[path]:
                    raise PatchRefusedError(
                        f"{self.name}: {path} was written to after the patch was staged",
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
                    root.settle(change.path, self.temporary(part, change), source, durability)
            self._settle_adoption({change.path for change in changes if change.adopts}, part, root, source)
            for kept in self.database.kept(self.name, part.destination).values():
                if kept.txn == part.txn:
                    root.settle_copy(kept.path, aside("released", kept.path), source, durability)
            there = present(self.database.files(self.name, part.source))
            for change in changes:
                if change.path not in there:
                    root.bring_home(change.path, source, durability)
                    root.unlink(change.path, durability)
            generation = self.database.find_generation(self.name, part.destination)
            if generation is not None and generation.txn == part.txn:
                root.remove_folders(generation.made, durability)
            durability.barrier()

    def _settle_adoption(self, paths: Set[str], part: PartRow, root: OverlayRoot, source: int) -> None:
        """Bring database and generations into line with how far adoption got: a link is managed, a file is
        not."""
        rows = self.database.files(self.name, part.source)
        new_rows = {}
        for path in paths:
            there = _identity_in(source, path)
            known = rows[path].identity if is_file(rows.get(path)) else None
            linked = root.has_link(path)
            # Without a link, what the generation holds counts where it has a version of its own. A known file
            # that was written to since is no new one.
            if there is not None and not same_file(there, known) and (linked or known is not None):
                folders, name = split(path)
                with fs.below(source, folders) as folder:
                    status = os.stat(name, dir_fd=folder, follow_symlinks=False)
                new_rows[path] = _adopted_row(path, status, None, source)
        alike = self._alike(part, paths)
        if new_rows:
            self._record_adopted(part, new_rows, alike)
        with fs.Durability(self.state.fd) as durability:
            self._remove_unknown(alike, durability)

    def tidy(self, part: PartRow) -> None:
        assert part.destination is not None
        gone = self.disappearing(part)
        with self._root() as root, fs.Durability(self.state.fd, root.fd) as durability:
            with fs.opened(self.state.generation(self.name, part.destination)) as destination:
                for path in gone:
                    root.bring_home(path, destination, durability)
                    root.unlink(path, durability)
            for number in self.crossed(part):
                root.remove_folders(self.database.generation(self.name, number).made, durability)
            durability.barrier()

    # --- the end of management ------------------------------------------------------------------------------

    def release(self) -> list[str]:
        number = self.state.number(self.name)
        rows = self.database.files(self.name, number)
        modes = {path: row.mode for path, row in sorted(rows.items()) if is_file(row)}
        own = {path for path, row in rows.items() if row.origin is None}
        released = []
        with self._root() as root, fs.Durability(self.state.fd, root.fd) as durability:
            for path in self._make_ordinary(root, number, modes, durability, own=own):
                released.append(path)
                failpoint("store.release.file")
            durability.barrier()
            new = max(row.number for row in self.database.generations(self.name)) + 1
            self.create_empty(new)
        self.database.add_generation(self.new_generation_row(new, like=number, place="store"))
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
