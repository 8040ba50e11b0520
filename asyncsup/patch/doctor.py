"""Looks at a state directory, and says what is not as it should be. `repair` mends it.

Changes nothing; it tries out the file system with files of its own. Works beside a running supervisor: what
that is at work on is left out, and only what is wrong at two looks in a row is wrong.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
from msgspec.structs import asdict

from asyncsup.errors import StateError
from asyncsup.patch import fs
from asyncsup.patch.audit import Head
from asyncsup.patch.bytecode import PYCACHE, SHARED
from asyncsup.patch.database import FileRow, GenerationRow, TargetRow, TransactionRow
from asyncsup.patch.facts import UNDECIDED
from asyncsup.patch.ledger import examine
from asyncsup.patch.look import TEMPORARY_PREFIX, identity, split
from asyncsup.patch.pointer import CURRENT, NEXT, SETS
from asyncsup.patch.statedir import (
    GENERATIONS,
    PERSIST,
    SAVED,
    STAGING,
    TREE,
    StateDirectory,
    lock_holder,
)
from asyncsup.patch.target_files import is_file, present
from asyncsup.patch.tree import Form

LITTLE_SPACE_BYTES: Final = 64 << 20
FEW_INODES: Final = 4096
"""Less than that, and the next patch may well be refused."""

UPLOADS: Final = "uploads"
NETWORK_FILE_SYSTEMS: Final = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "afs", "ceph", "glusterfs"})

Level = Literal["problem", "warning"]
Progress = Callable[[int, int], None]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is not as it should be.

    Attributes:
        level: a problem makes the examination fail; a warning is worth knowing.
        path: in a target or a generation, relative to it; else absolute.
    """

    code: str
    message: str
    level: Level = "problem"
    target: str | None = None
    generation: int | None = None
    path: str | None = None

    @property
    def key(self) -> tuple[str, str | None, int | None, str | None]:
        """Which one it is, whatever it says."""
        return self.code, self.target, self.generation, self.path

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Diagnosis(msgspec.Struct, kw_only=True):
    """What an examination has found.

    Attributes:
        running: the process of the supervisor that has the state directory.
        head: the audit's last record.
    """

    path: Path
    running: int | None
    findings: list[Finding] = msgspec.field(default_factory=list)
    head: Head | None = None
    records: int = 0
    targets: int = 0
    generations: int = 0
    files: int = 0
    size: int = 0

    @property
    def problems(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "problem"]

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        counts = {
            name: getattr(self, name) for name in ("records", "targets", "generations", "files", "size")
        }
        return {
            "ok": self.ok,
            "state_dir": str(self.path),
            "running": self.running,
            "checked": counts,
            "head": None if self.head is None else self.head.to_json(),
            "problems": [finding.to_json() for finding in self.problems],
            "warnings": [f.to_json() for f in self.findings if f.level == "warning"],
        }


def diagnose(path: Path, *, runtime_dir: Path | None = None, progress: Progress | None = None) -> Diagnosis:
    """Examine a state directory.

    Args:
        runtime_dir: its permissions are looked at as well.
        progress: called with bytes read so far, and to be read.
    Raises:
        StateError: there is no such directory, or it cannot be read.
    """
    first = _look(path, runtime_dir, progress)
    if first.running is None or not first.findings:
        return first
    second = _look(path, runtime_dir, progress)
    second.findings = [finding for finding in second.findings if finding in first.findings]
    return second


def _look(path: Path, runtime_dir: Path | None, progress: Progress | None) -> Diagnosis:
    try:
        return _Examination(path, runtime_dir, progress).run()
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise StateError(
            f"{path} cannot be examined: {error.strerror}{where}", code="state.unusable"
        ) from error


