"""The structure of a zip file, read strictly.

`scan` accepts an archive or refuses it before one byte of content is inflated; `stream` then yields the
content of one entry. What `scan` accepts means the same to every reader: each byte of the file belongs to
exactly one header, content, descriptor or directory, and where the format says a thing twice both say the
same. Archives as Info-ZIP, 7-Zip, Java and Python write them pass; ``docs/patch-format.md`` lists every rule
and code.

The standard library's `zipfile` is no validator: it extracts most hostile archives without an error.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from typing import Any, Final, NoReturn

import msgspec

from asyncsup.config.settings import PatchLimits
from asyncsup.errors import PatchMalformedError
from asyncsup.patch import paths

inflater: Any = zlib
"""What inflates and computes CRC-32: `isal_zlib`, where it is installed, is two to three times as fast."""

with contextlib.suppress(ImportError):
    from isal import isal_zlib

    inflater = isal_zlib

STORED: Final = 0
DEFLATED: Final = 8

LOCAL: Final = struct.Struct("<4s5H3I2H")
CENTRAL: Final = struct.Struct("<4s6H3I5H2I")
END: Final = struct.Struct("<4s4H2IH")
END64: Final = struct.Struct("<4sQ2H2I4Q")
LOCATOR64: Final = struct.Struct("<4sIQI")
EXTRA: Final = struct.Struct("<2H")

LOCAL_SIGNATURE: Final = b"PK\x03\x04"
CENTRAL_SIGNATURE: Final = b"PK\x01\x02"
END_SIGNATURE: Final = b"PK\x05\x06"
END64_SIGNATURE: Final = b"PK\x06\x06"
LOCATOR64_SIGNATURE: Final = b"PK\x06\x07"
DESCRIPTOR_SIGNATURE: Final = b"PK\x07\x08"

MAX16: Final = 0xFFFF
MAX32: Final = 0xFFFFFFFF
VERSION_ZIP64: Final = 45
EXTRA_ZIP64: Final = 0x0001

_VERSION_DEFLATE: Final = 20
# Python changes to ZIP64 at 2 GiB, the others at 4: below the first nothing demands it.
_ZIP64_DEMANDED: Final = 0x7FFFFFFF

_FLAG_DESCRIPTOR: Final = 1 << 3
_FLAG_UTF8: Final = 1 << 11
_FLAGS_ENCRYPTED: Final = 1 << 0 | 1 << 6 | 1 << 13
# Bits 1 and 2 only say how hard deflate tried.
_FLAGS_KNOWN: Final = _FLAG_DESCRIPTOR | _FLAG_UTF8 | 1 << 1 | 1 << 2

# Times and owners, which nobody here reads: extended timestamp, Info-ZIP Unix (three generations), NTFS, and
# the mark with which `jar` begins. Everything else could change what an entry means to some other reader.
_HARMLESS_EXTRAS: Final = frozenset({0x5455, 0x7875, 0x7855, 0x5855, 0x000A, 0xCAFE})
_EXTRA_TIMES: Final = 0x5455
# Flags, and up to three times. Some readers refuse what is shorter.
_TIMES_SIZES: Final = frozenset({1, 5, 9, 13})
_EXTRA_UNICODE_PATH: Final = 0x7075
_EXTRA_AES: Final = 0x9901

# MS-DOS, Unix, Macintosh, NTFS, MVS (some 7-Zip), VFAT, macOS: those whose attributes are laid out as below.
_SYSTEMS: Final = frozenset({0, 3, 7, 10, 11, 14, 19})
_DOS_VOLUME_LABEL: Final = 0x08
_DOS_FOLDER: Final = 0x10
_NTFS_REPARSE_POINT: Final = 0x400

_EMPTY_DEFLATE: Final = b"\x03\x00"
_READ_SLACK: Final = 64
_INFLATE_INPUT: Final = 1 << 16
CHUNK: Final = 1 << 20
"""Bytes handed over at a time at most: large enough that neither hash nor disk notices the loop around it."""

_MAX_RECORD_BYTES: Final = 2048
_LARGEST_COMMENT: Final = MAX16


DEFAULT_LIMITS: Final = PatchLimits()


def limit(limits: PatchLimits, name: str) -> str:
    """A limit for a message: its value, and the setting it comes from."""
    return f"the limit is {getattr(limits, name)} (`{name}` in [patch.limits])"


RATIO_FLOOR: Final = 1 << 20
"""Files up to this size may compress as well as they like."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One entry that `scan` accepted; sizes and offsets in bytes."""

    name: str
    is_folder: bool
    method: int
    crc: int
    compressed: int
    size: int
    offset: int
    data_offset: int


