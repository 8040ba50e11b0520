"""What the store needs of the file system beyond `os`: swaps, syncs, walks that follow no link, hard links.

Nothing here knows of targets or generations. Paths inside a tree are given as a directory descriptor and
components below it; every component is opened with ``O_NOFOLLOW``, so that whoever can write to the tree
cannot lead us out of it, not even by swapping a folder for a link while we are at work.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import itertools
import os
import platform
import re
import secrets
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from asyncsup.patch.space import MARGIN_BYTES, MARGIN_INODES, Need, Room

DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
DIRECTORY_NOFOLLOW: Final = DIRECTORY | os.O_NOFOLLOW
# O_NONBLOCK: opening a FIFO that somebody put where a file was must not hang.
READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
CREATE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

CHUNK_BYTES: Final = 1 << 20
NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors of a write that more room would cure."""

REMOVAL_ATTEMPTS: Final = 8
"""How often a folder is emptied that somebody fills meanwhile."""

CROSS_DEVICE: Final = errno.EXDEV
_CANNOT_LINK: Final = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP})
_RENAME_EXCHANGE: Final = 2
_RENAME_NOREPLACE: Final = 1
_SYS_RENAMEAT2: Final = {
    "x86_64": 316,
    "aarch64": 276,
    "riscv64": 276,
    "armv7l": 382,
    "ppc64le": 357,
    "s390x": 347,
}

_OCTAL: Final = re.compile(rb"\\([0-7]{3})")
_libc = ctypes.CDLL(None, use_errno=True)


class BlockedPathError(Exception):
    """A component of a path is not a real directory: a link, or a file, stands where a folder should be."""

    def __init__(self, component: str, what: str) -> None:
        super().__init__(f"{component} is {what}")
        self.component = component
        self.what = what


class CannotExchangeError(OSError):
    """The file system, or the kernel, cannot swap two names in one step."""


def exchange(first: str, second: str, *, first_dir: int, second_dir: int) -> None:
    """Swap two names of any type in one step: at no instant is either of them missing.

    Raises:
        CannotExchangeError: that cannot be done here.
        OSError: EXDEV across file systems, and what a rename raises.
    """
    try:
        _renameat2(first, second, first_dir, second_dir, _RENAME_EXCHANGE)
    except OSError as error:
        if error.errno in {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}:
            raise CannotExchangeError(error.errno, error.strerror, error.filename) from error
        raise


def rename_new(name: str, new: str, directory: int) -> None:
    """Rename within a folder, unless something has the new name.

    Raises:
        FileExistsError: something has; nothing was changed.
    """
    _renameat2(name, new, directory, directory, _RENAME_NOREPLACE)


def _renameat2(first: str, second: str, first_dir: int, second_dir: int, flags: int) -> None:
    arguments = (first_dir, os.fsencode(first), second_dir, os.fsencode(second), flags)
    if hasattr(_libc, "renameat2"):
        result = _libc.renameat2(*arguments)
    elif (number := _SYS_RENAMEAT2.get(platform.machine())) is not None:
        result = _libc.syscall(number, *arguments)
    else:
        raise OSError(errno.ENOSYS, "renameat2 is not available", first)
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), first, None, second)


def sync_directory(path: Path) -> None:
    """Make the names in a folder durable."""
    with opened(path) as fd:
        os.fsync(fd)


