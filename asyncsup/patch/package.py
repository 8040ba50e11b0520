"""A patch package: open it, verify it, take files out of it.

`open_package` accepts a package or refuses it before anything is extracted. What a `Package` then hands out
is checked again as it streams by: size, CRC-32 and SHA-256, each against what was accepted.

The file is opened once, and everything is read through that descriptor: who puts another file in its place
changes nothing. Who may write into the file itself could change it between two looks at it, and no time stamp
would tell for sure (memory mappings, clock ticks): hence `private_copies`.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, NoReturn, Self

from asyncsup.config.settings import PatchLimits
from asyncsup.errors import PatchMalformedError, PatchNotFoundError, PatchRefusedError, UsageError
from asyncsup.patch import archive, prototype
from asyncsup.patch import delta as deltas
from asyncsup.patch.ahead import DEPTH, read_ahead
from asyncsup.patch.archive import DEFAULT_LIMITS, Entry, limit, quote
from asyncsup.patch.manifest import SCHEMA, FileChange, Manifest, Op, Problem, malformed, parse_manifest

__all__ = ["DEFAULT_LIMITS", "Package", "PatchLimits", "open_package"]

MANIFEST: Final = "manifest.json"
FILES: Final = "files/"
DELTAS: Final = "deltas/"
SIGNATURES: Final = "signatures/"

Format = Literal["asyncsup.patch/1", "prototype"]
Sources = dict[str, Entry]
"""Entries of new and modified files by `_source_key`."""

Progress = Callable[[int], None]
"""Called with the number of bytes done since the last call."""

AHEAD_BYTES: Final = 256 << 10
"""Files from this size on are worth a second thread; smaller ones would pay more for handing over."""

_SIGNATURE = re.compile(r"signatures/([A-Za-z0-9][A-Za-z0-9._@+-]{0,127})\.sig")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


class Package:
    """An accepted package, and its open file; a context manager.

    `extract` may be called from several threads at once.

    Args:
        id: SHA-256 of the whole zip, lower-case hex.
        size: bytes of the whole zip.
        limits: those it was accepted under.
        manifest: complete also for a prototype package, whose digests and sizes are those of its sources.
        manifest_bytes: exactly as they are in the archive: what signatures are made over.
        signatures: content of ``signatures/NAME.sig`` by NAME.
    Attributes:
        owner: uid and gid of whoever owns the file that was opened.
    """

    def __init__(
        self,
        file: FileIO,
        *,
        path: Path,
        id: str,  # noqa: A002
        size: int,
        limits: PatchLimits,
        format: Format,  # noqa: A002
        manifest: Manifest,
        manifest_bytes: bytes,
        signatures: Mapping[str, bytes],
        sources: Sources,
    ) -> None:
        self._file = file
        self._sources = sources
        self.path: Final = path
        self.id: Final = id
        self.size: Final = size
        self.limits: Final = limits
        self.format: Final[Format] = format
        self.manifest: Final = manifest
        self.manifest_bytes: Final = manifest_bytes
        self.signatures: Final = signatures
        self.owner: tuple[int, int] | None = None

    def extract(self, change: FileChange, fd: int, progress: Progress | None = None) -> None:
        """Write the content of a new or modified file to `fd`, from its current position on.

        `change` is one of the manifest's, or what `prototype.with_root_name` made of one.

        Raises:
            PatchMalformedError: the content is not what the manifest says (``digest.sha256``), or the archive
                is damaged (``zip.*``). What was written up to then is worthless.
            OSError: writing failed.
        """
        if change.delta is not None:
            raise ValueError(f"{change!r} comes as a delta")
        self._read(change, lambda piece: _write_all(fd, piece), progress)

    def rebuild(self, change: FileChange, base: int, fd: int, progress: Progress | None = None) -> None:
        """Write the content of a file that comes as a delta to `fd`, made of its old content.

        The digests of the old content and of the delta are checked before anything is made of them, that of
        the result at the end.

        Args:
            base: descriptor of the old content, or of a file that has the new content already.

        Raises:
            PatchRefusedError: ``gate.base``: the file is another one.
            PatchMalformedError: as `extract` does, and ``delta.invalid``, ``delta.size``, ``zip.ratio``.
            OSError: reading or writing failed.
        """
        if change.delta is None:
            raise ValueError(f"{change!r} does not come as a delta")
        old = self._read_base(change, base)
        digest = hashlib.sha256(old).hexdigest()
        if digest == change.sha256:
            _write_all(fd, memoryview(old))
            return
        if digest != change.delta.base_sha256:
            raise PatchRefusedError(
                f"{change.path} is not the file its delta was made for (SHA-256 {digest[:12]}…, expected "
                f"{change.delta.base_sha256[:12]}…)",
                code="gate.base",
            )
        delta, size = self._read_delta(change), change.size or 0
        if size > max(archive.RATIO_FLOOR, self.limits.ratio * (len(old) + len(delta))):
            made = f"makes {size} bytes of {len(old)}; {limit(self.limits, 'ratio')}"
            raise self._refused(change, made, "zip.ratio")
        result = hashlib.sha256()
        try:
            for piece in deltas.rebuild(delta, old, size, largest=self.limits.delta_size):
                result.update(piece)
                _write_all(fd, piece)
                if progress is not None:
                    progress(len(piece))
        except PatchMalformedError as error:
            raise self._refused(change, error.message, error.error_code) from error.__cause__
        if result.hexdigest() != change.sha256:
            made = f"makes content with SHA-256 {result.hexdigest()}, the manifest says {change.sha256}"
            raise self._refused(change, made, "digest.sha256")

    def _read_base(self, change: FileChange, base: int) -> bytes:
        """The old content, which has to fit into memory."""
        size = os.fstat(base).st_size
        if size > self.limits.delta_size:
            asked = f"is one to a file of {size} bytes, {limit(self.limits, 'delta_size')}"
            raise self._refused(change, asked, "delta.size")
        with os.fdopen(base, "rb", closefd=False) as file:
            return file.read(size)

    def _read_delta(self, change: FileChange) -> bytearray:
        """The bytes of a delta, which are what the manifest says they are."""
        delta = bytearray()
        self._read(change, delta.extend, None)
        return delta

    def _refused(self, change: FileChange, message: str, code: str) -> PatchMalformedError:
        return PatchMalformedError(
            f"{self.path.name}: the delta of {quote(change.path)} {message}",
            code=code,
            file=self.path.name,
            entry=DELTAS + change.path,
        )

    def verify(self, progress: Progress | None = None) -> None:
        """Read all files as `extract` would, and throw them away. Of deltas only they themselves are checked:
        what they make depends on what is there.

        Raises:
            PatchMalformedError: as in `extract`, for the first file that is not what it should be.
        """
        for change in self.manifest.files:
            if change.op is not Op.DELETED:
                self._read(change, None, progress)

    @property
    def content_size(self) -> int:
        """Bytes that `verify` reads: of all files and deltas, unpacked."""
        return sum(entry.size for entry in self._sources.values())

    def close(self) -> None:
        """Close the file; harmless when repeated."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Package {self.path.name} {self.id[:12]} {self.format}>"

    def _read(
        self, change: FileChange, write: Callable[[memoryview], None] | None, progress: Progress | None
    ) -> None:
        entry = self._sources.get(_source_key(self.format, change))
        sha256, size = (
            (change.sha256, change.size) if change.delta is None else (change.delta.sha256, change.delta.size)
        )
        if entry is None or entry.size != size:
            raise ValueError(f"{change!r} is no new or modified file of this package")
        digest = hashlib.sha256()
        try:
            for piece in self._pieces(entry):
                digest.update(piece)
                if write is not None:
                    write(piece)
                if progress is not None:
                    progress(len(piece))
        except PatchMalformedError as error:
            raise _with_file(error, self.path) from error.__cause__
        if digest.hexdigest() != sha256:
            raise PatchMalformedError(
                f"{self.path.name}: entry {quote(entry.name)} has SHA-256 {digest.hexdigest()}, the manifest "
                f"says {sha256}; build the package again",
                code="digest.sha256",
                file=self.path.name,
                entry=entry.name,
            )

    def _pieces(self, entry: Entry) -> Iterator[memoryview]:
        if entry.size < AHEAD_BYTES and entry.compressed <= AHEAD_BYTES:
            return iter([memoryview(archive.read_small(self._file.fileno(), entry))])
        return read_ahead(archive.stream(self._file.fileno(), entry, ahead=DEPTH))


