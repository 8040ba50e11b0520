"""The listening sockets a program was started with: what sd_listen_fds(3) says, as `socket` objects.

They come from asyncsup (`[socket.NAME]`), from systemd, or from anything else that knows the convention.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Final

FIRST: Final = 3
"""The first descriptor that is passed on (SD_LISTEN_FDS_START)."""

UNNAMED: Final = "unknown"
"""The name of descriptors whose sender gave none, as with systemd."""

ENV_PID: Final = "LISTEN_PID"
ENV_COUNT: Final = "LISTEN_FDS"
ENV_NAMES: Final = "LISTEN_FDNAMES"


class ListenError(KeyError):
    """The program was not given the socket it asks for, or what it was given contradicts itself."""

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError shows the representation


class Sockets(Mapping[str, socket.socket]):
    """The sockets by name, see `sockets`. ``["web"]`` is the one of that name, `all` gives each."""

    def __init__(self, given: Mapping[str, tuple[socket.socket, ...]], reason: str = "") -> None:
        self._given = given
        self._reason = reason

    def __getitem__(self, name: str) -> socket.socket:
        """
        Raises:
            ListenError: there is no socket of that name, or more than one.
        """
        given = self.all(name)
        if len(given) > 1:
            raise ListenError(f"there are {len(given)} sockets named {name!r}: take them by .all({name!r})")
        return given[0]

    def all(self, name: str) -> tuple[socket.socket, ...]:
        """Every socket of a name, in the order they were passed.

        Raises:
            ListenError: there is none.
        """
        try:
            return self._given[name]
        except KeyError:
            raise ListenError(
                f"no socket named {name!r} was passed to this process; {self._what()}"
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._given

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)

    def _what(self) -> str:
        if self._given:
            return "there are: " + ", ".join(sorted(self._given))
        return self._reason


_lock = threading.Lock()
_taken: list[Sockets] = []
"""What this process was given. Once: a second set of objects would close the same descriptors again."""


def sockets(*, unset_environment: bool = False) -> Sockets:
    """The sockets this process was started with; none is no error until one is asked for.

    They are not inherited by children, and everybody who calls this gets the same objects. Whether one blocks
    is as its sender left it: it is shared with whoever else has it, and an asyncio program among them has
    made it non-blocking.

    Args:
        unset_environment: take the variables out of ``os.environ``, so that no child is misled by them.
    Raises:
        ListenError: the variables contradict themselves.
    """
    with _lock:
        if not _taken:
            _taken.append(_take(os.environ))
        if unset_environment:
            for name in (ENV_PID, ENV_COUNT, ENV_NAMES):
                os.environ.pop(name, None)
        return _taken[0]


def _take(environment: MutableMapping[str, str]) -> Sockets:
    pid, count = environment.get(ENV_PID), environment.get(ENV_COUNT)
    if pid is None or count is None:
        return Sockets({}, f"neither asyncsup nor systemd passed any ({ENV_COUNT} and {ENV_PID} are not set)")
    if _number(ENV_PID, pid) != os.getpid():
        return Sockets(
            {}, f"those of its environment were for process {pid} ({ENV_PID}), this is {os.getpid()}"
        )
    total = _number(ENV_COUNT, count)
    names = environment[ENV_NAMES].split(":") if ENV_NAMES in environment else [UNNAMED] * total
    if len(names) != total:
        raise ListenError(
            f"{ENV_COUNT} is {total}, but {ENV_NAMES} has {len(names)} names: {':'.join(names)!r}"
        )
    given: dict[str, list[socket.socket]] = {}
    for descriptor, name in enumerate(names, FIRST):
        passed = _as_socket(descriptor)
        if passed is not None:
            given.setdefault(name or UNNAMED, []).append(passed)
    return Sockets(
        {name: tuple(several) for name, several in given.items()}, f"none of its {total} descriptors is one"
    )


def _as_socket(descriptor: int) -> socket.socket | None:
    """None for a descriptor that is something else (systemd passes pipes and files as well)."""
    try:
        os.set_inheritable(descriptor, False)
    except OSError:
        raise ListenError(f"{ENV_COUNT} promises descriptor {descriptor}, but it is not open") from None
    try:
        found = socket.socket(fileno=descriptor)  # it looks up family, type and protocol itself
    except OSError:
        return None
    # The object is told what holds: the flag belongs to the socket, not to this process's descriptor.
    found.setblocking(os.get_blocking(descriptor))
    return found


def _number(variable: str, text: str) -> int:
    if not text.isascii() or not text.isdecimal():
        raise ListenError(f"{variable} must be a number, got {text!r}")
    return int(text)
