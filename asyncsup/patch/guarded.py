"""What no patch may change, wherever the root of a target is: what decides about patches, and remembers them.

The root of an overlay may well be the folder in which the configuration stands, with the state directory and
the inbox in it. A patch that changed one of them would say from then on who may patch what.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from asyncsup.patch import fs
from asyncsup.patch.look import split
from asyncsup.patch.plan import Found, PlanError, Presence

_NOT_THERE: Final = (OSError, fs.BlockedPathError)


class Guarded(msgspec.Struct, frozen=True, kw_only=True):
    """The places, by what they are called in a message.

    Attributes:
        places: files and folders, which need not exist.
        patterns: of the files that the configuration includes (absolute, as `glob` has them): one that
            appears would be read as well.
    """

    places: Mapping[Path, str] = msgspec.field(default_factory=dict)
    patterns: tuple[str, ...] = ()

    def along_with(self, more: Guarded) -> Guarded:
        """These places and those."""
        return Guarded(
            places={**self.places, **more.places}, patterns=tuple({*self.patterns, *more.patterns})
        )


NOTHING_MORE: Final = Guarded()


class Guard:
    """Judges paths below one root.

    A place is known by its name without links, and where it exists by its inode: whatever leads to it, a hard
    link, a mount, a file system that does not tell capital letters.

    Args:
        root: its open folder.
        where: its path, without links.
    """

    def __init__(self, guarded: Guarded, root: int, where: Path) -> None:
        self._root = root
        self._where = where
        self._patterns = [_without_links(pattern) for pattern in guarded.patterns]
        self._names: dict[str, str] = {}
        self._inodes: dict[tuple[int, int], str] = {}
        self._inode_numbers: set[int] = set()
        self._folders: dict[tuple[str, ...], str | None] = {}
        for place, what in guarded.places.items():
            # A link is guarded as well as what it leads to.
            for real in (Path(os.path.realpath(place)), Path(os.path.realpath(place.parent)) / place.name):
                if real.is_relative_to(where):
                    self._names[str(real.relative_to(where))] = what
            with contextlib.suppress(OSError):
                status = place.stat()
                self._inodes[(status.st_dev, status.st_ino)] = what
                self._inode_numbers.add(status.st_ino)

    def problem(self, path: str, found: Found) -> PlanError | None:
        """Why nothing may be done at `path`, where `found` is."""
        folders, name = split(path)
        what = self._by_name(path) or self._by_folder(tuple(folders)) or self._by_inode(folders, name, found)
        if what is None:
            return None
        return PlanError(code="gate.path", message=f"is where {what} is, which no patch may change")

    def _by_name(self, path: str) -> str | None:
        for name, what in self._names.items():
            if path == name or path.startswith(f"{name}/") or name.startswith(f"{path}/") or name == ".":
                return what
        parts = (self._where / path).parts
        if any(_matches(parts, pattern) for pattern in self._patterns):
            return "the configuration"
        return None

    def _by_folder(self, folders: tuple[str, ...]) -> str | None:
        if folders not in self._folders:
            what = self._by_folder(folders[:-1]) if folders else None
            if what is None:
                # What is missing, or no folder, is judged by whoever looks at the file.
                with contextlib.suppress(*_NOT_THERE), fs.below(self._root, folders) as folder:
                    status = os.fstat(folder)
                    what = self._inodes.get((status.st_dev, status.st_ino))
            self._folders[folders] = what
        return self._folders[folders]

    def _by_inode(self, folders: Sequence[str], name: str, found: Found) -> str | None:
        # Most files are told by the number alone, which is known already.
        known = found.identity.partition(":")[0]
        if found.presence is Presence.ABSENT or (known and int(known) not in self._inode_numbers):
            return None
        with contextlib.suppress(*_NOT_THERE), fs.below(self._root, folders) as folder:
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            return self._inodes.get((status.st_dev, status.st_ino))
        return None


def _without_links(pattern: str) -> tuple[str, ...]:
    """The components of a pattern, with no link in front of its first wildcard."""
    parts = Path(os.path.normpath(pattern)).parts
    fixed = next((n for n, part in enumerate(parts) if set(part) & set("*?[")), len(parts) - 1)
    return (*Path(os.path.realpath(Path(*parts[:fixed]))).parts, *parts[fixed:])


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[count:], pattern[1:]) for count in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])
