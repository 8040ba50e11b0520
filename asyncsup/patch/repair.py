"""Mends what `doctor` has found in a state directory, as far as it is sure of it; never beside a supervisor.

What a start of the supervisor would do anyway (take back what was cut off, sweep, set a lost pointer again)
is done by the same code. Files are made anew only from a copy with the right digest, and what stood there is
kept in ``saved``. Otherwise only links and temporary names of ours are removed. Every mend is written down in
the audit.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from asyncsup.actor import Actor
from asyncsup.errors import AsyncsupError, NotAllowedError, StateError, StateLockedError
from asyncsup.failpoints import failpoint
from asyncsup.patch import fs
from asyncsup.patch.confirmed import confirmed_entry, is_whole
from asyncsup.patch.database import FileRow, timestamp
from asyncsup.patch.doctor import Diagnosis, Finding, Progress, diagnose, is_torn, places
from asyncsup.patch.look import TEMPORARY_PREFIX, identity, split
from asyncsup.patch.package import Package, open_package
from asyncsup.patch.pointer import CURRENT
from asyncsup.patch.statedir import OVERLAY, PERSIST, StateDirectory, lock_holder
from asyncsup.patch.store import Store
from asyncsup.patch.swap import put, same_as
from asyncsup.patch.target_files import present
from asyncsup.patch.tree import Form

_TEMPORARY: Final = f"{TEMPORARY_PREFIX}doctor"

_DRIFT: Final = frozenset({"file.written", "file.removed", "leaf.missing"})
"""What somebody may have wanted so."""

T = TypeVar("T")
Key = tuple[str, str | None, int | None, str | None]


class Mended(msgspec.Struct, frozen=True, kw_only=True):
    """A finding, and what was done about it."""

    finding: Finding
    done: str

    def to_json(self) -> dict[str, Any]:
        return {**self.finding.to_json(), "done": self.done}


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a repair has come to.

    Attributes:
        left: what an examination finds afterwards.
        because: why something was left as it is, where that was tried.
    """

    mended: tuple[Mended, ...]
    left: Diagnosis
    because: Mapping[Key, str]

    def to_json(self) -> dict[str, Any]:
        value = self.left.to_json()
        for kind in ("problems", "warnings"):
            value[kind] = [
                {**finding.to_json(), "left_because": self.because.get(finding.key)}
                for finding in self.left.findings
                if f"{finding.level}s" == kind
            ]
        return {**value, "mended": [each.to_json() for each in self.mended]}


class _CannotMendError(Exception):
    """It is not sure what would be right, or there is nothing to make it right with."""


