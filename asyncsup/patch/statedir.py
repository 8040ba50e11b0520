"""The state directory: who owns it, where things are in it, and which generation each target has.

::

    lock                     held by one supervisor
    state.db                 see database.py
    current -> sets/43       see pointer.py
    sets/43/TARGET -> ../../generations/TARGET/17    or, of a tree that was never patched, -> its root
    generations/TARGET/17/
    persist/TARGET/          what a tree keeps outside of its generations
    pycache/                 see bytecode.py
    saved/TARGET/7/          what a person wrote and transaction 7 has overwritten
    staging/                 not visible to anybody, not worth keeping
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shlex
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from asyncsup.errors import StateError, StateLockedError, UsageError
from asyncsup.patch import bytecode, fs
from asyncsup.patch.database import Database, TargetRow
from asyncsup.patch.guarded import Guarded
from asyncsup.patch.overlay import OverlayRoot
from asyncsup.patch.pointer import CURRENT, SETS, Pointer
from asyncsup.patch.tree import TreeRoot

GENERATIONS: Final = "generations"
PERSIST: Final = "persist"
SAVED: Final = "saved"
STAGING: Final = "staging"
OVERLAY: Final = "overlay"
TREE: Final = "tree"

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_ENTRY = re.compile(r"\.\./\.\./generations/[^/]+/(\d+)")


class StateDirectory:
    """One state directory, locked and open.

    Attributes:
        path: absolute; the links in the roots of targets spell it out.
        fd: its descriptor.
        guarded: what no patch may change.
    """

    def __init__(self, path: Path, fd: int, lock: int | None, database: Database) -> None:
        self.path = path
        self.fd = fd
        self.database = database
        self.pointer = Pointer(path, fd)
        self._lock = lock
        self.guarded = Guarded()

    @classmethod
    def open(cls, path: Path) -> StateDirectory:
        """Take the lock, create what is missing, open the database.

        Raises:
            StateLockedError: another process has it.
            StateError: it is damaged, was moved, is of another version, or others may write to it.
        """
        path = Path(os.path.realpath(path))
        with contextlib.ExitStack() as undo:
            _make_folder(path, 0o711)
            _check_owner(path)
            lock = _take_lock(path / "lock")
            undo.callback(os.close, lock)
            # Programs of other users read through these; listing them is nobody's business.
            for name, mode in (
                (GENERATIONS, 0o711),
                (SETS, 0o711),
                (PERSIST, 0o711),
                (STAGING, 0o700),
                (SAVED, 0o700),
            ):
                _make_folder(path / name, mode)
            fd = os.open(path, fs.DIRECTORY)
            undo.callback(os.close, fd)
            database = Database.open(path / "state.db")
            undo.callback(database.close)
            _sync_names(path)
            state = cls(path, fd, lock, database)
            state._check_identity()
            undo.pop_all()
        return state

    @classmethod
    def look(cls, path: Path) -> StateDirectory:
        """Open one that is there, to look at it: without the lock, and nothing can be written.

        Raises:
            StateError: it has no state.db, or one that cannot be read.
            OSError: it cannot be opened.
        """
        path = Path(os.path.realpath(path))
        fd = os.open(path, fs.DIRECTORY)
        try:
            database = Database.open_to_read(path / "state.db")
            try:
                known = database.meta("path")
            except BaseException:
                database.close()
                raise
        except BaseException:
            os.close(fd)
            raise
        same = known is not None and os.path.realpath(known) == str(path)
        return cls(Path(known) if known is not None and same else path, fd, None, database)

    def _check_identity(self) -> None:
        if not self.database.targets() and fs.lstat(CURRENT, self.fd) is not None:
            raise StateError(
                f"{self.path} has generations, yet its state.db knows of no target; was it lost? Put it "
                "back, or choose another state directory",
                code="state.database_missing",
            )
        known = self.database.meta("path")
        if known == str(self.path):
            return
        if known is None or not self.database.targets():
            with self.database.write(durable=False):  # Nothing depends on it before there are targets.
                self.database.set_meta("path", str(self.path))
        elif os.path.realpath(known) == str(self.path):
            self.path = Path(known)  # A link now, but links in roots spell it so.
            self.pointer = Pointer(self.path, self.fd)
        else:
            raise StateError(
                f"this state directory was {known} and is now {self.path}, but links in the targets' roots "
                f"still lead to {known}; move it back, or make {known} a symbolic link to it",
                code="state.moved",
            )

    def close(self) -> None:
        """Let go of everything; the lock last."""
        self.database.close()
        os.close(self.fd)
        if self._lock is not None:
            with contextlib.suppress(OSError):  # What it says is for people; being locked is what counts.
                os.ftruncate(self._lock, 0)
            os.close(self._lock)

    # --- places ---------------------------------------------------------------------------------------------

    def generations(self, target: str) -> Path:
        return self.path / GENERATIONS / target

    def generation(self, target: str, number: int) -> Path:
        return self.generations(target) / str(number)

    def current(self, target: str) -> Path:
        return self.path / CURRENT / target

    @property
    def staging(self) -> Path:
        return self.path / STAGING

    def saved(self, target: str, label: str) -> Path:
        """Where copies of overwritten files are; ``label``: a transaction's number, or something like it."""
        return self.path / SAVED / target / label

    def saving(self) -> contextlib.AbstractContextManager[int]:
        """The open folder of all such copies."""
        return fs.opened(self.path / SAVED)

    def forget_saved(self, target: str, label: str) -> None:
        """Remove copies that are of no use, for good: nobody looks for them again."""
        with contextlib.suppress(FileNotFoundError), fs.opened(self.path / SAVED / target) as folder:
            fs.remove_tree(label, folder)
            os.fsync(folder)

    def content(self, row: TargetRow) -> Path:
        """The folder that holds the current files: of a tree that is not converted, the root itself."""
        number = self.number(row.name)
        return row.root if self.is_in_root(row.name) else self.generation(row.name, number)

    def overlay(self, row: TargetRow, fd: int) -> OverlayRoot:
        return OverlayRoot(row.name, self.current(row.name), fd)

    def tree(self, row: TargetRow) -> TreeRoot:
        return TreeRoot(
            row.name,
            root=row.root,
            current=self.current(row.name),
            generations=self.generations(row.name),
            persisted=self.path / PERSIST / row.name,
        )

    def make_target_folders(self, targets: Iterable[str]) -> None:
        """Create the folders that targets' files go into, durably.

        Raises:
            UsageError: a name cannot be a folder's.
        """
        for target in targets:
            if not _NAME.fullmatch(target):
                raise UsageError(f"{target!r} cannot be the name of a target with a root", target=target)
            _make_folder(self.generations(target), 0o711)
            _make_folder(self.path / PERSIST / target, 0o711)
        # Also those that were there: a process that was killed may have made them a moment ago.
        fs.sync_directory(self.path / GENERATIONS)
        fs.sync_directory(self.path / PERSIST)

    # --- what the pointer says ------------------------------------------------------------------------------

    @staticmethod
    def entry(target: str, number: int) -> str:
        """The text of a set's link to a generation."""
        return f"../../{GENERATIONS}/{target}/{number}"

    def number(self, target: str) -> int:
        """The generation that `target` has now."""
        text = self.pointer.entry(target)
        if text is None:
            raise StateError(f"the current set has no link for {target}", code="state.pointer")
        return self.number_in(target, text)

    def number_in(self, target: str, text: str) -> int:
        """Which generation a set's link means."""
        match = _ENTRY.fullmatch(text)
        if match is not None:
            return int(match[1])
        in_root = [row.number for row in self.database.generations(target) if row.place == "root"]
        if not in_root:
            raise StateError(f"the current set's link for {target} says {text!r}", code="state.pointer")
        return max(in_root)

    def shows(self, numbers: Mapping[str, int | None]) -> bool:
        """Whether the pointer shows these generations of these targets."""
        return {target: self.number(target) for target in numbers} == numbers

    def is_in_root(self, target: str) -> bool:
        """Whether the current files are in the root itself, and not in the store."""
        return not self.pointer.entries().get(target, "").startswith("../")

    def exists(self, target: str, number: int) -> bool:
        return self.generation(target, number).is_dir()

    # --- removing generations -------------------------------------------------------------------------------

    def discard(self, target: str, number: int, *, before: Callable[[], object] = lambda: None) -> bool:
        """Remove a generation, unless a reader holds it (a shared ``flock`` on its folder), or a process has
        its working directory in it.

        It leaves its place in one step, so that nobody finds half of it. After a power cut half of it may be
        there all the same; so it must be on disk by now that it is not wanted any more.

        Args:
            before: called once it is sure that it can be removed.
        Returns:
            Whether it is gone.
        """
        bytecode.discard(self.path, target, number)
        try:
            fd = os.open(self.generation(target, number), fs.DIRECTORY_NOFOLLOW)
        except FileNotFoundError:
            return True
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            if _is_inhabited(self.generation(target, number)):
                return False
            before()
            trash = f"{target}-{number}.gone"
            with fs.opened(self.staging) as staging, fs.opened(self.generations(target)) as home:
                fs.remove_tree(trash, staging)
                os.rename(str(number), trash, src_dir_fd=home, dst_dir_fd=staging)
                fs.remove_tree(trash, staging)
        finally:
            os.close(fd)
        return True

    def sweep_discarded(self, target: str) -> None:
        """Remove what is left of generations whose removal has failed on the way."""
        with fs.opened(self.staging) as staging:
            for name in fs.names(staging):
                if re.fullmatch(rf"{re.escape(target)}-\d+\.gone", name):
                    fs.remove_tree(name, staging)

    def move_to_saved(self, target: str, number: int, label: str) -> None:
        """Put a whole generation where copies are, in the place of the empty folder `label`. Harmless when it
        is there already."""
        bytecode.discard(self.path, target, number)
        with fs.opened(self.path / SAVED / target) as there, fs.opened(self.generations(target)) as home:
            with contextlib.suppress(FileNotFoundError):
                os.rename(str(number), label, src_dir_fd=home, dst_dir_fd=there)
            os.fsync(there)
            os.fsync(home)

    def sweep_staging(self) -> None:
        """Remove what a process that died has left in the staging area."""
        with fs.opened(self.staging) as fd:
            for name in fs.names(fd):
                fs.remove_tree(name, fd)


