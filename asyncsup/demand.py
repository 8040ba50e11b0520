"""Starting a target when somebody connects, as often as its restart policy would.

A program that ends without having taken a connection leaves it waiting; started for it at once, it would be
started as often as the machine can, for as long as the client waits. So a start that is asked for too soon
after the one before counts as the restart of a program that has ended early, with its delays and its limit.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from functools import partial
from socket import socket

from msgspec.structs import replace

from asyncsup.lifecycle import Event
from asyncsup.restart import RestartHistory, RestartPolicy, decide
from asyncsup.sockets import Readiness


class Demand:
    """Looks at the sockets of a target while it rests.

    Args:
        start: called once for each `watch`, when something waits and it is time; `settled` is to follow.
        give_up: called instead, with the reason, when it was started too often in vain.
    """

    def __init__(self, start: Callable[[], None], give_up: Callable[[str], None]) -> None:
        self._start = start
        self._give_up = give_up
        self._readiness: Readiness | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._starting = False
        self._started_at: float | None = None
        self._history = RestartHistory()

    @property
    def is_heard(self) -> bool:
        """Whether the sockets are looked at, or a start is about to come of it."""
        return self._readiness is not None or self._timer is not None or self._starting

    def watch(self, sockets: Iterable[socket], policy: RestartPolicy) -> None:
        self._readiness = Readiness(sockets, partial(self._somebody_waits, policy))

    def close(self) -> None:
        """Look no more."""
        if self._readiness is not None:
            self._readiness.close()
            self._readiness = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def settled(self) -> None:
        """The start has been carried out, or given up."""
        self._starting = False

    def _somebody_waits(self, policy: RestartPolicy) -> None:
        self._readiness = None
        now = time.monotonic()
        if self._started_at is None or now - self._started_at >= max(policy.min_uptime, policy.delay):
            self._history = RestartHistory()
            self._go()
            return
        decision = decide(
            replace(policy, mode="always"),
            self._history,
            ended="ended while somebody waits at its sockets",
            uptime=None,
            now=now,
        )
        self._history = decision.history
        if decision.event is Event.GAVE_UP:
            self._give_up(decision.reason)
        else:
            self._timer = asyncio.get_running_loop().call_later(decision.delay, self._go)

    def _go(self) -> None:
        self._timer = None
        self._starting = True
        self._started_at = time.monotonic()
        self._start()
