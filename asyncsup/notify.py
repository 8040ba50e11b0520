"""The sd_notify socket, for programs that speak systemd's protocol instead of the SDK.

One datagram socket serves all instances; the kernel says who sent a datagram (SO_PASSCRED), so a program can
speak only for itself and for processes of its own group. See sd_notify(3).
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from asyncsup.notification import (
    DATAGRAM_BYTES,
    BadNotificationError,
    Notification,
    Refusal,
    read_notification,
)

log = logging.getLogger("asyncsup.notify")

BATCH: Final = 64
LAST_WORDS: Final = 1024
"""Datagrams that are read before an end is acted upon; the kernel queues 10 to 512 (``max_dgram_qlen``)."""
_CREDENTIALS: Final = struct.Struct("iII")
_MOST_DESCRIPTORS: Final = 253
"""In one datagram: the kernel's SCM_MAX_FD."""


class Sender(msgspec.Struct, frozen=True, kw_only=True):
    """Who sent a datagram, as the kernel has it; ``uid`` is the real one."""

    pid: int
    uid: int

    @property
    def group(self) -> int:
        """The process group. Of a process that has ended: its pid, which is the group's if it led one."""
        try:
            return os.getpgid(self.pid)
        except ProcessLookupError:
            return self.pid


class NotifySocket:
    """Receives notifications.

    Args:
        on_notify: called with the sender, what it says, and the descriptors that came along, of which those
            that are left in the list are closed; returns what of it does not count, or None.
        held: a descriptor of the socket that outlived an earlier supervisor, and what was sent meanwhile is
            in it; ours from here on.

    Attributes:
        counters: what did not count, by reason; the first of each kind is logged.
    """

    def __init__(
        self,
        path: Path,
        on_notify: Callable[[Sender, Notification, list[int]], Refusal | None],
        held: int | None = None,
    ) -> None:
        self.path = path
        self.counters: Counter[str] = Counter()
        self._on_notify = on_notify
        self._loop = asyncio.get_running_loop()
        self._socket = _resumed(path, held) or _bound(path)
        self._loop.add_reader(self._socket.fileno(), self._receive, BATCH)

    def fileno(self) -> int:
        return self._socket.fileno()

    def hear_last_words(self) -> None:
        """Read what was sent so far: a process has ended, and is not reaped yet. What it said, and the order
        in which it did, counts before what its end means. A command that was killed may end when this is
        closed: nobody listens any more."""
        if self._socket.fileno() >= 0:
            self._receive(LAST_WORDS)

    def close(self) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        self.path.unlink(missing_ok=True)

    def _receive(self, most: int) -> None:
        # Level-triggered: what is left comes again, after everybody else had a turn.
        for _ in range(most):
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(
                    DATAGRAM_BYTES,
                    socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(4 * _MOST_DESCRIPTORS),
                    socket.MSG_CMSG_CLOEXEC,
                )
            except BlockingIOError:
                return
            sender, descriptors = _origin(ancillary)
            try:
                self._understand(data, flags, sender, descriptors)
            finally:
                # For BARRIER=1 this is the answer: everything before it was dealt with.
                for fd in descriptors:
                    os.close(fd)

    def _understand(self, data: bytes, flags: int, sender: Sender | None, descriptors: list[int]) -> None:
        if sender is None:
            self._refuse("stranger", sender, "nobody knows who sent it")
        elif flags & socket.MSG_TRUNC:
            self._refuse("oversized", sender, f"it is longer than {DATAGRAM_BYTES} bytes")
        elif flags & socket.MSG_CTRUNC:
            self._refuse("truncated", sender, "not all of its descriptors could be received")
        else:
            try:
                notification = read_notification(data)
            except BadNotificationError as error:
                self._refuse("garbage", sender, str(error))
                return
            for name in notification.unreadable:
                self._refuse("unreadable", sender, f"{name} has no such values")
            if notification.barrier:
                return
            if (refusal := self._on_notify(sender, notification, descriptors)) is not None:
                self._refuse(refusal.kind, sender, refusal.why)

    def _refuse(self, kind: str, sender: Sender | None, why: str) -> None:
        name = f"notify.{kind}"
        self.counters[name] += 1
        if self.counters[name] == 1:
            by = "" if sender is None else f" of pid {sender.pid} (uid {sender.uid})"
            log.warning("from the notify socket%s, refused: %s (more of %s are counted only)", by, why, name)


def _bound(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    path.unlink(missing_ok=True)
    made.bind(str(path))
    # Programs that run as another user must reach it; the folder above is searchable only for ours.
    path.chmod(0o666)
    return made


def _resumed(path: Path, held: int | None) -> socket.socket | None:
    """The socket an earlier supervisor was listening to, if it can still be reached."""
    if held is None:
        return None
    resumed = socket.socket(fileno=held)
    if resumed.getsockname() == str(path) and path.is_socket():
        return resumed
    resumed.close()
    return None


def _origin(ancillary: list[tuple[int, int, bytes]]) -> tuple[Sender | None, list[int]]:
    """Who sent a datagram, and the descriptors that came along."""
    sender, descriptors = None, []
    for level, kind, data in ancillary:
        if level != socket.SOL_SOCKET:
            continue
        if kind == socket.SCM_CREDENTIALS and len(data) >= _CREDENTIALS.size:
            pid, uid, _ = _CREDENTIALS.unpack(data[: _CREDENTIALS.size])
            # 0: it is in a namespace that has no view of ours.
            sender = Sender(pid=pid, uid=uid) if pid > 0 else None
        elif kind == socket.SCM_RIGHTS:
            descriptors += [fd for (fd,) in struct.iter_unpack("i", data[: len(data) // 4 * 4])]
    return sender, descriptors
