"""New connections are steered away from a program that is to end, without its cooperation.

All processes share one listening socket; what they do not share is who waits for it. A program with an event
loop waits with epoll(7), and a copy of its epoll descriptor (pidfd_getfd(2)) works upon what *it* waits for:
once the socket is taken out there, the program accepts nothing more, and everything else it has goes on.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import os
import select
import signal
import socket
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from asyncsup import listeners
from asyncsup.listeners import Watch
from asyncsup.pidfds import copy_descriptor

SETTLE_SECONDS: Final = 1.0
"""How long a connection that was accepted last may take until its first request is there."""

_CLONE_FILES: Final = 0x400
_GONE: Final = {errno.ESRCH, errno.EBADF, errno.ENOENT}
"""The process, its descriptor, or the socket in it."""


def steer_away(pids: Iterable[int], sockets: Iterable[socket.socket]) -> int:
    """Have some processes wait for nothing at some sockets any more. There is no way back.

    Those that wait otherwise (select(2), poll(2), a thread in accept(2)) are not reached.

    Returns:
        How many times one of the sockets was taken out of an event loop.

    Raises:
        OSError: the host does not let us.
    """
    ours = {os.fstat(each.fileno()).st_ino: each.fileno() for each in sockets}
    watches = [watch for pid in pids for watch in listeners.watches(pid, ours)]
    if not watches:
        return 0
    # What is collected in that thread would close numbers of its table, and leave ours open.
    collects = gc.isenabled()
    gc.disable()
    try:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(_take_out, watches, ours).result()
    except RuntimeError as error:  # no thread can be started
        raise OSError(errno.EAGAIN, str(error)) from None
    finally:
        if collects:
            gc.enable()


def _take_out(watches: Sequence[Watch], ours: Mapping[int, int]) -> int:
    """In a thread of its own.

    epoll_ctl(2) finds a socket by its open file *and* its number, which has to be the one that it has in the
    program. Here that one belongs to something else, as a rule: so this is done in a table of descriptors of
    the thread's own, which ends with it.
    """
    # Python's handler of a signal writes to a descriptor by its number.
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_FILES) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    above = max(watch.number for watch in watches) + 1
    kept = {inode: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for inode, fd in ours.items()}
    taken_out = 0
    for watch in watches:
        try:
            copied = copy_descriptor(watch.pid, watch.epoll)
            epoll = select.epoll.fromfd(fcntl.fcntl(copied, fcntl.F_DUPFD_CLOEXEC, above))
            os.close(copied)
            with epoll:
                os.dup2(kept[watch.inode], watch.number, inheritable=False)
                epoll.unregister(watch.number)
            taken_out += 1
        except OSError as error:
            if error.errno not in _GONE:
                raise
    return taken_out
