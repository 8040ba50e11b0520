"""The watch over one process, from its spawn to its end: is it ready, is it alive, is it too old?

Each question that the configuration asks is a task or a timer here; the answers go to the instance, which
decides. Nothing is asked that was not configured, so nothing wakes up for it.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from asyncsup.channel import PeerError, PeerGoneError
from asyncsup.config import ProbeConfig, TargetConfig
from asyncsup.logreader import Cursor
from asyncsup.logs import OutputStream
from asyncsup.probes import Probe, RunCommand, probe_of, until_dead, until_line, until_ready

AGE_SPREAD: Final = 0.1
"""Instances that started together do not become too old together: up to this part is added by chance."""


class Watch:
    """Watches one process.

    Args:
        run_command: runs a command as the instance; see `asyncsup.probes`.
        ping: asks the process itself for a sign of life within so many seconds; raises as
            `TargetChannel.request` does when there is none.
        accepts: why it does not wait for connections at its sockets yet; None when it does.
        on_ready: told why it counts as ready.
        on_dead: told why it is to be ended, and by which signal if not by the usual one.
        on_old: `max_age` is over.
        watchdog_timeout: how long it may be silent from when it is ready on, in seconds.
    """

    def __init__(
        self,
        config: TargetConfig,
        *,
        expand: Callable[[str], str],
        run_command: RunCommand,
        ping: Callable[[float], Awaitable[object]],
        accepts: Callable[[], str | None],
        on_ready: Callable[[str], None],
        on_dead: Callable[[str, int | None], None],
        on_old: Callable[[], None],
        watchdog_timeout: float | None,
    ) -> None:
        self.last_failure = ""
        """What the last readiness probe said."""
        self._config = config
        self._expand = expand
        self._run_command = run_command
        self._ping = ping
        self._accepts = accepts
        self._on_ready = on_ready
        self._on_dead = on_dead
        self._on_old = on_old
        self._loop = asyncio.get_running_loop()
        self._readiness: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._timers: list[asyncio.TimerHandle] = []
        self._watchdog: asyncio.TimerHandle | None = None
        self._watchdog_timeout = watchdog_timeout
        self._is_ready = False
        self._descriptor = -1

    # --- before it is ready ---------------------------------------------------------------------------------

    def await_ready(
        self,
        output: OutputStream,
        begin: Cursor | None,
        descriptor: int | None,
        *,
        since: float | None = None,
    ) -> None:
        """Begin to look for readiness, where it shows from outside.

        Args:
            begin: where in the output the process began; asked for only where a line of it says it is ready.
            descriptor: what its `ready.fd` leads to; closed here.
            since: monotonic time of the spawn, if that was not a moment ago.
        """
        config, ready = self._config, self._config.ready
        if config.oneshot and config.max_age is not None:
            self._grow_old(config.max_age, since)
        if descriptor is not None:
            os.set_blocking(descriptor, False)
            self._descriptor = descriptor
            self._loop.add_reader(descriptor, self._read_descriptor)
        elif ready.log is not None:
            assert begin is not None
            self._readiness = self._start(self._await_line(output, begin, ready.log))
        elif config.readiness == "accepts":
            self._readiness = self._start(self._await_probe(self._ask_whether_it_accepts))
        elif (probe := self._probe(ready)) is not None:
            self._readiness = self._start(self._await_probe(probe))

    async def _await_line(self, output: OutputStream, begin: Cursor, pattern: str) -> None:
        await until_line(output, begin, pattern)
        self._on_ready("its output says so")

    async def _await_probe(self, probe: Probe) -> None:
        await until_ready(probe, self._config.ready.interval, self._note_failure)
        self._on_ready("its readiness probe succeeded")

    async def _ask_whether_it_accepts(self) -> str | None:
        return self._accepts()

    def _note_failure(self, failure: str) -> None:
        self.last_failure = failure

    def _read_descriptor(self) -> None:
        try:
            data = os.read(self._descriptor, 4096)
        except BlockingIOError:
            return
        if b"\n" in data:
            self._close_descriptor()
            self._on_ready(f"wrote to descriptor {self._config.ready.fd}")
        elif not data:
            self._close_descriptor()
            self.last_failure = f"descriptor {self._config.ready.fd} was closed without a newline"

    def _close_descriptor(self) -> None:
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def configure(self, config: TargetConfig) -> None:
        """Other settings, for what is asked from when it is ready on; what is asked already stays."""
        self._config = config

    # --- from then on ---------------------------------------------------------------------------------------

    def became_ready(self, *, since: float | None = None) -> None:
        """Stop asking whether it is ready, and begin to ask whether it still is alive.

        Args:
            since: monotonic time at which it became ready, if that was not a moment ago.
        """
        config = self._config
        self._is_ready = True
        self._close_descriptor()
        if self._readiness is not None and self._readiness is not asyncio.current_task():
            self._readiness.cancel()
        if (probe := self._probe(config.liveness)) is not None:
            self._start(self._await_death(probe))
        if config.protocol == "sdk" and config.watchdog_timeout is not None:
            self._start(self._ping_on(config.watchdog_timeout))
        else:
            self.is_alive()
        if config.max_age is not None and not config.oneshot:
            self._grow_old(config.max_age * (1 + AGE_SPREAD * random.random()), since)

    def _grow_old(self, age: float, since: float | None) -> None:
        passed = 0.0 if since is None else self._loop.time() - since
        self._timers.append(self._loop.call_later(max(0.0, age - passed), self._on_old))

    async def _await_death(self, probe: Probe) -> None:
        self._on_dead(await until_dead(probe, self._config.liveness), None)

    async def _ping_on(self, timeout: float) -> None:
        """Two questions in the time within which one has to be answered."""
        while True:
            await asyncio.sleep(timeout / 2)
            try:
                await self._ping(timeout / 2)
            except (TimeoutError, PeerGoneError, PeerError):
                self.is_silent()
                return

    def is_alive(self) -> None:
        """It has said WATCHDOG=1. Until it is ready nobody waits for that."""
        if self._watchdog is not None:
            self._watchdog.cancel()
        if self._watchdog_timeout is not None and self._is_ready:
            self._watchdog = self._loop.call_later(self._watchdog_timeout, self.is_silent)

    def change_watchdog(self, timeout: float | None) -> None:
        """It has said WATCHDOG_USEC=...; None for 0, which turns it off."""
        self._watchdog_timeout = timeout
        self.is_alive()

    def is_silent(self) -> None:
        """The watchdog has gone off. SIGABRT, as systemd does: a core dump may tell where it hangs."""
        self._on_dead(f"watchdog: no sign of life for {self._watchdog_timeout:g} s", signal.SIGABRT)

    def is_triggered(self) -> None:
        """It has said WATCHDOG=trigger: as if it had been silent for too long."""
        self._on_dead("watchdog: triggered by the program itself", signal.SIGABRT)

    def close(self) -> None:
        """It has ended, or is about to be: nobody wants to know any more."""
        self._close_descriptor()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        for timer in (*self._timers, self._watchdog):
            if timer is not None:
                timer.cancel()
        self._timers.clear()
        self._watchdog = None

    # --- helpers --------------------------------------------------------------------------------------------

    def _probe(self, config: ProbeConfig) -> Probe | None:
        return probe_of(config, self._run_command, self._expand)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
