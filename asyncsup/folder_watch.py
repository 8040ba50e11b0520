"""The names in a folder at which something has changed, from inotify(7), on the event loop."""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
from collections import deque
from pathlib import Path
from typing import Final, Self

# <sys/inotify.h>
_CLOSE_WRITE: Final = 0x008
_MOVED_FROM: Final = 0x040
_MOVED_TO: Final = 0x080
_DELETE: Final = 0x200
_EVENT: Final = struct.Struct("iIII")
"""``struct inotify_event``: watch, mask, cookie, and the length of the name after it, padded with NUL."""

_READ_BYTES: Final = 64 * 1024


class FolderWatch:
    """Watches one folder: files that were written and closed, or were moved in, out or away.

    Raises:
        OSError: the folder cannot be watched.
    """

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise _last_error(folder)
        mask = _CLOSE_WRITE | _MOVED_FROM | _MOVED_TO | _DELETE
        if libc.inotify_add_watch(self._fd, os.fsencode(folder), ctypes.c_uint32(mask)) < 0:
            error = _last_error(folder)
            os.close(self._fd)
            raise error
        self._names: deque[bytes] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    async def next(self) -> bytes:
        """The next name; empty for what happened to the folder itself, or when the kernel has lost events."""
        while not self._names:
            try:
                self._names.extend(_names_in(os.read(self._fd, _READ_BYTES)))
            except BlockingIOError:
                await self._readable()
        return self._names.popleft()

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self._fd, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(self._fd)


def _names_in(data: bytes) -> list[bytes]:
    names, at = [], 0
    while at < len(data):
        *_, length = _EVENT.unpack_from(data, at)
        at += _EVENT.size + length
        names.append(data[at - length : at].rstrip(b"\0"))
    return names


def _last_error(folder: Path) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code), str(folder))
