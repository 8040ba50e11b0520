"""Who asked for something, as the system tells it and not as they claim."""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec.structs import asdict


class Actor(msgspec.Struct, frozen=True, kw_only=True):
    """Somebody who asked for something.

    Attributes:
        via: a connection to the control socket, a file in the inbox (its owner), this supervisor itself, or
            `asyncsup doctor`.
        user: the name of `uid` when it was asked for; None where it has none.
        address: of a peer that is no local process.
        key: of a peer that came over TCP, the name under which its key is allowed.
    """

    via: Literal["control", "inbox", "supervisor", "doctor"]
    uid: int | None = None
    gid: int | None = None
    pid: int | None = None
    user: str | None = None
    address: str | None = None
    key: str | None = None

    @classmethod
    def of_key(cls, name: str, address: str) -> Actor:
        """Who has proven to have a key that is allowed."""
        return cls(via="control", key=name, address=address)

    @classmethod
    def of_peer(cls, address: str) -> Actor:
        """Who is behind a message: the process that has connected, as the kernel tells it and libzmq hands it
        on (``localhost:UID:GID:PID``)."""
        _, *numbers = address.rsplit(":", 3)
        if len(numbers) != 3 or not all(number.isdecimal() for number in numbers):
            return cls(via="control", address=address or "unknown")
        uid, gid, pid = map(int, numbers)
        return cls(via="control", uid=uid, gid=gid, pid=pid, user=_user(uid))

    @classmethod
    def of_file(cls, path: Path) -> Actor:
        """Who owns a file in the inbox, by its name."""
        try:
            status = path.lstat()
        except OSError:
            return cls(via="inbox")
        return cls.of_owner(status.st_uid, status.st_gid)

    @classmethod
    def of_owner(cls, uid: int, gid: int) -> Actor:
        """Who owns a file in the inbox."""
        return cls(via="inbox", uid=uid, gid=gid, user=_user(uid))

    @classmethod
    def this_process(cls, via: Literal["supervisor", "doctor"]) -> Actor:
        """The user this very process runs as."""
        return cls(via=via, uid=os.getuid(), gid=os.getgid(), pid=os.getpid(), user=_user(os.getuid()))

    def __str__(self) -> str:
        if self.via == "supervisor":
            return "the supervisor"
        if self.key is not None:
            return f"key {self.key} from {self.address}"
        if self.uid is None:
            return self.address or "unknown"
        facts = [f"uid {self.uid}"] + ([f"pid {self.pid}"] if self.pid is not None else [])
        who = f"{self.user} ({', '.join(facts)})" if self.user is not None else ", ".join(facts)
        return f"inbox, file of {who}" if self.via == "inbox" else who

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def _user(uid: int) -> str | None:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None