class _Record(msgspec.Struct, kw_only=True):
    """One record of the central directory."""

    name: str
    raw_name: bytes
    is_folder: bool
    version: int
    flags: int
    method: int
    time: int
    date: int
    crc: int
    compressed: int
    size: int
    offset: int
    zip64_sizes: bool

    @property
    def has_descriptor(self) -> bool:
        return bool(self.flags & _FLAG_DESCRIPTOR)


def scan(fd: int, size: int, limits: PatchLimits = DEFAULT_LIMITS) -> tuple[Entry, ...]:
    """Check the whole structure of the archive of `size` bytes open at `fd`; its entries in directory order.

    Reads headers only. The position of `fd` is neither used nor moved.

    Raises:
        PatchMalformedError: a rule is broken; the code ``zip.*`` names the rule.
    """
    count, directory_offset, directory_size = _read_end(fd, size)
    if count == 0:
        _refuse("zip.empty", "the archive is empty; a patch holds at least its manifest")
    if count > limits.files:
        _refuse("zip.count", f"the archive has {count} entries, {limit(limits, 'files')}")
    if directory_size > count * _MAX_RECORD_BYTES:
        _refuse("zip.framing", f"the directory of {count} entries claims {directory_size} bytes")
    records = _read_directory(read_exactly(fd, directory_size, directory_offset), count, limits)
    _check_limits(records, size, limits)
    for collision in paths.collisions((record.name.rstrip("/"), record.is_folder) for record in records):
        _refuse(
            f"zip.{collision.kind}",
            f"entries {quote(collision.other)} and {quote(collision.path)} collide; "
            "keep one, and mind that names which differ only in case count as equal",
            entry=collision.path,
        )
    return _place(fd, records, directory_offset)


def stream(fd: int, entry: Entry, *, ahead: int = 0) -> Iterator[memoryview]:
    """Yield the content of `entry`, never more than it declares; size and CRC-32 are checked at the end.

    Positions are absolute, so that several threads may stream from one descriptor.

    Args:
        ahead: each view stays valid while so many others, and the next, are asked for.

    Raises:
        PatchMalformedError: ``zip.size``, ``zip.deflate``, ``zip.crc``. What was yielded before is worthless.
    """
    pieces = _stored(fd, entry, ahead) if entry.method == STORED else _inflated(fd, entry)
    crc = 0
    for piece in pieces:
        crc = inflater.crc32(piece, crc)
        yield piece
    if crc != entry.crc:
        _refuse(
            "zip.crc",
            f"entry {quote(entry.name)} has CRC-32 {crc:08x}, its header says {entry.crc:08x}; "
            "the archive is damaged, fetch or build it again",
            entry=entry.name,
        )


def read_small(fd: int, entry: Entry) -> bytes:
    """The content of an entry of up to `CHUNK` bytes, as `stream` gives it, at once.

    Raises:
        PatchMalformedError: as `stream` does.
    """
    raw = os.pread(fd, entry.compressed, entry.data_offset)
    if entry.method == DEFLATED and len(raw) == entry.compressed:
        inflate = inflater.decompressobj(-zlib.MAX_WBITS)
        with contextlib.suppress(zlib.error, inflater.error):
            content: bytes = inflate.decompress(raw, entry.size + 1)
            whole = inflate.eof and not inflate.unused_data and len(content) == entry.size
            if whole and _crc_fits(content, entry):
                return content
    elif len(raw) == entry.size and _crc_fits(raw, entry):
        return raw
    return b"".join(bytes(piece) for piece in stream(fd, entry))  # which says what is wrong with it


def _crc_fits(content: bytes, entry: Entry) -> bool:
    return bool(inflater.crc32(content) == entry.crc)


def _stored(fd: int, entry: Entry, ahead: int) -> Iterator[memoryview]:
    size = min(CHUNK, entry.size)
    buffers = itertools.cycle([memoryview(bytearray(size)) for _ in range(ahead + 1)])
    position, left = entry.data_offset, entry.size
    while left:
        buffer = next(buffers)
        count = os.preadv(fd, [buffer[: min(CHUNK, left)]], position)
        if count == 0:
            _refuse_shrunk()
        yield buffer[:count]
        position += count
        left -= count