class _Examination:
    """One look at a state directory."""

    def __init__(self, path: Path, runtime_dir: Path | None, progress: Progress | None) -> None:
        if not path.is_dir():
            raise StateError(f"there is no state directory {path}", code="state.missing")
        self._path = Path(os.path.realpath(path))
        self._runtime_dir = runtime_dir
        self._progress = progress
        holder = lock_holder(self._path)
        self._found = Diagnosis(path=self._path, running=None if holder == os.getpid() else holder)
        self._digests: dict[tuple[int, int], str] = {}
        self._total = 0

    def run(self) -> Diagnosis:
        self._check_permissions()
        self._check_space()
        self._check_file_system()
        if not self._check_folders():
            return self._found
        try:
            state = StateDirectory.look(self._path)
        except StateError as error:
            self._say(f"database.{error.error_code.rpartition('.')[2]}", error.message)
            return self._found
        with contextlib.closing(state):
            try:
                self._check_database(state)
            except StateError as error:
                self._say("database.unreadable", f"the rest could not be looked at: {error.message}")
        return self._found

    def _say(self, code: str, message: str, level: Level = "problem", **where: Any) -> None:
        self._found.findings.append(Finding(code=code, message=message, level=level, **where))

    # --- around the store -----------------------------------------------------------------------------------

    def _check_permissions(self) -> None:
        owner = self._path.stat().st_uid
        for path, most in places(self._path, self._runtime_dir):
            try:
                status = path.lstat()
            except FileNotFoundError:
                continue
            if status.st_uid not in {0, owner}:
                self._say(
                    "permissions.owner",
                    f"belongs to uid {status.st_uid}, and the state directory to uid {owner}",
                    path=str(path),
                )
            mode = stat.S_IMODE(status.st_mode)
            if mode & ~most:
                self._say(
                    "permissions.mode", f"has mode {mode:04o}, at most {most:04o} is safe", path=str(path)
                )

    def _check_folders(self) -> bool:
        """Whether nothing stands where folders of ours should be."""
        wrong = [
            path
            for name in (GENERATIONS, SETS, PERSIST, STAGING, SAVED, PYCACHE, UPLOADS)
            if os.path.lexists(path := self._path / name) and (path.is_symlink() or not path.is_dir())
        ]
        for path in wrong:
            self._say("state.folder", "is no folder", path=str(path))
        return not wrong

    def _check_space(self) -> None:
        volume = os.statvfs(self._path)
        free = volume.f_bavail * volume.f_frsize
        if free < LITTLE_SPACE_BYTES:
            self._say("space.bytes", f"only {free} bytes are free", "warning", path=str(self._path))
        # Some file systems have no fixed number of inodes and say 0.
        if volume.f_files and volume.f_favail < FEW_INODES:
            self._say(
                "space.inodes", f"only {volume.f_favail} inodes are free", "warning", path=str(self._path)
            )

    def _check_file_system(self) -> None:
        kind = file_system(self._path)
        if kind in NETWORK_FILE_SYSTEMS:
            self._say("filesystem.network", f"lies on {kind}, which is not supported", path=str(self._path))
        if kind == "tmpfs":
            self._say(
                "filesystem.volatile",
                "lies in memory, and is gone after a reboot",
                "warning",
                path=str(self._path),
            )
        if not (self._path / STAGING).is_dir():
            return
        lacking = lacking_operation(self._path / STAGING)
        if lacking is not None:
            self._say(f"filesystem.{lacking[0]}", lacking[1], path=str(self._path))

    # --- the database, the audit, the pointer ---------------------------------------------------------------

    def _check_database(self, state: StateDirectory) -> None:
        database = state.database
        with database.snapshot():
            for complaint in database.complaints():
                self._say("database.integrity", complaint)
            judgement = examine(database)
            self._found.head, self._found.records = judgement.head, judgement.records
            for fault in judgement.faults:
                self._say(fault.code, fault.message)
            self._total = sum(
                row.size
                for target in database.targets()
                for generation in database.generations(target.name)
                for row in database.files(target.name, generation.number).values()
            )
            if not self._is_at_home(state):
                return
            unfinished = database.unfinished_transactions()
            self._check_leftovers(state, unfinished)
            entries = self._entries(state)
            busy = {part.target: row for row in unfinished for part in database.parts(row.txn)}
            for target in database.targets():
                self._found.targets += 1
                self._check_target(state, target, entries, busy.get(target.name))

    def _is_at_home(self, state: StateDirectory) -> bool:
        known = state.database.meta("path")
        if not state.database.targets():
            if fs.lstat(CURRENT, state.fd) is not None:
                self._say("database.empty", "state.db knows of no target, yet there are generations")
            return False
        if known == str(state.path):
            return True
        self._say(
            "state.moved",
            f"it was {known}, and links in the targets' roots still lead there; move it back, or make "
            f"{known} a symbolic link to it",
            path=str(state.path),
        )
        return False

    def _check_leftovers(self, state: StateDirectory, unfinished: Sequence[TransactionRow]) -> None:
        """What a process that died has left behind; beside a supervisor it may be at work on it."""
        if self._found.running is not None:
            return
        for row in unfinished:
            if row.state == UNDECIDED:
                self._say(
                    "transaction.undecided",
                    f"transaction {row.txn} has failed, and waits for somebody to decide about it",
                    "warning",
                )
                continue
            self._say(
                "transaction.unfinished",
                f"transaction {row.txn} ({row.action}) was cut off; {row.phase.value}",
            )
        found = [state.path / NEXT] if fs.lstat(NEXT, state.fd) is not None else []
        for folder in (STAGING, UPLOADS):
            with contextlib.suppress(FileNotFoundError):
                found += sorted((state.path / folder).iterdir())
        with contextlib.suppress(FileNotFoundError):
            found += sorted(path for path in (state.path / SETS).iterdir() if not path.name.isdecimal())
        for path in found:
            self._say("leftover.file", "was left behind, and is of no use", "warning", path=str(path))
        known = {SHARED, *(row.name for row in state.database.targets())}
        for folder in (GENERATIONS, PERSIST, PYCACHE):
            with contextlib.suppress(FileNotFoundError):
                for path in sorted((state.path / folder).iterdir()):
                    if path.name not in known:
                        self._say("stray.folder", "is of no target", "warning", path=str(path))

    def _entries(self, state: StateDirectory) -> Mapping[str, str] | None:
        """What the pointer says; None when it says nothing at all."""
        try:
            entries = state.pointer.entries()
        except StateError as error:
            self._say("pointer.broken", error.message, path=str(state.path / CURRENT))
            return None
        if not entries:
            self._say("pointer.missing", "there is no pointer", path=str(state.path / CURRENT))
            return None
        return entries

    # --- one target -----------------------------------------------------------------------------------------

    def _check_target(
        self,
        state: StateDirectory,
        row: TargetRow,
        entries: Mapping[str, str] | None,
        busy: TransactionRow | None,
    ) -> None:
        if row.releasing:
            if self._found.running is None:
                self._say("target.releasing", "its release was cut off", target=row.name)
            return
        if busy is not None:
            return  # Recovery, or the supervisor that is at work on it, knows what is what.
        number = None if entries is None else self._check_entry(state, row, entries.get(row.name))
        rows = {each.number: each for each in state.database.generations(row.name) if each.state == "live"}
        if entries is None or number is not None:
            self._check_strays(state, row.name, rows)
        current = row.confirmed if number is None else number
        for generation in _way_back(rows, current):
            if generation.place == "store":
                self._check_generation(state, row, generation, is_current=generation.number == current)
        if number is None or number not in rows:
            return
        if row.layout == TREE:
            self._check_tree(state, row, rows[number])
        elif (state.generation(row.name, number)).is_dir():
            self._check_overlay(state, row, number)

    def _check_entry(self, state: StateDirectory, row: TargetRow, entry: str | None) -> int | None:
        """Which generation the pointer shows, if it is one that can be."""
        if entry is None:
            self._say("pointer.entry", "the pointer does not show it", target=row.name)
            return None
        try:
            number = state.number_in(row.name, entry)
        except StateError as error:
            self._say("pointer.entry", error.message, target=row.name)
            return None
        known = state.database.find_generation(row.name, number)
        if known is None:
            self._say(
                "pointer.unknown",
                f"the pointer shows generation {number}, which state.db does not know: is it an older copy?",
                target=row.name,
                generation=number,
            )
            return None
        if number != row.confirmed:
            self._say(
                "pointer.unconfirmed",
                f"the pointer shows generation {number}, but {row.confirmed} was confirmed last",
                target=row.name,
                generation=number,
            )
        return number

    def _check_strays(self, state: StateDirectory, target: str, rows: Mapping[int, GenerationRow]) -> None:
        for path in (state.generations(target), state.path / PERSIST / target):
            if os.path.lexists(path) and (path.is_symlink() or not path.is_dir()):
                self._say("state.folder", "is no folder", target=target, path=str(path))
                return
        folder = state.generations(target)
        if not folder.is_dir():
            self._say("generation.missing", "the folder of all its generations is missing", target=target)
            return
        for path in sorted(folder.iterdir()):
            if not path.name.isdecimal() or path.is_symlink() or not path.is_dir():
                if path.name.isdecimal() and int(path.name) in rows:
                    continue  # That is said of the generation.
                self._say("stray.folder", "is no generation", "warning", target=target, path=str(path))
            elif int(path.name) not in rows and self._found.running is None:
                self._say(
                    "generation.orphan",
                    f"generation {path.name} is of no use any more",
                    "warning",
                    target=target,
                    generation=int(path.name),
                )

    def _check_generation(
        self, state: StateDirectory, row: TargetRow, generation: GenerationRow, *, is_current: bool
    ) -> None:
        number = generation.number
        folder_path = state.generation(row.name, number)
        if os.path.lexists(folder_path) and (folder_path.is_symlink() or not folder_path.is_dir()):
            self._say(
                "generation.kind",
                f"generation {number} is no folder any more",
                target=row.name,
                generation=number,
            )
            return
        if not state.exists(row.name, number):
            self._say(
                "generation.missing",
                f"generation {number} is gone" + ("" if is_current else ": nothing goes back to it any more"),
                target=row.name,
                generation=number,
            )
            return
        self._found.generations += 1
        lived_in = is_current and row.layout == TREE
        kept = state.database.kept(row.name, number)
        with fs.opened(state.generation(row.name, number)) as folder:
            for path, file in sorted(state.database.files(row.name, number).items()):
                if not is_file(file) or path in kept:
                    continue  # What was kept is not a patch's.
                fault = self._fault_of(folder, path, file, lived_in=lived_in)
                if fault is not None:
                    code, message, level = fault
                    self._say(code, message, level, target=row.name, generation=number, path=path)

    def _fault_of(
        self, folder: int, path: str, row: FileRow, *, lived_in: bool
    ) -> tuple[str, str, Level] | None:
        """What is wrong with a file of a generation.

        Args:
            lived_in: a program has the generation as its tree, and may have put files of its own there.
        """
        folders, name = split(path)
        self._found.files += 1
        self._found.size += row.size
        drift: Level = "warning" if lived_in else "problem"
        try:
            with fs.below(folder, folders) as inner:
                status = os.stat(name, dir_fd=inner, follow_symlinks=False)
                if not stat.S_ISREG(status.st_mode):
                    return ("file.kind", "is no ordinary file any more", drift)
                if row.origin is None and identity(status) != row.identity:
                    return None  # An original, which is the program's to write to.
                if self._digest(name, inner, status) != row.sha256:
                    return self._difference(status, row, drift)
        except fs.BlockedPathError as error:
            return ("file.kind", f"cannot be reached: {error}", drift)
        except FileNotFoundError:
            if lived_in:
                return ("file.removed", "was removed by the program; left so", "warning")
            return ("file.missing", "is missing", "problem")
        except OSError as error:
            return ("file.unreadable", f"cannot be read: {error.strerror}", "problem")
        if row.origin is not None and status.st_mode & 0o222:
            return ("file.writable", f"has mode {stat.S_IMODE(status.st_mode):04o}, and is shared", "problem")
        return None

    @staticmethod
    def _difference(status: os.stat_result, row: FileRow, drift: Level) -> tuple[str, str, Level]:
        inode, _, written = row.identity.split(":")
        if str(status.st_mtime_ns) == written:
            return ("file.damaged", "has another content, and nobody has written to it", "problem")
        if drift == "warning" and str(status.st_ino) != inode:
            return ("file.replaced", "was replaced by the program; left so", "warning")
        return ("file.written", "is not what was delivered: somebody has written to it", "problem")

    def _digest(self, name: str, directory: int, status: os.stat_result) -> str:
        """Of one file that has several names, once."""
        key = (status.st_dev, status.st_ino)
        if key not in self._digests:
            self._digests[key] = fs.sha256_of(name, directory)
        if self._progress is not None:
            self._progress(min(self._found.size, self._total), self._total)
        return self._digests[key]

    # --- roots ----------------------------------------------------------------------------------------------

    def _check_overlay(self, state: StateDirectory, row: TargetRow, number: int) -> None:
        if not row.root.is_dir() or row.root.is_symlink():
            self._say("root.missing", "the root is no folder", target=row.name, path=str(row.root))
            return
        kept = state.database.kept(row.name, number)
        files = present(state.database.files(row.name, number))
        with fs.opened(row.root) as fd, fs.opened(state.generation(row.name, number)) as generation:
            root = state.overlay(row, fd)
            for path in sorted(files - kept.keys()):
                self._check_leaf(state, row.name, path, fd, generation)
            for path, text in _ours_in(fd):
                if text is None:
                    self._say("leftover.temporary", "was left behind", target=row.name, path=path)
                elif text == root.text(path) and path not in files:
                    self._say(
                        "leaf.stray",
                        "leads to a file that the generation does not have",
                        target=row.name,
                        path=path,
                    )

    def _check_leaf(self, state: StateDirectory, target: str, path: str, root: int, generation: int) -> None:
        folders, name = split(path)
        right = f"{state.current(target)}/{path}"
        try:
            with fs.below(root, folders) as folder:
                status = fs.lstat(name, folder)
                text = fs.link_text(name, folder)
                torn = is_torn(name, folder, state.path, f"{CURRENT}/{target}/{path}")
        except FileNotFoundError:
            status = text = None
            torn = False
        except fs.BlockedPathError as error:
            self._say(
                "leaf.detached", f"cannot be reached: {error}; left so", "warning", target=target, path=path
            )
            return
        if text == right:
            return
        if status is None:
            # Nothing to lead to is told of the generation itself.
            if _exists_below(generation, path):
                message = "was removed from the root; left so"
                self._say("leaf.missing", message, "warning", target=target, path=path)
        elif torn:
            self._say("leaf.torn", f"leads to {text}, not to {right}", target=target, path=path)
        else:
            self._say(
                "leaf.detached", "was replaced by the program; left so", "warning", target=target, path=path
            )

    def _check_tree(self, state: StateDirectory, row: TargetRow, generation: GenerationRow) -> None:
        self._check_tree_root(state, row, generation)
        if generation.place == "root" or not state.exists(row.name, generation.number):
            return
        with fs.opened(state.generation(row.name, generation.number)) as content:
            for path, text in _ours_in(content):
                if text is None:
                    self._say("leftover.temporary", "was left behind", target=row.name, path=path)
            for path in row.persist:
                self._check_persistent(state, row.name, path, content)

    def _check_tree_root(self, state: StateDirectory, row: TargetRow, generation: GenerationRow) -> None:
        def say(code: str, message: str) -> None:
            self._say(code, message, target=row.name, path=str(row.root))

        form, _ = state.tree(row).form()
        right = str(state.current(row.name))
        if generation.place == "root":
            if form is not Form.FOLDER:
                say("root.missing", f"the root is {form.value}")
        elif form is Form.MISSING and row.root.parent.is_dir():
            say("root.unlinked", f"the root is missing; it should be a link to {right}")
        elif form is Form.MISSING:
            say("root.missing", "the folder that the root lies in is missing")
        elif form is Form.DIRECT:
            say("root.direct", "the root is a link past the pointer")
        elif form is Form.OTHER and row.root.is_symlink():
            with fs.opened(row.root.parent) as parent:
                torn = is_torn(row.root.name, parent, state.path, f"{CURRENT}/{row.name}")
            code = "root.torn" if torn else "root.detached"
            say(code, f"the root is a link to {row.root.readlink()}, not to {right}")
        elif form is not Form.LINKED:
            say("root.detached", "the root is no link of ours any more")

    def _check_persistent(self, state: StateDirectory, target: str, path: str, content: int) -> None:
        folders, name = split(path)
        kept = state.path / PERSIST / target / path
        try:
            with fs.below(content, folders) as folder:
                linked = fs.link_text(name, folder) == str(kept)
                there = fs.lstat(name, folder) is not None
        except (FileNotFoundError, fs.BlockedPathError):
            return
        if linked and not os.path.lexists(kept):
            self._say("persist.missing", f"{kept} is gone", target=target, path=path)
        elif not there and os.path.lexists(kept):
            self._say(
                "persist.unlinked",
                f"{kept} is there, and the tree has no link to it",
                target=target,
                path=path,
            )


