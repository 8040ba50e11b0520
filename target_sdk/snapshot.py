"""Consistent reads: all files of a snapshot are of one generation, however often the target is patched.

A patch is one rename of a pointer, so each single file a program opens is wholly old or wholly new; two files
opened one after the other may still be of different builds. A snapshot opens the generation in force once and
reads below that directory only. A shared lock on it keeps the supervisor from removing it meanwhile.

How the files lie on disk (docs/patching.md): ``STATE/current/NAME`` resolves to the generation. In the *tree*
layout the root is a link to it and it holds every file. In the *overlay* layout the root is an ordinary
folder, the generation holds only the files that patches have touched (*managed*), and each of those is, in
the root, a link through ``STATE/current/NAME``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, Any, BinaryIO, Final, Literal, Self, TextIO, overload

import orjson

OWN_PREFIX: Final = ".asyncsup"
"""Names in a root that begin like this are the supervisor's own, for a moment: no files of the program."""

# Directories are passed through, not read: the permission to search them is enough.
_PASS: Final = os.O_DIRECTORY | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY)
_LIST: Final = os.O_DIRECTORY | os.O_CLOEXEC | os.O_RDONLY
# A FIFO must not block the reader; for an ordinary file O_NONBLOCK means nothing.
_READ: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK

AnyPath = str | os.PathLike[str]


