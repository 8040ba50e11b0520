"""Other processes and their descriptors: pidfd_getfd(2), Linux 5.6, which Python does not have."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Final

from asyncsup.libc import checked, libc

_SYS_PIDFD_GETFD: Final = 438
"""The same number on all architectures."""


@contextlib.contextmanager
def opened(pid: int) -> Iterator[int]:
    """A descriptor that means this process alone, whoever has its number later. Raises OSError."""
    pidfd = os.pidfd_open(pid)
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def copy_descriptor(pidfd: int, number: int) -> int:
    """A descriptor that a process has, as one of ours, closed on exec. For root, and whoever may trace it.

    Raises:
        OSError: it is not there, or the host does not let us.
    """
    return checked(libc.syscall(_SYS_PIDFD_GETFD, pidfd, number, 0))