def _source_key(package_format: Format, change: FileChange) -> str:
    """How a change finds its entry.

    By its path; in a prototype package by its content, because its paths change when the target is known and
    several may share one source.
    """
    return change.path if package_format == SCHEMA else f"{change.sha256}"


def open_package(
    path: Path,
    *,
    limits: PatchLimits = DEFAULT_LIMITS,
    sha256: str | None = None,
    crc32: int | None = None,
    follow: bool = True,
    private_copies: Path | None = None,
    progress: Progress | None = None,
) -> Package:
    """Open a package and check everything about it but the content of its files.

    In this order: size, the digests of the whole file, structure of the archive, manifest, and that archive
    and manifest name the same files. Of a prototype package the sources are read as well: only they tell
    their digests.

    Args:
        sha256: what the SHA-256 of the whole file must be, in hex.
        crc32: what its CRC-32 must be.
        follow: `path` may be a symbolic link.
        private_copies: a folder that nobody else may enter. A file that others may write to is copied there,
            to a file without a name, while its digest is computed; everything is read from the copy.
        progress: of computing the digest.

    Raises:
        PatchMalformedError: it is not a valid package; the code says why.
        PatchRefusedError: ``gate.space``: there is no room for the private copy.
        PatchNotFoundError: there is no such file.
        UsageError: `sha256` or `crc32` cannot be one.
    """
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise UsageError(f"{sha256[:80]!r} is not a SHA-256: 64 hexadecimal digits", code="usage.sha256")
    if crc32 is not None and not 0 <= crc32 < 1 << 32:
        raise UsageError(f"{crc32} is not a CRC-32: it has 32 bits", code="usage.crc32")
    try:
        with ExitStack() as undo:
            file = undo.enter_context(_open(path, follow=follow))
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                _refuse("zip.unreadable", "is not a regular file")
            copy = None
            if private_copies is not None and _others_may_write(status):
                copy = undo.enter_context(_private_file(private_copies))
            package = _read_package(
                file, path, limits, copy=copy, sha256=sha256, crc32=crc32, progress=progress
            )
            package.owner = status.st_uid, status.st_gid
            undo.pop_all()
        if copy is not None:
            file.close()
        return package
    except PatchMalformedError as error:
        raise _with_file(error, path) from error.__cause__
    except FileNotFoundError:
        raise PatchNotFoundError(f"there is no file {path}", path=str(path)) from None
    except OSError as error:
        malformed_error = PatchMalformedError(f"cannot be read: {error.strerror}", code="zip.unreadable")
        raise _with_file(malformed_error, path) from error