@contextlib.contextmanager
def opened(path: Path | str) -> Iterator[int]:
    """A descriptor of the folder `path`; links in `path` itself are followed."""
    fd = os.open(path, DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def opened_file(path: Path | str, *, follow: bool = True) -> Iterator[int]:
    """A descriptor to read a file through that anybody may have put there: never a pipe, a device, a folder.

    Args:
        follow: `path` may be a symbolic link.

    Raises:
        OSError: EISDIR for a folder, EINVAL for what else is no ordinary file.
    """
    fd = os.open(path, READ & ~os.O_NOFOLLOW if follow else READ)
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        yield fd
    finally:
        os.close(fd)


def read_all(fd: int, limit: int) -> bytes:
    """What is left of a file, but at most `limit` bytes."""
    pieces = []
    while limit and (piece := os.read(fd, min(limit, CHUNK_BYTES))):
        pieces.append(piece)
        limit -= len(piece)
    return b"".join(pieces)


@contextlib.contextmanager
def below(base: int, parts: Sequence[str]) -> Iterator[int]:
    """A descriptor of the folder that `parts` name below `base`.

    Raises:
        FileNotFoundError: a component is missing.
        BlockedPathError: a component is a link or no folder.
    """
    fd = open_below(base, parts)
    try:
        yield fd
    finally:
        os.close(fd)


def open_below(base: int, parts: Sequence[str]) -> int:
    """Like `below`; the caller closes the descriptor."""
    fd = os.dup(base)
    try:
        for depth, part in enumerate(parts, start=1):
            following = _open_component(part, fd, "/".join(parts[:depth]))
            os.close(fd)
            fd = following
    except BaseException:
        os.close(fd)
        raise
    return fd


class LastFolder:
    """The folder of the path before, kept open (or known to be missing): files of one folder come one after
    the other.

    Args:
        opening: opens the folder that some components name.
    """

    def __init__(self, opening: Callable[[Sequence[str]], int]) -> None:
        self._opening = opening
        self._parts: Sequence[str] | None = None
        self._fd = -1
        self._missing: Sequence[str] | None = None

    def __enter__(self) -> LastFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def open(self, parts: Sequence[str]) -> int:
        """The open folder; it stays open until another one is asked for.

        Raises:
            what ``opening`` raises.
        """
        if parts == self._missing:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/".join(parts))
        if parts != self._parts:
            self._close()
            try:
                self._fd = self._opening(parts)
            except FileNotFoundError:
                self._missing = parts
                raise
            self._parts = parts
        return self._fd

    def _close(self) -> None:
        if self._parts is not None:
            self._parts = None
            os.close(self._fd)


def make_below(base: int, parts: Sequence[str], durability: Durability, *, like: int | None = None) -> int:
    """Like `open_below`, creating folders that are missing; the caller closes the descriptor, and hands it to
    `durability` if it puts anything into the folder.

    A new folder gets owner and mode of the same folder below `like`, or of its parent where there is none.
    """
    fd, model = os.dup(base), None if like is None else os.dup(like)
    try:
        for depth, part in enumerate(parts, start=1):
            if model is not None:
                try:
                    inner: int | None = os.open(part, DIRECTORY_NOFOLLOW, dir_fd=model)
                except OSError:
                    inner = None
                os.close(model)
                model = inner
            try:
                following = _open_component(part, fd, "/".join(parts[:depth]))
            except FileNotFoundError:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o700, dir_fd=fd)
                following = _open_component(part, fd, "/".join(parts[:depth]))
                mirror_directory(os.fstat(fd if model is None else model), following)
                durability.directory(fd)
            os.close(fd)
            fd = following
    except BaseException:
        os.close(fd)
        raise
    finally:
        if model is not None:
            os.close(model)
    return fd


def _open_component(part: str, parent: int, shown: str) -> int:
    try:
        return os.open(part, DIRECTORY_NOFOLLOW, dir_fd=parent)
    except OSError as error:
        if error.errno not in {errno.ELOOP, errno.ENOTDIR}:
            raise
        status = lstat(part, parent)
        if status is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), shown) from None
        what = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "not a folder"
        raise BlockedPathError(shown, what) from None


def missing_folders(base: int, parts: Sequence[str]) -> list[str]:
    """Which of the folders that `parts` lead through do not exist, outermost first."""
    for depth in range(1, len(parts) + 1):
        try:
            with below(base, parts[:depth]):
                pass
        except FileNotFoundError:
            return ["/".join(parts[:n]) for n in range(depth, len(parts) + 1)]
    return []


def mirror_directory(source: os.stat_result, fd: int) -> None:
    """Give a folder of ours mode and owner of the one it stands for, so that it shows as much and no more."""
    mode = stat.S_IMODE(source.st_mode)
    if os.geteuid() == 0:
        os.fchown(fd, source.st_uid, source.st_gid)
    else:
        mode |= 0o700  # Without it we could not take the folder apart again.
    os.fchmod(fd, mode)


def lstat(name: str, directory: int) -> os.stat_result | None:
    """What stands under `name`, or None."""
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None


def link_text(name: str, directory: int) -> str | None:
    """Where the symbolic link `name` points, or None when there is no link of that name."""
    try:
        return os.readlink(name, dir_fd=directory)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOENT}:
            raise
        return None