def _inflated(fd: int, entry: Entry) -> Iterator[memoryview]:
    inflate = inflater.decompressobj(-zlib.MAX_WBITS)
    source = memoryview(bytearray(min(_INFLATE_INPUT, entry.compressed)))
    position, left, produced = entry.data_offset, entry.compressed, 0
    pending: bytes | memoryview = b""
    try:
        while not inflate.eof:
            if not pending and left:
                count = os.preadv(fd, [source[: min(len(source), left)]], position)
                if count == 0:
                    _refuse_shrunk()
                pending, position, left = source[:count], position + count, left - count
            starved = not pending
            # One byte more than declared is room enough to notice that there is more.
            piece = inflate.decompress(pending, min(CHUNK, entry.size - produced + 1))
            pending = inflate.unconsumed_tail
            produced += len(piece)
            if produced > entry.size:
                _refuse(
                    "zip.size",
                    f"entry {quote(entry.name)} inflates to more than the {entry.size} bytes it declares",
                    entry=entry.name,
                )
            if piece:
                yield memoryview(piece)
            elif starved:
                _refuse(
                    "zip.deflate",
                    f"entry {quote(entry.name)} ends in the middle of its compressed data",
                    entry=entry.name,
                )
    except (zlib.error, inflater.error) as error:
        _refuse(
            "zip.deflate",
            f"entry {quote(entry.name)} does not inflate: {error}; the archive is damaged, fetch it again",
            entry=entry.name,
        )
    if left or inflate.unused_data:
        _refuse(
            "zip.size",
            f"entry {quote(entry.name)} holds {left + len(inflate.unused_data)} bytes after the end of its "
            "compressed data",
            entry=entry.name,
        )
    if produced != entry.size:
        _refuse(
            "zip.size",
            f"entry {quote(entry.name)} inflates to {produced} bytes, it declares {entry.size}",
            entry=entry.name,
        )


# --- the end of the archive ---------------------------------------------------------------------------------


def _read_end(fd: int, size: int) -> tuple[int, int, int]:
    """Entries, offset and size of the central directory."""
    end_offset = size - END.size
    tail = read_exactly(fd, END.size, end_offset) if end_offset >= 0 else b""
    if tail[:4] != END_SIGNATURE or tail[-2:] != b"\0\0":
        _explain_missing_end(fd, size)
    _, disk, directory_disk, disk_count, count, directory_size, directory_offset, _ = END.unpack(tail)
    limit = end_offset
    locator_offset = end_offset - LOCATOR64.size
    locator = read_exactly(fd, LOCATOR64.size, locator_offset) if locator_offset >= 0 else b""
    if locator[:4] == LOCATOR64_SIGNATURE:
        small = (disk_count, count, directory_size, directory_offset)
        disk_count, count, directory_size, directory_offset = _read_end64(fd, locator, locator_offset, small)
        limit = locator_offset - END64.size
    elif MAX32 in {directory_size, directory_offset}:
        _refuse("zip.zip64", "the directory's place is marked as ZIP64, but there is no ZIP64 record")
    if disk or directory_disk or disk_count != count:
        _refuse("zip.multidisk", "the archive is split over several disks or files; pack it as one")
    if directory_offset + directory_size != limit:
        _refuse(
            "zip.framing",
            f"the central directory is said to end at byte {directory_offset + directory_size}, its end "
            f"record is at {limit}: bytes stand before, between or hidden behind the archive",
        )
    return count, directory_offset, directory_size