def _open(path: Path, *, follow: bool) -> FileIO:
    # Not blocking: a FIFO in the inbox must not hold up whoever looks at it.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    return FileIO(os.open(path, flags))


def _others_may_write(status: os.stat_result) -> bool:
    """Whether anybody but us and root may change a file (the group's bit includes what an ACL grants)."""
    return status.st_uid not in {0, os.geteuid()} or bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _private_file(folder: Path) -> FileIO:
    try:
        file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - the caller closes it
    except OSError as error:
        raise _no_copy(error) from error
    assert isinstance(file, FileIO)
    return file


def _read_package(
    file: FileIO,
    path: Path,
    limits: PatchLimits,
    *,
    copy: FileIO | None,
    sha256: str | None,
    crc32: int | None,
    progress: Progress | None,
) -> Package:
    fd = file.fileno()
    status = os.fstat(fd)
    if status.st_size > limits.package_size:
        _refuse("zip.package_size", f"has {status.st_size} bytes, {limit(limits, 'package_size')}")
    try:
        package_id, checksum = _digests(
            fd, status.st_size, copy, want_crc32=crc32 is not None, progress=progress
        )
        if sha256 is not None and sha256.lower() != package_id:
            _refuse("digest.sha256", f"has SHA-256 {package_id}, {sha256.lower()} was asked for")
        if crc32 is not None and crc32 != checksum:
            asked = f"{crc32} (0x{crc32:08x}) was asked for"
            _refuse("digest.crc32", f"has CRC-32 {checksum} (0x{checksum:08x}), {asked}")
        source = file if copy is None else copy
        entries = archive.scan(source.fileno(), status.st_size, limits)
        package = _read_contents(source, path, entries, limits, package_id=package_id, size=status.st_size)
    except PatchMalformedError as error:
        # If the file is being written to, that is what is wrong with it, whatever was seen of it.
        _refuse_changed(fd, status, cause=error)
        raise
    _refuse_changed(fd, status, cause=None)
    return package


