"""Overlay layout: the root stays an ordinary folder, and the names patches have touched are links in it.

Each managed name is a *leaf link*: ``ROOT/rules/eu.json -> STATE/current/TARGET/rules/eu.json``. The links
are made before the pointer moves and removed after it has moved for good, so that at any instant a name shows
what the pointer says: a link to what is not in the current generation dangles, which reads as "no such file".
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Final

import msgspec
from msgspec.structs import replace

from asyncsup.errors import PatchRefusedError
from asyncsup.failpoints import failpoint
from asyncsup.patch import fs
from asyncsup.patch.database import FileRow
from asyncsup.patch.look import TEMPORARY_PREFIX, aside, blocked, identity, presence_of, regular, split
from asyncsup.patch.plan import Found, Presence
from asyncsup.patch.swap import put, take_away

ADOPTION_ATTEMPTS: Final = 8
_ADOPTED: Final = f"{TEMPORARY_PREFIX}adopted"


class Home(msgspec.Struct, frozen=True, kw_only=True):
    """A generation that an adopted file belongs into.

    Attributes:
        fd: its folder.
        taken: the names it has another version of, which stays.
    """

    fd: int
    taken: Set[str]


class _Linked(msgspec.Struct, frozen=True, kw_only=True):
    """An ordinary file that has been given its name in the generations, before the swap."""

    status: os.stat_result
    same_file: bool

    def is_it(self, status: os.stat_result) -> bool:
        if not os.path.samestat(self.status, status):
            return False
        # A copy is only good as long as nobody has written to the original since.
        return self.same_file or identity(self.status) == identity(status)


class OverlayRoot:
    """The root of one overlay target, open.

    Args:
        current: ``STATE/current/TARGET``, what leaf links go through.
        fd: the root folder; stays the caller's.
    """

    def __init__(self, target: str, current: Path, fd: int) -> None:
        self.target = target
        self.fd = fd
        self._current = current

    def text(self, path: str) -> str:
        """The text of the leaf link for `path`."""
        return f"{self._current}/{path}"

    def look(
        self, path: str, row: FileRow | None, *, here: fs.LastFolder, current: fs.LastFolder, hashed: bool
    ) -> Found:
        """What stands at `path`.

        Args:
            row: what is known of the current generation's file.
            here, current: folders of the root, and of the current generation.
        """
        folders, name = split(path)
        managed = row is not None and row.sha256 is not None
        try:
            folder = here.open(folders)
            status = fs.lstat(name, folder)
            if status is not None and fs.link_text(name, folder) == self.text(path):
                if not managed:
                    return Found(presence=Presence.ABSENT)  # A link left over; it dangles.
                return regular(name, current.open(folders), row, hashed=hashed)
            if status is not None and presence_of(status) is Presence.ORDINARY:
                found = regular(name, folder, None, hashed=hashed)
                detached = managed and found.presence is Presence.ORDINARY
                return replace(found, presence=Presence.DETACHED) if detached else found
        except FileNotFoundError:
            status = None
        except fs.BlockedPathError as error:
            return Found(presence=Presence.ABSENT, problem=blocked(error))
        if status is None:
            mode = row.mode if managed and row is not None else None
            return Found(presence=Presence.REMOVED if managed else Presence.ABSENT, mode=mode)
        return Found(presence=presence_of(status))

    def has_link(self, path: str) -> bool:
        """Whether `path` is our leaf link."""
        folders, name = split(path)
        try:
            with fs.below(self.fd, folders) as folder:
                return fs.link_text(name, folder) == self.text(path)
        except (FileNotFoundError, fs.BlockedPathError):
            return False

    # --- adoption -------------------------------------------------------------------------------------------

    def adopt(
        self, paths: Mapping[str, str], homes: Sequence[Home], durability: fs.Durability
    ) -> dict[str, os.stat_result]:
        """Turn ordinary files into leaf links whose current target is the very same file.

        The file gets a second name in the current generation and in every other that is kept, then trades
        places with the link in one step. Whatever the program saves in that very moment is found in what
        came out of the swap, put back, and adopted in its turn.

        Args:
            paths: each path to adopt, with the temporary name to use beside it.
            homes: the generations to link into, the current one first.
        Returns:
            What was adopted, by path.
        Raises:
            PatchRefusedError: a file vanished, or is rewritten all the time.
        """
        adopted: dict[str, os.stat_result] = {}
        pending = dict(paths)
        for _ in range(ADOPTION_ATTEMPTS):
            linked = {path: self._give_second_name(path, homes, durability) for path in pending}
            failpoint("store.adopt.linked")
            for path, temporary in pending.items():
                with self._folder_of(path) as (folder, _name):
                    fs.unlink_quietly(temporary, folder)
                    os.symlink(self.text(path), temporary, dir_fd=folder)
                    durability.directory(folder)
            # From the swap on, only the generation holds the file under its name: it must be there for good.
            durability.barrier()
            failpoint("store.adopt.prepared")
            for path, temporary in list(pending.items()):
                before = linked[path]
                with self._folder_of(path) as (folder, name):
                    if before is not None and put(name, temporary, folder, before.is_it):
                        adopted[path] = before.status
                        del pending[path]
                    fs.unlink_quietly(temporary, folder)
                    durability.directory(folder)
            failpoint("store.adopt.tidied")
            if not pending:
                return adopted
        raise PatchRefusedError(
            f"{self.target}: the program rewrites {next(iter(pending))} faster than it can be taken over",
            code="gate.drift",
            target=self.target,
        )

    def _give_second_name(
        self, path: str, homes: Sequence[Home], durability: fs.Durability
    ) -> _Linked | None:
        """Link the file into every home; None when it was replaced meanwhile: look at it again."""
        folders, _ = split(path)
        with self._folder_of(path) as (folder, name):
            try:
                fd = os.open(name, fs.READ, dir_fd=folder)
            except FileNotFoundError:
                raise self._vanished(path) from None
            try:
                status = os.fstat(fd)
                if not stat.S_ISREG(status.st_mode):
                    raise self._vanished(path)
                durability.file(fd)
            finally:
                os.close(fd)
            same_file = True
            for home in homes:
                if path in home.taken:
                    continue
                inner = fs.make_below(home.fd, folders, durability, like=self.fd)
                try:
                    # By a rename: whoever reads the generation itself may find the version from before there.
                    fs.unlink_quietly(_ADOPTED, inner)
                    try:
                        same = fs.link_or_copy(name, folder, _ADOPTED, inner, durability)
                    except FileNotFoundError:
                        return None
                    there = fs.lstat(_ADOPTED, inner)
                    if there is None or (same and not os.path.samestat(there, status)):
                        fs.unlink_quietly(_ADOPTED, inner)
                        return None
                    if not same:
                        # It is seen behind the pointer at once, before any barrier.
                        _sync(_ADOPTED, inner)
                    os.rename(_ADOPTED, name, src_dir_fd=inner, dst_dir_fd=inner)
                    # Two names of one file are both left by a rename.
                    fs.unlink_quietly(_ADOPTED, inner)
                    same_file = same_file and same
                    durability.directory(inner)
                finally:
                    os.close(inner)
        return _Linked(status=status, same_file=same_file)

    def settle(self, path: str, temporary: str, generation: int, durability: fs.Durability) -> None:
        """After a crash in the middle of a swap: the program's last save goes under its name."""
        folders, name = split(path)
        with (
            contextlib.suppress(FileNotFoundError, fs.BlockedPathError),
            self._folder_of(path) as (folder, _),
        ):
            while (aside := fs.lstat(temporary, folder)) is not None:
                if not stat.S_ISREG(aside.st_mode) or _is_in(generation, folders, name, aside):
                    break
                here = fs.lstat(name, folder)
                ours = fs.link_text(name, folder) == self.text(path)
                if here is None or (not ours and here.st_mtime_ns >= aside.st_mtime_ns):
                    break
                fs.exchange(temporary, name, first_dir=folder, second_dir=folder)
            if aside is not None:
                fs.unlink_quietly(temporary, folder)
            # Also where it is gone: who has removed it may have been killed before that was on disk.
            durability.directory(folder)

    # --- leaf links -----------------------------------------------------------------------------------------

    def link(self, paths: Iterable[str], durability: fs.Durability) -> None:
        """Make the leaf links for names that the current generation does not have (yet).

        Raises:
            PatchRefusedError: something stands there by now.
        """

        def make(folders: Sequence[str]) -> int:
            folder = fs.make_below(self.fd, folders, durability)
            durability.directory(folder)
            return folder

        with fs.LastFolder(make) as last:
            for path in paths:
                folders, name = split(path)
                folder = last.open(folders)
                try:
                    os.symlink(self.text(path), name, dir_fd=folder)
                except FileExistsError:
                    if fs.link_text(name, folder) != self.text(path):
                        raise PatchRefusedError(
                            f"{self.target}: {path} has come into being while the patch was staged",
                            code="gate.conflict",
                            target=self.target,
                        ) from None

    def unlink(self, path: str, durability: fs.Durability) -> bool:
        """Remove a leaf link, if it is ours; anything else under the name is the program's, also what it puts
        there in this very moment. Whether it was removed."""
        with (
            contextlib.suppress(FileNotFoundError, fs.BlockedPathError),
            self._folder_of(path) as (folder, name),
        ):
            ours = self.text(path)
            removed = take_away(
                name, aside("gone", path), folder, lambda name: fs.link_text(name, folder) == ours
            )
            durability.directory(folder)
            return removed
        return False

    def remove_folders(self, paths: Sequence[str], durability: fs.Durability) -> None:
        """Remove folders that were made for a patch and are empty (again)."""
        for path in sorted(paths, key=lambda path: path.count("/"), reverse=True):
            with (
                contextlib.suppress(FileNotFoundError, fs.BlockedPathError),
                self._folder_of(path) as (folder, name),
            ):
                try:
                    os.rmdir(name, dir_fd=folder)
                    durability.directory(folder)
                except OSError as error:
                    if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.ENOTDIR}:
                        raise

    # --- and back -------------------------------------------------------------------------------------------

    def settle_copy(self, path: str, temporary: str, generation: int, durability: fs.Durability) -> None:
        """After a crash around `put_copy`, as `settle`. Where the leaf link stands the copy is not in place
        yet, and perhaps half a one."""
        if not self.has_link(path):
            self.settle(path, temporary, generation, durability)
            return
        with self._folder_of(path) as (folder, _):
            fs.unlink_quietly(temporary, folder)
            durability.directory(folder)

    def copy_beside(
        self, path: str, temporary: str, generation: int, mode: int, durability: fs.Durability, *, own: bool
    ) -> os.stat_result | None:
        """Put the generation's file, as an ordinary one, beside its leaf link; the link's status.

        None if something else stands under the name, which is then the program's own.

        Args:
            own: the file is the program's, and no other file is to take its place if that can be helped: what
                is written to it meanwhile is not lost.
        """
        folders, _ = split(path)
        self.settle_copy(path, temporary, generation, durability)
        if not self.has_link(path):
            return None
        with self._folder_of(path) as (folder, name), fs.below(generation, folders) as inner:
            link = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if not own or not fs.link(name, inner, temporary, folder):
                source = os.open(name, fs.READ, dir_fd=inner)
                try:
                    fs.copy_regular(source, temporary, folder, durability, mode=mode)
                finally:
                    os.close(source)
        return link

    def put_copy(self, path: str, temporary: str, link: os.stat_result, durability: fs.Durability) -> bool:
        """Swap a copy and its leaf link. Whether it was done; not if something else has taken the name."""
        with self._folder_of(path) as (folder, name):
            done = put(name, temporary, folder, lambda status: os.path.samestat(status, link))
            fs.unlink_quietly(temporary, folder)
            durability.directory(folder)
            return done

    def bring_home(self, path: str, generation: int, durability: fs.Durability) -> bool:
        """A file the program has created through a link that dangled: move it to where it meant to put it,
        unless it has put something else there since."""
        folders, name = split(path)
        temporary = aside("home", path)
        try:
            with fs.below(generation, folders) as inner, self._folder_of(path) as (folder, _):
                fs.unlink_quietly(temporary, folder)
                meant, there = fs.lstat(name, inner), fs.lstat(name, folder)
                if meant is None or there is None:
                    return False
                if not os.path.samestat(meant, there):  # as they are when a crash has cut this off
                    if fs.link_text(name, folder) != self.text(path):
                        return False
                    if not fs.link(name, inner, temporary, folder):
                        fs.copy(name, inner, temporary, folder, durability)
                        durability.barrier()
                    done = put(name, temporary, folder, lambda status: os.path.samestat(status, there))
                    fs.unlink_quietly(temporary, folder)
                    if not done:
                        return False
                durability.directory(folder)
                durability.barrier()
                os.unlink(name, dir_fd=inner)
        except (FileNotFoundError, fs.BlockedPathError):
            return False
        return True

    @contextlib.contextmanager
    def _folder_of(self, path: str) -> Iterator[tuple[int, str]]:
        folders, name = split(path)
        with fs.below(self.fd, folders) as folder:
            yield folder, name

    def _vanished(self, path: str) -> PatchRefusedError:
        return PatchRefusedError(
            f"{self.target}: {path} was removed or replaced while the patch was staged",
            code="gate.drift",
            target=self.target,
        )


def _sync(name: str, folder: int) -> None:
    fd = os.open(name, fs.READ, dir_fd=folder)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _is_in(generation: int, folders: Sequence[str], name: str, status: os.stat_result) -> bool:
    try:
        with fs.below(generation, folders) as inner:
            there = fs.lstat(name, inner)
    except (FileNotFoundError, fs.BlockedPathError):
        return False
    return there is not None and os.path.samestat(there, status)
