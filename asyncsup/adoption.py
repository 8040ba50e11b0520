"""Taking back processes that an earlier supervisor started.

A pid is no identity. A process is taken for the one that was written down if its pid, the time at which the
kernel started it, and the token in its environment agree. Some programs overwrite their environment (nginx
and PostgreSQL do, to show a title); then the inode of its pidfd decides, which no other process has before
the next boot, or else that its output goes into the instance's own FIFO. Whatever does not agree is left
alone, and said.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
from collections.abc import Callable
from enum import Enum, auto
from pathlib import Path
from typing import Final

import msgspec
from msgspec.structs import replace

from asyncsup.child import Child, ProcessFacts, group_members, pidfd_inode, read_facts, read_proc
from asyncsup.keeper_link import KeeperLink
from asyncsup.record import ProcessRecord
from asyncsup.restart import Exit
from target_sdk.protocol import ENV_TOKEN

ENV_HOOK: Final = "ASYNCSUP_HOOK"

_INFO_SIZE: Final = 64
_INFO_EXIT: Final = 1 << 3
_PIDFD_GET_INFO: Final = (3 << 30) | (_INFO_SIZE << 16) | (0xFF << 8) | 11
"""``_IOWR(PIDFS_IOCTL_MAGIC, 11, struct pidfd_info)`` as of kernel 6.13; exit statuses since 6.15."""

KEEPER_PATIENCE_SECONDS: Final = 1.0
"""How long after the end of an adopted process its keeper's word on it, or a look at it, is waited for."""
KEEPER_LOOK_SECONDS: Final = 0.01


class Verdict(Enum):
    OURS = auto()
    """It is the process that was written down (it may have ended, without having been reaped)."""
    GONE = auto()
    """That process has ended; if there is one of its number, it is another."""
    DOUBTFUL = auto()
    """There is one that may be it."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a process.

    Attributes:
        pidfd: of the process that was found; the caller's. -1 when it is gone.
        why: for a verdict that is not `OURS`, for people.
    """

    verdict: Verdict
    record: ProcessRecord
    pidfd: int = -1
    why: str = ""


def find(record: ProcessRecord, output: Path) -> Finding:
    """Look for the process of a record.

    Args:
        output: the FIFO that its standard output goes to.
    """
    if record.pid is None:
        return _find_by_token(record, output)
    try:
        # Before anything is read about the process: from here on the number cannot come to mean another.
        pidfd = os.pidfd_open(record.pid)
    except OSError:
        return Finding(verdict=Verdict.GONE, record=record, why=f"pid {record.pid} is gone")
    facts = read_facts(record.pid)
    inode = pidfd_inode(pidfd)
    if facts is None or facts.start_ticks != record.start_ticks or inode != record.inode:
        os.close(pidfd)
        return Finding(verdict=Verdict.GONE, record=record, why=f"pid {record.pid} is another process by now")
    doubt = None if facts.has_ended else _doubt(record, output, inode)
    return Finding(
        verdict=Verdict.OURS if doubt is None else Verdict.DOUBTFUL,
        record=record,
        pidfd=pidfd,
        why=doubt or "",
    )


def _doubt(record: ProcessRecord, output: Path, inode: int) -> str | None:
    """What speaks against a process whose pid and start time agree."""
    assert record.pid is not None
    token = token_of(record.pid)
    if token == record.token:
        return None
    if token is not None:
        return f"pid {record.pid} has the right start time, but another token"
    if inode or _writes_to(record.pid, output):
        return None
    return f"pid {record.pid} has the right start time, but its token cannot be seen"


def _find_by_token(record: ProcessRecord, output: Path) -> Finding:
    """The supervisor died when it was about to spawn, or just had: whom it spawned leads a session, is not
    older than that, and has the token, or at least writes to the instance's FIFO."""
    found: dict[int, ProcessFacts] = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        facts = read_facts(pid)
        if facts is None or facts.session != pid or facts.start_ticks < record.start_ticks:
            continue
        variables = _variables(pid)
        token = variables.get(ENV_TOKEN)
        # Its hooks have the token as well.
        same = token == record.token and variables.get(ENV_HOOK) == ("pre_start" if record.hook else None)
        if same or (token is None and _writes_to(pid, output)):
            found[pid] = facts
    if not found:
        return Finding(verdict=Verdict.GONE, record=record, why="it was not spawned any more")
    if len(found) > 1:
        pids = ", ".join(map(str, found))
        return Finding(verdict=Verdict.DOUBTFUL, record=record, why=f"several processes may be it: {pids}")
    ((pid, facts),) = found.items()
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return Finding(verdict=Verdict.GONE, record=record, why=f"pid {pid} is gone")
    complete = replace(
        record,
        pid=pid,
        start_ticks=facts.start_ticks,
        inode=pidfd_inode(pidfd),
        spawned=time.monotonic(),
    )
    return Finding(verdict=Verdict.OURS, record=complete, pidfd=pidfd)


