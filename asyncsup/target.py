"""A target: its instances, and the queue through which everything that is done to them passes.

One operation at a time, in the order asked, in the target's own task; a slow target delays only itself. What
takes several targets (`hold_all`) begins when all of them are free, and has none of them before.
`stop` pre-empts: it cancels what is running and what is queued. An operation whose client gives up is
cancelled. A patch takes the target by `hold_all` for the length of its transaction.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence, Set
from functools import partial
from typing import Any, Final

import anyio
import msgspec

from asyncsup.config import TargetConfig
from asyncsup.config.values import Condition
from asyncsup.demand import Demand
from asyncsup.errors import (
    AsyncsupError,
    CancelledByRequestError,
    HandoverFailedError,
    NoCapacityError,
    ReloadFailedError,
    ShuttingDownError,
    SpawnError,
    StartFailedError,
    StateError,
    StopFailedError,
    TargetBusyError,
    TargetNotFoundError,
    TargetNotRunningError,
)
from asyncsup.instance import Instance, ReloadOutcome
from asyncsup.lifecycle import ALIVE, State
from asyncsup.operation import Operation, Party
from asyncsup.record import Role
from asyncsup.restart import RestartPolicy
from asyncsup.rollout import Rollout
from asyncsup.runtime import Runtime
from asyncsup.stop_order import StopOrder
from asyncsup.together import together
from target_sdk.protocol import Reload

log = logging.getLogger("asyncsup.target")

STOP_GRACE_SECONDS: Final = 10.0
"""How long after SIGKILL a stop is still waited for."""

CAPACITY_LOOK_SECONDS: Final = 10.0
"""How long one that is too old waits until others may do without it."""

SETTLED: Final = frozenset({State.RUNNING, State.RELOADING, State.EXITED, State.FAILED, State.BACKOFF})
"""States that answer the question whether a start has worked."""


UP: Final = ALIVE - {State.STOPPING}
"""States of a process that nobody has asked to end."""

_STOPPED: Final = frozenset({State.STOPPING, State.STOPPED})
"""States of an instance that somebody has stopped, or is about to."""

RESTING: Final = frozenset({State.STOPPED, State.EXITED})
"""States of an instance that nobody will start again by himself."""


class Dependency(msgspec.Struct, frozen=True, kw_only=True):
    """What has to have become of another target before one may start."""

    target: Target
    condition: Condition

    @property
    def satisfied(self) -> bool:
        holds: Callable[[Instance], bool] = {
            "started": lambda i: i.state in ALIVE or i.state is State.EXITED,
            "ready": lambda i: i.ready or i.state is State.EXITED,
            "exited-ok": lambda i: i.state is State.EXITED,
        }[self.condition]
        # One that an operator has stopped alone is not waited for.
        counted = self.target.startable
        return bool(counted) and all(holds(instance) for instance in counted)

    def __str__(self) -> str:
        return self.target.name if self.condition == "ready" else f"{self.target.name} ({self.condition})"


class Target:
    """A configured program and its instances.

    Args:
        spawn_gate: lets one spawn through in each turn of the event loop, over all targets: it takes the
            loop's time, and while a thousand instances start others are served in between.
        on_wanted: told of each wish of an operator for this target (up or down, and which of its instances
            are to be down all the same), to write it down; it may raise `StateError`.
    """

    def __init__(
        self,
        config: TargetConfig,
        runtime: Runtime,
        *,
        spawn_gate: asyncio.Lock,
        on_wanted: Callable[[str, bool, Set[int]], None],
    ) -> None:
        self.config = config
        self.name = config.name
        self.wanted = False
        """Whether an operator (or autostart, or its schedule) wants it up."""
        self.held_down = False
        """Whether an operator has stopped it: its schedule does not start it then."""
        self.stopped_alone: frozenset[int] = frozenset()
        """Which instances, by index, an operator has stopped while others were to stay up."""
        self.dependencies: Sequence[Dependency] = ()
        self.dependents: Sequence[Target] = ()
        self.instances: list[Instance] = []
        """One for each slot: the one that counts there."""
        self.others: list[Instance] = []
        """What is in the slots besides: about to replace, or replaced and not gone yet."""
        self._runtime = runtime
        self._spawn_gate = spawn_gate
        self._on_wanted = on_wanted
        self._queue: deque[Operation] = deque()
        self._current: Operation | None = None
        self._wake = asyncio.Event()
        self._demand = Demand(self._demanded, self._demanded_in_vain)
        self._ends = False
        self._retired = False
        self._leaving: set[asyncio.Task[None]] = set()
        self._life = anyio.CancelScope()
        self.resize(config.instances)

    # --- looking --------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        return bool(self.instances) and all(instance.ready for instance in self.instances)

    @property
    def state(self) -> str:
        """The worst state of the instances, so that one line says whether there is something to look at."""
        order = (
            State.FAILED, State.LOST, State.BACKOFF, State.STOPPING, State.STARTING, State.WAITING,
            State.RELOADING, State.STOPPED, State.EXITED, State.RUNNING,
        )  # fmt: skip
        states = {instance.state for instance in self.instances}
        return next((state.value for state in order if state in states), State.STOPPED.value)

    @property
    def busy(self) -> str | None:
        """The name of the operation under way."""
        return self._current.name if self._current is not None else None

    @property
    def current(self) -> dict[str, Any] | None:
        """The operation under way: what, for whom, since when (seconds)."""
        return self._current.describe() if self._current is not None else None

    @property
    def waiting(self) -> list[dict[str, Any]]:
        """The operations in the queue, likewise."""
        return [operation.describe() for operation in self._queue]

    @property
    def under_way(self) -> list[dict[str, Any]]:
        """The operation that is carried out, and `waiting`: what a new one comes after."""
        return [] if self._current is None else [self._current.describe(), *self.waiting]

    @property
    def situation(self) -> str:
        """What whoever waits for something to be done has to know: what is being done before it, or else in
        which state the worst of the instances is, and why."""
        if self._current is not None and self._queue:
            return f"busy: {self._current}"
        state = self.state
        return next((i.situation for i in self.instances if i.state == state), state)

    @property
    def startable(self) -> list[Instance]:
        """Whoever is started when nobody says which."""
        return [instance for instance in self.instances if instance.index not in self.stopped_alone]

    def _changed(self) -> None:
        """An instance has changed its state: whoever was waiting for this target may start."""
        for target in self.dependents:
            target.start_waiting()
        self.await_demand()

    def await_demand(self) -> None:
        """While an on-demand target rests, have a look at its sockets: the first connection starts it.

        It does not rest when an operator has stopped it, nor when it was given up: it would fail for ever.
        """
        rests = (
            self.config.autostart == "on-demand"
            and not self.held_down
            and not self._ends
            and bool(self.startable)
            and all(instance.state in RESTING for instance in self.instances)
        )
        if not rests:
            self._demand.close()
        elif not self._demand.is_heard:
            try:
                sockets = [self._runtime.sockets.get(name) for name in self.config.sockets]
            except SpawnError as error:
                log.error("%s cannot be started on demand: %s", self.name, error.message)  # noqa: TRY400 - foreseen
                return
            self._demand.watch(sockets, RestartPolicy.of(self.config))

    def _demanded(self) -> None:
        try:
            self._want(True, self.startable)
        except StateError as error:
            log.error("%s is started all the same: %s", self.name, error.message)  # noqa: TRY400 - foreseen
            self._want(True, self.startable, remember=False)

        async def work() -> None:
            await self.spawn_instances(self.startable, "a connection")

        def done(future: asyncio.Future[Any]) -> None:
            _retrieve(future)
            self._demand.settled()
            self.await_demand()

        self.enqueue("start", "a connection", work).future.add_done_callback(done)

    def _demanded_in_vain(self, reason: str) -> None:
        for instance in self.instances:
            instance.give_up(reason)

    def start_waiting(self) -> None:
        """Start the instances that wait for dependencies, once all of those are satisfied, or have them say
        what they wait for by now. It needs no operation: a client that gave up has not taken its wish back.
        """
        waiting = [instance for instance in self.instances if instance.state is State.WAITING]
        why = self._awaited() if waiting else None
        if why is None:
            for instance in waiting:
                instance.start("what it depends on is ready")
            return
        news = [instance.wait_for_dependencies(why) for instance in waiting]
        if any(news):
            # Whoever waits for this target may be waiting for what does not come.
            asyncio.get_running_loop().call_soon(self._changed)

    def _awaited(self) -> str | None:
        """What instances wait for before they can be started; None if nothing."""
        blocked = [str(dependency) for dependency in self.dependencies if not dependency.satisfied]
        if not blocked:
            return None
        failed = self.failed_dependency()
        why = "" if failed is None else f"; {failed.config.name} has failed ({failed.detail})"
        return f"waiting for {', '.join(blocked)}{why}"

    def failed_dependency(self) -> Instance | None:
        """The nearest one that keeps this target waiting, directly or not, and has been given up: it does not
        come by itself.
        """
        seen, ahead = {self}, deque[Target]([self])
        while ahead:
            for dependency in ahead.popleft().dependencies:
                other = dependency.target
                if dependency.satisfied or other in seen:
                    continue
                seen.add(other)
                for instance in other.instances:
                    if instance.state is State.FAILED:
                        return instance
                if any(instance.state is State.WAITING for instance in other.instances):
                    ahead.append(other)
        return None

    def resize(self, number: int) -> None:
        """Have so many slots. Those that go must have no process any more, and what was said of them is
        forgotten."""
        there = min(number, len(self.instances))  # nobody has stopped what is in a new slot
        left = frozenset(index for index in self.stopped_alone if index < there)
        if left != self.stopped_alone:
            self.stopped_alone = left
            try:
                self._on_wanted(self.name, self.wanted, left)
            except StateError as error:
                log.warning("%s: that an instance was stopped is not forgotten: %s", self.name, error.message)
        while len(self.instances) > number:
            gone = self.instances.pop()
            gone.close()
            self._runtime.journal.drop(gone.journal_key)
        for index in range(len(self.instances), number):
            self.instances.append(Instance(self.config, index, self._runtime, self._changed, self._too_old))

    @property
    def everybody(self) -> list[Instance]:
        """Whoever may have a process."""
        return [*self.instances, *self.others]

    def in_slots_of(self, chosen: Iterable[Instance]) -> list[Instance]:
        """Whoever counts by now in the slots of instances that were chosen before."""
        return [self.instances[i.index] for i in chosen if i.index < len(self.instances)]

    # --- several in one slot --------------------------------------------------------------------------------

    def seat_beside(self, instance: Instance, *, seat: int | None = None) -> Instance:
        """Have another one in the slot of an instance, to be its successor."""
        taken = {other.seat for other in self.everybody if other.index == instance.index}
        free = next(number for number in itertools.count() if number not in taken) if seat is None else seat
        made = Instance(
            self.config, instance.index, self._runtime, self._changed, self._too_old,
            seat=free, predecessor=instance,
        )  # fmt: skip
        self.others.append(made)
        return made

    def take_over(self, successor: Instance, role: Role) -> Instance:
        """From now on this one counts in its slot; whoever did so far has the role given, and is returned."""
        before = self.instances[successor.index]
        self.others[self.others.index(successor)] = before
        self.instances[successor.index] = successor
        successor.take_over_from(before, role)
        if before.state not in ALIVE:
            before.stop("replaced", for_good=False)  # it is not tried again beside the one that counts
        self._runtime.events.emit(
            "instance.replaced",
            target=self.name,
            instance=successor.name,
            pid=successor.pid,
            before=before.pid,
        )
        self._changed()
        return before

    def let_go(self, instance: Instance, reason: str) -> None:
        """Let an instance that does not count any more finish what it has begun, and end it."""
        instance.retire()
        task = asyncio.get_running_loop().create_task(self._see_off(instance, reason))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _see_off(self, instance: Instance, reason: str) -> None:
        # One that was never ready may have accepted connections all the same.
        if instance.state in UP:
            drained = asyncio.ensure_future(self._drain(instance))
            down = asyncio.ensure_future(instance.wait_until(lambda i: i.state not in UP))
            try:
                await asyncio.wait([drained, down], return_when=asyncio.FIRST_COMPLETED)
            finally:
                down.cancel()
                drained.cancel()
        instance.stop(reason, for_good=True)
        await instance.wait_until(lambda i: i.state not in {State.STOPPING})
        self._leave(instance)

    async def _drain(self, instance: Instance) -> None:
        while True:
            pid = self.instances[instance.index].pid
            try:
                why = await instance.drain(self.config.drain_timeout)
            except HandoverFailedError as error:
                # To stop it would be to lose what it has, and so would a drain that no successor waits for.
                log.warning("%s; trying again when its next successor is ready", error.message)
                await self._next_in_slot(instance.index, pid)
                continue
            if why is not None:
                log.warning("%s (pid %s): %s; stopping it", instance.name, instance.pid, why)
            return

    async def _next_in_slot(self, index: int, pid: int | None) -> None:
        """Wait until whoever counts in a slot is ready, and another process than this one."""

        def has_come(instance: Instance) -> bool:
            return instance.ready and instance.pid != pid

        while index < len(self.instances) and not has_come(self.instances[index]):
            await self.instances[index].wait_until(lambda i: has_come(i) or i.role != "current")

    def _leave(self, instance: Instance) -> None:
        if instance in self.others:
            self.others.remove(instance)
            instance.close()
            self._runtime.journal.drop(instance.journal_key)

    # --- the queue ------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Carry out operations until cancelled, or retired."""
        with self._life:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while (operation := self._next()) is not None:
                    self._queue.remove(operation)
                    await self._carry_out(operation)
                    self._free_again()

    def leave_to_the_next(self) -> None:
        """The tasks of this supervisor end. What is under way stays as it is: the next will go on with it."""
        self._ends = True

    def close(self) -> None:
        """Let go of what is open; processes run on."""
        self._ends = True
        self.await_demand()
        for task in self._leaving:
            task.cancel()
        for instance in self.everybody:
            instance.close()

    def retire(self) -> None:
        """The target is no more: let go of everything. Its processes must have ended."""
        self._preempt(f"{self.name} is configured no more")
        for operation in (*self._queue, self._current):
            if operation is not None and not operation.future.done():
                operation.future.set_result(None)  # a `stop`, of what is down
        self._life.cancel()
        self._ends = self._retired = True
        self.stopped_alone = (
            frozenset()
        )  # of this object alone: it counts when the target is configured again
        self.await_demand()
        self.resize(0)
        self._runtime.journal.drop(f"target {self.name}")

    def _next(self) -> Operation | None:
        """The next one to carry out. One that waits for other targets as well lets those behind it pass."""
        begun = next((operation for operation in self._queue if operation.party.begun), None)
        return begun or next((operation for operation in self._queue if operation.party.begin()), None)

    def is_free_for(self, operation: Operation) -> bool:
        """Whether nothing is being done to it, nor about to be, nor was asked of it alone before. What was
        given up here keeps none of its party.
        """
        if operation.future.done():
            return True
        if self._current is not None or any(other.party.begun for other in self._queue):
            return False
        before = itertools.takewhile(lambda other: other is not operation, self._queue)
        return all(len(other.party.operations) > 1 for other in before)

    def look_again(self) -> None:
        """Something may have become possible that is in the queue."""
        self._wake.set()

    def _free_again(self) -> None:
        for operation in self._queue:
            operation.party.wake()

    async def _carry_out(self, operation: Operation) -> None:
        if operation.future.done():
            return
        self._current = operation
        operation.since = time.monotonic()
        try:
            with operation.scope:
                result = await operation.work()
                if not operation.future.done():
                    operation.future.set_result(result)
            if not operation.future.done():
                operation.future.set_exception(
                    CancelledByRequestError(
                        f"{operation.name} of {self.name} was cancelled: {operation.cancelled_because}"
                    )
                )
        except AsyncsupError as error:
            _fail(operation.future, error)
        except Exception as error:
            log.exception("%s of %s failed unexpectedly", operation.name, self.name)
            _fail(operation.future, error)
        finally:
            self._current = None

    def enqueue(
        self, name: str, asked_by: str, work: Callable[[], Awaitable[Any]], party: Party | None = None
    ) -> Operation:
        """Queue an operation, for its own or with those of other targets."""
        party = party or Party()
        operation = Operation(name, asked_by, work, asyncio.get_running_loop().create_future(), party)
        party.operations[self] = operation
        self._queue.append(operation)
        self._wake.set()
        return operation

    def refuse_if_busy(self) -> None:
        """Raises TargetBusyError when something is going on, or waits to."""
        if self._current is not None or self._queue:
            other = self._current or self._queue[0]
            raise TargetBusyError(f"{self.name} is busy: {other}", operation=other.name)

    def refuse_while_ending(self) -> None:
        """Whoever started a process from here on would leave it behind: nobody comes to stop it any more.

        Raises:
            ShuttingDownError: the supervisor ends, and is stopping the target or has done so.
            TargetNotFoundError: it is configured no more.
        """
        self._refuse_if_retired()
        if self._ends:
            raise ShuttingDownError(f"{self.name} is being stopped because the supervisor ends")

    def _refuse_if_retired(self) -> None:
        if self._retired:
            raise TargetNotFoundError(f"{self.name} is configured no more", name=self.name)

    async def _perform(
        self, name: str, asked_by: str, work: Callable[[], Awaitable[Any]], party: Party | None = None
    ) -> Any:
        if name != "stop":
            self.refuse_while_ending()
        operation = self.enqueue(name, asked_by, work, party)
        try:
            return await operation.future
        finally:
            if not operation.future.done() or operation.future.cancelled():
                self.withdraw(operation)

    def withdraw(self, operation: Operation) -> None:
        """Nobody waits for it any more: it ends if it runs, and never begins if it does not."""
        operation.cancel("its client gave up")
        if operation in self._queue:
            self._queue.remove(operation)
            self._wake.set()
            self._free_again()

    def _preempt(self, because: str) -> None:
        given_up = [operation for operation in self._queue if operation.name != "stop"]
        for operation in given_up:
            operation.cancel(because)
            _fail(operation.future, CancelledByRequestError(f"{operation.name} of {self.name}: {because}"))
            self._queue.remove(operation)
            operation.party.wake()
        if self._current is not None and self._current.name != "stop":
            self._current.cancel(because)

    # --- operations -----------------------------------------------------------------------------------------

    async def start(self, chosen: Sequence[Instance], *, asked_by: str, wait: bool) -> None:
        """Start instances, after the targets they depend on.

        Raises:
            StartFailedError: with ``wait``, one ended or gave up before it was ready.
            ShuttingDownError, TargetNotFoundError: see `refuse_while_ending`; nothing is remembered.
        """
        self.refuse_while_ending()
        self._want(True, chosen)

        async def work() -> None:
            here = self.in_slots_of(chosen)
            await self.spawn_instances(here, f"start by {asked_by}")
            if wait and not any(instance.state is State.WAITING for instance in here):
                await self.wait_settled(here)

        await self._perform("start", asked_by, work)
        if wait:
            # Waiting for a dependency must not keep the queue: its own patch may want both targets.
            await self.wait_settled(self.in_slots_of(chosen))

    async def stop(self, chosen: Sequence[Instance], *, asked_by: str, remember: bool = True) -> None:
        """Stop instances, whatever else was going on, and wait until their process groups are empty.

        Args:
            remember: it is an operator's wish that it be down.

        Raises:
            StopFailedError: a process survives SIGKILL.
            StateError: they are stopped, but that this is to stay so cannot be written down.
            TargetNotFoundError: it is configured no more.
        """
        self._refuse_if_retired()
        unwritten: StateError | None = None
        try:
            self._want(False, chosen, remember=remember)
        except StateError as error:
            unwritten = error  # what is to be stopped may be what fills the disk
        self._preempt(f"{asked_by} asked to stop {self.name}")
        reason = f"stop by {asked_by}"
        await self._perform(
            "stop",
            asked_by,
            lambda: self.stop_instances(self.in_slots_of(chosen), reason, for_good=True),
        )
        if unwritten is not None:
            what = self.name if not self.wanted else ", ".join(instance.name for instance in chosen)
            raise StateError(
                f"{what} is stopped, but that cannot be written down ({unwritten.message}); stop it "
                "again when there is room, or a later `asyncsup serve` starts it",
                code=unwritten.error_code,
            )

    async def shut_down(self) -> None:
        """Stop everything because the supervisor ends; what the operator wants stays as it is.

        Raises:
            StopFailedError: a process survives SIGKILL.
        """
        if self._retired:
            return
        self._ends = True
        self.await_demand()
        self._preempt("the supervisor is stopping")
        await self._perform(
            "stop", "shutdown", lambda: self.stop_instances(self.instances, "the supervisor is stopping")
        )

    async def restart(
        self,
        chosen: Sequence[Instance],
        *,
        asked_by: str,
        wait: bool,
        rolling: bool = False,
        order: StopOrder | None = None,
    ) -> None:
        """Stop, then start. A client that gives up in between leaves the instances starting, not stopped.

        Args:
            order: of this restart among those of other targets, unless it is rolling. They begin together;
                each stops in its turn, and starts when what it depends on has stopped.
            rolling: some at a time, and each new one before the old one where the target can have both. It is
                waited for. If a new one does not come up, those that were not replaced by then run on.

        Raises:
            StartFailedError: one did not become ready.
            ShuttingDownError, TargetNotFoundError: see `refuse_while_ending`; nothing is remembered.
        """
        self.refuse_while_ending()
        self._want(True, chosen)
        order = order or StopOrder([self])
        reason = f"restart by {asked_by}"

        async def work() -> None:
            here = self.in_slots_of(chosen)
            if rolling:
                await self._roll(here, reason)
                return
            await order.turn_of(self)
            try:
                await self.stop_instances(here, reason)
                order.passed(self)
                await order.dependencies_passed(self)
                await self.spawn_instances(here, reason)
            except asyncio.CancelledError:
                if self.is_to_be_up:
                    with anyio.CancelScope(shield=True):
                        await self.stop_instances(here, reason)
                        if self.is_to_be_up:
                            await self.spawn_instances(here, reason)
                raise
            if wait and not any(instance.state is State.WAITING for instance in here):
                await self.wait_settled(here)

        await self._perform("restart", asked_by, work, None if rolling else order.party(self))
        if wait and not rolling:
            await self.wait_settled(self.in_slots_of(chosen))

    async def scale(self, number: int, *, asked_by: str, wait: bool, remember: Callable[[], None]) -> None:
        """Have another number of instances: the last ones go, new ones are started if the target is to be up.

        Args:
            remember: writes the number down for the next supervisor. If it raises, nothing was changed.

        Raises:
            StartFailedError: with ``wait``, a new one did not become ready.
            StopFailedError: a process survives SIGKILL; its slot stays.
        """
        started: list[Instance] = []

        async def work() -> None:
            remember()
            reason = f"scaled to {number} by {asked_by}"
            try:
                await self._drain_surplus(number)
            finally:
                # The number is written down: whoever gives up waiting has not taken it back.
                with anyio.CancelScope(shield=True):
                    await self.stop_instances(self.instances[number:], reason)
                    before = len(self.instances)
                    self.resize(number)
                    started.extend(self.instances[before:])
                    if self.is_to_be_up:
                        await self.spawn_instances(started, reason)

        await self._perform("scale", asked_by, work)
        if wait and self.wanted:
            await self.wait_settled(started)

    async def replace(self, chosen: Sequence[Instance], *, asked_by: str) -> None:
        """Stop instances, and start anew those that are wanted."""
        reason = f"stopped because of {asked_by}"

        async def work() -> None:
            here = self.in_slots_of(chosen)
            try:
                await self.stop_instances(here, reason)
                await self.spawn_instances([i for i in here if i.wanted], reason)
            except asyncio.CancelledError:
                await self.up_again(here, reason)
                raise

        await self._perform("replace", asked_by, work)

    async def reconfigure(
        self, config: TargetConfig, *, restart: bool, resize: bool, asked_by: str
    ) -> Sequence[Instance]:
        """Take up other settings.

        Args:
            restart: a running process cannot take them up.
            resize: the number of instances is another one.

        Raises:
            StartFailedError: an instance that was to replace another did not become ready, and the settings
                are as before.
            StopFailedError: a process survives SIGKILL; nothing was changed.

        Returns:
            The instances that were started.
        """
        started: list[Instance] = []

        async def work() -> None:
            number = config.instances if resize else len(self.instances)
            reason = f"configuration changed by {asked_by}"
            # One that has failed is tried again: what was wrong with it may be what was changed.
            up = [i for i in self.instances if restart and i.state not in {State.STOPPED, State.EXITED}]
            beside = config.overlaps and _same_output(config, self.config)
            stays = [i for i in up if i.index < number]
            rolling: list[Instance] = []
            if config.rolls:
                # One that is down may be what others cannot be stopped without.
                too = {State.STARTING, State.BACKOFF, State.FAILED} if not beside else frozenset[State]()
                rolling = [i for i in stays if i.ready or (i.state in too and config.patch.min_available)]
            waiting = [i for i in stays if i.state is State.WAITING]
            stopping = [i for i in self.instances if (i in up and i not in rolling) or i.index >= number]
            try:
                await self._drain_surplus(number)
                await self.stop_instances(stopping, reason)
            except asyncio.CancelledError:
                with anyio.CancelScope(shield=True):
                    # Whoever was told to finish takes up nothing more.
                    await self.stop_instances(self.instances[number:], reason)
                await self._wait_again(waiting, reason)
                await self.up_again(stopping, reason)
                raise
            settings_before, self.config = self.config, config
            rollout = Rollout(self, reason, beside=beside)
            try:
                await rollout.run(rolling)
            except BaseException as error:
                self.config = settings_before
                await self._wait_again(waiting, reason)
                await self._as_before([*rollout.back(), *rolling, *stopping], reason)
                if not isinstance(error, asyncio.CancelledError):
                    await self._move_back(rolling, reason, beside=beside)
                raise
            rollout.finish()
            up = [i for i in up if i in stopping and i.index < number]
            self.resize(min(number, len(self.instances)))
            for instance in self.instances:
                instance.configure(config)
            before = len(self.instances)
            self.resize(number)
            if self.is_to_be_up:
                started.extend(i for i in self.instances if i in up or i.index >= before)
                # The settings are taken up: whoever was stopped for them is started with them.
                with anyio.CancelScope(shield=True):
                    await self.spawn_instances(started, reason)
            self.start_waiting()
            self._demand.close()  # what it looks at may be other sockets by now
            self.await_demand()

        await self._perform("reconfigure", asked_by, work)
        return started

    async def _as_before(self, chosen: Sequence[Instance], reason: str) -> None:
        """Other settings were given up: whoever was stopped for them, or does not work with them, is started
        with those from before. Those that do work with them run on.
        """
        here = self.in_slots_of(chosen)
        fallen = [i for i in here if i.config != self.config and not i.ready]
        with anyio.CancelScope(shield=True):
            with contextlib.suppress(StopFailedError):  # told where it is waited for once more
                await self.stop_instances(fallen, f"{reason}: given up")
            await self.up_again(here, reason)

    async def _wait_again(self, chosen: Sequence[Instance], reason: str) -> None:
        """What was to stop instances that wait for dependencies is given up: they wait once more."""
        if self.is_to_be_up:
            stopped = [i for i in self.in_slots_of(chosen) if i.wanted and i.state in _STOPPED]
            with anyio.CancelScope(shield=True):
                await self.spawn_instances(stopped, f"{reason}: given up")

    async def _move_back(self, chosen: Sequence[Instance], reason: str, *, beside: bool) -> None:
        """Have those that were started with other settings go back to the ones that the target has."""
        here = self.in_slots_of(chosen)
        moved = [i for i in here if i.config != self.config]
        if not moved:
            return
        try:
            await self.settle([i for i in here if i not in moved and i.state is not State.WAITING])
            back = Rollout(self, f"{reason}: given up", beside=beside, at_any_price=True)
            await back.complete(moved)
        except BaseException as error:
            await self._as_before(here, reason)
            if not isinstance(error, AsyncsupError):
                raise
            log.warning("%s: not everybody has the settings from before: %s", self.name, error.message)

    async def _drain_surplus(self, number: int) -> None:
        """Have the instances beyond a number of slots finish what they have begun: they are to be stopped."""

        async def drain(instance: Instance) -> None:
            instance.finish()
            try:
                why = await instance.drain(self.config.drain_timeout)
            except HandoverFailedError as error:
                why = error.message  # there is nobody who could have it
            if why is not None:
                log.warning("%s (pid %s): %s; stopping it", instance.name, instance.pid, why)

        if self.config.overlaps:
            await together(partial(drain, instance) for instance in self.instances[number:] if instance.ready)

    async def _roll(self, chosen: Sequence[Instance], reason: str) -> None:
        """Replace instances, some at a time.

        Raises:
            StartFailedError: a new one did not become ready; those that were not replaced by then run on.
        """
        try:
            await Rollout(self, reason).complete(chosen)
        except BaseException:
            await self.up_again(chosen, reason)
            raise

    async def up_again(self, chosen: Sequence[Instance], reason: str) -> None:
        """What was to stop and start instances is given up: none of them stays down for that. Those that were
        down before it, or have failed, are left alone.
        """
        if self.is_to_be_up:
            down = [i for i in self.in_slots_of(chosen) if i.wanted and i.state in _STOPPED]
            with anyio.CancelScope(shield=True):
                left = await self.still_there(down)
                if self.is_to_be_up:  # a stop may have come meanwhile
                    down = [i for i in down if i not in left and i.wanted]
                    await self.spawn_instances(down, f"{reason}: given up", whatever_it_depends_on=True)

    async def still_there(self, instances: Sequence[Instance]) -> list[Instance]:
        """Wait for those that are being stopped; returns those that do not end in time."""
        with anyio.move_on_after(self.stop_limit):
            for instance in instances:
                await instance.wait_until(lambda i: i.state is not State.STOPPING)
        return [instance for instance in instances if instance.state is State.STOPPING]

    async def reload(self, chosen: Sequence[Instance], *, asked_by: str) -> list[tuple[str, ReloadOutcome]]:
        """Have running instances read their resources again.

        Raises:
            TargetNotRunningError: none is running.
            ReloadFailedError: one refused or did not answer.
        """

        async def work() -> list[tuple[str, ReloadOutcome]]:
            ready = [instance for instance in self.in_slots_of(chosen) if instance.ready]
            if not ready:
                raise TargetNotRunningError(f"{self.name} has no running instance to reload")
            outcomes = await self.reload_instances(
                ready, patch=None, build=self._runtime.root_facts(self.name).build, changed=()
            )
            for name, outcome in outcomes:
                if outcome.told_by == "nobody":
                    raise ReloadFailedError(
                        f"{name} cannot be told: set reload_signal or reload_command for {self.name}, "
                        "or use the SDK"
                    )
                if not outcome.ok:
                    raise ReloadFailedError(f"{name}: {outcome.reason}")
            return outcomes

        result: list[tuple[str, ReloadOutcome]] = await self._perform("reload", asked_by, work)
        return result

    def _too_old(self, instance: Instance) -> None:
        """Restart an instance that has reached `max_age`; the queue sees to it that it is one at a time."""
        pid, reason = instance.pid, f"max_age ({self.config.max_age:g} s)"

        async def work() -> None:
            if instance in self.instances and instance.pid == pid and instance.ready:
                await self._roll([instance], reason)

        def done(future: asyncio.Future[None]) -> None:
            if future.cancelled() or not isinstance(error := future.exception(), NoCapacityError):
                return
            log.warning("%s: %s; looking again in %g s", reason, error.message, CAPACITY_LOOK_SECONDS)
            asyncio.get_running_loop().call_later(CAPACITY_LOOK_SECONDS, again)

        def again() -> None:
            if instance in self.instances and instance.pid == pid and not self._ends:
                self._too_old(instance)

        self.enqueue("restart", "max_age", work).future.add_done_callback(done)

    async def run_hook(self, name: str, command: tuple[str, ...], extra: Mapping[str, str]) -> str | None:
        """Run one of the hooks that belong to a patch, as the first instance; why it failed, or None."""
        return await self.instances[0].run_hook(name, command, extra) if self.instances else None

    # --- steps, for operations and for the transaction that holds the target --------------------------------

    async def spawn_instances(
        self, chosen: Sequence[Instance], reason: str, *, whatever_it_depends_on: bool = False
    ) -> None:
        """Start instances, or leave them waiting for dependencies (see `start_waiting`).

        Args:
            whatever_it_depends_on: do not wait: they ran a moment ago as well.
        """
        for instance in chosen:
            instance.want()
        for instance in chosen:
            # A stop that was given up still has its process; the next one comes after it.
            await instance.wait_until(lambda i: i.state is not State.STOPPING)
            why = None if whatever_it_depends_on else self._awaited()
            if why is not None:
                instance.wait_for_dependencies(why)
                continue
            async with self._spawn_gate:
                if instance.pid is None:
                    # It may have been the last one to run with other settings, which were given up.
                    instance.configure(self.config)
                instance.start(reason)
                await asyncio.sleep(0)

    @property
    def stop_limit(self) -> float:
        """How long an instance may take to stop (seconds); whatever is there after it survives SIGKILL."""
        hooks = self.config.hooks
        post_stop = hooks.timeout if hooks.post_stop is not None else 0.0
        return self.config.stop_timeout + STOP_GRACE_SECONDS + post_stop

    async def stop_instances(
        self, chosen: Sequence[Instance], reason: str, *, for_good: bool = False
    ) -> None:
        """Stop instances, and whatever is beside them in their slots; unless ``for_good`` they are to be
        started again, also if we die before that."""
        slots = {instance.index for instance in chosen}
        beside = [other for other in self.others if other.index in slots]
        for instance in chosen:
            instance.stop(reason, for_good=for_good)
        for other in beside:
            other.stop(reason, for_good=True)
        limit = self.stop_limit
        with anyio.move_on_after(limit) as scope:
            for instance in (*chosen, *beside):
                await instance.wait_until(lambda i: i.state not in {State.STOPPING})
        for other in beside:
            if other.state is not State.STOPPING:
                self._leave(other)
        if scope.cancelled_caught:
            left = ", ".join(i.name for i in (*chosen, *beside) if i.state is State.STOPPING)
            raise StopFailedError(f"{left}: a process is still there {limit:g} s after the stop began")

    async def wait_settled(self, chosen: Sequence[Instance]) -> None:
        """Wait until every instance is ready or has failed to become so.

        Raises:
            StartFailedError: names the first that failed, and why. One that waits for what has failed itself
                goes on waiting: when that is started by command, it is started as well.
        """

        def failed_dependency(instance: Instance) -> Instance | None:
            return self.failed_dependency() if instance.state is State.WAITING else None

        for instance in chosen:
            await instance.wait_until(
                lambda i: (
                    i.state in SETTLED
                    or i.state is State.STOPPED
                    or i.given_up is not None
                    or failed_dependency(i) is not None
                )
            )
            if instance.state is State.EXITED or instance.ready:
                continue
            failed = failed_dependency(instance)
            if failed is not None:
                raise StartFailedError(
                    f"{instance.name} waits for {failed.config.name}, which has failed: {failed.detail}",
                    instance=instance.name,
                    dependency=failed.name,
                )
            raise StartFailedError(
                f"{instance.name} did not become ready: {instance.detail}", instance=instance.name
            )

    async def settle(self, chosen: Sequence[Instance]) -> None:
        """Wait until every instance is ready or has failed to become so, and leave it at that."""
        for instance in chosen:
            with contextlib.suppress(StartFailedError):
                await self.wait_settled([instance])

    async def reload_instances(
        self,
        chosen: Sequence[Instance],
        *,
        patch: str | None,
        build: int,
        changed: Sequence[str],
        rollback: bool = False,
    ) -> list[tuple[str, ReloadOutcome]]:
        """Tell all at once and gather every answer."""
        request = Reload(
            patch=patch, build=build, root=str(self.config.root or ""), changed=changed, rollback=rollback
        )
        deadline = self.config.patch.ack_timeout if patch is not None else self.config.reload_timeout
        outcomes = await asyncio.gather(*(i.reload(request, deadline=deadline) for i in chosen))
        return [(instance.name, outcome) for instance, outcome in zip(chosen, outcomes, strict=True)]

    @property
    def is_to_be_up(self) -> bool:
        """Whether what was stopped on the way is to be started again; who ends stops it once more if so."""
        return self.wanted and not self._ends

    def _want(self, wanted: bool, chosen: Iterable[Instance], *, remember: bool = True) -> None:
        """Take an operator's wish for some of the instances, or for all.

        Args:
            remember: also for later supervisors.

        Raises:
            StateError: it cannot be written down. That it is to be down counts all the same; that it is to be
                up does not.
        """
        before = self.wanted, self.held_down, self.stopped_alone
        everybody = frozenset(instance.index for instance in self.instances)
        named = frozenset(instance.index for instance in chosen)
        if wanted:
            self.stopped_alone = (everybody if self.held_down else self.stopped_alone) - named
            self.wanted, self.held_down = True, False
        elif named >= everybody:
            self.wanted, self.held_down, self.stopped_alone = False, True, frozenset()
        elif self.wanted:
            self.stopped_alone |= named
        try:
            if remember:
                self._on_wanted(self.name, self.wanted, self.stopped_alone)
        except StateError:
            if wanted:
                self.wanted, self.held_down, self.stopped_alone = before
            else:
                self.await_demand()
            raise
        self.await_demand()
        for target in self.dependents:
            target.start_waiting()  # one that is stopped alone is not waited for any more