def _read_end64(
    fd: int, locator: bytes, locator_offset: int, small: tuple[int, int, int, int]
) -> tuple[int, int, int, int]:
    _, locator_disk, end64_offset, disks = LOCATOR64.unpack(locator)
    # Some readers believe the locator, some look in front of it: both must find the same record.
    if end64_offset != locator_offset - END64.size or end64_offset < 0:
        _refuse("zip.zip64", "the ZIP64 locator does not point at the record in front of it")
    record = END64.unpack(read_exactly(fd, END64.size, end64_offset))
    signature, record_size, _, version, disk, directory_disk, disk_count, count, size, offset = record
    if signature != END64_SIGNATURE or record_size != END64.size - 12:
        _refuse("zip.zip64", "the ZIP64 end record is missing or holds more than format version 1 defines")
    if version != VERSION_ZIP64:
        _refuse("zip.version", f"the ZIP64 end record needs version {version}, only {VERSION_ZIP64} is known")
    if locator_disk or disks != 1 or disk or directory_disk:
        _refuse("zip.multidisk", "the archive is split over several disks or files; pack it as one")
    if count < MAX16 and max(size, offset) < _ZIP64_DEMANDED:
        _refuse("zip.zip64", "ZIP64 is used although no size demands it; pack the archive without it")
    large = (disk_count, count, size, offset)
    for value, stand_in, largest in zip(large, small, (MAX16, MAX16, MAX32, MAX32), strict=True):
        if stand_in not in {value, largest}:
            _refuse("zip.zip64", "the ZIP64 end record contradicts the ordinary one")
    return large


def _explain_missing_end(fd: int, size: int) -> NoReturn:
    """The file does not end in an end record without a comment: say what is there instead."""
    start = max(0, size - END.size - _LARGEST_COMMENT)
    tail = read_exactly(fd, size - start, start)
    found = tail.rfind(END_SIGNATURE)
    while found >= 0 and len(tail) - found < END.size:
        found = tail.rfind(END_SIGNATURE, 0, found)
    if found < 0:
        if read_exactly(fd, min(4, size), 0) in {LOCAL_SIGNATURE[: min(4, size)]}:
            _refuse("zip.truncated", "the end of the archive is missing; it is cut off or still on its way")
        _refuse("zip.not_a_zip", "the file is not a zip archive")
    (comment_size,) = struct.unpack_from("<H", tail, found + END.size - 2)
    after = len(tail) - found - END.size
    if after > comment_size:
        _refuse("zip.trailing", f"{after - comment_size} bytes follow the end of the archive")
    if after < comment_size:
        _refuse("zip.truncated", "the archive's last bytes are missing; it is cut off or still on its way")
    _refuse("zip.comment", "the archive has a comment; pack it without (readers disagree on where it ends)")


# --- the central directory ----------------------------------------------------------------------------------


def _read_directory(data: bytes, count: int, limits: PatchLimits) -> list[_Record]:
    records: list[_Record] = []
    position = 0
    while position < len(data):
        if len(data) - position < CENTRAL.size or data[position : position + 4] != CENTRAL_SIGNATURE:
            _refuse(
                "zip.framing", f"the central directory has no record where number {len(records) + 1} is due"
            )
        fields = CENTRAL.unpack_from(data, position)
        name_end = position + CENTRAL.size + fields[10]
        extra_end = name_end + fields[11]
        if extra_end + fields[12] > len(data):
            _refuse("zip.framing", f"record {len(records) + 1} reaches beyond the central directory")
        raw_name = data[position + CENTRAL.size : name_end]
        records.append(_read_record(fields, raw_name, data[name_end:extra_end], limits))
        position = extra_end
        if len(records) > count:
            break
    if len(records) != count:
        _refuse("zip.framing", f"the end record counts {count} entries, the directory holds other than that")
    return records