def _way_back(rows: Mapping[int, GenerationRow], number: int | None) -> Iterator[GenerationRow]:
    """A generation, the one it was made from, and so on: what the others hold is of no use to anybody."""
    while number is not None and number in rows:
        yield rows[number]
        number = rows[number].parent


def places(state: Path, runtime_dir: Path | None = None) -> Iterator[tuple[Path, int]]:
    """What must not be open to everybody, and the most that its mode may allow."""
    for name in (".", SETS, GENERATIONS, PERSIST, PYCACHE):
        yield state / name, 0o755
    for name in (STAGING, UPLOADS, SAVED):
        yield state / name, 0o700
    for name in ("lock", "state.db", "state.db-wal", "state.db-shm"):
        yield state / name, 0o600
    if runtime_dir is not None:
        yield runtime_dir, 0o711


def is_torn(name: str, directory: int, state: Path, tail: str) -> bool:
    """Whether `name` is a link of ours that went wrong: it leads nowhere, and its text is the beginning of
    what is right, or what would be right if the state directory lay elsewhere. Anything else is somebody's.

    Args:
        tail: what is right, below the state directory.
    """
    text = fs.link_text(name, directory)
    if text is None or text == f"{state}/{tail}":
        return False
    cut_off = text.startswith(f"{state}/") and f"{state}/{tail}".startswith(text)
    if not cut_off and not text.endswith(f"/{tail}"):
        return False
    try:
        os.stat(name, dir_fd=directory)
    except OSError as error:
        return error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
    return False


