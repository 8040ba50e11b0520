"""Looking into a pipe without taking anything out: tee(2), which Python has no name for.

What is still in the pipe cannot be lost by whoever looked at it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
from typing import Final

from asyncsup.libc import checked

PIPE_BYTES: Final = 1 << 20
"""As much as a pipe of an unprivileged user may hold; with the usual 64 KiB a flood costs more wake-ups."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.tee.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_uint)
_libc.tee.restype = ctypes.c_ssize_t


def enlarge(pipe: int) -> None:
    """Give a pipe room for `PIPE_BYTES`, if the user's quota allows."""
    # Past the quota the kernel says EPERM: the default size does as well.
    with contextlib.suppress(OSError):
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


class Peephole:
    """A pipe of our own, empty between two looks, into which the content of others is duplicated."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        enlarge(self._writer)

    def peek(self, pipe: int, limit: int) -> bytes:
        """The first bytes in a pipe, at most ``limit``; possibly fewer than there are.

        Raises:
            BlockingIOError: it is empty.
        """
        size = checked(_libc.tee(pipe, self._writer, limit, os.SPLICE_F_NONBLOCK))
        data = os.read(self._reader, size) if size else b""
        while len(data) < size:
            data += os.read(self._reader, size - len(data))
        return data

    def close(self) -> None:
        os.close(self._reader)
        os.close(self._writer)
