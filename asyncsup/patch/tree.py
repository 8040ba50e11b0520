"""Tree layout: the root is a link to a whole generation, so that a program finds its siblings by real path.

The first patch moves the program's own folder into the store, where it is generation 0 from then on: the same
folder, so that a running program whose working directory it is notices nothing. Every later generation is a
clone of the one before, made of hard links. What the program writes into its tree is its own: `reconcile`
brings it along to whichever generation comes next.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from enum import Enum
from pathlib import Path
from typing import Final

import msgspec

from asyncsup.errors import PatchRefusedError
from asyncsup.failpoints import failpoint
from asyncsup.patch import fs
from asyncsup.patch.database import FileRow
from asyncsup.patch.look import (
    TEMPORARY_PREFIX,
    blocked,
    folders_of,
    identity,
    presence_of,
    regular,
    split,
)
from asyncsup.patch.plan import Found, Presence
from asyncsup.patch.swap import put, same_as

REPLACEMENT_ATTEMPTS: Final = 8
_CARRIED: Final = f"{TEMPORARY_PREFIX}carried"
_MOVED: Final = f"{TEMPORARY_PREFIX}moved-"


class Form(Enum):
    """What stands where the root should be."""

    FOLDER = "an ordinary folder, not converted"
    DIRECT = "a link to one generation: conversion, or release, was under way"
    LINKED = "a link through the pointer"
    MISSING = "nothing"
    OTHER = "something else"


def look(path: str, row: FileRow | None, content: fs.LastFolder, *, hashed: bool) -> Found:
    """What stands at `path` below the folder that `content` opens folders of."""
    folders, name = split(path)
    managed = row is not None and row.sha256 is not None
    try:
        folder = content.open(folders)
        status = fs.lstat(name, folder)
        if status is not None and presence_of(status) is Presence.ORDINARY:
            return regular(name, folder, row, hashed=hashed)
    except FileNotFoundError:
        status = None
    except fs.BlockedPathError as error:
        return Found(presence=Presence.ABSENT, problem=blocked(error))
    if status is None:
        mode = row.mode if managed and row is not None else None
        return Found(presence=Presence.REMOVED if managed else Presence.ABSENT, mode=mode)
    return Found(presence=presence_of(status))


def reconcile(
    source: int, destination: int, *, skip: Set[str] = frozenset(), durability: fs.Durability
) -> list[str]:
    """Make `destination` hold what `source` holds, except for the paths in `skip`, which stay as they are.

    Files are shared by hard links where the system allows it, else copied. Into an empty folder this is a
    clone. Works on trees that a program writes to meanwhile: what vanishes under our hands is not there.

    Returns:
        The paths that were added, replaced or removed.
    Raises:
        PatchRefusedError: another file system is mounted inside; it cannot be moved along.
    """
    return [
        *_remove_what_is_gone(source, destination, skip),
        *_bring_what_is_there(source, destination, skip, durability),
    ]


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    """How much there is in a tree; ``size`` is what its files take on disk, in bytes."""

    files: int
    folders: int
    size: int


def tally(content: int) -> Tally:
    """Count what is below an open folder. A file with several names in it counts once for each."""
    files, folders, size = 0, 1, 0
    for _, status in _walk(content):
        if status is None:
            folders += 1
        else:
            files += 1
            size += status.st_blocks * 512
    return Tally(files=files, folders=folders, size=size)


def _remove_what_is_gone(source: int, destination: int, skip: Set[str]) -> Iterator[str]:
    kept_folders = folders_of(skip)
    pending: list[Sequence[str]] = [()]
    while pending:
        parts = pending.pop()
        with fs.below(destination, parts) as there:
            fs.unlink_quietly(_CARRIED, there)  # A copy that was cut off.
            here = _open_or_none(source, parts)
            try:
                for name, is_folder in _entries(there):
                    path = "/".join((*parts, name))
                    status = None if here is None else fs.lstat(name, here)
                    stays = status is not None and stat.S_ISDIR(status.st_mode) == is_folder
                    if path in skip:
                        continue
                    if is_folder and (stays or path in kept_folders):
                        pending.append((*parts, name))
                    elif not stays:
                        fs.remove_tree(name, there)
                        yield path
            finally:
                if here is not None:
                    os.close(here)


def _bring_what_is_there(
    source: int, destination: int, skip: Set[str], durability: fs.Durability
) -> Iterator[str]:
    device = os.fstat(source).st_dev
    only_if_needed = folders_of(skip)
    pending: list[Sequence[str]] = [()]
    while pending:
        parts = pending.pop()
        here = _open_or_none(source, parts)
        if here is None:
            continue
        there: int | None = None
        try:
            if os.fstat(here).st_dev != device:
                raise PatchRefusedError(
                    f"another file system is mounted at {'/'.join(parts)} inside the root; the tree layout "
                    "cannot move it from one generation to the next",
                    code="gate.filesystem",
                )
            files = []
            for name, is_folder in _entries(here):
                if "/".join((*parts, name)) in skip:
                    continue
                if is_folder:
                    pending.append((*parts, name))
                else:
                    files.append(name)
            # A folder that is there for a patched file alone is not the program's.
            if files or "/".join(parts) not in only_if_needed:
                there = fs.make_below(destination, parts, durability, like=source)
                for name in files:
                    if _bring(name, here, there, durability):
                        yield "/".join((*parts, name))
                durability.directory(there)
        finally:
            os.close(here)
            if there is not None:
                os.close(there)


def bring(paths: Iterable[str], source: int, destination: int, durability: fs.Durability) -> None:
    """Make `destination` hold the files `paths` as `source` does, where it does."""
    for path in paths:
        folders, name = split(path)
        here = _open_or_none(source, folders)
        if here is None:
            continue
        try:
            if fs.lstat(name, here) is not None:
                there = fs.make_below(destination, folders, durability, like=source)
                try:
                    _bring(name, here, there, durability)
                    durability.directory(there)
                finally:
                    os.close(there)
        finally:
            os.close(here)


def survey(content: int) -> dict[str, str]:
    """What is below an open folder: the identity of each file, "" for each folder."""
    return {path: "" if status is None else identity(status) for path, status in _walk(content)}


def follow_up(
    source: int,
    destination: int,
    before: Mapping[str, str],
    now: Mapping[str, str],
    *,
    skip: Set[str],
    durability: fs.Durability,
) -> list[str]:
    """Bring what a program has created, saved or removed in `source` between two surveys of it, to the tree
    that has become its own since. Where it has saved a file in both, the later one counts.

    Args:
        before: what `survey` found there, no later than `reconcile` looked.
        now: what it finds there.
    Returns:
        The paths that were added, replaced or removed.
    """
    gone = sorted(before.keys() - now.keys() - skip, reverse=True)  # what is in a folder before the folder
    changed = [path for path in gone if _remove_if(path, before[path], destination, durability)]
    for path in sorted(now.keys() - skip):
        late = now[path]
        if late == before.get(path):
            continue
        folders, name = split(path)
        if late == "":
            os.close(fs.make_below(destination, [*folders, name], durability, like=source))
            changed.append(path)
            continue
        there = fs.make_below(destination, folders, durability, like=source)
        try:
            with fs.below(source, folders) as here:
                if _is_later(name, here, there, before.get(path)) and _bring(name, here, there, durability):
                    durability.directory(there)
                    changed.append(path)
        except (FileNotFoundError, fs.BlockedPathError):
            continue  # gone meanwhile: the next look finds it so
        finally:
            os.close(there)
    return changed


def _remove_if(path: str, seen: str, destination: int, durability: fs.Durability) -> bool:
    """Remove what was carried and has then been removed from where it came, unless it was saved anew."""
    folders, name = split(path)
    folder = _open_or_none(destination, folders)
    if folder is None:
        return False
    try:
        status = fs.lstat(name, folder)
        if status is None:
            return False
        if stat.S_ISDIR(status.st_mode):
            try:
                os.rmdir(name, dir_fd=folder)
            except OSError:
                return False  # Something has been put into it.
        elif without_inode(identity(status)) != without_inode(seen):
            return False
        else:
            os.unlink(name, dir_fd=folder)
        durability.directory(folder)
    finally:
        os.close(folder)
    return True


def _is_later(name: str, here: int, there: int, seen: str | None) -> bool:
    """Whether what was saved `here`, late, is to take the place of what is `there`."""
    late, present = fs.lstat(name, here), fs.lstat(name, there)
    if late is None or present is None:
        return late is not None
    carried = seen is not None and without_inode(identity(present)) == without_inode(seen)
    return carried or late.st_mtime_ns >= present.st_mtime_ns


def without_inode(identity: str) -> str:
    """What two identities have in common when one is of a copy of the other's file."""
    return identity.partition(":")[2]