def _read_record(fields: tuple[int, ...], raw_name: bytes, extra: bytes, limits: PatchLimits) -> _Record:
    (_, made_by, version, flags, method, time, date, crc, compressed, size, _, _, comment_size, disk, _,
     attributes, offset) = fields  # fmt: skip
    name = _decode_name(raw_name, flags, limits)
    is_folder = name.endswith("/")
    if comment_size:
        _refuse("zip.comment", f"entry {quote(name)} has a comment; pack it without", entry=name)
    if flags & _FLAGS_ENCRYPTED:
        _refuse("zip.encrypted", f"entry {quote(name)} is encrypted; pack it without a password", entry=name)
    if flags & ~_FLAGS_KNOWN:
        _refuse(
            "zip.flags", f"entry {quote(name)} has unknown flags 0x{flags & ~_FLAGS_KNOWN:04x}", entry=name
        )
    if method not in {STORED, DEFLATED}:
        _refuse(
            "zip.method",
            f"entry {quote(name)} uses compression method {method}; only stored (0) and deflate (8) are read",
            entry=name,
        )
    if disk not in {0, MAX16}:
        _refuse("zip.multidisk", f"entry {quote(name)} is said to be on disk {disk}", entry=name)
    extras = _split_extra(extra, name)
    zip64 = extras.get(EXTRA_ZIP64)
    zip64_sizes = MAX32 in {compressed, size}
    if zip64 is not None or zip64_sizes or offset == MAX32 or disk == MAX16:
        size, compressed, offset = _widen(
            name, zip64, size=size, compressed=compressed, offset=offset, disk=disk
        )
    if version > _VERSION_DEFLATE and not (zip64 is not None and version == VERSION_ZIP64):
        _refuse(
            "zip.version",
            f"entry {quote(name)} needs version {version / 10} of the format; 2.0 is read, and 4.5 for ZIP64",
            entry=name,
        )
    _check_attributes(name, made_by >> 8, attributes, is_folder=is_folder)
    if method == STORED and compressed != size:
        _refuse(
            "zip.size",
            f"entry {quote(name)} is stored, yet its compressed size {compressed} is not its size {size}",
            entry=name,
        )
    # A folder has no content; Java "deflates" that to two bytes.
    if is_folder and (size or crc or compressed not in {0, len(_EMPTY_DEFLATE) * (method == DEFLATED)}):
        _refuse("zip.file_type", f"folder entry {quote(name)} has content", entry=name)
    return _Record(
        name=name, raw_name=raw_name, is_folder=is_folder, version=version, flags=flags, method=method,
        time=time, date=date, crc=crc, compressed=compressed, size=size, offset=offset,
        zip64_sizes=zip64_sizes,
    )  # fmt: skip


def _decode_name(raw_name: bytes, flags: int, limits: PatchLimits) -> str:
    try:
        name = raw_name.decode("utf-8" if flags & _FLAG_UTF8 else "ascii")
    except UnicodeDecodeError:
        _refuse(
            "zip.name_encoding",
            f"entry name {raw_name[:200]!r} is not ASCII and not marked as UTF-8 (flag 11), so that readers "
            "disagree on it; pack with `asyncsup patch build`, Java, Python or 7-Zip",
        )
    # The layout's own folder stands in front of the path below the root.
    fault = paths.path_fault(
        name[:-1] if len(name) > 1 and name.endswith("/") else name,
        max_depth=limits.path_depth + 2,
        private=False,
    )
    if fault is not None:
        _refuse(f"zip.name_{fault.rule}", f"entry name {quote(name)} {fault.message}", entry=name)
    return name


def _split_extra(extra: bytes, name: str) -> dict[int, bytes]:
    """The extra fields of one header by id, all of them known to be harmless, or ZIP64."""
    found: dict[int, bytes] = {}
    position = 0
    while position < len(extra):
        if len(extra) - position < EXTRA.size:
            _refuse("zip.extra", f"entry {quote(name)} has an extra field that is cut off", entry=name)
        kind, length = EXTRA.unpack_from(extra, position)
        position += EXTRA.size
        if position + length > len(extra):
            _refuse("zip.extra", f"entry {quote(name)} has an extra field that is cut off", entry=name)
        if kind == _EXTRA_AES:
            _refuse(
                "zip.encrypted", f"entry {quote(name)} is encrypted; pack it without a password", entry=name
            )
        if kind == _EXTRA_UNICODE_PATH:
            _refuse(
                "zip.extra",
                f"entry {quote(name)} carries a second name (extra field 0x7075); pack it without",
                entry=name,
            )
        if kind == _EXTRA_TIMES and length not in _TIMES_SIZES:
            _refuse("zip.extra", f"entry {quote(name)} has times of {length} bytes", entry=name)
        if kind in found or (kind not in _HARMLESS_EXTRAS and kind != EXTRA_ZIP64):
            word = "repeated" if kind in found else "unknown"
            _refuse("zip.extra", f"entry {quote(name)} has the {word} extra field 0x{kind:04x}", entry=name)
        found[kind] = extra[position : position + length]
        position += length
    return found


