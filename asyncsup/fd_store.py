"""Descriptors that an instance has handed over, to find them again at its next start (FDSTORE=1).

The keeper holds each of them as well, under a name that says everything about it, so they outlive the program
and the supervisor. They go when the instance is stopped for good or given up.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import functools
import logging
import os
import select
import stat
from collections.abc import Sequence
from typing import Final
from urllib.parse import quote, unquote

import msgspec

from asyncsup.child import out_of_the_way
from asyncsup.keeper_link import KeeperLink

log = logging.getLogger("asyncsup.instance")

_KCMP: Final = {"x86_64": 312, "aarch64": 272, "riscv64": 272, "ppc64le": 354, "s390x": 343}
"""Numbers of the system call kcmp(2)."""


class _Stored(msgspec.Struct, frozen=True, kw_only=True):
    fd: int
    name: str
    held: str
    """What the keeper knows it by."""


class FdStore:
    """The descriptors of one instance.

    Args:
        instance: its name.
    """

    def __init__(self, instance: str, keeper: KeeperLink) -> None:
        self._instance = instance
        self._keeper = keeper
        self._stored: list[_Stored] = []
        self._serial = 0
        self._hangups: select.epoll | None = None

    def __len__(self) -> int:
        return len(self._stored)

    def named(self) -> Sequence[tuple[str, int]]:
        """Name and number of each, in the order in which they came; they stay in the store."""
        return [(each.name, each.fd) for each in self._stored]

    def add(self, descriptors: list[int], name: str, *, poll: bool, most: int) -> str | None:
        """Take descriptors out of the list; what is in the store already is left in it.

        Args:
            poll: each goes by itself when its other end has.
            most: how many the store may hold.

        Returns:
            Why some are left that should have been stored, or None.
        """
        for fd in list(descriptors):
            if any(_is_same(fd, each.fd) for each in self._stored):
                continue
            if len(self._stored) >= most:
                return f"{self._instance} may store {most} descriptors (fd_store_max)"
            descriptors.remove(fd)
            self._serial += 1
            held = f"{self._prefix}{self._serial}/{int(poll)}/{quote(name, safe='')}"
            with contextlib.ExitStack() as on_failure:
                try:
                    moved = out_of_the_way(fd)
                    on_failure.callback(os.close, moved)
                    self._keeper.hold(held, moved)
                except OSError as error:
                    return f"{self._instance}: a descriptor cannot be stored: {error.strerror}"
                on_failure.pop_all()
            self._keep(_Stored(fd=moved, name=name, held=held), poll=poll)
        return None

    def remove(self, name: str) -> None:
        """Let all of this name go."""
        for each in [each for each in self._stored if each.name == name]:
            self._let_go(each)

    def clear(self) -> None:
        """Let all go."""
        for each in list(self._stored):
            self._let_go(each)
        self.close()

    def restore(self, most: int) -> None:
        """Take what an earlier supervisor has left with the keeper."""
        found: list[tuple[int, bool, str, str]] = []
        for held in self._keeper.names_below(self._prefix):
            number, polled, quoted = held.removeprefix(self._prefix).split("/")
            found.append((int(number), polled == "1", unquote(quoted), held))
        for serial, poll, name, held in sorted(found)[:most]:
            self._serial = serial
            fd = self._keeper.take(held)
            assert fd is not None
            self._keep(_Stored(fd=out_of_the_way(fd), name=name, held=held), poll=poll)

    def close(self) -> None:
        """Close ours; what the keeper holds, it goes on holding."""
        if self._hangups is not None:
            asyncio.get_running_loop().remove_reader(self._hangups.fileno())
            self._hangups.close()
            self._hangups = None
        for each in self._stored:
            os.close(each.fd)
        self._stored.clear()

    @property
    def _prefix(self) -> str:
        return f"store/{self._instance}/"

    def _keep(self, stored: _Stored, *, poll: bool) -> None:
        self._stored.append(stored)
        if not poll:
            return
        if self._hangups is None:
            self._hangups = select.epoll()
            asyncio.get_running_loop().add_reader(self._hangups.fileno(), self._hung_up)
        # A hang-up and an error are always told. A plain file has neither, and cannot be asked (EPERM).
        with contextlib.suppress(PermissionError):
            self._hangups.register(stored.fd, 0)

    def _hung_up(self) -> None:
        assert self._hangups is not None
        gone = {fd for fd, _ in self._hangups.poll(0)}
        for each in [each for each in self._stored if each.fd in gone]:
            log.info("%s: a stored descriptor goes, its other end has (%s)", self._instance, each.name)
            self._let_go(each)

    def _let_go(self, stored: _Stored) -> None:
        self._stored.remove(stored)
        if self._hangups is not None:
            # The keeper has it as well, so closing ours would not take it off the list.
            # ENOENT, EPERM: it was never on it.
            with contextlib.suppress(FileNotFoundError, PermissionError):
                self._hangups.unregister(stored.fd)
        self._keeper.drop(stored.held)
        os.close(stored.fd)


def _is_same(one: int, other: int) -> bool:
    """Whether two descriptors lead to one open file; where the kernel does not say, whether they must."""
    if (answer := _compare(one, other)) is not None:
        return answer
    first, second = os.fstat(one), os.fstat(other)
    if (first.st_dev, first.st_ino) != (second.st_dev, second.st_ino):
        return False
    if stat.S_ISSOCK(first.st_mode):
        return True
    modes = [fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE for fd in (one, other)]
    return stat.S_ISFIFO(first.st_mode) and modes[0] == modes[1]


def _compare(one: int, other: int) -> bool | None:
    number = _KCMP.get(os.uname().machine)
    if number is None:
        return None
    pid, kcmp_file = os.getpid(), 0
    answer = _libc().syscall(*map(ctypes.c_long, (number, pid, pid, kcmp_file, one, other)))
    return None if answer < 0 else bool(answer == 0)


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    return libc
