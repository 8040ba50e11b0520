"""A program says which process is its main one (MAINPID): is that process its to name?

A daemon that forks goes on in a child, and a master that replaces itself in a new one. The supervisor signals
its instances' main processes, often as root, so whoever could name any process could have it killed.
"""

from __future__ import annotations

import os
from collections.abc import Collection

import msgspec

from asyncsup.adoption import token_of
from asyncsup.child import pidfd_inode, read_facts


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """A process that may be named.

    Attributes:
        pidfd: the caller's.
        group: its process group: one of the instance's, or one that it leads itself.
    """

    pid: int
    pidfd: int
    start_ticks: int
    inode: int
    group: int


def examine(pid: int, *, main: int, groups: Collection[int], token: str) -> Claim | str:
    """Look at a process that an instance names as its main one; or why it is not to.

    It has to be of the instance's process groups, a descendant of its main process, or to have the instance's
    token in its environment, as a daemon has whose parents have ended.

    Args:
        main: the main process so far.
        groups: the instance's process groups.
    """
    try:
        # Before anything is read about the process: from here on the number cannot come to mean another.
        pidfd = os.pidfd_open(pid)
    except OSError:
        return f"there is no process {pid}"
    facts = read_facts(pid)
    why = None
    if facts is None or facts.has_ended:
        why = f"process {pid} has ended"
    elif facts.group not in groups:
        if not _descends(pid, main) and token_of(pid) != token:
            why = f"process {pid} is neither of its group nor a descendant of it"
        elif facts.group != pid:
            why = f"process {pid} is in a process group that it does not lead ({facts.group})"
    if why is not None or facts is None:
        os.close(pidfd)
        return why or f"there is no process {pid}"
    return Claim(
        pid=pid,
        pidfd=pidfd,
        start_ticks=facts.start_ticks,
        inode=pidfd_inode(pidfd),
        group=facts.group,
    )


def _descends(pid: int, ancestor: int) -> bool:
    seen: set[int] = set()
    while pid > 1 and pid not in seen:
        if pid == ancestor:
            return True
        seen.add(pid)
        facts = read_facts(pid)
        pid = facts.parent if facts is not None else 0
    return False
