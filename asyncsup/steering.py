"""New connections are steered away from a program that is to end, without its cooperation.

All processes share one listening socket; what they do not share is who waits for it. A program with an event
loop waits with epoll(7), and a copy of its epoll descriptor (pidfd_getfd(2)) works upon what *it* waits for:
once nothing is to be told of the socket there, the program accepts no more, and everything else it has goes
on.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gc
import os
import platform
import signal
import socket
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from asyncsup import listeners
from asyncsup.child import group_members, read_facts
from asyncsup.libc import checked, libc
from asyncsup.listeners import Watch
from asyncsup.pidfds import copy_descriptor, opened

SETTLE_SECONDS: Final = 1.0
"""How long a connection that was accepted last may take until its first request is there."""

_CLONE_FILES: Final = 0x400
_EPOLL_CTL_DEL: Final = 2
_EPOLL_CTL_MOD: Final = 3
_GONE: Final = {errno.ESRCH, errno.EBADF, errno.ENOENT}
"""The process, its descriptor, or the socket in it."""


class _EpollEvent(ctypes.Structure):
    """As in <sys/epoll.h>; only on this one machine without room between the two."""

    if platform.machine() == "x86_64":
        _pack_ = 1
    _fields_ = (("events", ctypes.c_uint32), ("data", ctypes.c_uint64))


def steer_away(groups: Iterable[int], sockets: Iterable[socket.socket]) -> int:
    """Have the processes of some groups hear no more of what comes in at some sockets. There is no way back.

    Those that wait otherwise (select(2), poll(2), a thread in accept(2)) are not reached.

    Returns:
        How many times one of the sockets was silenced in an event loop.

    Raises:
        OSError: why none was; the host does not let us, for one.
    """
    ours = {os.fstat(each.fileno()).st_ino: each.fileno() for each in sockets}
    wanted = set(groups)
    with contextlib.ExitStack() as processes:
        found: list[tuple[int, Watch]] = []
        for pid in group_members(*wanted):
            with contextlib.suppress(ProcessLookupError), contextlib.ExitStack() as process:
                pidfd = process.enter_context(opened(pid))
                facts = read_facts(pid)
                if facts is None or facts.group not in wanted:
                    continue  # the number has gone to somebody else meanwhile
                watches = [(pidfd, watch) for watch in listeners.watches(pid, ours)]
                if watches:
                    found += watches
                    processes.push(process.pop_all())
        return _in_own_table(found, ours) if found else 0


def _in_own_table(watches: Sequence[tuple[int, Watch]], ours: Mapping[int, int]) -> int:
    # What is collected in that thread would close numbers of its table, and leave ours open.
    collects = gc.isenabled()
    gc.disable()
    try:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(_silence, watches, ours).result()
    except RuntimeError as error:  # no thread can be started
        raise OSError(errno.EAGAIN, str(error)) from None
    finally:
        if collects:
            gc.enable()


def _silence(watches: Sequence[tuple[int, Watch]], ours: Mapping[int, int]) -> int:
    """In a thread of its own.

    epoll_ctl(2) finds a socket by its open file *and* its number, which has to be the one that it has in the
    program. Here that one belongs to something else, as a rule: so this is done in a table of descriptors of
    the thread's own, which ends with it.
    """
    # Python's handler of a signal writes to a descriptor by its number.
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    checked(libc.unshare(_CLONE_FILES))
    above = max(watch.number for _, watch in watches) + 1

    def out_of_the_way(fd: int) -> int:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above)

    sockets = {inode: out_of_the_way(fd) for inode, fd in ours.items()}
    pidfds = {pidfd: out_of_the_way(pidfd) for pidfd, _ in watches}
    silenced, failure = 0, None
    for pidfd, watch in watches:
        try:
            copied = copy_descriptor(pidfds[pidfd], watch.epoll)
            epoll = out_of_the_way(copied)
            os.close(copied)
            try:
                os.dup2(sockets[watch.inode], watch.number, inheritable=False)
                _leave_out(epoll, watch)
            finally:
                os.close(epoll)
            silenced += 1
        except OSError as error:
            if error.errno not in _GONE:
                failure = failure or error
    if failure is not None and not silenced:
        raise failure
    return silenced


def _leave_out(epoll: int, watch: Watch) -> None:
    """Nothing is to be told of the socket; but it stays in there, where the program will look for it when it
    ends. Raises OSError."""
    event = _EpollEvent(0, watch.data)
    result = libc.epoll_ctl(epoll, _EPOLL_CTL_MOD, watch.number, ctypes.byref(event))
    if result < 0 and ctypes.get_errno() == errno.EINVAL:
        # EPOLLEXCLUSIVE: such an entry cannot be changed.
        result = libc.epoll_ctl(epoll, _EPOLL_CTL_DEL, watch.number, None)
    checked(result)