def _digests(
    fd: int, size: int, copy: FileIO | None, *, want_crc32: bool, progress: Progress | None
) -> tuple[str, int]:
    """SHA-256 and CRC-32 of the file, which is copied to `copy` on the way."""
    digest = hashlib.sha256()
    checksum = 0
    buffer = memoryview(bytearray(min(archive.CHUNK, size)))
    position = 0
    while position < size:
        count = os.preadv(fd, [buffer[: min(len(buffer), size - position)]], position)
        if count == 0:
            break  # it became shorter, which is noticed afterwards
        piece = buffer[:count]
        digest.update(piece)
        if want_crc32:
            checksum = zlib.crc32(piece, checksum)
        if copy is not None:
            _write_copy(copy.fileno(), piece)
        position += count
        if progress is not None:
            progress(count)
    return digest.hexdigest(), checksum


def _write_copy(fd: int, piece: memoryview) -> None:
    try:
        _write_all(fd, piece)
    except OSError as error:
        raise _no_copy(error) from error


def _no_copy(error: OSError) -> PatchRefusedError:
    message = f"the package cannot be copied to where nobody else may change it: {error.strerror}"
    return PatchRefusedError(message, code="gate.space")


def _read_contents(
    file: FileIO, path: Path, entries: Sequence[Entry], limits: PatchLimits, *, package_id: str, size: int
) -> Package:
    by_name = {entry.name: entry for entry in entries}
    fd = file.fileno()
    signatures: Mapping[str, bytes] = {}
    native, older = by_name.get(MANIFEST), by_name.get(prototype.MANIFEST)
    if native is not None and native is entries[0] and native.offset == 0:
        package_format: Format = SCHEMA
        raw = _read_small(fd, native, limits, "manifest_size")
        manifest = parse_manifest(raw)
        signatures, sources = _match(fd, manifest, by_name, limits)
    elif older is not None:
        package_format = "prototype"
        raw = _read_small(fd, older, limits, "manifest_size")
        manifest, sources = _match_prototype(fd, path, prototype.parse_prototype(raw), by_name, limits)
    elif native is not None:
        raise PatchMalformedError(
            f"{MANIFEST} must be the first entry of the archive, {quote(entries[0].name)} is; "
            "pack with `asyncsup patch build`, or name the manifest first (7-Zip sorts and cannot)",
            code="manifest.not_first",
            entry=MANIFEST,
        )
    else:
        raise PatchMalformedError(
            f"the archive has neither {MANIFEST} nor {prototype.MANIFEST}: it is no patch",
            code="manifest.missing",
        )
    return Package(
        file,
        path=path,
        id=package_id,
        size=size,
        limits=limits,
        format=package_format,
        manifest=manifest,
        manifest_bytes=raw,
        signatures=signatures,
        sources=sources,
    )


def _match(
    fd: int, manifest: Manifest, by_name: Mapping[str, Entry], limits: PatchLimits
) -> tuple[dict[str, bytes], Sources]:
    """Signatures by name, and the files' entries, if manifest and archive name the same files."""
    problems: list[Problem] = []
    sources: Sources = {}
    signatures: dict[str, Entry] = {}
    unlisted = dict(by_name)
    del unlisted[MANIFEST]
    for index, change in enumerate(manifest.files):
        where = f"files[{index}]"
        if change.path.count("/") >= limits.path_depth:
            message = f"{quote(change.path)} is too deep: {limit(limits, 'path_depth')}"
            problems.append(Problem(code="manifest.path", where=f"{where}.path", message=message))
        if change.sha256 is None:
            continue
        name, size = (
            (FILES + change.path, change.size)
            if change.delta is None
            else (DELTAS + change.path, change.delta.size)
        )
        entry = unlisted.pop(name, None)
        if entry is None:
            message = f"the archive has no entry {quote(name)}"
            problems.append(Problem(code="manifest.missing_file", where=where, message=message))
        elif entry.size != size:
            message = f"says {size} bytes, the archive's entry has {entry.size}"
            problems.append(Problem(code="manifest.file_size", where=f"{where}.size", message=message))
        else:
            sources[change.path] = entry
    for name, entry in unlisted.items():
        signature = _SIGNATURE.fullmatch(name)
        if entry.is_folder and (name == SIGNATURES or name.startswith((FILES, DELTAS))):
            continue
        if signature is not None and not entry.is_folder:
            signatures[signature[1]] = entry
            continue
        problems.append(_unlisted(name))
    if len(signatures) > limits.signatures:
        message = f"the archive has {len(signatures)} signatures, {limit(limits, 'signatures')}"
        problems.append(Problem(code="zip.count", where="", message=message))
    problems.extend(_above_limits(manifest, limits))
    if problems:
        raise malformed(problems)
    # Whoever may offer a package may put as many into it as it has entries: they are counted by now.
    contents = {name: _read_small(fd, entry, limits, "signature_size") for name, entry in signatures.items()}
    return contents, sources


