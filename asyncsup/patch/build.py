"""Make packages: from two folders, or in the prototype's layout.

The same input gives the same bytes (with the same zlib): entries are sorted, times and attributes fixed, and
no clock is read. A package appears at its place complete, or not at all.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import os
import secrets
import stat
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Final, NoReturn

import msgspec
from msgspec.structs import replace

from asyncsup.config.settings import PatchLimits
from asyncsup.errors import PatchBuildError, PatchMalformedError
from asyncsup.patch import archive, paths
from asyncsup.patch import delta as deltas
from asyncsup.patch.archive import CHUNK, DEFAULT_LIMITS, DEFLATED, MAX16, MAX32, STORED
from asyncsup.patch.manifest import (
    DEFAULT_MODE,
    Delta,
    FileChange,
    Kind,
    Manifest,
    Op,
    Requires,
    encode_manifest,
    parse_manifest,
)
from asyncsup.patch.package import DELTAS, FILES, MANIFEST, open_package

Progress = Callable[[int], None]
"""Called with the number of bytes read since the last call."""

ENV_CREATED: Final = "SOURCE_DATE_EPOCH"
"""Seconds since 1970: what reproducible builds take for the time (https://reproducible-builds.org/specs)."""

_COMPRESSION_LEVEL: Final = 6
MIN_DELTA_BYTES: Final = 1 << 10
"""A delta of a smaller file saves less than its lines in the manifest take."""

_DATE_1980: Final = 1 << 5 | 1
_VERSION: Final = 20


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """A regular file of a folder that is compared."""

    file: Path
    size: int
    mode: int


def build_patch(
    *,
    old: Path | Mapping[str, Source] | None,
    new: Path,
    output: Path,
    name: str,
    version: str,
    build: int,
    kind: Kind,
    targets: Sequence[str],
    regions: Sequence[str],
    created: datetime | None = None,
    expires: datetime | None = None,
    requires: Requires = Requires(),  # noqa: B008 (frozen)
    build_floor: int | None = None,
    downgrade: bool = False,
    probation: float | None = None,
    notes: str = "",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    normal_modes: bool = False,
    store: bool = False,
    delta: bool = False,
    limits: PatchLimits = DEFAULT_LIMITS,
    progress: Progress | None = None,
) -> Manifest:
    """Write the package that turns the folder `old` into the folder `new`.

    Content and permission bits count, times and empty folders do not; `.asyncsup*` is left out always.

    Args:
        old: a folder, or files by path; None when there was nothing before: every file is new.
        created: None takes ``SOURCE_DATE_EPOCH``, and without that the manifest does not say.
        include, exclude: shell patterns. One without ``/`` is tried on every component of a path, one with on
            the whole path, where ``*`` matches ``/`` as well. Without `include` everything is included.
        normal_modes: files are 0755 if their owner may execute them, else 0644, whatever their other bits.
        store: nothing is compressed; the bytes are then the same with every version of zlib.
        delta: modified files come as differences to the old ones, where that is smaller. With another version
            of zstd the bytes are others.
        limits: those of whoever is to read it.

    Raises:
        PatchBuildError: no package can be made of this; `output` is as it was.
        OSError: reading or writing failed; `output` is as it was.
    """
    if isinstance(old, Path):
        _check_apart(output, old)
    _check_apart(output, new)
    if isinstance(old, Path):
        before = list_folder(old, include, exclude)
    else:
        before = {path: file for path, file in (old or {}).items() if _is_chosen(path, include, exclude)}
    after = list_folder(new, include, exclude)
    if normal_modes:
        before, after = _normalised(before), _normalised(after)
    changes, contents = _compare(before, after, progress)
    differences: dict[str, bytes] = {}
    if delta:
        changes, differences = _with_deltas(changes, before, contents, limits)
    if not changes:
        raise PatchBuildError(
            f"there is nothing to patch: {new} holds what is there already"
            if old
            else f"{new} holds no file",
            code="build.empty",
        )
    manifest = Manifest(
        name=name,
        version=version,
        build=build,
        kind=kind,
        targets=tuple(targets),
        regions=tuple(regions),
        files=changes,
        created=created if created is not None else _time_from_environment(),
        expires=expires,
        requires=requires,
        build_floor=build_floor,
        downgrade=downgrade,
        probation=probation,
        notes=notes,
    )
    raw, manifest = _check_manifest(manifest)
    with _written_atomically(output) as (file, temporary):
        writer = _ArchiveWriter(file, ratio=limits.ratio, store=store)
        writer.add(MANIFEST, len(raw), lambda: iter([memoryview(raw)]))
        for change in changes:
            if change.path in differences:
                raw_delta = memoryview(differences[change.path])
                writer.add(DELTAS + change.path, len(raw_delta), lambda raw=raw_delta: iter([raw]))  # type: ignore[misc]
            elif change.op is not Op.DELETED:
                _add_change(writer, change, contents[change.path], progress)
        writer.finish()
        file.flush()
        _check_package(temporary, limits, "build.limits")
    return manifest


def build_prototype_patch(
    *,
    output: Path,
    region: str,
    build: int,
    warm: bool,
    new: Mapping[str, bytes] | None = None,
    modified: Mapping[str, bytes] | None = None,
    deleted: Sequence[str] = (),
) -> int:
    """Write a package as the prototype's author made them, and return its CRC-32.

    Args:
        new, modified: content by destination, such as ``/work/rest/res.json``.
        deleted: destinations.

    Raises:
        PatchBuildError: two destinations of one list share a file name but not the content, which the flat
            folders cannot hold; or the package would not open.
    """
    listed: dict[str, list[dict[str, str]]] = {}
    sources: dict[str, bytes] = {}
    for key, folder, destinations in (
        ("newfiles", "patch/new/", new or {}),
        ("modfiles", "patch/mod/", modified or {}),
        ("delfiles", "", dict.fromkeys(deleted, b"")),
    ):
        listed[key] = []
        for destination, content in destinations.items():
            parent, _, file_name = destination.rpartition("/")
            listed[key].append({"name": file_name, "path": f"{parent}/"})
            if folder and sources.setdefault(folder + file_name, content) != content:
                raise PatchBuildError(
                    f"two different files are called {file_name!r} in {folder}, which can hold only one",
                    code="build.path_conflict",
                )
    # Cold packages of the prototype leave the key out.
    head: dict[str, object] = {"justres": True} if warm else {}
    raw = json.dumps({**head, "region": region, "build": str(build), **listed}, indent=2).encode()
    with _written_atomically(output) as (file, temporary):
        writer = _ArchiveWriter(file, dos=True)
        for folder in ("patch/", "patch/del/", "patch/mod/", "patch/new/"):
            writer.add_folder(folder)
        for name, content in sorted({**sources, "patch/manifest.json": raw}.items()):
            writer.add(name, len(content), lambda content=content: iter([memoryview(content)]))  # type: ignore[misc]
        writer.finish()
        file.flush()
        _check_package(temporary, DEFAULT_LIMITS, "build.manifest")
        return zlib.crc32(temporary.read_bytes())


# --- comparing ----------------------------------------------------------------------------------------------


def list_folder(root: Path, include: Sequence[str], exclude: Sequence[str]) -> dict[str, Source]:
    """The regular files below `root` by relative path, sorted."""
    if not root.is_dir():
        raise PatchBuildError(f"{root} is not a folder", code="build.folder")
    found: dict[str, Source] = {}
    pending = [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(root / prefix) as entries:
            for entry in entries:
                path = prefix + entry.name
                if entry.name.startswith(paths.PRIVATE_PREFIX) or _matches(path, exclude):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    pending.append(f"{path}/")
                elif not include or _matches(path, include):
                    found[path] = _source(root, path, entry.stat(follow_symlinks=False))
    return dict(sorted(found.items()))


def _is_chosen(path: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether `list_folder` would list a path: a folder that is excluded is so with all that is in it."""
    components = path.split("/")
    leading = ("/".join(components[:depth]) for depth in range(1, len(components) + 1))
    return not any(_matches(each, exclude) for each in leading) and (not include or _matches(path, include))


def _normalised(files: Mapping[str, Source]) -> dict[str, Source]:
    return {
        path: replace(file, mode=0o755 if file.mode & 0o100 else DEFAULT_MODE) for path, file in files.items()
    }


def _delivered_to(root: Path, path: str) -> str | None:
    """The target in whose root patches have made this link; None where it is another, or none.

    Such a link ends in ``current/TARGET/PATH``, and `root` may be any folder of that root.
    """
    try:
        link = str((root / path).readlink())
    except OSError:
        return None
    below = link.rpartition("/current/")[2]
    target, _, rest = below.partition("/")
    return target if below != link and f"/{rest}".endswith(f"/{path}") else None


def _source(root: Path, path: str, status: os.stat_result) -> Source:
    mode = status.st_mode
    if not stat.S_ISREG(mode):
        word = "a symbolic link" if stat.S_ISLNK(mode) else "no plain file"
        what_would_do = "exclude it, or put its content there"
        if (target := _delivered_to(root, path)) is not None:
            word = f"a link that patches of {target} have made"
            what_would_do = (
                f"`--from-generation current -t {target}` stands for what it has now, in place of a folder; "
                "`cp -rL` copies content"
            )
        raise PatchBuildError(
            f"{root / path} is {word}; a patch holds plain files only: {what_would_do}",
            code="build.file_type",
            path=path,
        )
    if mode & (stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX):
        raise PatchBuildError(
            f"{root / path} has a set-id or sticky bit (mode {mode & 0o7777:04o}), which a patch never sets",
            code="build.file_type",
            path=path,
        )
    return Source(file=root / path, size=status.st_size, mode=stat.S_IMODE(mode))


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(
        fnmatch.fnmatchcase(path, pattern)
        if "/" in pattern
        else any(fnmatch.fnmatchcase(component, pattern) for component in path.split("/"))
        for pattern in patterns
    )


def _compare(
    before: Mapping[str, Source], after: Mapping[str, Source], progress: Progress | None
) -> tuple[tuple[FileChange, ...], dict[str, Source]]:
    """The changes in order of their paths, and where the content of the new and modified ones is."""
    changes: list[FileChange] = []
    contents: dict[str, Source] = {}
    for path in sorted({*before, *after}):
        old, new = before.get(path), after.get(path)
        if new is None:
            assert old is not None
            changes.append(FileChange(path=path, op=Op.DELETED, base_sha256=_digest(old, progress)))
            continue
        new_digest = _digest(new, progress)
        change = FileChange(path=path, op=Op.NEW, sha256=new_digest, size=new.size)
        if old is None:
            change = replace(change, mode=None if new.mode == DEFAULT_MODE else new.mode)
        else:
            old_digest = _digest(old, progress)
            if old_digest == new_digest and old.mode == new.mode:
                continue
            mode = None if old.mode == new.mode else new.mode
            change = replace(change, op=Op.MODIFIED, base_sha256=old_digest, mode=mode)
        changes.append(change)
        contents[path] = new
    _check_paths([change.path for change in changes])
    return tuple(changes), contents


def _with_deltas(
    changes: Sequence[FileChange],
    before: Mapping[str, Source],
    after: Mapping[str, Source],
    limits: PatchLimits,
) -> tuple[tuple[FileChange, ...], dict[str, bytes]]:
    """The changes, and the deltas of those modified files of which they are smaller than the whole."""
    if not deltas.available():
        raise PatchBuildError(
            f"deltas take the package zstandard: {deltas.INSTALL}, or build without --delta",
            code="build.delta",
        )
    made: dict[str, bytes] = {}
    changed = []
    for change in changes:
        if change.op is Op.MODIFIED and _worth_a_delta(before[change.path], after[change.path], limits):
            old, new = (_whole(side[change.path]) for side in (before, after))
            if (hashlib.sha256(old).hexdigest(), hashlib.sha256(new).hexdigest()) != (
                change.base_sha256,
                change.sha256,
            ):
                _refuse_changed(after[change.path].file)
            raw = deltas.make(old, new)
            whole = zlib.compressobj(_COMPRESSION_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
            if len(raw) < min(len(new), len(whole.compress(new)) + len(whole.flush())):
                made[change.path] = raw
                change = replace(  # noqa: PLW2901
                    change,
                    delta=Delta(
                        base_sha256=change.base_sha256 or "",
                        sha256=hashlib.sha256(raw).hexdigest(),
                        size=len(raw),
                    ),
                )
        changed.append(change)
    return tuple(changed), made


def _worth_a_delta(old: Source, new: Source, limits: PatchLimits) -> bool:
    return new.size >= MIN_DELTA_BYTES and max(old.size, new.size) <= limits.delta_size


def _whole(source: Source) -> bytes:
    return b"".join(bytes(piece) for piece in _read_file(source, None))


def _check_paths(changed: Sequence[str]) -> None:
    problems = []
    for path in changed:
        fault = paths.path_fault(path)
        if fault is not None:
            problems.append(f"{archive.quote(path)} {fault.message}")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise PatchBuildError(
            f"a patch cannot name these paths: {'; '.join(problems[:3])}{more}",
            code="build.path",
            problems=problems[:100],
        )
    for collision in paths.collisions((path, False) for path in changed):
        raise PatchBuildError(
            f"one patch cannot change both {archive.quote(collision.other)} and "
            f"{archive.quote(collision.path)}: a file cannot become a folder (or the other way), nor a name "
            "change only its case; use two patches",
            code="build.path_conflict",
        )


def _digest(source: Source, progress: Progress | None) -> str:
    digest = hashlib.sha256()
    for piece in _read_file(source, progress):
        digest.update(piece)
    return digest.hexdigest()


def _read_file(source: Source, progress: Progress | None) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(max(1, min(CHUNK, source.size))))
    total = 0
    with source.file.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total += count
            if total > source.size:
                break
            if progress is not None:
                progress(count)
            yield buffer[:count]
    if total != source.size:
        _refuse_changed(source.file)


def _add_change(
    writer: _ArchiveWriter, change: FileChange, source: Source, progress: Progress | None
) -> None:
    # Content that is better stored is read a second time, which is not progress.
    report = [progress]

    def checked() -> Iterator[memoryview]:
        digest = hashlib.sha256()
        for piece in _read_file(source, report.pop() if report else None):
            digest.update(piece)
            yield piece
        if digest.hexdigest() != change.sha256:
            _refuse_changed(source.file)

    writer.add(FILES + change.path, source.size, checked)


def _refuse_changed(file: Path) -> NoReturn:
    raise PatchBuildError(
        f"{file} was changed while the package was being built; build again when it is quiet",
        code="build.changed",
        path=str(file),
    )


def _check_apart(output: Path, folder: Path) -> None:
    if output.resolve().is_relative_to(folder.resolve()):
        raise PatchBuildError(
            f"the package {output} would lie inside {folder}, which it is built from; put it elsewhere",
            code="build.output",
        )


def _check_manifest(manifest: Manifest) -> tuple[bytes, Manifest]:
    """The manifest's bytes, and what a reader makes of them."""
    try:
        raw = encode_manifest(manifest)
        return raw, parse_manifest(raw)
    except PatchMalformedError as error:
        raise PatchBuildError(error.message, code="build.manifest", **error.details) from error
    except ValueError as error:
        raise PatchBuildError(f"the manifest cannot be written: {error}", code="build.manifest") from error


def _check_package(path: Path, limits: PatchLimits, code: str) -> None:
    """What is published opens: the rules of the two sides cannot drift apart unnoticed."""
    try:
        open_package(path, limits=limits).close()
    except PatchMalformedError as error:
        message = error.message.removeprefix(f"{path.name}: ")
        raise PatchBuildError(f"the package would be refused: {message}", code=code) from error


def _time_from_environment() -> datetime | None:
    text = os.environ.get(ENV_CREATED)
    if not text:
        return None
    try:
        return datetime.fromtimestamp(int(text), UTC)
    except (ValueError, OverflowError, OSError):
        raise PatchBuildError(
            f"{ENV_CREATED} must be seconds since 1970, it is {text[:80]!r}", code="build.environment"
        ) from None


# --- writing ------------------------------------------------------------------------------------------------


@contextmanager
def _written_atomically(output: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A temporary file beside `output` that takes its place, on disk, if the block ends without an error."""
    # Not called .zip: an inbox must not take it for a package.
    temporary = output.with_name(f".patch-{secrets.token_hex(8)}.part")
    try:
        with temporary.open("xb") as file:
            yield file, temporary
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(output)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(output.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system whose folders cannot be synced
            raise
    finally:
        os.close(folder)


class _ArchiveWriter:
    """Writes the plainest zip that `archive.scan` accepts: no descriptors, no extras, ZIP64 where it must be.

    Args:
        file: empty, seekable, positioned at 0.
        ratio: what readers refuse to inflate.
        store: compress nothing.
        dos: entries made on MS-DOS, as those of the prototype's packages.
    """

    def __init__(
        self,
        file: BinaryIO,
        *,
        ratio: int = DEFAULT_LIMITS.ratio,
        store: bool = False,
        dos: bool = False,
    ) -> None:
        self._file = file
        self._ratio = ratio
        self._store = store
        self._dos = dos
        self._records: list[bytes] = []

    def add_folder(self, name: str) -> None:
        offset = self._file.tell()
        self._file.write(self._local(name, STORED, 0, 0, 0))
        self._record(name, STORED, 0, 0, 0, offset=offset)

    def add(self, name: str, size: int, read: Callable[[], Iterator[memoryview]]) -> None:
        """Add a file: deflated, or stored where that is not larger.

        Args:
            size: bytes that `read` gives; it is called once or twice.
        """
        offset = self._file.tell()
        start = offset + len(self._local(name, STORED, 0, 0, size))
        method = DEFLATED
        self._file.seek(start)
        written = None if self._store else self._deflate(size, read)
        if written is None:
            method = STORED
            self._file.seek(start)
            self._file.truncate()
            crc = 0
            for piece in read():
                crc = zlib.crc32(piece, crc)
                self._file.write(piece)
            compressed = size
        else:
            crc, compressed = written
        self._file.seek(offset)
        self._file.write(self._local(name, method, crc, compressed, size))
        self._file.seek(start + compressed)
        self._record(name, method, crc, compressed, size, offset=offset)

    def finish(self) -> None:
        """Write the central directory and the end record."""
        offset = self._file.tell()
        for record in self._records:
            self._file.write(record)
        end = self._file.tell()
        count, size = len(self._records), end - offset
        if count >= MAX16 or max(size, offset) >= MAX32:
            self._file.write(
                archive.END64.pack(
                    archive.END64_SIGNATURE, archive.END64.size - 12, archive.VERSION_ZIP64,
                    archive.VERSION_ZIP64, 0, 0, count, count, size, offset,
                )
            )  # fmt: skip
            self._file.write(archive.LOCATOR64.pack(archive.LOCATOR64_SIGNATURE, 0, end, 1))
        count = min(count, MAX16)
        self._file.write(
            archive.END.pack(
                archive.END_SIGNATURE, 0, 0, count, count, min(size, MAX32), min(offset, MAX32), 0
            )
        )

    def _deflate(self, size: int, read: Callable[[], Iterator[memoryview]]) -> tuple[int, int] | None:
        """Write deflated content; CRC-32 and compressed size, or None where it is better stored."""
        deflater = zlib.compressobj(_COMPRESSION_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
        crc = compressed = 0
        for piece in read():
            crc = zlib.crc32(piece, crc)
            compressed += self._file.write(deflater.compress(piece))
            if compressed >= size:
                return None
        compressed += self._file.write(deflater.flush())
        # Readers refuse what inflates too well, by file and by package.
        if compressed >= size or size > self._ratio // 2 * compressed:
            return None
        return crc, compressed

    def _local(self, name: str, method: int, crc: int, compressed: int, size: int) -> bytes:
        raw_name = name.encode()
        extra = b""
        version = _VERSION
        if size >= MAX32:
            extra = struct.pack("<2H2Q", archive.EXTRA_ZIP64, 16, size, compressed)
            compressed = size = MAX32
            version = archive.VERSION_ZIP64
        header = archive.LOCAL.pack(
            archive.LOCAL_SIGNATURE, version, _flags(name), method, 0, _DATE_1980, crc, compressed, size,
            len(raw_name), len(extra),
        )  # fmt: skip
        return header + raw_name + extra

    def _record(self, name: str, method: int, crc: int, compressed: int, size: int, *, offset: int) -> None:
        raw_name = name.encode()
        wide: list[int] = []
        if size >= MAX32:
            wide += [size, compressed]
            compressed = size = MAX32
        if offset >= MAX32:
            wide.append(offset)
            offset = MAX32
        extra = struct.pack(f"<2H{len(wide)}Q", archive.EXTRA_ZIP64, 8 * len(wide), *wide) if wide else b""
        version = archive.VERSION_ZIP64 if wide else _VERSION
        is_folder = name.endswith("/")
        if self._dos:
            made_by, attributes = version, 0x10 if is_folder else 0x20
        else:
            mode = stat.S_IFDIR | 0o755 if is_folder else stat.S_IFREG | DEFAULT_MODE
            made_by, attributes = 3 << 8 | version, mode << 16
        header = archive.CENTRAL.pack(
            archive.CENTRAL_SIGNATURE, made_by, version, _flags(name), method, 0, _DATE_1980, crc, compressed,
            size, len(raw_name), len(extra), 0, 0, 0, attributes, offset,
        )  # fmt: skip
        self._records.append(header + raw_name + extra)


def _flags(name: str) -> int:
    return 0 if name.isascii() else 1 << 11