def _bring(name: str, here: int, there: int, durability: fs.Durability) -> bool:
    """Make `name` the same in both folders; False when it is already, or is gone from the first."""
    source, existing = fs.lstat(name, here), fs.lstat(name, there)
    if source is None or (existing is not None and os.path.samestat(source, existing)):
        return False
    fs.unlink_quietly(_CARRIED, there)
    try:
        linked = fs.link(name, here, _CARRIED, there)
        if not linked:
            if existing is not None and _looks_the_same(source, existing):
                return False
            fs.copy(name, here, _CARRIED, there, durability)
        os.rename(_CARRIED, name, src_dir_fd=there, dst_dir_fd=there)
    except FileNotFoundError:
        return False
    return True


def _looks_the_same(first: os.stat_result, second: os.stat_result) -> bool:
    """For files that can only be copied: is the copy up to date?"""
    return (
        stat.S_IFMT(first.st_mode) == stat.S_IFMT(second.st_mode)
        and first.st_size == second.st_size
        and (first.st_mtime_ns == second.st_mtime_ns or not stat.S_ISREG(first.st_mode))
    )


def _walk(content: int) -> Iterator[tuple[str, os.stat_result | None]]:
    """Everything below an open folder by its path: what it is, or None for a folder."""
    pending: list[Sequence[str]] = [()]
    while pending:
        parts = pending.pop()
        here = _open_or_none(content, parts)
        if here is None:
            continue
        try:
            for name, is_folder in _entries(here):
                path = "/".join((*parts, name))
                if is_folder:
                    pending.append((*parts, name))
                    yield path, None
                elif (status := fs.lstat(name, here)) is not None:
                    yield path, status
        finally:
            os.close(here)


