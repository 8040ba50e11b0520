"""Looking at one managed or ordinary file, for the plan: what is it, and is it still what we left there?"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Sequence
from typing import Final

from asyncsup.patch import fs
from asyncsup.patch.database import FileRow
from asyncsup.patch.paths import path_fault
from asyncsup.patch.plan import Found, PlanError, Presence

TEMPORARY_PREFIX: Final = ".asyncsup~"
"""Names beside a program's files that exist only while something is being swapped."""


def aside(why: str, path: str) -> str:
    """A name in the folder of `path` that is used for nothing else: recovery must know what it finds."""
    return f"{TEMPORARY_PREFIX}{why}-{hashlib.sha256(path.encode()).hexdigest()[:16]}"


def identity(status: os.stat_result) -> str:
    """Differs when a file has been replaced, or (mtime permitting) written to."""
    return f"{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"


def same_file(first: str, second: str | None) -> bool:
    """Whether two identities, taken while neither was removed, are of one file, written to or not; or of a
    file and an exact copy of it, as in a state directory that was restored."""
    if second is None:
        return False
    inode, _, content = first.partition(":")
    other_inode, _, other_content = second.partition(":")
    return inode == other_inode or content == other_content


def split(path: str) -> tuple[Sequence[str], str]:
    """The folders that lead to `path`, and its last component."""
    *folders, name = path.split("/")
    return folders, name


def folders_of(paths: Iterable[str]) -> set[str]:
    """All folders that lead to `paths`."""
    return {path[:end] for path in paths for end, character in enumerate(path) if character == "/"}


def unusable(path: str) -> PlanError | None:
    """Why a path may not be used below a root at all; the manifest's own checks come first."""
    fault = path_fault(path)
    return None if fault is None else PlanError(code="gate.path", message=fault.message)


def blocked(error: fs.BlockedPathError) -> PlanError:
    return PlanError(
        code="gate.path",
        message=f"cannot be reached: {error.component} is {error.what}, and only real folders are followed",
    )


def presence_of(status: os.stat_result) -> Presence:
    mode = status.st_mode
    if stat.S_ISREG(mode):
        return Presence.ORDINARY
    if stat.S_ISLNK(mode):
        return Presence.LINK
    return Presence.FOLDER if stat.S_ISDIR(mode) else Presence.SPECIAL


def regular(name: str, directory: int, row: FileRow | None, *, hashed: bool) -> Found:
    """The regular file `name`, managed if there is a `row` for it.

    Args:
        hashed: the content's SHA-256 is wanted; otherwise it is computed only to tell whether a file of ours
            has been changed, and only when its inode, size or mtime have.
    """
    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    seen = identity(status)
    managed = row is not None and row.sha256 is not None
    ours = managed and row is not None and row.origin is not None
    digest: str | None = None
    if managed and row is not None and row.identity == seen:
        digest = row.sha256
    elif hashed or ours:
        try:
            digest = fs.sha256_of(name, directory)
        except PermissionError as error:
            problem = PlanError(code="gate.unreadable", message=f"cannot be read: {error.strerror}")
            return Found(presence=Presence.ABSENT, problem=problem)
    return Found(
        presence=Presence.MANAGED if managed else Presence.ORDINARY,
        sha256=digest,
        size=status.st_size,
        mode=row.mode if ours and row is not None else stat.S_IMODE(status.st_mode),
        delivered=bool(ours),
        drifted=bool(ours and row is not None and digest != row.sha256),
        identity=seen,
        owner=(status.st_uid, status.st_gid),
    )