def token_of(pid: int) -> str | None:
    """The token in a process's environment, as it was when the program in it was executed."""
    return _variables(pid).get(ENV_TOKEN)


def _variables(pid: int) -> dict[str, str]:
    """What can be seen of asyncsup's own variables in a process's environment."""
    try:
        entries = read_proc(pid, "environ").split(b"\0")
    except OSError:
        return {}
    pairs = (entry.decode(errors="replace").partition("=") for entry in entries if entry[:9] == b"ASYNCSUP_")
    return {name: value for name, _, value in pairs}


def _writes_to(pid: int, output: Path) -> bool:
    with contextlib.suppress(OSError):
        return str(Path(f"/proc/{pid}/fd/1").readlink()).removesuffix(" (deleted)") == str(output)
    return False


def groups_of(record: ProcessRecord, output: Path) -> list[int]:
    """The process groups of a process that was found, as far as they are still its own.

    The number of one that was left empty may be in use again.
    """
    assert record.pid is not None
    if not record.groups:
        return [record.pid]
    facts = read_facts(record.pid)
    own = {record.pid} if facts is None else {record.pid, facts.group}
    return [
        group for group in record.groups if group in own or is_group_of(record, group_members(group), output)
    ]


def is_group_of(record: ProcessRecord, members: list[int], output: Path) -> bool:
    """Whether the processes of a group whose leader is gone are those that the process of a record has left
    behind. A number that is in use for a group is not given to a new process, so one that is known suffices.
    """
    return any(token_of(pid) == record.token or _writes_to(pid, output) for pid in members)


class AdoptedChild(Child):
    """A process that is no child of ours, so that somebody else reaps it.

    How it ended is said by the keeper, if that is its parent now; by the kernel (6.15 and later), through its
    pidfd; or by its remains, until they are reaped.
    """

    def __init__(self, record: ProcessRecord, pidfd: int, keeper: KeeperLink) -> None:
        assert record.pid is not None
        super().__init__(
            record.pid,
            pidfd=pidfd,
            started=record.spawned,
            groups=record.groups,
            start_ticks=record.start_ticks,
        )
        self._keeper = keeper
        self._known_as = record.pid, record.start_ticks
        """What the keeper calls it."""
        keeper.expect(*self._known_as)

    def _reaped_elsewhere(
        self, callback: Callable[[Exit], None], before_reaping: Callable[[Exit], None]
    ) -> None:
        # Not always: a supervisor that was replaced without a keeper is the same process, and has children.
        assert self._loop is not None
        self._loop.remove_reader(self._pidfd)
        self._ask(self._loop.time() + KEEPER_PATIENCE_SECONDS, callback, before_reaping)

    def _ask(
        self, deadline: float, callback: Callable[[Exit], None], before_reaping: Callable[[Exit], None]
    ) -> None:
        assert self._loop is not None
        status, may_be_known = self._keeper.exit_of(*self._known_as), self._keeper.reaps
        if status is None:
            try:
                status = exit_status(self._pidfd, *self._known_as)
            except OSError:  # no descriptor to look with
                may_be_known = True
        if status is None and may_be_known and self._loop.time() < deadline:
            self._loop.call_later(KEEPER_LOOK_SECONDS, self._ask, deadline, callback, before_reaping)
            return
        ended = Exit() if status is None else Exit.from_wait_status(status)
        before_reaping(ended)
        self._keeper.forget(*self._known_as)
        self._let_go()
        callback(ended)


def exit_status(pidfd: int, pid: int, start_ticks: int) -> int | None:
    """The wait status of a process that has ended and is no child of ours; None if nobody can tell."""
    for _ in range(2):
        facts = read_facts(pid)
        if facts is not None and facts.start_ticks == start_ticks and facts.has_ended:
            return facts.wait_status
        info = bytearray(_INFO_SIZE)
        struct.pack_into("Q", info, 0, _INFO_EXIT)
        with contextlib.suppress(OSError):  # a kernel that cannot say
            fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
            if struct.unpack_from("Q", info)[0] & _INFO_EXIT:
                return int(struct.unpack_from("i", info, 60)[0])
    return None
