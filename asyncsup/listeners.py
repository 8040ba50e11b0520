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
import socket
from collections.abc import Container, Iterable, Iterator
from typing import Final, NamedTuple

from asyncsup.child import read_proc

EPOLLIN: Final = 1
_WATCHED: Final = re.compile(rb"^tfd:\s*(\d+) events:\s*([0-9a-f]+) .*?ino:\s*([0-9a-f]+)", re.MULTILINE)
_ACCEPTS: Final = {"x86_64": (43, 288), "aarch64": (202, 242)}.get(platform.machine(), ())
"""The numbers of accept(2) and accept4(2)."""


class Watch(NamedTuple):
    """A process waits, with an epoll descriptor, for what comes in at a socket."""

    pid: int
    epoll: int
    """The descriptor's number in the process."""
    number: int
    """The socket's number there, when it was put in."""
    inode: int
    """The socket's."""


def why_not(pids: Iterable[int], sockets: Iterable[socket.socket]) -> str | None:
    """Why nobody among some processes waits for connections at some sockets; None when somebody does."""
    wanted = {os.fstat(each.fileno()).st_ino for each in sockets}
    looked = False
    for pid in pids:
        try:
            links = _links(pid)
        except OSError:
            continue  # it has ended, or is somebody else's
        looked = True
        ours = {number for number, link in links.items() if _inode(link) in wanted}
        if ours and (any(_watches(pid, links, wanted)) or _is_accepting(pid, ours)):
            return None
    return "nobody waits for connections yet" if looked else "its processes may not be looked at"


def watches(pid: int, wanted: Container[int]) -> Iterator[Watch]:
    """Where a process waits for sockets that are wanted, by inode: nowhere, if it may not be looked at."""
    with contextlib.suppress(OSError):
        yield from _watches(pid, _links(pid), wanted)


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
        except OSError:
            continue
        for number, events, inode in _WATCHED.findall(text):
            if int(events, 16) & EPOLLIN and int(inode, 16) in wanted:
                yield Watch(pid, epoll, int(number), int(inode, 16))


def _is_accepting(pid: int, ours: set[int]) -> bool:
    """Whether a thread is in accept(2) on one of these descriptors."""
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208 - numbers
            with contextlib.suppress(OSError):
                number, *arguments = read_proc(pid, f"task/{thread}/syscall").split()
                if number.isdigit() and int(number) in _ACCEPTS and int(arguments[0], 16) in ours:
                    return True
    return False
