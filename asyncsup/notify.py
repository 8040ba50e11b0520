"""The sd_notify socket, for programs that speak systemd's protocol instead of the SDK.

One datagram socket serves all instances; the kernel says who sent a datagram (SO_PASSCRED), so a program can
speak only for itself and for processes of its own group. See sd_notify(3).
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

DATAGRAM_BYTES: Final = 4096
BATCH: Final = 64
_CREDENTIALS: Final = struct.Struct("iII")


class NotifySocket:
    """Receives notifications.

    Args:
        on_notify: called with the group id of the sender and the fields of the datagram; False when no
            instance leads that group.
        held: a descriptor of the socket that outlived an earlier supervisor, and what was sent meanwhile is
            in it; ours from here on.
    """

    def __init__(
        self, path: Path, on_notify: Callable[[int, Mapping[str, str]], bool], held: int | None = None
    ) -> None:
        self.path = path
        self.counters: Counter[str] = Counter()
        self._on_notify = on_notify
        self._loop = asyncio.get_running_loop()
        self._socket = _resumed(path, held) or _bound(path)
        self._loop.add_reader(self._socket.fileno(), self._readable)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        self.path.unlink(missing_ok=True)

    def _readable(self) -> None:
        # Level-triggered: what is left comes again, after everybody else had a turn.
        for _ in range(BATCH):
            try:
                data, ancillary, _, _ = self._socket.recvmsg(
                    DATAGRAM_BYTES, socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(4 * 64)
                )
            except BlockingIOError:
                return
            pid = _sender(ancillary)
            try:
                group = os.getpgid(pid) if pid is not None else None
            except ProcessLookupError:
                group = pid  # it has ended; if it led a group, the group has its pid
            fields = dict(
                line.split("=", 1) for line in data.decode("utf-8", "replace").split("\n") if "=" in line
            )
            if group is None or not fields or not self._on_notify(group, fields):
                self.counters["notify.stranger"] += 1


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


def _sender(ancillary: list[tuple[int, int, bytes]]) -> int | None:
    """The sender's pid; descriptors that came along are closed."""
    pid = None
    for level, kind, data in ancillary:
        if level != socket.SOL_SOCKET:
            continue
        if kind == socket.SCM_CREDENTIALS:
            pid = _CREDENTIALS.unpack(data[: _CREDENTIALS.size])[0]
        elif kind == socket.SCM_RIGHTS:
            for (fd,) in struct.iter_unpack("i", data[: len(data) // 4 * 4]):
                os.close(fd)
    return pid
