"""What a datagram of the sd_notify protocol says. Pure: bytes in, a typed value out. See sd_notify(3).

A field that cannot be meant as it stands is left out, and the rest of the datagram counts; what is unknown
is left out as well. Of a field that comes twice the first one counts, as with systemd.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from typing import Final, Literal, NamedTuple, TypeVar

import msgspec

T = TypeVar("T")

DATAGRAM_BYTES: Final = 4096
"""The longest datagram that is read, as with systemd: a page."""

STORED: Final = "stored"
"""The name of a descriptor that was sent without one."""

_LARGEST_ERRNO: Final = 4095
_MOST_DIGITS: Final = 15
"""Microseconds in so many digits are 31 years."""
_BUS_ERROR: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)+")


class Refusal(NamedTuple):
    """Something of a datagram does not count.

    Attributes:
        kind: by which such are counted.
        why: for people.
    """

    kind: str
    why: str


class BadNotificationError(ValueError):
    """The datagram is none of this protocol; nothing of it counts."""


class Notification(msgspec.Struct, frozen=True, kw_only=True):
    """One datagram. Durations in seconds.

    Attributes:
        state: of STOPPING, RELOADING and READY, which may come together, the first.
        reloading_at: microseconds of CLOCK_MONOTONIC; only programs of today say it.
        error: why it fails, for people; "" takes an earlier one back.
        watchdog_timeout: 0 turns it off.
        fd_name: what the descriptors are to be called, or which are to be removed.
        fd_poll: whether a descriptor goes when its other end does.
        unreadable: the fields that were left out, by name.
    """

    state: Literal["stopping", "reloading", "ready"] | None = None
    reloading_at: int | None = None
    status: str | None = None
    error: str | None = None
    main_pid: int | None = None
    extend: float | None = None
    watchdog: Literal["alive", "trigger"] | None = None
    watchdog_timeout: float | None = None
    fd_store: bool = False
    fd_remove: bool = False
    fd_name: str | None = None
    fd_poll: bool = True
    barrier: bool = False
    unreadable: tuple[str, ...] = ()


def read_notification(data: bytes) -> Notification:
    """Read a datagram.

    Raises:
        BadNotificationError: it has no field at all, a NUL byte inside, or BARRIER=1 beside something else.
    """
    text = data.rstrip(b"\0").decode("utf-8", "replace")
    if "\0" in text:
        raise BadNotificationError("a NUL byte inside")
    fields: dict[str, str] = {}
    for line in text.split("\n"):
        name, equals, value = line.partition("=")
        if equals and name:
            fields.setdefault(name, value)
    if not fields:
        raise BadNotificationError("no field of the form NAME=VALUE")
    if fields.get("BARRIER") == "1":
        if len(fields) > 1:
            raise BadNotificationError("BARRIER=1 beside other fields")
        return Notification(barrier=True)
    unreadable: list[str] = []

    def value_of(name: str, read: Callable[[str], T]) -> T | None:
        if name not in fields:
            return None
        try:
            return read(fields[name])
        except ValueError:
            unreadable.append(name)
            return None

    error = value_of("ERRNO", _errno)
    if (bus_error := value_of("BUSERROR", _bus_error)) is not None:
        error = f"{error}, {bus_error}" if error else bus_error
    return Notification(
        state=(
            "stopping" if fields.get("STOPPING") == "1"
            else "reloading" if fields.get("RELOADING") == "1"
            else "ready" if fields.get("READY") == "1"
            else None
        ),
        reloading_at=value_of("MONOTONIC_USEC", _number),
        status=fields.get("STATUS"),
        error=error,
        main_pid=value_of("MAINPID", _pid),
        extend=value_of("EXTEND_TIMEOUT_USEC", _seconds),
        watchdog=value_of("WATCHDOG", _watchdog),
        watchdog_timeout=value_of("WATCHDOG_USEC", _seconds),
        fd_store=fields.get("FDSTORE") == "1",
        fd_remove=fields.get("FDSTOREREMOVE") == "1",
        fd_name=value_of("FDNAME", _fd_name),
        fd_poll=fields.get("FDPOLL") != "0",
        unreadable=tuple(unreadable),
    )  # fmt: skip


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > _MOST_DIGITS:
        raise ValueError(text)
    return int(text)


def _seconds(text: str) -> float:
    return _number(text) / 1e6


def _pid(text: str) -> int:
    pid = _number(text)
    if not 1 < pid < 1 << 31:
        raise ValueError(text)
    return pid


def _errno(text: str) -> str:
    number = _number(text)
    if number > _LARGEST_ERRNO:
        raise ValueError(text)
    if number == 0:
        return ""
    return f"{errno.errorcode.get(number, f'errno {number}')} ({os.strerror(number)})"


def _bus_error(text: str) -> str:
    if len(text) > 255 or not _BUS_ERROR.fullmatch(text):
        raise ValueError(text)
    return text


def _watchdog(text: str) -> Literal["alive", "trigger"]:
    if text == "1":
        return "alive"
    if text == "trigger":
        return "trigger"
    raise ValueError(text)


def _fd_name(text: str) -> str:
    """As systemd has them: they are joined by colons in LISTEN_FDNAMES."""
    if not 0 < len(text) <= 255 or not (text.isascii() and text.isprintable()) or ":" in text:
        raise ValueError(text)
    return text


class ReloadHandshake:
    """Whether a program has done what a reload signal asked for (``Type=notify-reload``).

    A program that is reloading already when the signal comes says READY=1 for that first. With MONOTONIC_USEC
    the two can be told apart: only a RELOADING=1 from after the signal begins the reload that was asked for,
    and only a READY=1 after that ends it. From a program that has never said MONOTONIC_USEC any READY=1 does.

    Args:
        since: microseconds of CLOCK_MONOTONIC, from before the signal.
        says_when: the program is known to say MONOTONIC_USEC.
    """

    def __init__(self, since: int, *, says_when: bool) -> None:
        self._since = since
        self._says_when = says_when
        self._begun = False

    def said_reloading(self, at: int | None) -> None:
        self._says_when = self._says_when or at is not None
        self._begun = at is None or at >= self._since

    def is_done_by_ready(self) -> bool:
        """It has said READY=1: whether that is the end of the reload."""
        return self._begun or not self._says_when