def _widen(
    name: str, zip64: bytes | None, *, size: int, compressed: int, offset: int, disk: int
) -> tuple[int, int, int]:
    """Size, compressed size and offset of a central record that says ZIP64."""
    marked = [value == MAX32 for value in (size, compressed, offset)]
    if zip64 is None or not any(marked) or disk or len(zip64) != 8 * sum(marked):
        _refuse(
            "zip.zip64",
            f"entry {quote(name)} has ZIP64 marks and a ZIP64 field that do not fit one another",
            entry=name,
        )
    wide = iter(struct.unpack(f"<{sum(marked)}Q", zip64))
    size, compressed, offset = (
        next(wide) if mark else value for mark, value in zip(marked, (size, compressed, offset), strict=True)
    )
    sizes_fit = max(size, compressed) >= _ZIP64_DEMANDED if marked[0] or marked[1] else True
    offset_fits = offset >= _ZIP64_DEMANDED if marked[2] else True
    if not (sizes_fit and offset_fits):
        _refuse("zip.zip64", f"entry {quote(name)} uses ZIP64 although no size demands it", entry=name)
    return size, compressed, offset


def _check_attributes(name: str, system: int, attributes: int, *, is_folder: bool) -> None:
    if system not in _SYSTEMS:
        _refuse(
            "zip.file_type",
            f"entry {quote(name)} was made on system {system}, whose file types are not known here",
            entry=name,
        )
    mode = attributes >> 16
    kind = stat.S_IFMT(mode)
    if kind not in {0, stat.S_IFDIR if is_folder else stat.S_IFREG}:
        _refuse(
            "zip.file_type",
            f"entry {quote(name)} is marked as {_KINDS.get(kind, 'something unknown')}; a patch holds only "
            "plain files and folders",
            entry=name,
        )
    if attributes & (_DOS_VOLUME_LABEL | _NTFS_REPARSE_POINT) or (attributes & _DOS_FOLDER and not is_folder):
        _refuse(
            "zip.file_type",
            f"entry {quote(name)} has attributes 0x{attributes & MAX16:x}, not those of a plain file",
            entry=name,
        )
    # Folders below a set-group-id folder inherit that bit; entries for folders are never acted upon.
    if mode & (stat.S_ISUID | stat.S_ISVTX | (0 if is_folder else stat.S_ISGID)):
        _refuse(
            "zip.mode",
            f"entry {quote(name)} has a set-user-id, set-group-id or sticky bit (mode {mode & 0o7777:04o})",
            entry=name,
        )


_KINDS: Final = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFREG: "a plain file",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def _check_limits(records: list[_Record], package_size: int, limits: PatchLimits) -> None:
    total = 0
    for record in records:
        total += record.size
        if record.size > limits.file_size:
            _refuse(
                "zip.file_size",
                f"entry {quote(record.name)} has {record.size} bytes, {limit(limits, 'file_size')}",
                entry=record.name,
            )
        if record.size > RATIO_FLOOR and record.size > limits.ratio * record.compressed:
            _refuse(
                "zip.ratio",
                f"entry {quote(record.name)} inflates {record.compressed} bytes to {record.size}; "
                f"{limit(limits, 'ratio')}, store it uncompressed",
                entry=record.name,
            )
    if total > limits.total_size:
        _refuse("zip.total_size", f"the archive inflates to {total} bytes, {limit(limits, 'total_size')}")
    if total > RATIO_FLOOR and total > limits.ratio * package_size:
        _refuse(
            "zip.ratio", f"the archive inflates {package_size} bytes to {total}; {limit(limits, 'ratio')}"
        )


# --- local headers ------------------------------------------------------------------------------------------


def _place(fd: int, records: list[_Record], directory_offset: int) -> tuple[Entry, ...]:
    """Match every record with its local header, and every byte before the directory with a record."""
    ordered = sorted(records, key=lambda record: record.offset)
    if ordered[0].offset != 0:
        _refuse("zip.gap", f"{ordered[0].offset} bytes stand before the first entry")
    data_offsets: dict[str, int] = {}
    for index, record in enumerate(ordered):
        following = ordered[index + 1].offset if index + 1 < len(ordered) else directory_offset
        data_offsets[record.name] = _check_local(fd, record, following)
    return tuple(
        Entry(
            name=record.name, is_folder=record.is_folder, method=record.method, crc=record.crc,
            compressed=record.compressed, size=record.size, offset=record.offset,
            data_offset=data_offsets[record.name],
        )
        for record in records
    )  # fmt: skip