class Snapshot:
    """The files of the target as they are in one moment. Use it with ``with``; any thread may.

    Paths are relative to the target's root. Under asyncsup only ordinary files are read: a path that leads
    through a symbolic link of your own is refused (`OSError`, ``ELOOP``), as nothing pins what it leads to.

    Files that no patch has ever touched are read as they lie in the root. A file object that `open` returned
    may outlive the snapshot.
    """

    def __init__(self, *, root: Path, current: Path | None) -> None:
        self._root_path = root
        self._current = current
        self._pid: int | None = None
        self._generation: int | None = None
        self._generation_name: str | None = None
        self._root: int | None = None
        self._has_read = False

    @property
    def generation(self) -> str | None:
        """The name of the generation that is read; None where the plain folder is.

        Another name means that files may have changed; the names have no order.
        """
        return self._generation_name

    # --- reading -------------------------------------------------------------------------------------------

    @overload
    def open(self, path: AnyPath, mode: Literal["r"] = "r", *, encoding: str = "utf-8") -> TextIO: ...

    @overload
    def open(self, path: AnyPath, mode: Literal["rb"], *, encoding: str = "utf-8") -> BinaryIO: ...

    def open(self, path: AnyPath, mode: str = "r", *, encoding: str = "utf-8") -> IO[Any]:
        """Open a file for reading.

        Raises:
            ValueError: the path is absolute or contains ``..``, or the mode is not ``r`` or ``rb``.
            FileNotFoundError: this generation has no such file.
        """
        if mode not in {"r", "rb"}:
            raise ValueError(f'a snapshot is opened with mode "r" or "rb", got {mode!r}')
        descriptor = self._find(path)
        return os.fdopen(descriptor, mode, encoding=None if mode == "rb" else encoding)

    def read_text(self, path: AnyPath, *, encoding: str = "utf-8") -> str:
        with self.open(path, encoding=encoding) as file:
            return file.read()

    def read_bytes(self, path: AnyPath) -> bytes:
        with self.open(path, "rb") as file:
            return file.read()

    def json(self, path: AnyPath) -> Any:
        """Read a JSON file.

        Raises:
            ValueError: it is not JSON; the message names the file.
        """
        try:
            return orjson.loads(self.read_bytes(path))
        except orjson.JSONDecodeError as error:
            raise orjson.JSONDecodeError(f"{os.fspath(path)}: {error.msg}", error.doc, error.pos) from None

    def exists(self, path: AnyPath) -> bool:
        """Whether `open` would find a file there."""
        try:
            os.close(self._find(path))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return False
        return True

    def walk(self, under: AnyPath = "") -> list[str]:
        """The paths of all files, or of those below a folder, sorted; empty if there is no such folder."""
        parts = _parts(under) if os.fspath(under) not in {"", "."} else ()
        self._check_open()
        self._has_read = True
        found: set[str] = set()
        # The root first: a file adopted meanwhile is put into the generation before it becomes a link.
        if self._root is not None:
            found.update(_files_below(self._root, parts, follow=self._current is None))
        if self._generation is not None:
            found.update(_files_below(self._generation, parts, follow=False))
        return sorted(found)

    # --- pinning -------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._pid is not None:
            raise RuntimeError("a snapshot is entered once; take a new one")
        self._pid = os.getpid()
        try:
            self._pin()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _pin(self) -> None:
        pinned = _pin_generation(self._current) if self._current is not None else None
        if pinned is None:
            self._root = os.open(self._root_path, _PASS)
            return
        self._generation, self._generation_name = pinned
        try:
            self._root = os.open(self._root_path, _PASS)
        except FileNotFoundError:
            return  # everything there is lies in the generation
        # In the tree layout the root is a link to a generation, ours or by now a later one. Its parent tells:
        # the folder of all generations. In the overlay layout the two parents have nothing in common.
        if os.path.samestat(os.stat("..", dir_fd=self._root), os.stat("..", dir_fd=self._generation)):
            # Before the first patch of a tree the pointer leads to the root itself, which is still a folder.
            root_is_it = os.path.samestat(os.fstat(self._root), os.fstat(self._generation))
            if root_is_it and not self._root_path.is_symlink():
                self._generation_name = None
            os.close(self._root)
            self._root = None

    def _close(self) -> None:
        generation, self._generation = self._generation, None
        root, self._root = self._root, None
        if generation is not None:
            if self._pid == os.getpid():
                # Closing alone is not enough: a child forked meanwhile holds the same lock by its copy.
                fcntl.flock(generation, fcntl.LOCK_UN)
            os.close(generation)
        if root is not None:
            os.close(root)

    def _check_open(self) -> None:
        if self._generation is None and self._root is None:
            raise ValueError("the snapshot is not open: use `with target.snapshot() as files:`")

    # --- finding -------------------------------------------------------------------------------------------

    def _find(self, path: AnyPath) -> int:
        parts = _parts(path)
        self._check_open()
        try:
            descriptor = self._open(parts)
            _check_ordinary(descriptor)
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None
        self._has_read = True
        return descriptor

    def _open(self, parts: tuple[str, ...]) -> int:
        if self._current is None:
            assert self._root is not None
            return os.open("/".join(parts), _READ, dir_fd=self._root)
        if self._generation is None:
            return self._open_before_first_patch(parts)
        pinned = _open_if_there(self._generation, parts)
        if pinned is not None:
            return pinned
        if self._root is None:
            raise FileNotFoundError(errno.ENOENT, "no such file in this generation")
        unmanaged: int | None = None
        problem: OSError | None = None
        try:
            unmanaged = self._open_in_root(self._root, parts)
        except OSError as error:
            problem = error
        # Between the two looks the file may have been adopted (linked into the generations, then replaced by
        # a link in the root), deleted by a patch, or released again: then the generation has it now.
        pinned = _open_if_there(self._generation, parts)
        if pinned is not None:
            if unmanaged is not None:
                os.close(unmanaged)
            return pinned
        if problem is not None:
            raise problem
        assert unmanaged is not None
        return unmanaged

    def _open_before_first_patch(self, parts: tuple[str, ...]) -> int:
        assert self._root is not None
        try:
            return self._open_in_root(self._root, parts)
        except _ManagedError:
            if self._has_read:
                raise OSError(
                    errno.ESTALE, "the first patch came while this snapshot was open; take a new snapshot"
                ) from None
        # Nothing was read yet, so it does no harm to begin later than we did.
        self._close()
        self._pin()
        return self._open(parts)

    def _open_in_root(self, root: int, parts: tuple[str, ...]) -> int:
        with _parent(root, parts) as folder:
            try:
                return _open_leaf(parts[-1], folder)
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                link = _link_text(parts[-1], folder)
                if link is not None and not self._is_managed(link, folder):
                    raise
            raise _ManagedError(errno.ENOENT, "no such file in this generation")

    def _is_managed(self, link: str, folder: int) -> bool:
        """Whether a link leads through ``STATE/current/NAME``, by whatever path it gets to STATE."""
        assert self._current is not None
        pointer, name = self._current.parent.name, self._current.name
        try:
            state = self._current.parent.parent.stat()
            parts = PurePosixPath(link).parts
            return any(
                os.path.samestat(os.stat(str(PurePosixPath(*parts[:index])), dir_fd=folder), state)
                for index in range(len(parts) - 1)
                if parts[index : index + 2] == (pointer, name)
            )
        except OSError:
            return False


