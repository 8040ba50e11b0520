"""Opening a file where somebody else may put a link in its place.

A target's output often goes to a folder that the target's user may write to, and the supervisor may be root.
So a link counts only if it is root's or ours and nobody else can have put it there, at the file's own name
and at every folder on the way. A file that has other names as well is refused where others can have given it
this one. The path is walked by descriptors: what was checked is what is opened.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import Final, NamedTuple

_FOLDER: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_ALWAYS: Final = os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_MOST_LINKS: Final = 40
"""As the kernel."""


class Opened(NamedTuple):
    """Attributes:
    fd: the caller's.
    is_descriptor: the path leads through ``/proc`` to what a process has open, as ``/dev/stdout`` does:
        others write to it as well, and the name is not ours to move.
    """

    fd: int
    is_descriptor: bool


def safe_open(path: Path, flags: int, mode: int = 0o640) -> Opened:
    """Open a file; with O_CREAT the folders on the way are made as well. It waits for no pipe.

    Raises:
        OSError: as `os.open`; ELOOP for a link that others can have put there, EMLINK for a file of several
            names one of which others can have given it.
    """
    rest = list(reversed(path.absolute().parts[1:]))
    folder = os.open("/", _FOLDER)
    links = 0
    try:
        while rest:
            name = rest.pop()
            kind = _kind(name, folder)
            if kind == stat.S_IFLNK and (rest or not flags & os.O_EXCL):
                links += 1
                _trust_link(name, folder, links)
                if not _is_magic(folder):
                    target = os.readlink(name, dir_fd=folder)
                    rest += reversed([part for part in target.split("/") if part not in {"", "."}])
                    folder = _step("/", folder) if target.startswith("/") else folder
                elif rest:
                    folder = _step(name, folder)
                else:
                    fd = os.open(name, (flags | _ALWAYS) & ~os.O_CREAT, dir_fd=folder)
                    return Opened(fd, is_descriptor=True)
            elif rest:
                if kind is None and flags & os.O_CREAT:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, dir_fd=folder)
                folder = _step(name, folder, os.O_NOFOLLOW)
            else:
                return Opened(_open_here(name, folder, flags, mode), is_descriptor=False)
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(folder)


def _kind(name: str, folder: int) -> int | None:
    """What is there, a link being one; None for nothing."""
    try:
        return stat.S_IFMT(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return None


def _step(name: str, folder: int, flags: int = 0) -> int:
    below = os.open(name, _FOLDER | flags, dir_fd=folder)
    os.close(folder)
    return below


def _open_here(name: str, folder: int, flags: int, mode: int) -> int:
    fd = os.open(name, flags | _ALWAYS | os.O_NOFOLLOW, mode, dir_fd=folder)
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode) and status.st_nlink > 1 and not _is_only_ours(folder):
        os.close(fd)
        raise OSError(errno.EMLINK, "it has several names, in a folder that others may write to")
    return fd


def _trust_link(name: str, folder: int, number: int) -> None:
    if number > _MOST_LINKS:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    if _is_of_proc(folder):
        return  # where nobody makes links; they seem to be nobody's in a user namespace without root in it
    # Whoever may write to the folder can also bring a link of ours there, from elsewhere.
    owner = os.stat(name, dir_fd=folder, follow_symlinks=False).st_uid
    if owner not in {0, os.geteuid()} or not _is_only_ours(folder):
        raise OSError(errno.ELOOP, f"{name!r} is a link that others can have put there")


def _is_only_ours(folder: int) -> bool:
    """Nobody but root and us (and our own group) may change what is in it."""
    status = os.fstat(folder)
    if status.st_uid not in {0, os.geteuid()} or status.st_mode & stat.S_IWOTH:
        return False
    return not status.st_mode & stat.S_IWGRP or status.st_gid in {0, os.getegid()}


def _is_magic(folder: int) -> bool:
    """Links in it lead to what a process has open, whatever their text: ``/proc/PID/fd`` and such."""
    return _is_of_proc(folder) and os.fstat(folder).st_ino != Path("/proc").stat().st_ino


def _is_of_proc(folder: int) -> bool:
    try:
        return os.fstat(folder).st_dev == Path("/proc").stat().st_dev
    except OSError:
        return False
