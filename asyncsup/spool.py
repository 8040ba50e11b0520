"""Where output waits to be put into lines: a file between the FIFO and the log file.

A line with a timestamp in front of it cannot go from the FIFO to the file by `splice`. So the bytes are
spliced here, formatted, and written from here; and a header says what has been done with them. A supervisor
that is killed at any instant leaves behind either bytes that are not written yet, or a write that was begun:
then the header has the log file's size from before it, and the next supervisor cuts it off and writes again.
Nothing is lost, and nothing is there twice.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Final

_HEADER: Final = struct.Struct("<QQQQ")
START_ANEW_BYTES: Final = 1 << 20
"""A spool that is larger than this starts again at its beginning, once everything in it is written."""


class Spool:
    """The spool of one stream.

    Args:
        path: made when it is missing; what it holds is not written yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._end = os.fstat(self._fd).st_size
        header = os.pread(self._fd, _HEADER.size, 0)
        self.begun: tuple[int, int, int] | None = None
        """Device, inode and size (before) of the file to which a write was begun and not finished."""
        if len(header) < _HEADER.size:
            self._done = self._end = _HEADER.size
            self._note(0, 0, 0)
        else:
            device, inode, size, self._done = _HEADER.unpack(header)
            self._end = max(self._end, self._done)
            self.begun = (device, inode, size) if inode else None

    def take(self, pipe: int, limit: int) -> int:
        """Move up to ``limit`` bytes from a pipe; raises BlockingIOError when it is empty."""
        moved = os.splice(
            pipe, self._fd, limit, offset_dst=self._end, flags=os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE
        )
        self._end += moved
        return moved

    @property
    def pending(self) -> int:
        """How many bytes are not written yet."""
        return self._end - self._done

    def waiting(self, limit: int) -> bytes:
        """The first bytes that are not written yet."""
        return os.pread(self._fd, min(limit, self._end - self._done), self._done)

    def begin(self, device: int, inode: int, size: int) -> None:
        """The next bytes are about to be written to the end of a file, which has this size now."""
        self._note(device, inode, size)

    def done(self, count: int) -> None:
        """The next ``count`` bytes are in the file, or given up."""
        self._done += count
        self.begun = None
        self._note(0, 0, 0)
        if self._done == self._end and self._end > START_ANEW_BYTES:
            # In this order: there is nothing to be done beyond the end of the file.
            os.ftruncate(self._fd, _HEADER.size)
            self._done = self._end = _HEADER.size
            self._note(0, 0, 0)

    def close(self, *, remove: bool) -> None:
        os.close(self._fd)
        if remove:
            self._path.unlink(missing_ok=True)

    def _note(self, device: int, inode: int, size: int) -> None:
        """One small write within a page: the kernel does it wholly or not at all."""
        os.pwrite(self._fd, _HEADER.pack(device, inode, size, self._done), 0)