@contextlib.contextmanager
def state_errors() -> Iterator[None]:
    """What the system says about the state directory, as an error with a code."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise StateError(
            f"the state directory cannot be used: {error.strerror or error}{where}", code="state.unusable"
        ) from error


def _is_inhabited(folder: Path) -> bool:
    """Whether a process has its working directory in it: there it saves by relative paths."""
    home = os.path.realpath(folder)
    for name in os.listdir("/proc"):  # noqa: PTH208 - there are thousands
        if not name.isdecimal():
            continue
        try:
            place = os.readlink(f"/proc/{name}/cwd")  # noqa: PTH115 - likewise
        except OSError:
            continue  # it has ended, or is not ours to ask
        if place == home or place.startswith(f"{home}/"):
            return True
    return False


def _make_folder(path: Path, mode: int) -> None:
    """Create a folder; one that exists keeps its mode."""
    if path.is_dir():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(exist_ok=True)
    path.chmod(mode)


def _sync_names(path: Path) -> None:
    """Make the names in a folder durable, and those that lead to it from the top of its file system; any of
    them may be new, whoever has made them."""
    device = path.stat().st_dev
    for folder in (path, *path.parents):
        if folder.stat().st_dev != device:
            break
        # Where we may not even look, we have made nothing.
        with contextlib.suppress(PermissionError):
            fs.sync_directory(folder)


def _check_owner(path: Path) -> None:
    """Whoever may write to the state directory decides what every target runs.

    Raises:
        StateError: somebody else may.
    """
    status = path.stat()
    if status.st_uid not in {0, os.geteuid()}:
        raise StateError(
            f"{path} belongs to uid {status.st_uid}, not to uid {os.geteuid()}, and who owns it decides what "
            "every target runs; choose another state directory",
            code="state.permissions",
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise StateError(
            f"{path} may be written to by others, who could put anything in a target's place; "
            f"`chmod go-w {shlex.quote(str(path))}`",
            code="state.permissions",
        )


def lock_holder(path: Path) -> int | None:
    """Which process has the lock of a state directory; None when nobody has.

    Taken from the kernel's list: trying the lock would keep a supervisor from it that starts in that moment.
    """
    try:
        status = (path / "lock").stat()
        said = (path / "lock").read_text(errors="replace").strip()
    except FileNotFoundError:
        return None
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    for line in Path("/proc/locks").read_text().splitlines():
        _, *facts = line.split()
        if facts[0] != "FLOCK" or facts[2] != "WRITE":
            continue
        pid, where = facts[3:5]
        on, _, inode = where.rpartition(":")
        # Some file systems have a number of their own in that list.
        if int(inode) == status.st_ino and (on == device or pid == said):
            return int(pid)
    return None


def _take_lock(path: Path) -> int:
    # For nobody else: whoever may open it, if only for reading, may lock it, and keep us from starting.
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(fd, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode(errors="replace").strip()
            raise StateLockedError(
                f"{path.parent} is in use by another supervisor (process {holder or 'unknown'}); "
                "stop that one with `asyncsup shutdown`, or give this one a state_dir of its own",
                pid=int(holder) if holder.isdecimal() else None,
                state_dir=str(path.parent),
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except BaseException:
        os.close(fd)
        raise
    return fd