def _entries(folder: int) -> list[tuple[str, bool]]:
    with os.scandir(folder) as entries:
        return [
            (entry.name, entry.is_dir(follow_symlinks=False))
            for entry in entries
            if entry.name != _CARRIED and not entry.name.startswith(_MOVED)
        ]


def _temporary_for(path: str) -> str:
    """The name beside a persistent file while it is moved; others may be moved in the same folder."""
    return _MOVED + hashlib.blake2b(os.fsencode(path), digest_size=8).hexdigest()


def _open_or_none(base: int, parts: Sequence[str]) -> int | None:
    try:
        return fs.open_below(base, parts)
    except (FileNotFoundError, fs.BlockedPathError):
        return None


class TreeRoot:
    """The root of one tree target, and its way into the store and out again.

    Args:
        root: the folder as configured, absolute, its parents resolved.
        current: ``STATE/current/TARGET``.
        generations: ``STATE/generations/TARGET``.
        persisted: ``STATE/persist/TARGET``.
    """

    def __init__(self, target: str, *, root: Path, current: Path, generations: Path, persisted: Path) -> None:
        self.target = target
        self.root = root
        self._current = current
        self._generations = generations
        self._persisted = persisted
        self._aside = f"{TEMPORARY_PREFIX}{target}"
        self._link = f"{TEMPORARY_PREFIX}{target}.link"

    def form(self) -> tuple[Form, int | None]:
        """What the root is, and for `Form.DIRECT` the generation it links to."""
        if not self.root.parent.is_dir():
            return Form.MISSING, None
        with self._parent() as parent:
            status = fs.lstat(self.root.name, parent)
            if status is None:
                return Form.MISSING, None
            if stat.S_ISDIR(status.st_mode):
                return Form.FOLDER, None
            text = fs.link_text(self.root.name, parent)
        if text == str(self._current):
            return Form.LINKED, None
        if text is not None:
            path = Path(text)
            if path.parent == self._generations and path.name.isdecimal():
                return Form.DIRECT, int(path.name)
        return Form.OTHER, None

    def move_in(self, number: int) -> bool:
        """Make the root's folder generation `number`, and the root a link straight to it.

        Both change in one step, so every path through the root means the same file before and after.
        Returns False when the root lies on another file system, and has to be copied in instead.

        Raises:
            PatchRefusedError: the root cannot be moved at all.
        """
        with self._parent() as parent, fs.opened(self._generations) as inner:
            existing = fs.lstat(str(number), inner)
            if existing is not None and stat.S_ISDIR(existing.st_mode):
                return False  # It was copied in before.
            fs.unlink_quietly(str(number), inner)
            # A link to itself, for now; swapped with the folder it becomes right in both places.
            os.symlink(self._generations / str(number), str(number), dir_fd=inner)
            os.fsync(inner)
            failpoint("store.convert.placed")
            try:
                fs.exchange(self.root.name, str(number), first_dir=parent, second_dir=inner)
            except OSError as error:
                fs.unlink_quietly(str(number), inner)
                if error.errno == fs.CROSS_DEVICE:
                    return False
                raise self._immovable(error) from error
            failpoint("store.convert.exchanged")
            os.fsync(parent)
            os.fsync(inner)
        return True

    def swap_for_link(self, number: int) -> None:
        """After the folder was copied in: the root becomes a link to generation `number`; the folder stands
        aside, see `remove_aside`."""
        with self._parent() as parent:
            fs.remove_tree(self._aside, parent)
            os.symlink(self._generations / str(number), self._aside, dir_fd=parent)
            os.fsync(parent)
            failpoint("store.convert.placed")
            try:
                fs.exchange(self.root.name, self._aside, first_dir=parent, second_dir=parent)
            except OSError as error:
                fs.unlink_quietly(self._aside, parent)
                raise self._immovable(error) from error
            failpoint("store.convert.exchanged")
            os.fsync(parent)

    def remove_aside(self) -> None:
        """Remove what a conversion, or its reverse, has left beside the root, unless it is the only copy; and
        the links it has left where generations are."""
        form, _ = self.form()
        if form not in {Form.LINKED, Form.DIRECT, Form.FOLDER}:
            return
        with self._parent() as parent, fs.opened(self._generations) as inner:
            fs.remove_tree(self._aside, parent)
            fs.unlink_quietly(self._link, parent)
            for name in fs.names(inner):
                if fs.link_text(name, inner) is not None:
                    fs.unlink_quietly(name, inner)

    def point_through_current(self) -> None:
        """Make the root a link through the pointer."""
        self._repoint(str(self._current))

    def point_straight(self, number: int) -> None:
        """Make the root a link straight to generation `number`."""
        self._repoint(str(self._generations / str(number)))

    def _repoint(self, text: str) -> None:
        with self._parent() as parent:
            fs.unlink_quietly(self._link, parent)
            os.symlink(text, self._link, dir_fd=parent)
            os.fsync(parent)
            os.rename(self._link, self.root.name, src_dir_fd=parent, dst_dir_fd=parent)
            os.fsync(parent)
        failpoint("store.convert.repointed")

    def move_out(self, number: int, durability: fs.Durability) -> None:
        """The reverse of `move_in`: generation `number` becomes the root's folder again."""
        with self._parent() as parent, fs.opened(self._generations) as inner:
            try:
                fs.exchange(self.root.name, str(number), first_dir=parent, second_dir=inner)
            except OSError as error:
                if error.errno != fs.CROSS_DEVICE:
                    raise self._immovable(error) from error
                with fs.below(inner, [str(number)]) as source:
                    fs.remove_tree(self._aside, parent)
                    copy = fs.make_below(parent, [self._aside], durability)
                    try:
                        fs.mirror_directory(os.fstat(source), copy)
                        reconcile(source, copy, durability=durability)
                        durability.barrier()
                    finally:
                        os.close(copy)
                fs.exchange(self.root.name, self._aside, first_dir=parent, second_dir=parent)
                os.fsync(parent)
                fs.unlink_quietly(self._aside, parent)
            else:
                os.fsync(parent)
                os.fsync(inner)
                fs.unlink_quietly(str(number), inner)
            failpoint("store.release.exchanged")

    # --- persistent paths -----------------------------------------------------------------------------------

    def settle_persistent(self, content: int, paths: Sequence[str]) -> None:
        """After a move that was cut off: what the program saved last under a persistent name counts."""
        for path in paths:
            folders, name = split(path)
            folder, temporary = _open_or_none(content, folders), _temporary_for(path)
            if folder is None:
                continue
            try:
                aside = fs.lstat(temporary, folder)
                if aside is None:
                    continue
                swapped = fs.link_text(name, folder) == str(self._persisted / path)
                if stat.S_ISREG(aside.st_mode) and swapped:
                    with fs.opened(self._persisted) as base, fs.below(base, folders) as home:
                        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=home)
                        os.fsync(home)
                # Two names of one file are both left by a rename.
                fs.unlink_quietly(temporary, folder)
                os.fsync(folder)
            finally:
                os.close(folder)

    def _take_newer(self, path: str, folder: int, home: int, durability: fs.Durability) -> None:
        """A persistent file that the program has replaced, as atomic saves do: what it saved is what counts.

        Raises:
            PatchRefusedError: the program replaces it all the time.
        """
        name, temporary = split(path)[1], _temporary_for(path)
        for _ in range(REPLACEMENT_ATTEMPTS):
            fs.unlink_quietly(temporary, home)
            try:
                linked = fs.link(name, folder, temporary, home)
            except FileNotFoundError:
                return
            if not linked:
                break
            newer = os.stat(temporary, dir_fd=home, follow_symlinks=False)
            os.rename(temporary, name, src_dir_fd=home, dst_dir_fd=home)
            fs.unlink_quietly(temporary, home)
            durability.directory(home)
            durability.barrier()
            failpoint("store.persist.taken")
            fs.unlink_quietly(temporary, folder)
            os.symlink(str(self._persisted / path), temporary, dir_fd=folder)
            os.fsync(folder)  # A link that is swapped before it is on disk may come back without its text.
            done = put(name, temporary, folder, same_as(newer))
            fs.unlink_quietly(temporary, folder)
            durability.directory(folder)
            if done:
                return
        raise PatchRefusedError(
            f"{self.target}: {path} is persistent, and the program replaces it faster than it can be moved",
            code="gate.conflict",
            target=self.target,
        )

    def move_persistent_out(self, content: int, paths: Sequence[str], durability: fs.Durability) -> None:
        """Move persistent paths out of the open generation `content`, where they exist and have not been
        moved yet. A link takes their place, in one step.

        Raises:
            PatchRefusedError: there is data in both places.
        """
        self.settle_persistent(content, paths)
        try:
            self._move_persistent_out(content, paths, durability)
        except BaseException:
            self.settle_persistent(content, paths)
            raise

    def _move_persistent_out(self, content: int, paths: Sequence[str], durability: fs.Durability) -> None:
        for path in paths:
            folders, name = split(path)
            text = str(self._persisted / path)
            folder = _open_or_none(content, folders)
            if folder is None:
                continue
            try:
                status = fs.lstat(name, folder)
                if status is None or stat.S_ISLNK(status.st_mode):
                    continue
                with fs.opened(self._persisted) as base:
                    home = fs.make_below(base, folders, durability, like=content)
                try:
                    stored = fs.lstat(name, home)
                    if stored is not None and stat.S_ISREG(stored.st_mode) and stat.S_ISREG(status.st_mode):
                        self._take_newer(path, folder, home, durability)
                        continue
                    if stored is not None and fs.link_text(name, home) != text:
                        raise PatchRefusedError(
                            f"{self.target}: {path} is persistent and stored at {text}, yet the program has "
                            "made another one in its tree",
                            code="gate.conflict",
                            target=self.target,
                        )
                    fs.unlink_quietly(name, home)
                    os.symlink(text, name, dir_fd=home)
                    os.fsync(home)
                    fs.exchange(name, name, first_dir=folder, second_dir=home)
                    failpoint("store.persist.exchanged")
                    durability.directory(folder)
                    durability.directory(home)
                finally:
                    os.close(home)
            finally:
                os.close(folder)

    def move_persistent_in(self, content: int, paths: Sequence[str], durability: fs.Durability) -> None:
        """The reverse: persistent data goes back into the tree, whose links to it it replaces."""
        for path in paths:
            folders, name = split(path)
            folder = _open_or_none(content, folders)
            if folder is None:
                continue
            try:
                if fs.link_text(name, folder) != str(self._persisted / path):
                    continue
                with fs.opened(self._persisted) as base, fs.below(base, folders) as home:
                    fs.exchange(name, name, first_dir=folder, second_dir=home)
                    failpoint("store.persist.returned")
                    durability.directory(folder)
                    durability.directory(home)
                    fs.unlink_quietly(name, home)
            finally:
                os.close(folder)

    def is_moved_out(self, content: int, path: str) -> bool:
        """Whether `path` in the open generation `content` is a link to where persistent data is kept."""
        folders, name = split(path)
        folder = _open_or_none(content, folders)
        if folder is None:
            return False
        try:
            return fs.link_text(name, folder) == str(self._persisted / path)
        finally:
            os.close(folder)

    def refresh_persistent(self, folder: int, paths: Sequence[str], durability: fs.Durability) -> None:
        """Bring what the program has written to persistent paths below the open `folder`, from which they
        were copied, up to date in the store."""
        with fs.opened(self._persisted) as base:
            for path in paths:
                folders, name = split(path)
                here, home = _open_or_none(folder, folders), fs.make_below(base, folders, durability)
                try:
                    status = None if here is None else fs.lstat(name, here)
                    if here is None or status is None:
                        continue
                    if not stat.S_ISDIR(status.st_mode):
                        _bring(name, here, home, durability)
                        durability.directory(home)
                        continue
                    with fs.below(here, [name]) as source, fs.below(home, [name]) as destination:
                        reconcile(source, destination, durability=durability)
                finally:
                    os.close(home)
                    if here is not None:
                        os.close(here)

    def _parent(self) -> AbstractContextManager[int]:
        return fs.opened(self.root.parent)

    def _immovable(self, error: OSError) -> PatchRefusedError:
        return PatchRefusedError(
            f"{self.target}: {self.root} cannot be turned into a link to a generation ({error.strerror}); it "
            "must be an ordinary folder, not a mount point, on a file system that can swap names",
            code="gate.filesystem",
            target=self.target,
            root=str(self.root),
        )