def _above_limits(manifest: Manifest, limits: PatchLimits) -> Iterator[Problem]:
    """What is not in the archive has limits all the same: files that are deleted, and what deltas make.

    A delta itself is held in memory like what it is made of.
    """
    yield from _too_many(len(manifest.files), limits)
    total = 0
    for index, change in enumerate(manifest.files):
        size = change.size or 0
        total += size
        if change.delta is None:
            continue
        if change.delta.size > limits.delta_size:
            message = f"the delta has {change.delta.size} bytes, {limit(limits, 'delta_size')}"
            yield Problem(code="delta.size", where=f"files[{index}].delta.size", message=message)
        for name, code in (("delta_size", "delta.size"), ("file_size", "zip.file_size")):
            if size > getattr(limits, name):
                message = f"the delta makes {size} bytes, {limit(limits, name)}"
                yield Problem(code=code, where=f"files[{index}].size", message=message)
    if total > limits.total_size:
        message = f"the files have {total} bytes in all, {limit(limits, 'total_size')}"
        yield Problem(code="zip.total_size", where="files", message=message)


def _too_many(files: int, limits: PatchLimits) -> Iterator[Problem]:
    if files > limits.files:
        message = f"the manifest lists {files} files, {limit(limits, 'files')}"
        yield Problem(code="zip.count", where="files", message=message)


def _match_prototype(
    fd: int, path: Path, manifest: prototype.Prototype, by_name: Mapping[str, Entry], limits: PatchLimits
) -> tuple[Manifest, Sources]:
    """The complete manifest and the files' entries; reads all sources."""
    problems = list(_too_many(len(manifest.files), limits))
    wanted: dict[str, Entry] = {}
    unlisted = {name for name in by_name if name != prototype.MANIFEST and name not in prototype.FOLDERS}
    for file in manifest.files:
        unlisted.discard(file.source)
        if file.path.count("/") >= limits.path_depth:
            message = f"{quote(file.path)} is too deep: {limit(limits, 'path_depth')}"
            problems.append(Problem(code="manifest.path", where="", message=message))
        if file.op is Op.DELETED:
            continue
        entry = by_name.get(file.source)
        if entry is None:
            message = f"the archive has no entry {quote(file.source)}"
            problems.append(Problem(code="manifest.missing_file", where="", message=message))
        else:
            wanted[file.source] = entry
    problems.extend(_unlisted(name) for name in sorted(unlisted))
    if problems:
        raise malformed(problems)
    contents: dict[str, prototype.Content] = {}
    sources: Sources = {}
    for name, entry in wanted.items():
        digest = hashlib.sha256()
        for piece in archive.stream(fd, entry):
            digest.update(piece)
        contents[name] = prototype.Content(sha256=digest.hexdigest(), size=entry.size)
        sources[digest.hexdigest()] = entry
    complete = prototype.to_manifest(manifest, name=prototype.name_from_file(path.name), contents=contents)
    return complete, sources


def _unlisted(name: str) -> Problem:
    message = f"the archive's entry {quote(name)} is not in the manifest"
    return Problem(code="manifest.extra_file", where="", message=message)


def _read_small(fd: int, entry: Entry, limits: PatchLimits, name: str) -> bytes:
    if entry.size > getattr(limits, name):
        raise PatchMalformedError(
            f"{entry.name} has {entry.size} bytes, {limit(limits, name)}",
            code="manifest.size",
            entry=entry.name,
        )
    return b"".join(bytes(piece) for piece in archive.stream(fd, entry))


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _refuse_changed(fd: int, before: os.stat_result, *, cause: PatchMalformedError | None) -> None:
    after = os.fstat(fd)
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        message = "changed while it was being read; wait until it is complete"
        raise PatchMalformedError(message, code="zip.changed") from cause


def _refuse(code: str, message: str) -> NoReturn:
    raise PatchMalformedError(message, code=code)


def _with_file(error: PatchMalformedError, path: Path) -> PatchMalformedError:
    """The same error, with the package's name in front."""
    details = {"file": path.name, **error.details}
    return PatchMalformedError(f"{path.name}: {error.message}", code=error.error_code, **details)
