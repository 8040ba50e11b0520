"""What the kernel knows of a file, its birth included: statx(2), which Python has no name for."""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from pathlib import Path
from typing import Final

import msgspec

_AT_FDCWD: Final = -100
_BASIC_AND_BIRTH: Final = 0x7FF | 0x800
_BIRTH: Final = 0x800
_STATX: Final = struct.Struct("=I 24x H 2x Q Q 32x qI 20x qI 68x")
"""Mask, mode, inode, size, birth, modification: where linux/stat.h has them, on every architecture."""
_BUFFER_BYTES: Final = 256

_libc = ctypes.CDLL(None, use_errno=True)


class FileFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Attributes:
    identity: inode, and the birth in microseconds since the epoch (0 where the file system does not know);
        together no later file has them, as one may have the inode of one that was removed.
    modified: seconds since the epoch.
    """

    identity: tuple[int, int]
    size: int
    modified: float
    is_regular: bool

    @property
    def born(self) -> float | None:
        """Seconds since the epoch."""
        return self.identity[1] / 1e6 if self.identity[1] else None


def look(path: Path | str) -> FileFacts | None:
    """The facts about what a path leads to; None when there is nothing, or it cannot be looked at."""
    buffer = ctypes.create_string_buffer(_BUFFER_BYTES)
    try:
        status = _libc.statx(_AT_FDCWD, os.fsencode(path), 0, _BASIC_AND_BIRTH, buffer)
    except AttributeError:  # a C library older than 2018
        return _look_without_birth(path)
    if status != 0:
        return None
    mask, mode, inode, size, born, born_ns, modified, modified_ns = _STATX.unpack_from(buffer)
    birth = born * 10**6 + born_ns // 1000 if mask & _BIRTH else 0
    return FileFacts(
        identity=(inode, birth),
        size=size,
        modified=modified + modified_ns / 1e9,
        is_regular=stat.S_ISREG(mode),
    )


def _look_without_birth(path: Path | str) -> FileFacts | None:
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return FileFacts(
        identity=(status.st_ino, 0),
        size=status.st_size,
        modified=status.st_mtime,
        is_regular=stat.S_ISREG(status.st_mode),
    )
