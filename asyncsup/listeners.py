"""Whether a program waits for connections, seen from outside: readiness without its cooperation.

Linux shows what an epoll descriptor watches (``/proc/PID/fdinfo``, see proc(5)) and in which system call a
thread is (``/proc/PID/task/TID/syscall``). A program that has put a socket into its event loop, or blocks in
accept(2) on it, serves it. One that uses select(2) or poll(2) cannot be seen to.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import select
import socket
from collections.abc import Container, Iterable, Iterator
from typing import Final, NamedTuple

from asyncsup.child import read_proc

_WATCHED: Final = re.compile(
    rb"^tfd:\s*(\d+) events:\s*([0-9a-f]+) data:\s*([0-9a-f]+) .*?ino:\s*([0-9a-f]+)", re.MULTILINE
)
_ALWAYS: Final = select.EPOLLERR | select.EPOLLHUP
"""Told of whatever is in there, asked for or not."""
_ACCEPTS: Final = {"x86_64": (43, 288), "aarch64": (202, 242)}.get(platform.machine(), ())
"""The numbers of accept(2) and accept4(2)."""


class Watch(NamedTuple):
    """A process has a socket in an epoll descriptor."""

    epoll: int
    """The descriptor's number in the process."""
    number: int
    """The socket's number there, when it was put in."""
    events: int
    """What is told of it; with EPOLLONESHOT nothing, until the program asks again."""
    data: int
    """What the program knows it by."""
    inode: int
    """The socket's."""


def why_not(pids: Iterable[int], sockets: Iterable[socket.socket]) -> str | None:
    """Why nobody among some processes waits for connections at some sockets; None when somebody does."""
    wanted = {os.fstat(each.fileno()).st_ino for each in sockets}
    looked = False
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            links = _links(pid)
            looked = True
            ours = {number for number, link in links.items() if _inode(link) in wanted}
            waits = any(watch.events & select.EPOLLIN for watch in _watches(pid, links, wanted))
            if ours and (waits or _is_accepting(pid, ours)):
                return None
    return "nobody waits for connections yet" if looked else "its processes may not be looked at"


def watches(pid: int, wanted: Container[int]) -> Iterator[Watch]:
    """Where a process waits for sockets that are wanted, by inode, or will do so when it has dealt with what
    came last: nowhere, if it may not be looked at.

    Raises:
        OSError: there are no descriptors left to look with.
    """
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        yield from (watch for watch in _watches(pid, _links(pid), wanted) if watch.events & ~_ALWAYS)


def _links(pid: int) -> dict[int, str]:
    """What the descriptors of a process lead to."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208 - numbers
        with contextlib.suppress(FileNotFoundError):
            found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")  # noqa: PTH115 - a text
    return found


def _inode(link: str) -> int | None:
    return int(link[8:-1]) if link.startswith("socket:[") else None


def _watches(pid: int, links: dict[int, str], wanted: Container[int]) -> Iterator[Watch]:
    for epoll, link in links.items():
        if link != "anon_inode:[eventpoll]":
            continue
        try:
            text = read_proc(pid, f"fdinfo/{epoll}")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        for number, events, data, inode in _WATCHED.findall(text):
            if int(inode, 16) in wanted:
                yield Watch(epoll, int(number), int(events, 16), int(data, 16), int(inode, 16))


def _is_accepting(pid: int, ours: set[int]) -> bool:
    """Whether a thread is in accept(2) on one of these descriptors."""
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208 - numbers
            with contextlib.suppress(OSError):
                number, *arguments = read_proc(pid, f"task/{thread}/syscall").split()
                if number.isdigit() and int(number) in _ACCEPTS and int(arguments[0], 16) in ours:
                    return True
    return False