def _check_local(fd: int, record: _Record, following: int) -> int:
    """Check the local header of `record`, whose bytes must end at `following`; where its content begins."""
    name = record.name
    room = following - record.offset
    if room < LOCAL.size + len(record.raw_name) + record.compressed:
        _refuse("zip.overlap", f"entry {quote(name)} overlaps what follows it", entry=name)
    header = read_exactly(fd, min(room, LOCAL.size + len(record.raw_name) + _READ_SLACK), record.offset)
    (signature, version, flags, method, time, date, crc, compressed, size, name_size, extra_size) = (
        LOCAL.unpack_from(header)
    )
    if signature != LOCAL_SIGNATURE:
        _refuse(
            "zip.framing", f"there is no local header where entry {quote(name)} is said to begin", entry=name
        )
    start = LOCAL.size + name_size
    data_offset: int = record.offset + start + extra_size
    data_end = data_offset + record.compressed
    if data_end > following:
        _refuse("zip.overlap", f"entry {quote(name)} overlaps what follows it", entry=name)
    if len(header) < start + extra_size:
        header = read_exactly(fd, start + extra_size, record.offset)
    same = (
        header[LOCAL.size : start] == record.raw_name
        and (flags, method, time, date) == (record.flags, record.method, record.time, record.date)
        and (version == record.version or (record.version == VERSION_ZIP64 and version <= VERSION_ZIP64))
    )
    if not same:
        _refuse_mismatch(name)
    zip64 = _split_extra(header[start : start + extra_size], name).get(EXTRA_ZIP64)
    if zip64 is not None:
        if not record.zip64_sizes or len(zip64) != 16 or (size, compressed) != (MAX32, MAX32):
            _refuse(
                "zip.zip64", f"entry {quote(name)} has a local ZIP64 field that nothing demands", entry=name
            )
        size, compressed = struct.unpack("<2Q", zip64)
    # With a descriptor the local header may leave out what was not known yet when it was written.
    unknown = {0} if record.has_descriptor else set()
    for local, central in ((crc, record.crc), (compressed, record.compressed), (size, record.size)):
        if local != central and local not in unknown:
            _refuse_mismatch(name)
    end = data_end + (_descriptor_size(fd, record, data_end, following) if record.has_descriptor else 0)
    if end != following:
        _refuse(
            "zip.gap", f"{following - end} bytes after entry {quote(name)} belong to no entry", entry=name
        )
    if record.is_folder and record.compressed and read_exactly(fd, 2, data_offset) != _EMPTY_DEFLATE:
        _refuse("zip.file_type", f"folder entry {quote(name)} has content", entry=name)
    return data_offset


def _descriptor_size(fd: int, record: _Record, data_end: int, following: int) -> int:
    """Size of the data descriptor behind the content: it repeats the directory, its signature is optional."""
    values = struct.pack("<I2Q" if record.zip64_sizes else "<3I", record.crc, record.compressed, record.size)
    found = read_exactly(fd, min(following - data_end, len(values) + 4), data_end)
    if found.startswith(DESCRIPTOR_SIGNATURE + values):
        return len(DESCRIPTOR_SIGNATURE) + len(values)
    if not found.startswith(values):
        _refuse_mismatch(record.name)
    return len(values)


def _refuse_mismatch(name: str) -> NoReturn:
    _refuse(
        "zip.header_mismatch",
        f"entry {quote(name)}: what stands before and after its content contradicts the central directory",
        entry=name,
    )


# --- shared -------------------------------------------------------------------------------------------------


def read_exactly(fd: int, size: int, offset: int) -> bytes:
    """`size` bytes at `offset`; the file was that long a moment ago."""
    data = os.pread(fd, size, offset)
    while len(data) < size:
        more = os.pread(fd, size - len(data), offset + len(data))
        if not more:
            _refuse_shrunk()
        data += more
    return data


def quote(name: str) -> str:
    """A name out of a package, harmless on a terminal and of bounded length."""
    return repr(name if len(name) <= 200 else name[:200] + "…")


def _refuse_shrunk() -> NoReturn:
    _refuse("zip.changed", "the file became shorter while it was being read; wait until it is complete")


def _refuse(code: str, message: str, *, entry: str | None = None) -> NoReturn:
    details = {} if entry is None else {"entry": entry[: paths.MAX_PATH_BYTES]}
    raise PatchMalformedError(message, code=code, **details)