def unlink_quietly(name: str, directory: int) -> None:
    """Remove a name that may be gone already."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)


def names(directory: int) -> list[str]:
    """The names in an open folder."""
    with os.scandir(directory) as entries:
        return [entry.name for entry in entries]


def sha256_of(name: str, directory: int) -> str:
    """SHA-256 of a regular file, as hex digits."""
    with os.fdopen(os.open(name, READ, dir_fd=directory), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link(name: str, directory: int, new_name: str, new_directory: int) -> bool:
    """Give a file of any type a second name; False when the system allows no hard link there."""
    try:
        os.link(name, new_name, src_dir_fd=directory, dst_dir_fd=new_directory, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        return False
    return True


def copy(name: str, directory: int, new_name: str, new_directory: int, durability: Durability) -> None:
    """Copy a file, link, FIFO or device. A socket is not copied: it belongs to whoever has bound it."""
    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    if stat.S_ISLNK(status.st_mode):
        os.symlink(os.readlink(name, dir_fd=directory), new_name, dir_fd=new_directory)
        if os.geteuid() == 0:
            os.chown(new_name, status.st_uid, status.st_gid, dir_fd=new_directory, follow_symlinks=False)
    elif stat.S_ISREG(status.st_mode):
        source = os.open(name, READ, dir_fd=directory)
        try:
            copy_regular(source, new_name, new_directory, durability)
        finally:
            os.close(source)
    elif stat.S_ISFIFO(status.st_mode):
        os.mkfifo(new_name, stat.S_IMODE(status.st_mode), dir_fd=new_directory)
    elif not stat.S_ISSOCK(status.st_mode):
        os.mknod(new_name, status.st_mode, status.st_rdev, dir_fd=new_directory)


def link_or_copy(
    name: str, directory: int, new_name: str, new_directory: int, durability: Durability
) -> bool:
    """A second name for a file where hard links are possible, else a copy; whether it is the same file."""
    if link(name, directory, new_name, new_directory):
        return True
    copy(name, directory, new_name, new_directory, durability)
    return False


def copy_regular(
    source: int, name: str, directory: int, durability: Durability, *, mode: int | None = None
) -> None:
    """A new file with the content, owner, times and (unless given) mode of the open file `source`. Where that
    has large holes, so has the new one.
    """
    status = os.fstat(source)
    fd = os.open(name, CREATE, 0o600, dir_fd=directory)
    try:
        offset = _next_data(source, 0)
        while offset is not None and (chunk := os.pread(source, CHUNK_BYTES, offset)):
            os.lseek(fd, offset, os.SEEK_SET)
            write_all(fd, chunk)
            offset = _next_data(source, offset + len(chunk))
        os.ftruncate(fd, os.fstat(source).st_size)
        if os.geteuid() == 0:
            os.fchown(fd, status.st_uid, status.st_gid)
        os.fchmod(fd, stat.S_IMODE(status.st_mode) if mode is None else mode)
        os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))
        durability.file(fd)
    except BaseException:
        unlink_quietly(name, directory)
        raise
    finally:
        os.close(fd)


def _next_data(fd: int, offset: int) -> int | None:
    """Where the next content is, at `offset` or behind a hole; None when only a hole is left, or nothing."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def remove_tree(name: str, directory: int) -> None:
    """Remove `name` with everything below it, whatever it is; nothing happens when it is gone already."""
    status = lstat(name, directory)
    if status is None:
        return
    if not stat.S_ISDIR(status.st_mode):
        unlink_quietly(name, directory)
        return
    trash = f"{secrets.token_hex(8)}-"
    for attempt in itertools.count(1):
        try:
            _make_writable(name, directory)
            with below(directory, [name]) as top:
                numbers = itertools.count()
                while flat := names(top):
                    for entry in flat:
                        _flatten(entry, top, trash, numbers)
            os.rmdir(name, dir_fd=directory)
        except FileNotFoundError:
            return  # Somebody else removes it as well.
        except OSError as error:
            # Somebody writes to it meanwhile.
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST} or attempt == REMOVAL_ATTEMPTS:
                raise
        else:
            return


def _flatten(name: str, top: int, trash: str, numbers: Iterator[int]) -> None:
    """Remove an entry of the folder `top`; the folders in it become entries of `top`, to be removed next.

    So neither the depth of a tree nor the number of its folders costs descriptors, stack or long paths.
    """
    status = lstat(name, top)
    if status is None:
        return
    if not stat.S_ISDIR(status.st_mode):
        unlink_quietly(name, top)
        return
    _make_writable(name, top)
    with below(top, [name]) as folder:
        with os.scandir(folder) as entries:
            found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        for inner, is_folder in found:
            if is_folder:
                _make_writable(inner, folder)
                os.rename(inner, f"{trash}{next(numbers)}", src_dir_fd=folder, dst_dir_fd=top)
            else:
                unlink_quietly(inner, folder)
    os.rmdir(name, dir_fd=top)


def _make_writable(name: str, directory: int) -> None:
    """So that a folder can be emptied, and moved: a program's own need not be."""
    if os.geteuid() != 0:
        os.chmod(name, 0o700, dir_fd=directory)


