"""One running process of a target: its state, and what it does about each event.

Everything here is synchronous and happens on the event loop's thread, so there is nothing to lock: the
kernel, the clock, the program (through the channel or the notify socket) and the target's operations call
in, the transition table decides, and whoever waits for a state is woken.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

import anyio
import msgspec
from msgspec.structs import replace

from asyncsup import adoption, lifecycle, listen_fds, listeners, main_process
from asyncsup.adoption import ENV_HOOK, AdoptedChild
from asyncsup.cgroups import Cgroup, Usage
from asyncsup.channel import PeerError, PeerGoneError
from asyncsup.child import (
    Child,
    group_members,
    out_of_the_way,
    ticks_now,
    user_ids,
    when_groups_empty,
)
from asyncsup.config import TargetConfig
from asyncsup.errors import HandoverFailedError, SpawnError, TargetNotRunningError
from asyncsup.events import timestamp
from asyncsup.fd_store import FdStore
from asyncsup.launch import WATCHDOG_PID, expand, managed_sockets, run_as
from asyncsup.lifecycle import Event, State
from asyncsup.logreader import Cursor
from asyncsup.logs import OutputStream
from asyncsup.notification import STORED, Notification, Refusal, ReloadHandshake
from asyncsup.record import InstanceRecord, ProcessRecord, Role
from asyncsup.restart import Exit, LastExit, RestartHistory, RestartPolicy, decide
from asyncsup.runtime import RootFacts, Runtime
from asyncsup.slot_output import SlotOutput
from asyncsup.steering import SETTLE_SECONDS
from asyncsup.watch import Watch
from target_sdk import protocol
from target_sdk.protocol import Hello, PrepareAnswer, ProtocolError, ReloadAnswer

log = logging.getLogger("asyncsup.instance")

RECONNECT_SECONDS: Final = 5.0
"""How long a program with the SDK may take to find a new supervisor; it tries at least twice a second."""
LAST_ESCALATION_SECONDS: Final = 5.0
"""How long after SIGKILL a process may take to vanish before that is worth a word."""

ENV_EXIT_STATUS: Final = "ASYNCSUP_EXIT_STATUS"
ENV_EXIT_SIGNAL: Final = "ASYNCSUP_EXIT_SIGNAL"

NONE: Final[Mapping[int, int]] = MappingProxyType({})

ToldBy = Literal["sdk", "signal", "command", "nobody"]


class ReloadOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a reload went; ``took`` in seconds."""

    told_by: ToldBy
    ok: bool
    took: float
    reason: str | None = None