class _ManagedError(FileNotFoundError):
    """The root has a link to a managed file, which the generation at hand does not hold."""


def _pin_generation(current: Path) -> tuple[int, str] | None:
    """Open and lock the generation in force; None if there is none.

    The pruner takes an exclusive lock, without waiting, on a generation that is not in force, and only then
    removes it. So one that we hold a lock on *and* that was in force after we got it cannot go away under us.
    If it was replaced in between, somebody has made progress and we try again.
    """
    while True:
        pointer = _link_text(current.parent)
        try:
            generation = os.open(current, _LIST)
        except FileNotFoundError:
            if _link_text(current.parent) == pointer:
                return None
            continue  # the set we were passing through was removed meanwhile
        try:
            fcntl.flock(generation, fcntl.LOCK_SH)
            path = current.resolve()
            if _is_same(path, generation):
                return generation, path.name
        except BaseException:
            os.close(generation)
            raise
        os.close(generation)


def _link_text(name: str | Path, folder: int | None = None) -> str | None:
    """What a symbolic link says; None for anything else, or nothing."""
    try:
        return os.readlink(name, dir_fd=folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise


def _is_same(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _parts(path: AnyPath) -> tuple[str, ...]:
    """Raises ValueError for a path that is not strictly below the folder it is relative to."""
    text = os.fspath(path)
    pure = PurePosixPath(text)
    if not pure.parts:
        raise ValueError("the path is empty")
    if pure.is_absolute() or ".." in pure.parts or "\0" in text:
        raise ValueError(f"a path in a snapshot is relative to the target's root, without `..`; got {text!r}")
    return pure.parts


@contextmanager
def _parent(top: int, parts: tuple[str, ...]) -> Iterator[int]:
    """The folder that holds the last part, reached without following any link."""
    folder = top
    try:
        for part in parts[:-1]:
            try:
                deeper = os.open(part, _PASS | os.O_NOFOLLOW, dir_fd=folder)
            except NotADirectoryError:
                _refuse_link(part, folder)
                raise
            if folder != top:
                os.close(folder)
            folder = deeper
        yield folder
    finally:
        if folder != top:
            os.close(folder)


def _open_leaf(name: str, folder: int) -> int:
    try:
        return os.open(name, _READ | os.O_NOFOLLOW, dir_fd=folder)
    except OSError as error:
        if error.errno == errno.ELOOP:
            _refuse_link(name, folder)
        raise


def _refuse_link(name: str, folder: int) -> None:
    link = _link_text(name, folder)
    if link is not None:
        raise OSError(
            errno.ELOOP, f"{name} is a symbolic link (to {link}): a snapshot reads ordinary files only"
        )


def _open_if_there(top: int, parts: tuple[str, ...]) -> int | None:
    try:
        with _parent(top, parts) as folder:
            return _open_leaf(parts[-1], folder)
    except FileNotFoundError:
        return None


def _check_ordinary(descriptor: int) -> None:
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a directory")
    raise OSError(errno.EINVAL, "not an ordinary file")


def _files_below(top: int, parts: tuple[str, ...], *, follow: bool) -> Iterator[str]:
    """The files below a folder, as paths relative to ``top``. Links to folders are never entered.

    Args:
        follow: whether the folder may be reached, and a file be named, by a link.
    """
    try:
        if follow:
            folder = os.open("/".join(parts) or ".", _LIST, dir_fd=top)
        else:
            with _parent(top, (*parts, "")) as parent:
                folder = os.open(".", _LIST, dir_fd=parent)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        yield from _list(folder, "/".join(parts), follow=follow)
    finally:
        os.close(folder)


def _list(folder: int, prefix: str, *, follow: bool) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(OWN_PREFIX):
                continue
            path = f"{prefix}/{entry.name}" if prefix else entry.name
            if entry.is_file(follow_symlinks=follow):
                yield path
            elif entry.is_dir(follow_symlinks=False):
                try:
                    below = os.open(entry.name, _LIST | os.O_NOFOLLOW, dir_fd=folder)
                except (FileNotFoundError, NotADirectoryError):
                    continue  # gone meanwhile
                try:
                    yield from _list(below, path, follow=follow)
                finally:
                    os.close(below)