def _ours_in(folder: int) -> Iterator[tuple[str, str | None]]:
    """Every link below an open folder, with its text, and every temporary name of ours, with None."""
    for where, folders, files, fd in os.fwalk(".", dir_fd=folder, follow_symlinks=False):
        prefix = where[2:] + "/" if where != "." else ""
        for name in (*folders, *files):
            if name.startswith(TEMPORARY_PREFIX):
                yield f"{prefix}{name}", None
                continue
            text = fs.link_text(name, fd)
            if text is not None:
                yield f"{prefix}{name}", text


def _exists_below(folder: int, path: str) -> bool:
    folders, name = split(path)
    try:
        with fs.below(folder, folders) as inner:
            return fs.lstat(name, inner) is not None
    except (FileNotFoundError, fs.BlockedPathError):
        return False


def file_system(path: Path) -> str | None:
    """The type of the file system that a path is on, as the kernel names it."""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2] == wanted:
            return after.split()[0]
    return None


def lacking_operation(folder: Path) -> tuple[str, str] | None:
    """What the store needs and a file system cannot do, tried out in `folder`; code and message."""
    names = [f"doctor-{os.getpid()}-{number}" for number in (1, 2, 3)]
    with ExitStack() as stack:
        try:
            fd = stack.enter_context(fs.opened(folder))
            for name in names:
                stack.callback(fs.unlink_quietly, name, fd)
            for name in names[:2]:
                os.close(os.open(name, fs.CREATE, 0o600, dir_fd=fd))
        except OSError as error:
            return ("readonly", f"cannot be written to: {error.strerror}")
        try:
            fs.exchange(names[0], names[1], first_dir=fd, second_dir=fd)
        except fs.CannotExchangeError:
            return ("exchange", "cannot swap two names in one step (RENAME_EXCHANGE)")
        if not fs.link(names[0], fd, names[2], fd):
            return ("links", "has no hard links: every generation is a copy of all files")
    return None