class Instance:
    """A seat for one process in the slot ``NAME:INDEX``; processes come and go.

    A slot has one such seat, which lives as long as the target; while one process replaces another without a
    gap it has several. They share the slot's output, and its name.

    Args:
        predecessor: whose slot it is, and whom it is to replace.
    """

    def __init__(
        self,
        config: TargetConfig,
        index: int,
        runtime: Runtime,
        on_change: Callable[[], None],
        on_old: Callable[[Instance], None],
        *,
        seat: int = 0,
        predecessor: Instance | None = None,
    ) -> None:
        self.config = config
        self.index = index
        self.name = f"{config.name}:{index}"
        self.seat = seat
        self.role: Role = "current" if predecessor is None else "successor"
        self.state = State.STOPPED
        self.detail = ""
        self.status_text = ""
        self.failure: str | None = None
        """Why the program says that it cannot do its work, until it is reloaded, started or ready again."""
        self.given_up: str | None = None
        """Why it will not be a successor, although its process is still there."""
        self.restarts: int = 0 if predecessor is None else predecessor.restarts
        self.wanted = False
        """It is to be up, also if it is down at this moment for a restart or a patch."""
        self.last_exit: LastExit | None = None
        self.hello: Hello | None = None
        self.token = ""
        self._runtime = runtime
        self._on_change = on_change
        self._on_old = on_old
        self._history = RestartHistory()
        self._child: Child | None = None
        """The program; before it, the `pre_start` hook."""
        self._formers: dict[int, Child] = {}
        """What was its main process before, and has not ended: its end is waited for already."""
        self._program_runs = False
        self._watch: Watch | None = None
        self._cleaning: asyncio.Task[None] | None = None
        """The `post_stop` hook: nothing is started before it has ended."""
        self._hooks: set[asyncio.Task[None]] = set()
        self._process: ProcessRecord | None = None
        """How the next supervisor will know the process again."""
        self._facts: RootFacts | None = None
        """What there was in its root when its start began."""
        self._cgroup: Cgroup | None = None
        """Of the process there is, or was last."""
        self._missed: Exit | None = None
        """How a process ended while no supervisor was there; to be dealt with by `carry_on`."""
        self._doubt = ""
        """Why a process that was found may be another one."""
        self._lost_pidfd = -1
        self._awaited = False
        """It was taken back, and its program has not connected to us yet."""
        self._ready_at: float | None = None
        self._since = time.monotonic()
        self._doomed: str | None = None
        """Why the supervisor itself is ending a process that nobody asked to stop."""
        self._timer: asyncio.TimerHandle | None = None
        self._due: float | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self._output: SlotOutput = self._new_output() if predecessor is None else predecessor._output
        self._store: FdStore = (
            FdStore(self.name, runtime.keeper) if predecessor is None else predecessor._store
        )
        self._time_out: Callable[[], None] | None = None
        """What happens when the timer ends."""
        self._finishing = False
        """It finishes what it has begun, and is stopped then."""
        self._leaving = False
        """It has said that it is stopping, and nobody had asked it to."""
        self._said_error = ""
        """The error it says that it fails for."""
        self._said_watchdog_timeout: float | None = None
        self._says_when = False
        """It is known to say MONOTONIC_USEC when it reloads."""
        self._handshake: ReloadHandshake | None = None
        self._reload_confirmed: asyncio.Future[str | None] | None = None
        self._answer_deadline: asyncio.Timeout | None = None
        """Until when it may take to reload, or to drain."""
        self._asking: asyncio.Timeout | None = None
        """How long `stop_command` may take."""
        self._telling: set[asyncio.Task[None]] = set()

    # --- looking --------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child is not None and self._child.alive else None

    @property
    def generation(self) -> int | None:
        """Of the resources its process was started on, or has taken up since; None if that is not known."""
        return self._process.generation if self._process is not None else None

    @property
    def ready(self) -> bool:
        return self.state in lifecycle.READY and self._doomed is None and not self._leaving

    @property
    def open_streams(self) -> Mapping[str, OutputStream]:
        """Those that have been needed so far."""
        return self._output.opened

    @property
    def streams(self) -> Mapping[str, OutputStream]:
        return self._output.open(has_writers=self._has_writers)

    @property
    def _has_writers(self) -> bool:
        """Whether there is a process; of one that is only looked for, somebody may be left as well."""
        return self._process is not None and self._process.pid is not None

    @property
    def seat_name(self) -> str:
        """No other seat has it, in whatever slot."""
        return f"{self.name}~{self.seat}" if self.seat else self.name

    @property
    def journal_key(self) -> str:
        """What the journal knows this seat by."""
        return f"instance {self.seat_name}"

    @property
    def situation(self) -> str:
        """Its state, and why it is in one that is not what anybody wants."""
        if self.state is State.WAITING:
            return self.detail
        is_explained = self.state in {State.BACKOFF, State.EXITED, State.FAILED, State.LOST}
        return f"{self.state.value} ({self.detail})" if is_explained else self.state.value

    @property
    def told_by(self) -> ToldBy:
        """How this instance learns of changed resources."""
        if self.hello is not None:
            return "sdk"
        if self.config.protocol == "sdk":
            return "sdk"
        if self.config.reload_command is not None:
            return "command"
        return "signal" if self.config.reload_signal is not None else "nobody"

    def describe(self) -> dict[str, Any]:
        now = time.monotonic()
        return {
            "name": self.name,
            "state": self.state.value,
            "pid": self.pid,
            "ready": self.ready,
            "uptime": now - self._child.started if self._child is not None and self._child.alive else None,
            "in_state": now - self._since,
            "restarts": self.restarts,
            "status_text": self.status_text,
            "failure": self.failure,
            "exit": self.last_exit.to_json() if self.last_exit is not None else None,
            "sdk": self.hello is not None,
            "build": self.hello.build if self.hello is not None else None,
            "region": self.hello.region if self.hello is not None else None,
            "detail": self.detail,
            "cgroup": None if self._cgroup is None else str(self._cgroup.path),
            "lost_bytes": sum(stream.lost_bytes for stream in self.open_streams.values()),
            "role": self.role,
        }

    def usage(self) -> Usage | None:
        """What its processes take; None without a control group."""
        return None if self._cgroup is None else self._cgroup.usage()

    def take_over_from(self, before: Instance, role: Role) -> None:
        """Be the one that counts in the slot; the one that did so far has another role from now on. Both are
        written down at once.
        """
        self.role, before.role = "current", role
        self._runtime.journal.put_together(
            {self.journal_key: self._record(), before.journal_key: before._record()}
        )
        for each in (self, before):
            each._role_changed()

    def retire(self) -> None:
        """It is on its way out."""
        self.role = "retiring"
        self._remember()
        self._role_changed()

    def _role_changed(self) -> None:
        if self.role == "retiring" and self.ready:
            # It need not answer questions any more: a time-out of its own ends it.
            self._end_watch()
        self._wake_waiters()

    async def wait_until(self, condition: Callable[[Instance], bool]) -> None:
        """Return when the condition holds; it is looked at after every change of state and `failure`."""
        while not condition(self):
            future = asyncio.get_running_loop().create_future()
            self._waiters.append(future)
            try:
                await future
            finally:
                if future in self._waiters:
                    self._waiters.remove(future)

    # --- what operations ask for ----------------------------------------------------------------------------

    def want(self) -> None:
        """It is to be up from now on, even if that takes a while."""
        if not self.wanted:
            self.wanted = True
            self._remember()

    def wait_for_dependencies(self, why: str) -> bool:
        """Be started when they are there, unless there is a process already; whether that is news to anybody,
        also of one that waits already.
        """
        if self.state is State.WAITING and self.detail != why:
            log.info("%s: %s", self.name, why)
            self.detail = why
            self._remember()
            self._wake_waiters()
            return True
        if not lifecycle.accepts(self.state, Event.WAIT):
            return False
        self._cancel_timer()
        self._forget_lost()
        self._apply(Event.WAIT, why)
        return True

    def start(self, reason: str) -> None:
        """Start now, unless there is a process already. A commanded start forgets earlier failures."""
        if lifecycle.accepts(self.state, Event.START):
            self.wanted = True
            self._cancel_timer()
            self._forget_lost()
            self._history = RestartHistory()
            self._start_over(Event.START, reason)

    def stop(self, reason: str, *, for_good: bool) -> None:
        """Begin to stop; `STOPPED` is reached when the whole group is gone.

        Args:
            for_good: it is not wanted any more; otherwise it is to be started again later.
        """
        if for_good and self.wanted:
            self.wanted = False
            self._remember()
        if not lifecycle.accepts(self.state, Event.STOP):
            self._settle_store()
            return
        self._cancel_timer()
        self._forget_lost()
        alive = self.state in lifecycle.ALIVE
        self._apply(Event.STOP, reason)
        if self._child is not None:
            self._terminate()
        elif alive:
            self._apply(Event.GONE, "not started yet")

    def give_up(self, reason: str) -> None:
        """It has ended as expected, and is not to be started again by itself all the same."""
        if self.state is State.EXITED:
            self._apply(Event.GAVE_UP, reason)

    def kill(self) -> None:
        """SIGKILL at once, for whoever cannot wait for `stop_timeout`."""
        if self.state in lifecycle.ALIVE:
            self._kill()

    def signal(self, number: int) -> int:
        """Send a signal to the process; returns its pid.

        Raises:
            TargetNotRunningError: there is no process.
        """
        if self._child is None or not self._child.signal(number):
            raise TargetNotRunningError(f"{self.name} is {self.state.value}: there is no process to signal")
        return self._child.pid

    def reset(self) -> None:
        """Forget the past of a slot that an operator has dealt with."""
        self.restarts = 0

    async def prepare(self, request: protocol.Prepare) -> PrepareAnswer:
        """Ask whether a patch may come now.

        Raises:
            TimeoutError, PeerGoneError, PeerError, ProtocolError: no valid answer.
        """
        await self._connected()
        answer = await self._runtime.channel.request(
            self.token, request.METHOD, request.params(), deadline=request.deadline
        )
        return PrepareAnswer.from_result(answer)

    async def abort(self, patch: str, *, deadline: float) -> None:
        """Tell that a prepared patch will not come. Best effort: who is gone needs no telling."""
        try:
            await self._runtime.channel.request(
                self.token, protocol.Abort.METHOD, protocol.Abort(patch=patch).params(), deadline=deadline
            )
        except (TimeoutError, PeerGoneError, PeerError) as error:
            log.warning("%s was not told that patch %s is off: %s", self.name, patch[:12], error)

    def finish(self) -> None:
        """It is to drain, and to be stopped then: nobody asks whether it is alive, nor starts it again."""
        self._finishing = True
        self._end_watch()

    async def drain(self, seconds: float) -> str | None:
        """Have the program finish what it has begun, and take up nothing new; returns why it has not done so,
        or None. From one that goes on waiting for connections these are steered away.

        Raises:
            HandoverFailedError: it still has what its successor was to have, and goes on with it.
        """
        if self.config.protocol == "sdk" and self.hello is None:
            with anyio.move_on_after(RECONNECT_SECONDS):
                await self.wait_until(lambda i: i.hello is not None)
        # One without the SDK knows nothing of a drain.
        why, left = (None, seconds) if self.hello is None else await self._ask_to_drain(seconds)
        if left > 0 and self.config.sockets:
            await self._steer_away(min(left, SETTLE_SECONDS))
        return why

    async def _steer_away(self, seconds: float) -> None:
        """Let it take no more connections, and finish what it has taken.

        In the middle of that it is done once more: a program may have asked to hear of its sockets just after
        the first time, which it does not do when it waits.
        """
        steer_away = partial(self._runtime.sockets.steer_away, self._groups, self.config.sockets)
        if await steer_away():
            await asyncio.sleep(seconds / 2)
            await steer_away()
            await asyncio.sleep(seconds / 2)

    def _groups(self) -> Sequence[int]:
        return self._child.groups if self._child is not None else ()

    async def _ask_to_drain(self, seconds: float) -> tuple[str | None, float]:
        """Returns why it is not drained, or None, and how many seconds of its time are left."""
        await self._connected()
        why, deadline = None, asyncio.timeout(seconds)
        try:
            async with self._may_put_off(deadline):
                await self._runtime.channel.request(self.token, "drain", {"deadline": seconds}, deadline=None)
        except TimeoutError as error:
            why = f"not drained {error}"
        except PeerError as error:
            if error.code == protocol.HANDOVER_FAILED:
                raise HandoverFailedError(
                    f"{self.name} (pid {self.pid}) keeps what it has: {error}"
                ) from None
            why = str(error)
        except PeerGoneError as error:
            why = str(error)
        return why, (deadline.when() or 0.0) - asyncio.get_running_loop().time()

    @contextlib.asynccontextmanager
    async def _may_put_off(self, deadline: asyncio.Timeout) -> AsyncIterator[None]:
        """Enter a time-out that is put off when the program asks for more time (`said_extend`).

        Raises:
            TimeoutError: says how much time there was.
        """
        began = asyncio.get_running_loop().time()
        try:
            async with deadline:
                self._answer_deadline = deadline
                yield
        except TimeoutError:
            had = (deadline.when() or began) - began
            raise TimeoutError(f"within {round(had, 2):g} s") from None
        finally:
            if self._answer_deadline is deadline:
                self._answer_deadline = None

    def abort_later(self, patch: str, *, deadline: float) -> None:
        """As `abort`, for one that will not listen for a while, and is not waited for."""
        task = asyncio.get_running_loop().create_task(self.abort(patch, deadline=deadline))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def reload(self, request: protocol.Reload, *, deadline: float) -> ReloadOutcome:
        """Have changed resources taken up, in whichever way this instance knows. Never raises: the outcome
        says what went wrong. On failure the process runs on.
        """
        self.failure = None  # It spoke of the files there were before.
        told_by = self.told_by
        if told_by == "nobody":
            return ReloadOutcome(told_by=told_by, ok=True, took=0.0)
        began = time.monotonic()
        if lifecycle.accepts(self.state, Event.RELOAD):
            self._apply(Event.RELOAD, f"build {request.build}")
        try:
            if told_by == "sdk":
                reason = await self._reload_by_sdk(request, deadline)
            elif told_by == "command":
                reason = await self._reload_by_command(deadline)
            else:
                reason = await self._reload_by_signal(deadline)
        finally:
            if self.state is State.RELOADING:
                self._apply(Event.RELOADED, f"build {request.build}")
        if reason is None and self._process is not None:
            generation = self._runtime.root_facts(self.config.name).generation
            self._process = replace(self._process, generation=generation)
            self._remember()
        return ReloadOutcome(told_by=told_by, ok=reason is None, took=time.monotonic() - began, reason=reason)

    # --- what the program says ------------------------------------------------------------------------------

    def said_hello(self, hello: Hello) -> Mapping[str, Any]:
        self.hello = hello
        self._awaited = False
        self._remember()
        self._wake_waiters()
        facts = self._runtime.root_facts(self.config.name)
        return {
            "name": self.config.name,
            "instance": self.name,
            "build": facts.build,
            "region": self.config.region,
        }

    def said_ready(self, build: int | None) -> None:
        if self.hello is not None and build is not None:
            self.hello = Hello(**{**self.hello.params(), "build": build})
        self.failure = None
        self._remember()
        if self.config.readiness == "sdk":
            self._became_ready("said ready")

    def said_status(self, text: str) -> None:
        self.status_text = text[:1000]
        self._runtime.events.emit(
            "instance.status", target=self.config.name, instance=self.name, text=self.status_text
        )

    def said_failed(self, reason: str) -> None:
        """A patch on probation is undone; at any other time this is for people."""
        self.failure = reason[:1000] or "without a reason"
        self._remember()
        log.warning("%s says that it has failed: %s", self.name, self.failure)
        self._runtime.events.emit(
            "instance.failed", target=self.config.name, instance=self.name, reason=self.failure
        )
        self._wake_waiters()

    def said_extend(self, seconds: float) -> None:
        """Have the time-out of what is under way (start, stop, reload, drain) end no sooner than this."""
        if self._doomed is not None:
            return  # it is being ended for having been late
        loop = asyncio.get_running_loop()
        if (deadline := self._answer_deadline) is not None:
            due = deadline.when()
            if due is not None and due < loop.time() + seconds and not deadline.expired():
                deadline.reschedule(loop.time() + seconds)
        elif (action := self._extensible) is not None and self._remaining() < seconds:
            self._arm(seconds, action)
            self._remember()
            if self.state is State.STOPPING:
                self._end_asking_in(seconds)

    @property
    def _extensible(self) -> Callable[[], None] | None:
        """The time-out under way that a program may put off; how long it has to survive is none."""
        may = (self._kill,) if self.state is State.STOPPING else (self._start_timed_out, self._stayed)
        return self._time_out if self._time_out in may else None

    def said_stopping(self) -> None:
        self.detail = "said that it is stopping"

    def _said_stopping_by_notify(self) -> None:
        """As systemd has it: it is not ready any more, and has as long to end as in any other stop."""
        self.said_stopping()
        if self.state in lifecycle.ALIVE - {State.STOPPING} and self._doomed is None and not self._leaving:
            self._leaving = True
            self._end_watch()
            self._arm(self.config.stop_timeout, self._stayed)
            self._remember()
            self._wake_waiters()
            asyncio.get_running_loop().call_soon(self._on_change)

    def _stayed(self) -> None:
        self._end(f"said that it is stopping, and was still there {self.config.stop_timeout:g} s later")

    def may_speak(self, pid: int, uid: int) -> bool:
        """Whether a process of this instance may speak for it: its main one may, and whoever is root, the
        supervisor's user, or somebody that its main process may act as. A worker that has given up its
        rights may not: whoever has taken it over would have the supervisor's ear.
        """
        return pid == self.pid or uid in {0, os.geteuid()} or uid in user_ids(self.pid or 0)

    def said_notify(self, said: Notification, descriptors: list[int]) -> Refusal | None:
        """One datagram of the sd_notify protocol; returns what of it does not count, or None.

        Args:
            descriptors: what came with it; what is left in the list is closed.
        """
        refused = None
        if said.status is not None:
            self.said_status(said.status)
        if said.extend is not None:
            self.said_extend(said.extend)
        if not self._program_runs:
            return None  # a hook has no more to say
        if said.main_pid is not None:
            refused = self._said_main_pid(said.main_pid)
        if said.error is not None:
            self._said_error = said.error
            self._remember()
        if said.watchdog_timeout is not None:
            self._said_watchdog_timeout = said.watchdog_timeout
            self._remember()
            if self._watch is not None:
                self._watch.change_watchdog(said.watchdog_timeout or None)
        if said.state == "stopping":
            self._said_stopping_by_notify()
        elif said.state == "reloading":
            self._said_reloading(said.reloading_at)
        elif said.state == "ready":
            self._said_ready_by_notify()
        if said.watchdog is not None and self._watch is not None:
            if said.watchdog == "trigger":
                self._watch.is_triggered()
            else:
                self._watch.is_alive()
        if said.fd_remove:
            self._store.remove(said.fd_name or STORED)
        if said.fd_store:
            why = self._store.add(
                descriptors, said.fd_name or STORED, poll=said.fd_poll, most=self.config.fd_store_max
            )
            refused = refused if why is None else Refusal("fd_store", why)
        return refused

    def _said_reloading(self, at: int | None) -> None:
        self._says_when = self._says_when or at is not None
        if self._handshake is not None:
            self._handshake.said_reloading(at)
        if lifecycle.accepts(self.state, Event.RELOAD):
            self._apply(Event.RELOAD, "said that it is reloading")

    def _said_ready_by_notify(self) -> None:
        if self._handshake is not None and self._reload_confirmed is not None:
            if self._handshake.is_done_by_ready() and not self._reload_confirmed.done():
                self._reload_confirmed.set_result(None)
        elif self.state is State.RELOADING:
            self._apply(Event.RELOADED, "said ready")
        elif self.config.readiness == "notify":
            self._became_ready("said ready")

    def _said_main_pid(self, pid: int) -> Refusal | None:
        """Another process is the main one from now on; or why it is not."""
        before, process = self._child, self._process
        if before is None or process is None or pid == before.pid:
            return None
        claim = main_process.examine(pid, main=before.pid, groups=before.groups, token=self.token)
        if isinstance(claim, str):
            log.warning("%s: MAINPID=%d is refused: %s", self.name, pid, claim)
            return Refusal("main_pid", claim)
        groups = [*before.groups] if claim.group in before.groups else [*before.groups, claim.group]
        self._process = replace(
            process, pid=pid, start_ticks=claim.start_ticks, inode=claim.inode, groups=tuple(groups)
        )
        former = self._formers.pop(pid, None)
        if before.alive:
            self._formers[before.pid] = before
        if former is not None and former.identity == (claim.start_ticks, claim.inode):
            os.close(claim.pidfd)
            former.groups = groups
            self._child = former
        else:
            self._child = AdoptedChild(self._process, claim.pidfd, self._runtime.keeper)
            self._await_exit(self._child)
        self._runtime.groups[claim.group] = self
        self._remember()
        log.info("%s: its main process is pid %d from now on; it was %d", self.name, pid, before.pid)
        self._runtime.events.emit(
            "instance.main_pid", target=self.config.name, instance=self.name, pid=pid, before=before.pid
        )
        self._wake_waiters()
        return None

    # --- the machine ----------------------------------------------------------------------------------------

    def _apply(self, event: Event, reason: str) -> None:
        """The one place that changes the state, and so the one that logs and publishes it."""
        before, self.state = self.state, lifecycle.next_state(self.state, event)
        self._since = time.monotonic()
        self.detail = reason
        self._settle_store()
        self._remember()
        level = logging.WARNING if self.state is State.FAILED else logging.INFO
        log.log(level, "%s: %s -> %s (%s)", self.name, before.value, self.state.value, reason)
        self._runtime.events.emit(
            "instance.state",
            target=self.config.name,
            instance=self.name,
            **{"from": before.value, "to": self.state.value},
            pid=self.pid,
            reason=reason,
        )
        self._wake_waiters()
        # Not here and now: whoever caused this change has not finished with it.
        asyncio.get_running_loop().call_soon(self._on_change)

    def _settle_store(self) -> None:
        """Stored descriptors are for the next start, and go when there is to be none."""
        if self.role != "current":
            return  # it is the store of the whole slot
        is_down = self.state is State.STOPPED and not self.wanted
        if is_down or self.state in {State.EXITED, State.FAILED}:
            self._store.clear()

    def _wake_waiters(self) -> None:
        """Let whoever waits for a condition look again."""
        waiters, self._waiters = self._waiters, []
        for future in waiters:
            if not future.done():
                future.set_result(None)

    def _remember(self) -> None:
        """Write down what the next supervisor must know, should this one die now."""
        self._runtime.journal.put(self.journal_key, self._record())

    def _record(self) -> InstanceRecord:
        process = self._process
        if process is not None:
            hello = None if self.hello is None else self.hello.params()
            process = replace(
                process,
                ready_at=self._ready_at,
                hello=hello,
                watchdog_timeout=self._said_watchdog_timeout,
            )
        return InstanceRecord(
            seat=self.seat,
            role=self.role,
            state=self.state,
            since=self._since,
            wanted=self.wanted,
            detail=self.detail,
            status_text=self.status_text,
            failure=self.failure,
            restarts=self.restarts,
            due=self._due,
            doomed=self._doomed,
            leaving=self._leaving,
            said_error=self._said_error,
            early_ends=self._history.early_ends,
            recent_restarts=self._history.restarts,
            last_exit=self.last_exit.to_json() if self.last_exit is not None else None,
            process=process,
        )

    def _start_over(self, event: Event, reason: str) -> None:
        """Spawn a new process; the event leads to `STARTING`."""
        self._child = self._process = self.hello = self._ready_at = self._doomed = self.failure = None
        self._formers.clear()
        self._said_watchdog_timeout = None
        self._leaving = self._finishing = self._says_when = False
        self.status_text = self._said_error = ""
        if self._cleaning is None:
            self._intend()
        self._apply(event, reason)
        self._spawn()

    def _intend(self) -> None:
        """Before there is a process: by its token it can be found, should nobody be left to write it down."""
        self.token = secrets.token_hex(16)
        self._process = self._new_record(hook=self.config.hooks.pre_start is not None)

    def _new_record(self, *, hook: bool) -> ProcessRecord:
        path = None if self.config.cgroup == "off" else self._runtime.cgroups.path_of(self.seat_name)
        cgroup = None if path is None else str(path)
        self._facts = self._runtime.root_facts(self.config.name)
        return ProcessRecord(
            token=self.token,
            start_ticks=ticks_now(),
            hook=hook,
            cgroup=cgroup,
            generation=self._facts.generation,
        )

    def _enter_cgroup(self) -> None:
        """Make the control group of the process that is about to be spawned, if it is to have one.

        Raises:
            SpawnError: it cannot be had.
        """
        assert self._process is not None
        limits = self.config.cgroup_limits
        self._cgroup = self._runtime.cgroups.make(self.seat_name, self.config.cgroup, limits)
        before = 0 if self._cgroup is None else self._cgroup.oom_kills
        self._process = replace(self._process, oom_kills=before)

    def _leave_cgroup(self) -> int:
        """The process has ended. Returns how many the kernel has killed in its group because of its limit of
        memory."""
        group, self._cgroup = self._cgroup, None
        if group is None:
            return 0
        before = 0 if self._process is None else self._process.oom_kills
        killed = max(0, group.oom_kills - before)
        # With `kill_mode = "process"` somebody may be left in it; the next process comes into the same one.
        group.remove()
        return killed

    def _spawn_failed(self, reason: str) -> None:
        self._leave_cgroup()
        self._process = None
        self._ended(reason)

    def _take_down(self, child: Child) -> None:
        """There is a process now."""
        assert self._process is not None
        start_ticks, inode = child.identity
        self._process = replace(
            self._process, pid=child.pid, start_ticks=start_ticks, inode=inode, spawned=child.started
        )
        self._runtime.groups[child.pid] = self

    def _await_exit(self, child: Child) -> None:
        """Act upon the end of a process, while it is this one that counts."""
        child.on_exit(partial(self._main_ended, child), before_reaping=partial(self._ends, child))

    def _ends(self, child: Child, ended: Exit) -> None:
        """What it has said before its end counts before that, MAINPID for one."""
        self._runtime.hear_last_words()
        if self._child is child:
            self._write_down_exit(ended)

    def _main_ended(self, child: Child, ended: Exit) -> None:
        if self._formers.get(child.pid) is child:
            del self._formers[child.pid]
        if self._child is not child:
            log.info("%s: pid %d, its main process before, has ended (%s)", self.name, child.pid, ended)
            self._watch_group_of_former(child.pid)
        elif self._program_runs:
            self._exited(ended)
        else:
            self._pre_start_ended(ended)

    def _watch_group_of_former(self, group: int) -> None:
        """Its number is free for another group as soon as this one is empty."""

        def forget() -> None:
            child = self._child
            if child is None or group not in child.groups or group == child.pid:
                return
            child.groups.remove(group)
            self._runtime.groups.pop(group, None)
            assert self._process is not None
            self._process = replace(self._process, groups=tuple(child.groups))
            self._remember()

        when_groups_empty([group], forget)

    def _spawn(self) -> None:
        """Start the program, after the hook before it and after the one behind its predecessor."""
        if self._cleaning is not None:
            self._cleaning.add_done_callback(lambda _: self._spawn() if self._may_spawn else None)
            return
        if self._process is None:
            self._intend()
            self._remember()
        hooks = self.config.hooks
        if hooks.pre_start is None:
            self._spawn_program()
            return
        try:
            self._enter_cgroup()
            self._child = self._spawn_command(
                hooks.pre_start, {ENV_HOOK: "pre_start"}, facts=self._facts, cgroup=self._cgroup
            )
        except SpawnError as error:
            self._spawn_failed(f"pre_start: {error.message}")
            return
        self._take_down(self._child)
        self._await_exit(self._child)
        self._arm(hooks.timeout, self._pre_start_timed_out)
        self._remember()

    @property
    def _may_spawn(self) -> bool:
        return self.state is State.STARTING and self._child is None

    def _pre_start_timed_out(self) -> None:
        self._end(f"pre_start did not end within {self.config.hooks.timeout:g} s")

    def _pre_start_ended(self, ended: Exit) -> None:
        if self.state is State.STARTING and self._doomed is None:
            if ended.status == 0:
                self._let_go_of_groups()
                self._child = None
                self._cancel_timer()
                self._process = self._new_record(hook=False)
                self._remember()
                self._spawn_program()
                return
            self._doomed = f"pre_start: {ended}"
        self._exited(ended)

    def _spawn_program(self) -> None:
        try:
            self._child, output, begin, descriptor = self._spawn_with_output()
        except SpawnError as error:
            self._spawn_failed(error.message)
            return
        self._program_runs = True
        self._take_down(self._child)
        if begin is not None:
            assert self._process is not None
            self._process = replace(self._process, output_from=(begin.inode, begin.offset))
        self._runtime.channel.admit(self.token, self)
        self._await_exit(self._child)
        self._watch = self._new_watch()
        if self.config.readiness == "uptime":
            if self.config.min_uptime > 0:
                self._arm(self.config.min_uptime, self._survived)
                self._remember()
            else:
                self._survived()
            return
        if self.config.readiness != "exit":
            self._arm(self.config.start_timeout, self._start_timed_out)
        self._remember()
        self._watch.await_ready(output, begin, descriptor)

    def _new_watch(self) -> Watch:
        return Watch(
            self.config,
            expand=lambda text: expand(text, self.config, self.index),
            run_command=lambda command, deadline: self.run_command(command, {}, deadline),
            ping=lambda deadline: self._runtime.channel.request(self.token, "ping", {}, deadline=deadline),
            accepts=self._why_it_does_not_accept,
            on_ready=self._became_ready,
            on_dead=self._end,
            on_old=self._too_old,
            watchdog_timeout=self._watchdog_timeout,
        )

    @property
    def _watchdog_timeout(self) -> float | None:
        """What it has said itself goes before what is configured."""
        if self._said_watchdog_timeout is None:
            return self.config.watchdog_timeout
        return self._said_watchdog_timeout or None

    def _why_it_does_not_accept(self) -> str | None:
        try:
            sockets = [self._runtime.sockets.get(name) for name in self.config.sockets]
        except SpawnError as error:
            return error.message
        return listeners.why_not(group_members(*self._groups()), sockets)

    def _new_output(self) -> SlotOutput:
        runtime = self._runtime
        return SlotOutput(
            self.name,
            self.config.log,
            logs=runtime.logs,
            fifos=runtime.fifos,
            files=runtime.log_files,
            keeper=runtime.keeper,
            on_loss=self._output_lost,
        )

    def _output_lost(self, stream: OutputStream, error: OSError) -> None:
        self._runtime.events.emit(
            "instance.output_lost",
            target=self.config.name,
            instance=stream.instance,
            stream=stream.stream,
            path=str(stream.file.path),
            reason=error.strerror,
        )

    def _spawn_with_output(self) -> tuple[Child, OutputStream, Cursor | None, int | None]:
        """Spawn the program; with its output, where that begins if somebody is going to look for a line of
        it, and the descriptor on which it says that it is ready.

        Raises:
            SpawnError: nothing was started, and nothing is left open.
        """
        number, descriptor, stored = self.config.ready.fd, None, self._store.named()
        names = [*self.config.sockets, *(name for name, _ in stored)]
        passed = managed_sockets(self.config, self._runtime)
        first = listen_fds.FIRST + len(passed)
        passed |= {first + position: fd for position, (_, fd) in enumerate(stored)}
        with contextlib.ExitStack() as on_failure, contextlib.ExitStack() as child_ends:
            try:
                output = self.streams["stdout"]
                begin = None if self.config.ready.log is None else output.reader.end()
                if number is not None:
                    descriptor, child_end = os.pipe2(os.O_CLOEXEC)
                    on_failure.callback(os.close, descriptor)
                    passed[number] = out_of_the_way(child_end)
                    child_ends.callback(os.close, passed[number])
                    self._runtime.keeper.hold(self._ready_name, descriptor)
                    on_failure.callback(self._runtime.keeper.drop, self._ready_name)
            except OSError as error:
                raise SpawnError(f"{self.config.command[0]}: cannot be started: {error.strerror}") from None
            self._enter_cgroup()
            child = self._spawn_command(
                self.config.command,
                listen_fds.environment(names),
                passed,
                facts=self._facts,
                cgroup=self._cgroup,
                pid_variables=[
                    *([listen_fds.LISTEN_PID] if names else []),
                    *([WATCHDOG_PID] if self.config.tells_watchdog else []),
                ],
            )
            on_failure.pop_all()
        return child, output, begin, descriptor

    def _spawn_command(
        self,
        command: tuple[str, ...],
        extra: Mapping[str, str],
        descriptors: Mapping[int, int] = NONE,
        *,
        facts: RootFacts | None = None,
        pid_variables: Sequence[str] = (),
        cgroup: Cgroup | None = None,
    ) -> Child:
        """Run a command as this instance. Raises SpawnError.

        Args:
            facts: what it finds in the root; by default whatever is there by now.
        """
        try:
            with self._output.child_ends(has_writers=self._has_writers) as opened:
                return run_as(
                    self.config,
                    self.index,
                    self._runtime,
                    command,
                    facts=facts or self._runtime.root_facts(self.config.name),
                    token=self.token,
                    output=opened,
                    extra=extra,
                    descriptors=descriptors,
                    pid_variables=pid_variables,
                    cgroup=cgroup,
                )
        except OSError as error:
            raise SpawnError(f"{command[0]}: no place for its output: {error}") from None

    async def run_command(
        self, command: tuple[str, ...], extra: Mapping[str, str], deadline: float | None
    ) -> str | None:
        """Run a command as this instance, to its end; why it failed, or None. Cancelled, it is killed.

        Args:
            deadline: seconds; None where the caller has one.
        """
        finished: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        try:
            child = self._spawn_command(command, {"MAINPID": str(self.pid or ""), **extra})
        except SpawnError as error:
            return error.message
        self._runtime.groups[child.pid] = self
        child.on_exit(
            lambda ended: None if finished.done() else finished.set_result(ended),
            before_reaping=lambda _: self._runtime.hear_last_words(),
        )
        try:
            async with asyncio.timeout(deadline):
                ended = await finished
        except TimeoutError:
            return f"did not end within {deadline:g} s"
        finally:
            self._runtime.groups.pop(child.pid, None)
            if not finished.done() or finished.cancelled():
                child.signal_group(signal.SIGKILL)
        return None if ended.status == 0 else str(ended)

    async def run_hook(self, name: str, command: tuple[str, ...], extra: Mapping[str, str]) -> str | None:
        """Run a hook to its end; why it failed, or None. A failure is also said to whoever follows."""
        failure = await self.run_command(command, {ENV_HOOK: name, **extra}, self.config.hooks.timeout)
        if failure is not None:
            log.warning("%s: hook %s: %s", self.name, name, failure)
        self._runtime.events.emit(
            "instance.hook", target=self.config.name, instance=self.name, hook=name, failure=failure
        )
        return failure

    def _in_background(self, work: Coroutine[Any, Any, object]) -> asyncio.Task[None]:
        async def run() -> None:
            await work

        task = asyncio.get_running_loop().create_task(run())
        self._hooks.add(task)
        task.add_done_callback(self._hooks.discard)
        return task

    @property
    def _ready_name(self) -> str:
        """What the keeper knows the descriptor by that the program announces its readiness on."""
        return f"ready/{self.seat_name}"

    def configure(self, config: TargetConfig) -> None:
        """Take other settings. What a process has from its start is that of the next one; until then there
        must be none, if any of that is different.
        """
        before, self.config = self.config, config
        if before.log != config.log:
            self._output.configure(config.log, has_writers=self._process is not None)
        if self._watch is None or before == config:
            return
        if not self.ready:
            self._watch.configure(config)
            return
        self._watch.close()
        self._watch = self._new_watch()
        self._watch.became_ready(since=self._ready_at)

    def close(self) -> None:
        """Let go of descriptors; the process, if there is one, is not touched, and goes on writing."""
        self._cancel_timer()
        self._forget_lost()
        self._end_watch()
        for task in self._hooks:
            task.cancel()
        if self.role == "current":
            self._store.close()
            self._output.close(keep=self._process is not None)

    def _survived(self) -> None:
        self._became_ready(f"up for {self.config.min_uptime:g} s" if self.config.min_uptime else "spawned")

    def _became_ready(self, reason: str) -> None:
        if lifecycle.accepts(self.state, Event.READY) and self._doomed is None and not self._leaving:
            self._cancel_timer()
            self._ready_at = time.monotonic()
            self._apply(Event.READY, reason)
            assert self._watch is not None
            self._watch.became_ready(since=self._ready_at)
            self._drop_ready_descriptor()
            if self.config.hooks.post_start is not None:
                self._in_background(self.run_hook("post_start", self.config.hooks.post_start, {}))

    def _start_timed_out(self) -> None:
        last = self._watch.last_failure if self._watch is not None else ""
        because = f" ({last})" if last else ""
        reason = f"not ready within {self.config.start_timeout:g} s{because}"
        if self.role == "successor":
            # Not ended here and now: it may be serving connections already that its sockets have given it.
            self.given_up = self.detail = reason
            self._wake_waiters()
        else:
            self._end(reason)

    def _end(self, reason: str, number: int | None = None) -> None:
        """End a process that nobody asked to stop; what follows is the restart policy's business."""
        if self._child is None or self._doomed is not None or self.state is State.STOPPING:
            return
        self._doomed = reason
        self.detail = reason
        log.warning("%s: %s; ending it", self.name, reason)
        self._wake_waiters()
        self._terminate(number)

    def _too_old(self) -> None:
        if self.config.oneshot:
            self._end(f"not done within max_age ({self.config.max_age:g} s)")
        else:
            self._on_old(self)

    def _end_watch(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        self._drop_ready_descriptor()

    def _drop_ready_descriptor(self) -> None:
        if self.config.ready.fd is not None:
            self._runtime.keeper.drop(self._ready_name)

    def _terminate(self, number: int | None = None) -> None:
        """Ask the process group to end, and see to it that it does, with all that is in the control group.

        Args:
            number: this signal at once, whatever is configured.
        """
        assert self._child is not None
        self._end_watch()
        self._arm(self.config.stop_timeout, self._kill)
        self._remember()
        if number is not None or not self._program_runs:
            self._send(number or signal.SIGTERM)
        elif self.config.hooks.pre_stop is not None:
            self._in_background(self._ask_to_end_after(self.config.hooks.pre_stop, self._child))
        else:
            self._ask_to_end(self._child)

    async def _ask_to_end_after(self, hook: tuple[str, ...], child: Child) -> None:
        await self.run_hook("pre_stop", hook, {})
        if self._child is child:
            self._ask_to_end(child)

    def _ask_to_end(self, child: Child) -> None:
        if self.config.stop_command is None:
            self._send(self.config.stop_signal)
            self._send(signal.SIGCONT)  # a stopped process could not act on the signal
            return
        self._in_background(self._ask_to_end_by(self.config.stop_command, child))

    async def _ask_to_end_by(self, command: tuple[str, ...], child: Child) -> None:
        """It has as long as the program has, which may put that off; what is killed then is both."""
        if self._child is not child:
            return
        deadline = asyncio.timeout(self._remaining())
        try:
            async with deadline:
                self._asking = deadline
                failure = await self.run_command(command, {"MAINPID": str(child.pid)}, None)
        except TimeoutError:
            log.warning("%s: stop_command did not end in time", self.name)
            return  # neither did the program
        finally:
            if self._asking is deadline:
                self._asking = None
        if failure is not None and self._child is child:
            log.warning("%s: stop_command: %s; sending the signal", self.name, failure)
            self._send(self.config.stop_signal)

    def _send(self, number: int) -> None:
        if self._child is None:
            return
        if self.config.kill_mode != "group":
            self._child.signal(number)
            return
        self._child.signal_group(number)
        if number == signal.SIGKILL and self._cgroup is not None:
            self._cgroup.kill()

    def _kill(self) -> None:
        log.warning("%s: still there, sending SIGKILL", self.name)
        self._send(signal.SIGKILL)
        self._end_asking_in(0.0)
        self._arm(LAST_ESCALATION_SECONDS, self._unkillable)

    def _end_asking_in(self, seconds: float) -> None:
        if self._asking is not None and not self._asking.expired():
            self._asking.reschedule(asyncio.get_running_loop().time() + seconds)

    def _unkillable(self) -> None:
        self.detail = "a process survives SIGKILL (uninterruptible in the kernel?)"
        log.error("%s: %s", self.name, self.detail)
        self._timer = None

    def _write_down_exit(self, ended: Exit) -> None:
        """Whatever becomes of us: it is not the kernel alone any more that knows how the process ended."""
        assert self._process is not None
        self._process = replace(self._process, ended={"status": ended.status, "signal": ended.signal})
        self._remember()

    def _exited(self, ended: Exit) -> None:
        assert self._child is not None
        self._end_watch()
        self._runtime.channel.dismiss(self.token)
        if self._reload_confirmed is not None and not self._reload_confirmed.done():
            # The next one's READY=1 will speak of its start.
            self._reload_confirmed.set_result(f"it has ended: {ended}")
        child = self._child
        if self.config.kill_mode != "group":
            self._gone(ended)
        elif not child.signal_group(0):
            self._group_gone(ended)
        else:
            if not self._is_ending:
                # Its leader is gone, so nobody minds them; they would hold the ports the next one needs.
                child.signal_group(signal.SIGKILL)
            when_groups_empty(child.groups, lambda: self._group_gone(ended))

    @property
    def _is_ending(self) -> bool:
        """Whether its processes were asked to end, and have their time for that."""
        return self.state is State.STOPPING or self._doomed is not None

    def _group_gone(self, ended: Exit) -> None:
        """Its process group is empty; whoever has left that for another session is in the control group, if
        there is one, and nowhere else."""
        left = self._cgroup
        if left is None or not left.populated:
            self._gone(ended)
            return
        if self._is_ending:
            left.signal(self.config.stop_signal)  # they have not heard of it yet
            left.signal(signal.SIGCONT)
        else:
            left.kill()
        left.when_empty(lambda: self._gone(ended))

    def _let_go_of_groups(self) -> None:
        assert self._child is not None
        for group in self._child.groups:
            self._runtime.groups.pop(group, None)

    def _gone(self, ended: Exit) -> None:
        """The process, and with `kill_mode = "group"` all that it has started, has ended."""
        self._let_go_of_groups()
        oom_kills = self._leave_cgroup()
        self._child = self._process = None
        self._cancel_timer()
        self._output.drain()
        if self._program_runs and self.config.hooks.post_stop is not None:
            self._cleaning = self._in_background(self._clean_up(self.config.hooks.post_stop, ended))
        self._program_runs = False
        if oom_kills:
            self._ran_out_of_memory(oom_kills)
        if self.state is not State.STOPPING:
            self._ended(ended if self._doomed is None else self._doomed, oom_kills)
        elif self._cleaning is not None:
            self._cleaning.add_done_callback(lambda _: self._stopped(ended))
        else:
            self._stopped(ended)

    def _ran_out_of_memory(self, killed: int) -> None:
        limit = self.config.cgroup_limits.get("memory")
        log.warning("%s: out of memory: the kernel has killed %d of its processes", self.name, killed)
        self._runtime.events.emit(
            "instance.oom", target=self.config.name, instance=self.name, killed=killed, limit=limit
        )

    def _stopped(self, ended: Exit) -> None:
        self.last_exit = LastExit(ended=ended, at=timestamp(), reason=f"stopped: {ended}")
        self._apply(Event.GONE, str(ended))

    async def _clean_up(self, hook: tuple[str, ...], ended: Exit) -> None:
        status = "" if ended.status is None else str(ended.status)
        number = "" if ended.signal is None else str(ended.signal)
        try:
            await self.run_hook("post_stop", hook, {ENV_EXIT_STATUS: status, ENV_EXIT_SIGNAL: number})
        finally:
            self._cleaning = None

    @property
    def _never_said_ready(self) -> bool:
        """Whether it should have become ready and has not: no exit status makes that a success."""
        return self._ready_at is None and self.config.readiness not in {"uptime", "exit"}

    def _ended(self, ended: Exit | str, oom_kills: int = 0) -> None:
        if self.role != "current" or self._finishing:
            self._ended_beside(ended)
            return
        now = time.monotonic()
        uptime = now - self._ready_at if self._ready_at is not None else None
        policy = RestartPolicy.of(self.config)
        how: Exit | str = ended
        if self._never_said_ready and isinstance(ended, Exit) and ended.status in policy.success_exit_codes:
            how = f"ended before it was ready ({ended})"
        if oom_kills and not (isinstance(how, Exit) and policy.is_success(how)):
            how = f"{how}, out of memory (the kernel has killed {oom_kills} of its processes)"
        if self._said_error and not (isinstance(how, Exit) and policy.is_success(how)):
            how = f"{how}; it said {self._said_error}"
        decision = decide(policy, self._history, ended=how, uptime=uptime, now=now)
        self._history = decision.history
        self.last_exit = LastExit(ended=ended, at=timestamp(), reason=str(how), out_of_memory=oom_kills > 0)
        if decision.event is Event.RESPAWN:
            self.restarts += 1
            self._start_over(decision.event, decision.reason)
            return
        if decision.event is Event.CRASHED:
            self._arm(decision.delay, self._backoff_elapsed)
        self._apply(decision.event, decision.reason)
        if decision.event is not Event.CRASHED and self.config.essential:
            self._runtime.essential_ended(self)

    def _ended_beside(self, ended: Exit | str) -> None:
        """It was not the one that counts in its slot, or not for much longer, so nobody starts it again."""
        self.last_exit = LastExit(ended=ended, at=timestamp(), reason=str(ended))
        if self.role == "successor":
            self._apply(Event.GAVE_UP, str(ended))
            return
        self._apply(Event.STOP, str(ended))
        if self.state is State.STOPPING:
            self._apply(Event.GONE, str(ended))

    def _backoff_elapsed(self) -> None:
        self._cancel_timer()
        self.restarts += 1
        self._start_over(Event.BACKOFF_ELAPSED, f"try {self._history.early_ends + 1}")

    # --- taking over from an earlier supervisor -------------------------------------------------------------

    def restore(self, record: InstanceRecord) -> None:
        """Be what an earlier supervisor has left behind, and look for the process. Nothing is started, ended
        or sent yet; that is `carry_on`, when everybody is there.
        """
        self.state, self._since, self.wanted = record.state, record.since, record.wanted
        self.role = record.role
        self.detail, self.status_text, self.restarts = record.detail, record.status_text, record.restarts
        self.failure = record.failure
        self._due, self._doomed = record.due, record.doomed
        self._leaving, self._said_error = record.leaving, record.said_error
        self._history = RestartHistory(early_ends=record.early_ends, restarts=record.recent_restarts)
        if record.last_exit is not None:
            self.last_exit = LastExit.from_json(record.last_exit)
        if self.role == "current":
            self._store.restore(self.config.fd_store_max)
        if record.process is not None:
            self._find_process(record.process)
        self._output.take_back(
            None if self._child is None else self._child.pid, has_writers=self._process is not None
        )

    def _find_process(self, record: ProcessRecord) -> None:
        finding = adoption.find(record, self._output.fifo("stdout"))
        if record.cgroup is not None:
            self._cgroup = Cgroup(Path(record.cgroup))
        process = self._process = finding.record
        self.token, self._ready_at = process.token, process.ready_at
        self._said_watchdog_timeout = process.watchdog_timeout
        if process.hello is not None:
            self.hello = Hello.from_params(process.hello)
        if finding.verdict is adoption.Verdict.DOUBTFUL:
            self._doubt, self._lost_pidfd = finding.why, finding.pidfd
        elif finding.verdict is adoption.Verdict.OURS:
            self._child = AdoptedChild(process, finding.pidfd, self._runtime.keeper)
            self._child.groups = adoption.groups_of(process, self._output.fifo("stdout"))
            for group in self._child.groups:
                self._runtime.groups[group] = self
            self._runtime.channel.admit(self.token, self)
            self._awaited = self.hello is not None
            if record.pid is None:
                self._remember()
            if self.state is State.LOST:
                self.state = State.RUNNING
        elif process.pid is None:
            self.state = State.STARTING  # which is as far as it has come
        else:
            self._missed = self._unseen_exit(process, process.pid)

    def _unseen_exit(self, process: ProcessRecord, pid: int) -> Exit:
        """How a process ended that is gone: the earlier supervisor wrote it down, or the keeper knows."""
        status = self._runtime.keeper.exit_of(pid, process.start_ticks)
        if process.ended is not None:
            ended = Exit(status=process.ended.get("status"), signal=process.ended.get("signal"))
        else:
            ended = Exit() if status is None else Exit.from_wait_status(status)
        self._write_down_exit(ended)
        self._runtime.keeper.forget(pid, process.start_ticks)
        return ended

    def carry_on(self) -> None:
        """Go on with what was under way when the earlier supervisor died."""
        process = self._process
        if self._child is not None and process is not None:
            log.info("%s: taken back, pid %d, %s", self.name, self._child.pid, self.state.value)
            self._runtime.events.emit(
                "instance.adopted",
                target=self.config.name,
                instance=self.name,
                pid=self._child.pid,
                state=self.state.value,
            )
            self._program_runs = not process.hook
            self._await_exit(self._child)
            for group in self._child.groups:
                if group != self._child.pid:
                    self._watch_group_of_former(group)
            self._resume(self._child, process)
        elif self._missed is not None and process is not None:
            self._catch_up(self._missed, process)
        elif self._doubt:
            self._lose(self._doubt)
        elif self.state is State.STOPPING:
            # Its process has ended; what was waited for is its `post_stop`, which is nobody's by now.
            self._apply(Event.GONE, self.detail)
        elif self.role != "current":
            pass  # there is no process, and there is to be none
        elif self.state is State.STARTING:
            self._spawn()
        elif self.state is State.BACKOFF:
            self._arm(self._remaining(), self._backoff_elapsed)
        elif self.state is State.STOPPED and self.wanted:
            self.start("it was down only for a moment")

    def _lose(self, why: str) -> None:
        """There is a process that may be ours: it is not touched, and none is started beside it."""
        if lifecycle.accepts(self.state, Event.LOST):
            self._apply(
                Event.LOST, f"{why}; left alone: `start` starts another one, `stop` forgets about this one"
            )
        if self._lost_pidfd >= 0:
            asyncio.get_running_loop().add_reader(self._lost_pidfd, self._lost_ended)

    def _resume(self, child: Child, process: ProcessRecord) -> None:
        """There is a process, and neither a watch over it nor a timer."""
        left = self._remaining()
        if self.state is State.STOPPING or self._doomed is not None:
            self._terminate()  # again: perhaps it was never asked
            self._arm(left, self._kill)
            return
        if process.hook:
            self._arm(left, self._pre_start_timed_out)
            return
        if self.state is State.RELOADING:
            self._apply(Event.RELOADED, "the supervisor that asked for it is gone")
        if self._leaving:
            self._arm(left, self._stayed)
            return
        self._watch = self._new_watch()
        descriptor = self._runtime.keeper.take(self._ready_name)
        if self.state is not State.STARTING:
            if descriptor is not None:
                os.close(descriptor)
            self._watch.became_ready(since=self._ready_at)
        elif self.config.readiness == "uptime":
            self._arm(left, self._survived)
        else:
            if self.config.readiness != "exit":
                self._arm(left, self._start_timed_out)
            inode, offset = process.output_from or (0, 0)
            begin = Cursor(instance=self.name, stream="stdout", inode=inode, born=0, offset=offset)
            self._watch.await_ready(self.streams["stdout"], begin, descriptor, since=child.started)

    def _remaining(self) -> float:
        return max(0.0, self._due - time.monotonic()) if self._due is not None else 0.0

    def _catch_up(self, ended: Exit, process: ProcessRecord) -> None:
        """The process ended while nobody was there; some of its group may be left."""
        self._missed = None
        assert process.pid is not None
        log.warning("%s: pid %d ended while no supervisor was there: %s", self.name, process.pid, ended)
        self._program_runs = not process.hook
        child = self._child = Child(process.pid, pidfd=-1, started=process.spawned, groups=process.groups)
        for group in list(child.groups) if self.config.kill_mode == "group" else []:
            members = group_members(group)
            if members and not adoption.is_group_of(process, members, self._output.fifo("stdout")):
                log.warning("%s: group %d is somebody else's by now, left alone", self.name, group)
                child.groups.remove(group)
        if self.state is State.STOPPING or self._doomed is not None:
            self._arm(self._remaining(), self._kill)
        if process.hook:
            self._pre_start_ended(ended)
        else:
            self._exited(ended)

    def _lost_ended(self) -> None:
        """The process that may have been this instance has ended: what follows is the same either way."""
        process, pidfd = self._process, self._lost_pidfd
        assert process is not None
        assert process.pid is not None
        status = adoption.exit_status(pidfd, process.pid, process.start_ticks)
        self._forget_lost()
        self._ended(Exit() if status is None else Exit.from_wait_status(status))

    def _forget_lost(self) -> None:
        if self.state is State.LOST:
            self._process = None
            self._doubt = ""
        if self._lost_pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._lost_pidfd)
            os.close(self._lost_pidfd)
            self._lost_pidfd = -1

    def _arm(self, seconds: float, action: Callable[[], None]) -> None:
        self._cancel_timer()
        self._time_out = action
        self._due = time.monotonic() + seconds
        self._timer = asyncio.get_running_loop().call_later(seconds, action)

    def _cancel_timer(self) -> None:
        self._due = self._time_out = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- the three ways to reload: each returns why it failed, or None --------------------------------------

    async def _connected(self) -> None:
        """Give a program that was taken back the time to connect again; answers are waited for after that."""
        if self._awaited:
            with anyio.move_on_after(RECONNECT_SECONDS):
                await self.wait_until(lambda i: not i._awaited)
            self._awaited = False

    async def _reload_by_sdk(self, request: protocol.Reload, deadline: float) -> str | None:
        await self._connected()
        try:
            async with self._may_put_off(asyncio.timeout(deadline)):
                value = await self._runtime.channel.request(
                    self.token, request.METHOD, request.params(), deadline=None
                )
            answer = ReloadAnswer.from_result(value)
        except TimeoutError as error:
            return f"no answer {error}"
        except (PeerGoneError, PeerError, ProtocolError) as error:
            return str(error)
        if answer.ok and self.hello is not None:
            self.hello = Hello(**{**self.hello.params(), "build": request.build})
        return None if answer.ok else answer.reason or "failed without a reason"

    async def _reload_by_command(self, deadline: float) -> str | None:
        assert self.config.reload_command is not None
        failure = await self.run_command(self.config.reload_command, {}, deadline)
        return None if failure is None else f"reload_command: {failure}"

    async def _reload_by_signal(self, deadline: float) -> str | None:
        assert self.config.reload_signal is not None
        if self.config.protocol != "notify":
            try:
                self.signal(self.config.reload_signal)
            except TargetNotRunningError as error:
                return error.message
            return None
        confirmed: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._reload_confirmed = confirmed
        self._handshake = ReloadHandshake(
            time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000, says_when=self._says_when
        )
        try:
            self.signal(self.config.reload_signal)
            async with self._may_put_off(asyncio.timeout(deadline)):
                return await confirmed
        except TargetNotRunningError as error:
            return error.message
        except TimeoutError as error:
            return f"no READY=1 {error} of {self.config.reload_signal.name}"
        finally:
            self._handshake = self._reload_confirmed = None