@contextlib.asynccontextmanager
async def hold_all(
    targets: Sequence[Target],
    name: str,
    asked_by: str,
    *,
    on_preempt: Callable[[str], None],
    wait_busy: bool = True,
) -> AsyncIterator[None]:
    """Keep every other operation away from all targets for as long as the block runs.

    When a `stop` of one pre-empts, ``on_preempt`` is called with the reason, and the stop waits until the
    block has ended: it is expected to put things back first.

    Raises:
        ShuttingDownError, TargetNotFoundError: see `Target.refuse_while_ending`.
        TargetBusyError: something else is going on and ``wait_busy`` is False.
    """
    acquired, released = asyncio.Event(), asyncio.Event()
    missing = set(targets)
    if not missing:
        acquired.set()  # nobody's turn comes: of a patch, whose targets are configured no more
    party = Party()

    async def keep(target: Target) -> None:
        missing.discard(target)
        if not missing:
            acquired.set()
        try:
            await released.wait()
        except asyncio.CancelledError:
            on_preempt(party.operations[target].cancelled_because)
            with anyio.CancelScope(shield=True):
                await released.wait()
            raise

    for target in targets:
        target.refuse_while_ending()
        if not wait_busy:
            target.refuse_if_busy()
    for target in targets:
        target.enqueue(name, asked_by, partial(keep, target), party)
    futures = [operation.future for operation in party.operations.values()]
    try:
        acquiring = asyncio.ensure_future(acquired.wait())
        try:
            await asyncio.wait([acquiring, *futures], return_when=asyncio.FIRST_COMPLETED)
        finally:
            acquiring.cancel()
        if not acquired.is_set():
            for future in futures:
                if future.done():
                    await future  # raises: pre-empted while it was queued
        yield
    finally:
        released.set()
        for target, operation in party.operations.items():
            if target in missing:
                target.withdraw(operation)
                operation.future.cancel()
            elif operation.future.done() and not operation.future.cancelled():
                operation.future.exception()  # a pre-emption was reported through on_preempt
            else:
                operation.future.add_done_callback(_retrieve)


def _same_output(one: TargetConfig, other: TargetConfig) -> bool:
    """Whether processes with these settings can be in one slot, to which their output belongs."""
    here, there = one.log, other.log
    return (here.stdout, here.stderr, here.format) == (there.stdout, there.stderr, there.format)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


def _retrieve(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()
