"""Reaping processes that nobody else waits for, where there is no keeper to do it.

A program may leave children behind that end later. The kernel gives them to the nearest subreaper above, or
to PID 1: both is this process, when it runs without a keeper. Unreaped they would stay as zombies, each with
a pid that nobody can have.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from typing import Final

from asyncsup.child import Child
from asyncsup.keeper_link import become_subreaper

log = logging.getLogger("asyncsup")

LOOK_AGAIN_SECONDS: Final = 0.05


class StrayReaper:
    """Reaps strays from the event loop, on SIGCHLD. Whoever is a `Child` is reaped by that, and only by that:
    how it ended must not be lost.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._later: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Children of an earlier program in this process must have been taken back before."""
        become_subreaper()
        self._loop.add_signal_handler(signal.SIGCHLD, self._reap)
        # Hundreds may end in one turn of the loop. Python would print a traceback for each signal that finds
        # the loop's socket full, where one byte is enough to wake it.
        signal.set_wakeup_fd(signal.set_wakeup_fd(-1), warn_on_full_buffer=False)
        self._reap()

    def close(self) -> None:
        self._loop.remove_signal_handler(signal.SIGCHLD)
        if self._later is not None:
            self._later.cancel()

    def _reap(self) -> None:
        if self._later is not None:
            self._later.cancel()
            self._later = None
        while True:
            try:
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if info is None:
                return
            if info.si_pid in Child.expected:
                # It stands before the others until its own reader has had its turn.
                self._later = self._loop.call_later(LOOK_AGAIN_SECONDS, self._reap)
                return
            os.waitpid(info.si_pid, 0)
            log.debug("reaped pid %d, left behind by another process", info.si_pid)