def mount_points() -> frozenset[str]:
    """Every folder, and every file, that something is mounted at."""
    try:
        with open("/proc/self/mountinfo", "rb") as file:  # noqa: PTH123
            lines = file.read().splitlines()
    except OSError:
        return frozenset()
    # Spaces, tabs, newlines and backslashes are written as octal numbers.
    return frozenset(os.fsdecode(_OCTAL.sub(_unescape, line.split()[4])) for line in lines)


def _unescape(match: re.Match[bytes]) -> bytes:
    return bytes([int(match[1], 8)])


def rooms(needs: Iterable[Need]) -> list[Room]:
    """What is needed of every file system concerned, and what is free there."""
    by_device: dict[int, list[Need]] = {}
    for need in needs:
        by_device.setdefault(need.place.stat().st_dev, []).append(need)
    return [_room(each) for each in by_device.values()]


def _room(needs: Sequence[Need]) -> Room:
    place = needs[0].place
    volume = os.statvfs(place)
    return Room(
        place=place,
        needed=MARGIN_BYTES + sum(need.size for need in needs),
        free=volume.f_bavail * volume.f_frsize,
        needed_inodes=MARGIN_INODES + sum(need.inodes for need in needs),
        # Some file systems make inodes as they need them, and say 0.
        free_inodes=volume.f_favail if volume.f_files else None,
    )


EARLY_OBJECTS: Final = 2000
"""After so many, what has been written begins to go to disk while the rest is being written."""


def _syncfs(fd: int) -> None:
    if _libc.syncfs(fd) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class _EarlySync(threading.Thread):
    """One ``syncfs`` beside the writing. The one at the barrier is shorter for it, and still needed."""

    def __init__(self, fd: int) -> None:
        super().__init__(name="early sync")
        self._fd = fd
        self._error: OSError | None = None

    def run(self) -> None:
        try:
            _syncfs(self._fd)
        except OSError as error:
            self._error = error

    def finish(self) -> None:
        """Wait for its end. A failed write is reported to one ``syncfs`` only: it must not be lost here."""
        self.join()
        if self._error is not None:
            raise self._error


class Durability:
    """Makes what is written durable at the next `barrier`, in the cheaper of two ways.

    A few objects are synced one by one, which leaves other people's dirty data alone. Past `limit` objects
    one ``syncfs`` per file system is 20 to 30 times cheaper than that.

    Args:
        filesystems: a descriptor on each file system that is written to. They are kept open from the start,
            because ``syncfs`` reports only those write errors that happen after its descriptor was opened.
    """

    def __init__(self, *filesystems: int, limit: int = 32) -> None:
        self._limit = limit
        self._objects = 0
        self._bulk = False
        self._early: _EarlySync | None = None
        self._folders: dict[tuple[int, int], int] = {}
        self._filesystems: dict[int, int] = {}
        for fd in filesystems:
            device = os.fstat(fd).st_dev
            if device not in self._filesystems:
                self._filesystems[device] = os.dup(fd)

    def __enter__(self) -> Durability:
        return self

    def __exit__(self, *_: object) -> None:
        if self._early is not None:
            self._early.join()
        self._forget_folders()
        while self._filesystems:
            os.close(self._filesystems.popitem()[1])

    def file(self, fd: int) -> None:
        """The content of `fd` is complete. An fsync that fails is final: the data counts as lost."""
        if not self._left_to_syncfs(os.fstat(fd).st_dev):
            os.fsync(fd)

    def directory(self, fd: int) -> None:
        """Names in the folder `fd` have changed; they are synced at the barrier."""
        status = os.fstat(fd)
        key = (status.st_dev, status.st_ino)
        if key not in self._folders and not self._left_to_syncfs(status.st_dev):
            self._folders[key] = os.dup(fd)

    def barrier(self) -> None:
        """Everything handed in so far is on disk when this returns."""
        if self._early is not None:
            self._early.finish()
            self._early = None
        if self._bulk:
            for fd in self._filesystems.values():
                _syncfs(fd)
        for fd in self._folders.values():
            os.fsync(fd)
        self._forget_folders()

    def _left_to_syncfs(self, device: int) -> bool:
        self._objects += 1
        self._bulk = self._bulk or self._objects > self._limit
        if device not in self._filesystems:
            return False
        if self._objects % EARLY_OBJECTS == 0 and (self._early is None or not self._early.is_alive()):
            if self._early is not None:
                self._early.finish()
            self._early = _EarlySync(self._filesystems[device])
            self._early.start()
        return self._bulk

    def _forget_folders(self) -> None:
        while self._folders:
            os.close(self._folders.popitem()[1])