def repair(
    path: Path,
    *,
    runtime_dir: Path | None = None,
    packages: Sequence[Path] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Outcome:
    """Examine a state directory, mend what can be mended, and examine it again.

    Args:
        packages: patches whose files may take the place of damaged ones.
        overwrite: files that somebody has written to or removed are made anew as well.
    Raises:
        StateLockedError: a supervisor has it; nothing was touched.
        NotAllowedError: it is another user's; nothing was touched.
        StateError: there is no such directory, or it cannot be read.
        PatchMalformedError, PatchNotFoundError: of a package.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(open_package(package)) for package in packages]
        before = diagnose(path, runtime_dir=runtime_dir, progress=progress)
        _refuse_beside_a_supervisor(before.path)
        _refuse_as_somebody_else(before.path)
        job = _Repair(opened, overwrite=overwrite)
        job.mend_permissions(before, runtime_dir)
        hopeless = [f for f in _with_code(before, "database", "state") if f.code != "database.integrity"]
        if hopeless:
            job.give_up(before, hopeless[0].message)
        else:
            job.take(before.path)
            with contextlib.closing(job):
                job.mend_database(before)
                job.mend_generations(before)
                job.mend_pointer(before)
                job.recover(before)
                job.mend_roots(diagnose(path, runtime_dir=runtime_dir, progress=progress))
        left = diagnose(path, runtime_dir=runtime_dir, progress=progress)
    return Outcome(mended=tuple(job.mended), left=left, because=job.because)


def _refuse_beside_a_supervisor(path: Path) -> None:
    holder = lock_holder(path)
    if holder is not None:
        raise StateLockedError(
            f"{path} is in use by a supervisor (process {holder}), and nothing is mended beside it; "
            "`asyncsup shutdown` first. Without --repair it can be examined all the same",
            pid=holder,
            state_dir=str(path),
        )


def _refuse_as_somebody_else(path: Path) -> None:
    owner = path.stat().st_uid
    if owner != os.geteuid():
        raise NotAllowedError(
            f"{path} belongs to uid {owner}, and what is made anew has to belong to it as well; repair it as "
            "that user",
            state_dir=str(path),
        )


class _Repair:
    """One repair: what was mended, and why something was not."""

    state: StateDirectory
    store: Store

    def __init__(self, packages: Sequence[Package], *, overwrite: bool) -> None:
        self.mended: list[Mended] = []
        self.because: dict[Key, str] = {}
        self._packages = packages
        self._overwrite = overwrite
        self._taken = False
        self._by = Actor.this_process("doctor").to_json()
        self._label = f"doctor-{timestamp().replace(':', '')}"

    def take(self, path: Path) -> None:
        """Take the lock, and open the database.

        Raises:
            StateLockedError, StateError: it cannot be had, or opened.
        """
        try:
            self.state = StateDirectory.open(path)
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            raise StateError(
                f"{path} cannot be opened: {error.strerror}{where}", code="state.unusable"
            ) from error
        self.store = Store(self.state)
        self._taken = True
        for each in self.mended:
            self._write_down(each)

    def close(self) -> None:
        self.store.close()

    def give_up(self, diagnosis: Diagnosis, why: str) -> None:
        for finding in diagnosis.findings:
            self.because.setdefault(finding.key, f"without the database nothing is sure: {why}")

    def _try(self, finding: Finding, mend: Callable[[Finding], str]) -> None:
        if finding.code in _DRIFT and not self._overwrite:
            self.because[finding.key] = "somebody may want it so; `--drift overwrite` makes it anew"
            return
        try:
            done = mend(finding)
        except (_CannotMendError, OSError, AsyncsupError) as error:
            self.because[finding.key] = str(error)
            return
        self._add(finding, done)

    def _add(self, finding: Finding, done: str) -> None:
        self.mended.append(Mended(finding=finding, done=done))
        if self._taken:
            self._write_down(self.mended[-1])

    def _write_down(self, mended: Mended) -> None:
        finding = mended.finding
        self.state.database.record(
            "doctor.repaired",
            code=finding.code,
            target=finding.target,
            generation=finding.generation,
            path=finding.path,
            done=mended.done,
            by=self._by,
        )

    # --- around the store -----------------------------------------------------------------------------------

    def mend_permissions(self, diagnosis: Diagnosis, runtime_dir: Path | None) -> None:
        allowed = {str(path): most for path, most in places(diagnosis.path, runtime_dir)}

        def mend(finding: Finding) -> str:
            path = Path(_given(finding.path))
            mode = stat.S_IMODE(path.stat(follow_symlinks=False).st_mode) & allowed[str(path)]
            if path.is_symlink():
                raise _CannotMendError("it is a symbolic link")
            path.chmod(mode)
            return f"mode set to {mode:04o}"

        for finding in _with_code(diagnosis, "permissions.mode"):
            self._try(finding, mend)

    def mend_database(self, diagnosis: Diagnosis) -> None:
        def mend(finding: Finding) -> str:
            if not all(" index " in complaint for complaint in self.state.database.complaints()):
                raise _CannotMendError("more than an index is damaged; put back a copy of state.db")
            self.state.database.rebuild_indexes()
            if self.state.database.complaints():
                raise _CannotMendError("making the indexes anew did not help")
            return "all indexes made anew"

        for finding in _with_code(diagnosis, "database.integrity"):
            self._try(finding, mend)

    def mend_pointer(self, diagnosis: Diagnosis) -> None:
        """What is left half done is swept, a lost pointer set again, and each target brought to what was
        confirmed."""
        try:
            self.store.settle()
        except (OSError, AsyncsupError) as error:
            self.because.update({f.key: str(error) for f in _with_code(diagnosis, "pointer")})
            return

        def set_anew(_: Finding) -> str:
            try:
                self.state.pointer.entries()
            except StateError:
                # One of the set's links is none: each target is shown again below.
                self.state.pointer.replace({}, point="store.repair")
            return "set to what was last confirmed"

        def show_confirmed(finding: Finding) -> str:
            row = self.state.database.target(_given(finding.target))
            if any(
                part.target == row.name
                for transaction in self.state.database.unfinished_transactions()
                for part in self.state.database.parts(transaction.txn)
            ):
                raise _CannotMendError("a transaction on it was cut off")
            generation = self.state.database.generation(row.name, row.confirmed)
            if generation.place == "store" and not is_whole(self.state, row.name, row.confirmed):
                raise _CannotMendError(f"generation {row.confirmed}, which was confirmed last, is damaged")
            self.state.pointer.flip({row.name: confirmed_entry(self.state, row)}, point="store.repair")
            return f"set to generation {row.confirmed}, which was confirmed last"

        for finding in _with_code(diagnosis, "pointer.missing", "pointer.broken"):
            self._try(finding, set_anew)
        entries = self.state.pointer.entries()
        for row in self.state.database.targets():
            if row.name not in entries:
                missing = Finding(
                    code="pointer.entry", message="the pointer does not show it", target=row.name
                )
                self._try(missing, show_confirmed)
        for finding in _with_code(diagnosis, "pointer.unconfirmed", "pointer.entry"):
            if finding.target in entries:
                self._try(finding, show_confirmed)

    def recover(self, diagnosis: Diagnosis) -> None:
        """As a start of the supervisor would; and what that removes besides."""
        try:
            for done in self.store.recover():
                if done.action == "undecided":
                    continue  # It is somebody's to decide about.
                finding = Finding(
                    code="target.releasing" if done.action == "released" else "transaction.unfinished",
                    message=f"transaction {done.txn} was cut off" if done.txn else "its release was cut off",
                    target=", ".join(done.targets),
                )
                self._add(finding, done.action.replace("_", " "))
        except (OSError, AsyncsupError) as error:
            unfinished = _with_code(diagnosis, "transaction.unfinished")
            self.because.update({finding.key: f"taking it back failed: {error}" for finding in unfinished})

        def is_gone(finding: Finding) -> str:
            path = Path(_given(finding.path))
            if path.parent.name == "uploads":
                path.unlink(missing_ok=True)
            if os.path.lexists(path):
                raise _CannotMendError("it could not be removed")
            return "removed"

        def is_swept(finding: Finding) -> str:
            path = self.state.generation(_given(finding.target), _given(finding.generation))
            if os.path.lexists(path):
                raise _CannotMendError("a reader holds it")
            return "removed"

        for finding in _with_code(diagnosis, "leftover.file"):
            self._try(finding, is_gone)
        for finding in _with_code(diagnosis, "generation.orphan"):
            self._try(finding, is_swept)
        for finding in _with_code(diagnosis, "root.direct"):
            self._try(finding, self._is_linked)

    def _is_linked(self, finding: Finding) -> str:
        form, _ = self.state.tree(self.state.database.target(_given(finding.target))).form()
        if form is not Form.LINKED:
            raise _CannotMendError(f"it is {form.value}")
        return "made to lead through the pointer"

    # --- generations and their files ------------------------------------------------------------------------

    def mend_generations(self, diagnosis: Diagnosis) -> None:
        for finding in _with_code(diagnosis, "generation.missing"):
            self._try(finding, self._mend_generation)
        damaged = ("file.damaged", "file.missing", "file.unreadable", "file.written", "file.removed")
        for finding in _with_code(diagnosis, *damaged):
            self._try(finding, self._make_file)
        for finding in _with_code(diagnosis, "file.writable"):
            self._try(finding, self._take_write_bits)

    def _mend_generation(self, finding: Finding) -> str:
        row, database = self.state.database.target(_given(finding.target)), self.state.database
        if finding.generation is None:
            raise _CannotMendError("all its files are gone")
        if finding.generation != row.confirmed:
            with database.write():
                database.update_generation(row.name, finding.generation, state="pruned")
            return "nothing goes back to it any more"
        if row.layout != OVERLAY:
            raise _CannotMendError("what the program had in it is known to nobody")
        paths = sorted(present(database.files(row.name, row.confirmed)))
        for path in paths:
            wanted = database.files(row.name, row.confirmed)[path].sha256
            assert wanted is not None
            with ExitStack() as stack:
                self._find_copy(stack, wanted, row.name, path, unlike=None)
        with fs.opened(self.state.generations(row.name)) as home, fs.Durability(self.state.fd) as durability:
            os.close(fs.make_below(home, [str(row.confirmed)], durability))
            durability.barrier()
            with fs.opened(row.root) as root, fs.below(home, [str(row.confirmed)]) as folder:
                fs.mirror_directory(os.fstat(root), folder)
        for path in paths:
            self._make_file(
                Finding(code="file.missing", message="", target=row.name, generation=row.confirmed, path=path)
            )
        return f"made anew, {len(paths)} files"

    def _make_file(self, finding: Finding) -> str:
        """Put a copy with the right digest in place of a damaged or missing file; in one step."""
        target, number, path = _given(finding.target), _given(finding.generation), _given(finding.path)
        row = self.state.database.files(target, number)[path]
        folders, name = split(path)
        with ExitStack() as stack:
            durability = stack.enter_context(fs.Durability(self.state.fd))
            home = stack.enter_context(fs.opened(self.state.generation(target, number)))
            folder = fs.make_below(home, folders, durability)
            stack.callback(os.close, folder)
            stack.callback(fs.unlink_quietly, _TEMPORARY, folder)
            old = fs.lstat(name, folder)
            if old is not None and not stat.S_ISREG(old.st_mode):
                raise _CannotMendError("what stands there is no file")
            assert row.sha256 is not None
            copy = self._find_copy(stack, row.sha256, target, path, unlike=old)
            fs.unlink_quietly(_TEMPORARY, folder)
            shared = copy.share(row, folder, durability)
            if not shared:
                copy.write(folder, durability)
                self._dress(row, folder, old or os.fstat(folder))
            if fs.sha256_of(_TEMPORARY, folder) != row.sha256:
                raise _CannotMendError(f"{copy.where} changed meanwhile")
            saved = "" if old is None else self._save(target, path, folder, durability)
            durability.barrier()
            failpoint("doctor.file.written")
            os.rename(_TEMPORARY, name, src_dir_fd=folder, dst_dir_fd=folder)
            failpoint("doctor.file.renamed")
            durability.directory(folder)
            durability.barrier()
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        self.state.database.set_identity(target, number, path, identity(status))
        return f"made anew from {copy.where}{saved}"

    def _find_copy(
        self, stack: ExitStack, sha256: str, target: str, path: str, *, unlike: os.stat_result | None
    ) -> _Copy:
        """Something with this digest; checked, not believed.

        Args:
            unlike: the damaged file, which has other names.
        """
        alike_first = sorted(
            self.state.database.files_with(sha256), key=lambda found: (found[0] != target, found[2] != path)
        )
        for other, number, where in alike_first:
            row = self.state.database.files(other, number)[where]
            label = f"generation {number}" + ("" if other == target else f" of {other}")
            alike = row if (other, where) == (target, path) else None
            copy = _Copy.in_folder(stack, self.state.generation(other, number), where, label, row=alike)
            if copy is not None and copy.is_good(sha256, unlike):
                return copy
        root = self.state.database.target(target).root
        copy = _Copy.in_folder(stack, root, path, "the file of that name in the root")
        if copy is not None and copy.is_good(sha256, unlike):
            return copy
        for package in self._packages:
            if any(change.sha256 == sha256 for change in package.manifest.files):
                return _Copy(where=package.path.name, package=package, sha256=sha256)
        raise _CannotMendError(
            f"there is no other copy of it (SHA-256 {sha256}); --package FILE names a package that has it"
        )

    def _dress(self, row: FileRow, folder: int, owner: os.stat_result) -> None:
        """Owner, mode and time, as they were when the file was delivered or adopted."""
        fd = os.open(_TEMPORARY, fs.READ, dir_fd=folder)
        try:
            if os.geteuid() == 0:
                os.fchown(fd, owner.st_uid, owner.st_gid)
            os.fchmod(fd, row.mode if row.origin is None else row.mode & ~0o222 | 0o400)
            mtime = int(row.identity.rpartition(":")[2])
            os.utime(fd, ns=(mtime, mtime))
            os.fsync(fd)
        finally:
            os.close(fd)

    def _save(self, target: str, path: str, folder: int, durability: fs.Durability) -> str:
        folders, name = split(path)
        source = os.open(name, fs.READ, dir_fd=folder)
        try:
            with self.state.saving() as base:
                there = fs.make_below(base, [target, self._label, *folders], durability)
                try:
                    free = name
                    while fs.lstat(free, there) is not None:
                        free += "~"  # of another generation
                    fs.copy_regular(source, free, there, durability)
                    durability.directory(there)
                finally:
                    os.close(there)
        finally:
            os.close(source)
        return f"; what was there is {self.state.saved(target, self._label).joinpath(*folders, free)}"

    def _take_write_bits(self, finding: Finding) -> str:
        folders, name = split(_given(finding.path))
        generation = self.state.generation(_given(finding.target), _given(finding.generation))
        with fs.opened(generation) as home, fs.below(home, folders) as folder:
            fd = os.open(name, fs.READ, dir_fd=folder)
            try:
                mode = stat.S_IMODE(os.fstat(fd).st_mode) & ~0o222
                os.fchmod(fd, mode)
            finally:
                os.close(fd)
        return f"mode set to {mode:04o}"

    # --- roots ----------------------------------------------------------------------------------------------

    def mend_roots(self, diagnosis: Diagnosis) -> None:
        mends: Mapping[str, Callable[[Finding], str]] = {
            "leaf.missing": self._link_leaf,
            "leaf.torn": self._relink_leaf,
            "leaf.stray": self._unlink_leaf,
            "leftover.temporary": self._remove_temporary,
            "root.unlinked": self._link_root,
            "root.torn": self._link_root,
            "persist.unlinked": self._link_persistent,
        }
        for finding in diagnosis.findings:
            if finding.code in mends:
                self._try(finding, mends[finding.code])

    @contextlib.contextmanager
    def _beside(self, finding: Finding) -> Any:
        """The open folder in which a name of an overlay's root, or of a tree, is; and the name."""
        row = self.state.database.target(_given(finding.target))
        folders, name = split(_given(finding.path))
        base = row.root if row.layout == OVERLAY else self.state.content(row)
        with fs.opened(base) as fd, fs.below(fd, folders) as folder:
            yield folder, name
            os.fsync(folder)

    def _text(self, finding: Finding) -> str:
        return f"{self.state.current(_given(finding.target))}/{finding.path}"

    def _link_leaf(self, finding: Finding) -> str:
        row = self.state.database.target(_given(finding.target))
        with fs.opened(row.root) as root, fs.Durability(self.state.fd, root) as durability:
            self.state.overlay(row, root).link([_given(finding.path)], durability)
            durability.barrier()
        return "link made again"

    def _relink_leaf(self, finding: Finding) -> str:
        with self._beside(finding) as (folder, name):
            if not is_torn(name, folder, self.state.path, f"{CURRENT}/{finding.target}/{finding.path}"):
                raise _CannotMendError("it has changed meanwhile")
            before, status = fs.link_text(name, folder), os.stat(name, dir_fd=folder, follow_symlinks=False)
            fs.unlink_quietly(_TEMPORARY, folder)
            os.symlink(self._text(finding), _TEMPORARY, dir_fd=folder)
            done = put(name, _TEMPORARY, folder, same_as(status))
            fs.unlink_quietly(_TEMPORARY, folder)
        if not done:
            raise _CannotMendError("it has changed meanwhile")
        return f"link made anew; it led to {before}"

    def _unlink_leaf(self, finding: Finding) -> str:
        row = self.state.database.target(_given(finding.target))
        with fs.opened(row.root) as root, fs.Durability(self.state.fd, root) as durability:
            removed = self.state.overlay(row, root).unlink(_given(finding.path), durability)
            durability.barrier()
        if not removed:
            raise _CannotMendError("it has changed meanwhile")
        return "link removed"

    def _remove_temporary(self, finding: Finding) -> str:
        with self._beside(finding) as (folder, name):
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            ours = stat.S_ISLNK(status.st_mode) or name == _TEMPORARY
            if not ours and not (stat.S_ISREG(status.st_mode) and status.st_nlink > 1):
                raise _CannotMendError(
                    "it may be the only copy of what the program saved; look at it, and remove it"
                )
            os.unlink(name, dir_fd=folder)
        return "removed"

    def _link_root(self, finding: Finding) -> str:
        row = self.state.database.target(_given(finding.target))
        if not self.state.current(row.name).is_dir():
            raise _CannotMendError("the pointer leads to no folder for it")
        tree = self.state.tree(row)
        form, _ = tree.form()
        if form not in {Form.MISSING, Form.OTHER} or (form is Form.OTHER and not row.root.is_symlink()):
            raise _CannotMendError(f"it is {form.value}")
        before = row.root.readlink() if form is Form.OTHER else None
        tree.point_through_current()
        return "link made" + ("" if before is None else f" anew; it led to {before}")

    def _link_persistent(self, finding: Finding) -> str:
        with self._beside(finding) as (folder, name):
            os.symlink(
                self.state.path / PERSIST / str(finding.target) / str(finding.path), name, dir_fd=folder
            )
        return "link made again"


class _Copy:
    """Content with the right digest, and how to get at it."""

    def __init__(
        self,
        *,
        where: str,
        folder: int | None = None,
        name: str = "",
        row: FileRow | None = None,
        package: Package | None = None,
        sha256: str = "",
    ) -> None:
        self.where = where
        self._folder = folder
        self._name = name
        self._row = row
        self._package = package
        self._sha256 = sha256

    @classmethod
    def in_folder(
        cls, stack: ExitStack, base: Path, path: str, where: str, *, row: FileRow | None = None
    ) -> _Copy | None:
        """A regular file below a folder, if there is one. `row`: what is known of it as another generation's
        version of the very file that is damaged."""
        folders, name = split(path)
        try:
            home = stack.enter_context(fs.opened(base))
            folder = stack.enter_context(fs.below(home, folders))
            status = fs.lstat(name, folder)
        except (OSError, fs.BlockedPathError):
            return None
        if status is None or not stat.S_ISREG(status.st_mode):
            return None
        return cls(where=where, folder=folder, name=name, row=row)

    def is_good(self, sha256: str, unlike: os.stat_result | None) -> bool:
        assert self._folder is not None
        status = os.stat(self._name, dir_fd=self._folder, follow_symlinks=False)
        if unlike is not None and os.path.samestat(status, unlike):
            return False
        try:
            return fs.sha256_of(self._name, self._folder) == sha256
        except OSError:
            return False

    def share(self, row: FileRow, folder: int, durability: fs.Durability) -> bool:
        """Give the copy its name in the open folder, if it is the same version of the same file."""
        same = self._row is not None and (self._row.origin, self._row.mode) == (row.origin, row.mode)
        if not same or self._folder is None:
            return False
        linked = fs.link(self._name, self._folder, _TEMPORARY, folder)
        durability.directory(folder)
        return linked

    def write(self, folder: int, durability: fs.Durability) -> None:
        if self._folder is not None:
            source = os.open(self._name, fs.READ, dir_fd=self._folder)
            try:
                fs.copy_regular(source, _TEMPORARY, folder, durability)
            finally:
                os.close(source)
            return
        assert self._package is not None
        change = next(each for each in self._package.manifest.files if each.sha256 == self._sha256)
        fd = os.open(_TEMPORARY, fs.CREATE, 0o600, dir_fd=folder)
        try:
            self._package.extract(change, fd)
        finally:
            os.close(fd)


def _given(value: T | None) -> T:
    """What a finding of that code always has."""
    assert value is not None
    return value


def _with_code(diagnosis: Diagnosis, *codes: str) -> list[Finding]:
    """The findings with one of the codes, or with a code of that family."""
    return [f for f in diagnosis.findings if f.code in codes or f.code.partition(".")[0] in codes]
