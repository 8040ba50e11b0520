"""Rotated log files, compressed: gzip that every tool reads, in blocks that can be found without the others.

Each block is a gzip member of its own. Its extra field says how long it is, and of which file it is a part:
so a reader goes to any place by one inflated block, and one who was in the middle of the file before it was
compressed finds the place again.

Run as a program it compresses descriptor 3 to its standard output, at the lowest priority: see
`asyncsup.compressor`. It imports nothing of asyncsup, and starts without site packages.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import sys
import zlib
from typing import NamedTuple

BLOCK_BYTES = 256 << 10
"""Content of a block."""
SOURCE_FD = 3

_MEMBER = struct.Struct("<4s I 2s H 2s H QQQII")
"""Magic, method and flags; time; more flags and system; the extra field: its length, subfield, length, and of
that the content: inode and birth of the file, bytes in all of it, bytes of this member, of its content."""
_TRAILER = struct.Struct("<II")
_MAGIC, _SYSTEM, _NAME = b"\x1f\x8b\x08\x04", b"\x00\x03", b"AS"
_CONTENT_BYTES = struct.calcsize("<QQQII")
_LEVEL = 6
_PR_SET_PDEATHSIG = 1
_LOWEST_PRIORITY = 19


class Archive(NamedTuple):
    """What the first member says.

    Attributes:
        identity: of the file that was compressed; see `asyncsup.filefacts`.
        size: bytes of its content.
    """

    identity: tuple[int, int]
    size: int


def examine(fd: int) -> Archive | None:
    """None for what was not written here."""
    member = _member(fd, 0)
    return None if member is None else Archive(identity=member[:2], size=member[2])


def read(fd: int, offset: int, limit: int) -> bytes:
    """Up to ``limit`` bytes of the content from ``offset`` on.

    Raises:
        OSError: it cannot be read.
        zlib.error: it is damaged.
    """
    parts: list[bytes] = []
    at, start = 0, 0
    while limit > 0 and (member := _member(fd, at)) is not None:
        *_, length, size = member
        if start + size > offset:
            packed = os.pread(fd, length - _MEMBER.size - _TRAILER.size, at + _MEMBER.size)
            content = zlib.decompress(packed, -zlib.MAX_WBITS)
            parts.append(content[offset - start : offset - start + limit])
            offset += len(parts[-1])
            limit -= len(parts[-1])
        at, start = at + length, start + size
        if length == 0:
            break
    return b"".join(parts)


def write(source: int, to: int, identity: tuple[int, int]) -> None:
    """Compress a whole file from one descriptor to another, and have it on disk."""
    status = os.fstat(source)
    total, at = status.st_size, 0
    while True:
        content = os.pread(source, min(BLOCK_BYTES, total - at), at)
        at += len(content)
        deflate = zlib.compressobj(_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
        packed = deflate.compress(content) + deflate.flush()
        length = _MEMBER.size + len(packed) + _TRAILER.size
        head = _MEMBER.pack(
            _MAGIC, int(status.st_mtime) & 0xFFFFFFFF, _SYSTEM, 4 + _CONTENT_BYTES, _NAME, _CONTENT_BYTES,
            *identity, total, length, len(content),
        )  # fmt: skip
        view = memoryview(head + packed + _TRAILER.pack(zlib.crc32(content), len(content)))
        while view:
            view = view[os.write(to, view) :]
        if at >= total or not content:
            break
    os.fsync(to)


def _member(fd: int, at: int) -> tuple[int, int, int, int, int] | None:
    """Inode, birth, bytes of the file, of this member, of its content; None where none of ours begins."""
    head = os.pread(fd, _MEMBER.size, at)
    if len(head) < _MEMBER.size:
        return None
    magic, _, _, extra, name, length, *rest = _MEMBER.unpack(head)
    if (magic, extra, name, length) != (_MAGIC, 4 + _CONTENT_BYTES, _NAME, _CONTENT_BYTES):
        return None
    inode, birth, total, member, content = rest
    return inode, birth, total, member, content


def main() -> None:
    """Arguments: the parent's pid, with which this ends; inode and birth of the file."""
    parent, inode, birth = map(int, sys.argv[1:])
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    os.nice(_LOWEST_PRIORITY)
    write(SOURCE_FD, sys.stdout.fileno(), (inode, birth))


if __name__ == "__main__":
    main()
