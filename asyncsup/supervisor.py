"""The supervisor: owns the task group, the targets, the sockets and the store; starts all and ends all.

Nothing here knows the wire: `control.py` turns requests into calls of these methods.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import fnmatch
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.abc
import msgspec
import zmq

import asyncsup
from asyncsup import owners
from asyncsup.actor import Actor
from asyncsup.cgroups import Cgroups
from asyncsup.channel import TargetChannel
from asyncsup.child import raise_descriptor_limit, seal_descriptors
from asyncsup.config import INSTANCE, Config
from asyncsup.config.values import is_one_file
from asyncsup.environment import may_be_inherited
from asyncsup.errors import (
    AsyncsupError,
    RequestError,
    ShuttingDownError,
    StateError,
    StateLockedError,
    TargetNotFoundError,
    TimeoutExpiredError,
)
from asyncsup.events import EventStream, timestamp
from asyncsup.inheritance import HANDED_OVER, Inheritance
from asyncsup.instance import Instance
from asyncsup.ipc import Publisher, Router, private_directory
from asyncsup.journal import Journal
from asyncsup.keeper_link import KeeperLink
from asyncsup.keys import KeyStore
from asyncsup.lifecycle import State
from asyncsup.logs import OutputStream
from asyncsup.notification import Notification, Refusal
from asyncsup.notify import NotifySocket, Sender
from asyncsup.patch.facts import Layout, TargetRoot
from asyncsup.patch.guarded import Guarded
from asyncsup.patch.inbox import Inbox
from asyncsup.patch.overseer import PatchOverseer
from asyncsup.patch.store import Store
from asyncsup.reconfigure import Reconfigurer
from asyncsup.remote import RemoteAccess
from asyncsup.runtime import RootFacts, Runtime
from asyncsup.schedule import keep
from asyncsup.sockets import ManagedSockets
from asyncsup.stop_order import StopOrder
from asyncsup.strays import StrayReaper
from asyncsup.successor import Successor, examine
from asyncsup.target import Dependency, Target
from asyncsup.together import together
from target_sdk.protocol import PROTOCOL_VERSION

log = logging.getLogger("asyncsup")

MOST_INSTANCES: Final = 10_000
SIGNALS: Final = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
LAST_WORDS_SECONDS: Final = 1.0
"""How long the answer to `reexec` may take to leave."""
LOCK_SECONDS: Final = 5.0
LOCK_LOOK_SECONDS: Final = 0.02


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """Instances of one target that a request named; all of them unless one was named by its index."""

    target: Target
    instances: Sequence[Instance]


class Scaled(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one target that was to have another number of instances.

    Attributes:
        instances: how many it has.
    """

    target: str
    instances: int
    error: AsyncsupError | None


class Supervisor:
    """Everything one `asyncsup serve` runs.

    Args:
        keeper: the link to the keeper, or one to nobody.
    """

    def __init__(self, config: Config, keeper: KeeperLink) -> None:
        self.config = config
        self.keeper = keeper
        self.started_at = timestamp()
        self.counters: Counter[str] = Counter()
        self.targets: dict[str, Target] = {}
        self._started = time.monotonic()
        self._stopping = asyncio.Event()
        self._asked_to_end: Counter[str] = Counter()
        """How often, by whom the signals came from: one that reaches us and our keeper is one."""
        self._impatient = False
        self._exit_status = 0
        self.successor: Successor | None = None
        """What goes on in our place, when we end without stopping anything."""
        self._ended_in_order = False
        self._schedules_changed = asyncio.Event()
        self._hung_up = False
        """A SIGHUP has come that no reading of the configuration has answered yet."""
        self._cleanup = contextlib.ExitStack()

    # --- life -----------------------------------------------------------------------------------------------

    async def run(self, serve_control: Callable[[Supervisor, Router], Any] | None = None) -> int:
        """Start everything, serve until told to stop, stop everything. Returns the exit status."""
        try:
            self._open()
            return await self._serve()
        finally:
            self._cleanup.close()

    def _open(self) -> None:
        """Take hold of what must be ours alone, in the order in which a conflict shows without a trace."""
        settings = self.config.supervisor
        # Programs of other users must reach their own socket; they are known by their tokens.
        self._strangers = any(target.user is not None for target in self.config.targets.values())
        searchable = self._strangers or bool(settings.socket_mode & 0o077)
        private_directory(settings.runtime_dir, searchable=searchable)
        self._lock_runtime_dir(settings.runtime_dir)
        self.store = Store.open(settings.state_dir)
        self._cleanup.callback(self.store.close)
        self.store.note(
            "supervisor.started",
            by=Actor.this_process("supervisor").to_json(),
            version=asyncsup.__version__,
            trust=self.config.patch.trust,
            signatures_required=self.config.patch.signatures_required,
        )
        raise_descriptor_limit()
        seal_descriptors()
        self.register_roots(self.config)
        self.journal = Journal(settings.state_dir / "journal")
        self._cleanup.callback(self._close_journal)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        # Instances, clients and the fan-out of a thousand targets share one context.
        context.set(zmq.MAX_SOCKETS, 65_000)
        self._cleanup.callback(context.destroy, 0)
        run = settings.runtime_dir
        publisher = Publisher(context, f"ipc://{run}/events.sock", mode=settings.socket_mode)
        self._cleanup.callback(publisher.close)
        self._give_to_group(run / "events.sock")
        self._publishers = [publisher.send]
        self._remote: RemoteAccess | None = None
        if settings.listen is not None:
            keys = KeyStore(settings.state_dir / "keys")
            self._remote = RemoteAccess(context, settings.listen, keys, self.counters)
            self._cleanup.callback(self._remote.close)
            self._publishers.append(self._remote.publish)
        self.events = EventStream(self._publish)
        self._cleanup.callback(self.events.flush)
        target_mode = 0o666 if self._strangers else 0o600
        self.channel = TargetChannel(partial(Router, context, f"ipc://{run}/target.sock", mode=target_mode))
        self._cleanup.callback(self.channel.close)
        self.notify = NotifySocket(run / "notify.sock", self._on_notify, self.keeper.take("notify"))
        self.keeper.hold("notify", self.notify.fileno())
        self._cleanup.callback(self.notify.close)
        self._context = context
        self.sockets = ManagedSockets(self.keeper)
        self._cleanup.callback(lambda: self.sockets.close(keep=not self._ended_in_order))
        self.cgroups = Cgroups(settings.cgroup_root, settings.state_dir)
        self._cleanup.callback(self.cgroups.close)
        self._runtime = Runtime(
            cgroups=self.cgroups,
            events=self.events,
            channel=self.channel,
            keeper=self.keeper,
            journal=self.journal,
            sockets=self.sockets,
            target_endpoint=f"ipc://{run}/target.sock",
            notify_path=self.notify.path,
            runtime_dir=run,
            state_dir=settings.state_dir,
            logs=settings.state_dir / "logs",
            fifos=run / "output",
            environ=dict(os.environ),
            inheritable=may_be_inherited(os.environ),
            root_facts=self.root_facts,
            essential_ended=self._essential_ended,
            hear_last_words=self.notify.hear_last_words,
        )
        self._spawn_gate = asyncio.Lock()
        for name in self.config.targets:
            self._make_target(name)
        self.connect_targets()
        self._cleanup.callback(self._close_instances)
        self._inheritance = Inheritance(
            self.journal.left_behind, self.targets, self._runtime, orphans=settings.orphans
        )
        self._recovered = self.store.recover(keep=self._inheritance.on_probation())
        for recovered in self._recovered:
            log.warning("recovered: %s", recovered)
        self._inheritance.find()
        self.sockets.open(self.config.sockets, self._pids())
        self.channel.open()

    def register_roots(self, config: Config) -> None:
        """Make the roots of all targets known to the store, and what no patch may change.

        What was guarded before is guarded all the same, until `guard_no_more_than`: a configuration that is
        refused still stands in its file, and until another one is in force it is the old one that decides.

        Raises:
            StateError: one is not what patches have made it.
        """
        self.store.guard(self.store.guarded.along_with(_guarded(config)))
        self.store.register(
            [
                TargetRoot(
                    name=target.name,
                    root=target.root,
                    layout=Layout(target.layout),
                    persist=target.persist,
                    build=target.build,
                )
                for target in config.targets.values()
                if target.root is not None
            ]
        )

    def guard_no_more_than(self, config: Config) -> None:
        """What was guarded for an earlier configuration alone is not guarded any more."""
        self.store.guard(_guarded(config))

    def _make_target(self, name: str) -> Target:
        target = self.targets[name] = Target(
            self.config.targets[name],
            self._runtime,
            spawn_gate=self._spawn_gate,
            on_wanted=self._remember_wanted,
        )
        self._scale_as_remembered(target)
        target.held_down = self._stays_down(target)
        if target.config.remembers_wishes:
            target.stopped_alone = self.store.stopped_alone(name)
        return target

    def _pids(self) -> list[int]:
        """Of all instances that have a process."""
        instances = (instance for target in self.targets.values() for instance in target.everybody)
        return [instance.pid for instance in instances if instance.pid is not None]

    def _close_journal(self) -> None:
        self.journal.close(empty=self._ended_in_order and not self._pids())

    def _publish(self, topic: bytes, frame: bytes) -> None:
        for publish in self._publishers:
            publish(topic, frame)

    def _give_to_group(self, path: Path) -> None:
        """Members of `socket_group` may connect, as far as `socket_mode` lets them."""
        group = self.config.supervisor.socket_group
        if group is None:
            return
        try:
            owners.give(path, group=group)
        except OSError as error:
            raise StateError(f"cannot give {path} to group {group}: {error.strerror}") from None

    def refused(self, actor: Actor, method: str, why: str) -> None:
        """Somebody with a key has asked for what it does not allow."""
        log.warning("refused %s to %s: the key %s", method, actor, why)
        self.events.emit("control.refused", method=method, by=actor.to_json(), reason=why)
        self.store.note("control.refused", by=actor.to_json(), method=method, reason=why)

    def _lock_runtime_dir(self, runtime_dir: Path) -> None:
        """A second bind on an ipc path succeeds silently and steals it, hence a lock."""
        path = runtime_dir / "lock"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        held = self.keeper.take("lock")
        if held is not None and os.path.sameopenfile(held, fd):
            # Nobody could take it while there was no supervisor.
            fd, held = held, fd
        if held is not None:
            os.close(held)
        self._cleanup.callback(os.close, fd)
        deadline = time.monotonic() + LOCK_SECONDS
        while not _lock(fd):
            written = os.pread(fd, 32, 0).strip()
            pid = written.decode() if written.isdigit() else "unknown"
            dying = written.isdigit() and not Path(f"/proc/{pid}").exists()
            if dying and time.monotonic() < deadline:
                # Its keeper was killed, and so is it, in this very moment.
                time.sleep(LOCK_LOOK_SECONDS)
                continue
            raise StateLockedError(
                f"another supervisor (pid {pid}) runs with runtime_dir {runtime_dir}; "
                "stop it with `asyncsup shutdown`, or give this one a runtime_dir of its own"
            )
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{self.keeper.pid or os.getpid()}\n".encode(), 0)
        self.keeper.hold("lock", fd)

    async def _serve(self) -> int:
        from asyncsup.control import ControlServer  # noqa: PLC0415 - control knows the supervisor's type

        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            for target in self.targets.values():
                tasks.start_soon(target.run, name=f"target {target.name}")
            self.reconfigurer = Reconfigurer(self)
            self.inbox = Inbox(self.config.patch.inbox, self.events)
            self.overseer = PatchOverseer(self, tasks)
            settings = self.config.supervisor
            make_router = partial(Router, self._context, settings.endpoint, mode=settings.socket_mode)
            control = None
            try:
                with self._signals():
                    self.events.emit("supervisor.started", pid=os.getpid(), version=asyncsup.__version__)
                    # Before the loop gets its turn, and with it a program that has something to say.
                    self._inheritance.carry_on(tasks, undecided=self._go_on_with_patches())
                    self.keeper.drop_the_rest()
                    self.cgroups.tidy_up(self._inheritance.names)
                    if not self.keeper.reaps:
                        reaper = StrayReaper()
                        reaper.start()
                        self._cleanup.callback(reaper.close)
                    await tasks.start(self.inbox.watch)
                    control = ControlServer(self, tasks, make_router, self._remote)
                    self._give_to_group(Path(settings.endpoint.removeprefix("ipc://")))
                    self.keeper.serve(lambda number: self._on_signal(number, "keeper"))
                    log.info("ready at %s, pid %d", settings.endpoint, os.getpid())
                    if settings.listen is not None:
                        log.info("allowed keys may connect at %s", settings.listen)
                    tasks.start_soon(self._autostart)
                    tasks.start_soon(self._keep_schedules)
                    if self.config.patch.auto:
                        tasks.start_soon(self.overseer.arrivals.apply_all)
                    await self._stopping.wait()
                    if self.successor is None:
                        await self._stop_all()
                        self._ended_in_order = True
            finally:
                if control is not None:
                    control.close(linger=0.0 if self.successor is None else LAST_WORDS_SECONDS)
                self.reconfigurer.let_go()
                self.overseer.jobs.let_go()
                for target in self.targets.values():
                    target.leave_to_the_next()
                tasks.cancel_scope.cancel()
        return self._exit_status

    def _go_on_with_patches(self) -> set[str]:
        """See to the processes of patches that were under way; their files recovery has seen to.

        Returns the targets about whose patch is still to be decided.
        """
        undecided = {name for name in self.targets if self.overseer.decisions.on(name) is not None}
        recovered = {each.txn: each for each in self._recovered if each.txn is not None}
        for txn, record in self._inheritance.patches.items():
            found = recovered.pop(txn, None)
            if found is not None and found.action == "kept":
                self.overseer.go_on(record)
                undecided |= {part.target for part in record.parts}
            elif record.switched and self.store.history.is_undone(txn):
                names = [part.target for part in record.parts]
                self.overseer.bring_back(txn, names, record.patch, record)
                undecided.update(names)
            else:
                self.journal.drop(f"transaction {txn}")
        for txn, found in recovered.items():
            if found.action == "switched_back":
                self.overseer.bring_back(txn, found.targets, found.patch, None)
                undecided.update(found.targets)
        return undecided

    @contextlib.contextmanager
    def _signals(self) -> Any:
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number, "direct")
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    def _on_signal(self, number: int, way: str) -> None:
        """A signal, sent to us or to the keeper; Ctrl-C, for one, goes to both."""
        name = signal.Signals(number).name
        if number == signal.SIGHUP:
            if not self._stopping.is_set():
                self._tasks.start_soon(self._reconfigure_on_signal)
            return
        if number == signal.SIGUSR1:
            log.warning("SIGUSR1: ignored; SIGUSR2 reopens log files")
            return
        if number == signal.SIGUSR2:
            log.info("SIGUSR2: reopening log files")
            self.reopen_logs(self.targets.values())
            return
        self._asked_to_end[way] += 1
        if not self._stopping.is_set():
            self.shutdown(name)
        elif self._asked_to_end[way] > 1 and not self._impatient:
            self._impatient = True
            log.warning("%s again: killing what is left", name)
            for target in self.targets.values():
                for instance in target.everybody:
                    instance.kill()

    async def _reconfigure_on_signal(self) -> None:
        """Take up the file as it is after the last signal: a change under way may have read it before."""
        if self._hung_up:
            return
        self._hung_up = True
        await self.reconfigurer.idle()
        self._hung_up = False
        try:
            await self.reconfigurer.apply(asked_by="SIGHUP", wait=False)
        except ShuttingDownError as error:
            log.warning("SIGHUP: %s", error.message)
        except AsyncsupError as error:
            log.error("SIGHUP: nothing was changed: %s", error.message)  # noqa: TRY400 - foreseen
        except Exception:
            # Whatever is the matter with it, there is something to supervise.
            log.exception("SIGHUP: the configuration was not taken up")

    def reopen_logs(self, targets: Iterable[Target]) -> list[str]:
        """Open the log files anew, after somebody else has moved them away; returns their paths."""
        files = [
            stream.file
            for target in targets
            for instance in target.instances
            for stream in instance.open_streams.values()
        ]
        for file in files:
            file.reopen()
        return [str(file.path) for file in files]

    def shutdown(self, reason: str) -> int:
        """Begin to end; returns how many instances there are to stop. The caller may watch the events."""
        alive = len(self._pids())
        if not self._stopping.is_set():
            log.info("stopping (%s)", reason)
            self.events.emit("supervisor.stopping", reason=reason)
            self.store.note("supervisor.stopping", reason=reason)
            self._stopping.set()
        return alive

    async def reexec(self, program: str | None) -> Successor:
        """End in favour of another program, soon after this has returned; everything else stays.

        Raises:
            ReexecError: it would not start.
            TargetBusyError: a patch is under way.
        """
        self.refuse_while_stopping()
        self.overseer.jobs.refuse_while_patching()
        successor = await examine(program)
        self.refuse_while_stopping()
        self.overseer.jobs.refuse_while_patching()
        log.info("handing over to asyncsup %s", successor.version)
        self.events.emit("supervisor.replaced", version=successor.version)
        self.successor = successor
        self.journal.put(HANDED_OVER, True)
        asyncio.get_running_loop().call_soon(self._stopping.set)
        return successor

    async def _stop_all(self) -> None:
        """Stop every target, each only after the targets that depend on it."""
        self.overseer.jobs.refuse_new()
        order = StopOrder(self.targets.values())

        async def stop(target: Target) -> None:
            await order.turn_of(target)
            try:
                with order.accounting_for(target):
                    await target.shut_down()
            except AsyncsupError as error:
                log.error("%s", error.message)  # noqa: TRY400 - foreseen, no traceback
                self._exit_status = 1

        async with anyio.create_task_group() as stops:
            for target in reversed(self.targets.values()):
                stops.start_soon(stop, target)
        await self.overseer.jobs.finished()
        await self._inheritance.leftovers_gone()

    def _close_instances(self) -> None:
        for target in self.targets.values():
            target.close()
        self._runtime.log_files.close()

    async def _autostart(self) -> None:
        async def start(target: Target) -> None:
            try:
                await target.start(target.startable, asked_by="autostart", wait=False)
            except AsyncsupError as error:
                log.warning("%s", error.message)

        async with anyio.create_task_group() as starts:
            for target in self.targets.values():
                stays_down = self._stays_down(target)
                known = self._inheritance.knows(target)
                if target.config.autostart == "on-demand":
                    target.held_down = target.held_down or (stays_down and not known)
                    target.await_demand()
                elif target.config.autostart and not stays_down and not known:
                    starts.start_soon(start, target)

    def _stays_down(self, target: Target) -> bool:
        """Whether an operator has stopped it, be it in an earlier life, and that is to count."""
        return target.config.remembers_wishes and not self.store.wanted(target.name)

    def _due(self, name: str) -> None:
        """The schedule of a target says so: start it if it is a oneshot, else restart it."""
        target = self.targets.get(name)
        if target is None or target.config.schedule is None:
            return  # by a configuration that is being taken up; the schedules hear of that last
        running = any(instance.pid is not None for instance in target.instances)
        is_stopped = target.held_down or (target.instances and not target.startable)
        skip = "stopped by command" if is_stopped else "busy" if target.busy else None
        if skip is None and target.config.oneshot and running:
            skip = "its last run has not ended"
        self.events.emit("target.due", target=name, skipped=skip)
        if skip is not None or self._stopping.is_set():
            log.warning("%s: due, but %s", name, skip or "the supervisor is stopping")
            return
        rolling = target.config.rolls and any(instance.ready for instance in target.instances)
        act = target.start if target.config.oneshot else partial(target.restart, rolling=rolling)
        self._tasks.start_soon(
            self._act_on_schedule, partial(act, target.startable, asked_by="schedule", wait=True)
        )

    async def _act_on_schedule(self, act: Callable[[], Awaitable[None]]) -> None:
        try:
            await act()
        except AsyncsupError as error:
            log.warning("schedule: %s", error.message)

    def _scale_as_remembered(self, target: Target) -> None:
        """An operator's number of instances counts until the configuration says another one."""
        scaled = self.store.scaled(target.name)
        if scaled is not None and scaled.configured == target.config.instances:
            target.resize(scaled.instances)

    async def scale(
        self, targets: Sequence[Target], number: int | None, by: int, *, asked_by: str, wait: bool
    ) -> list[Scaled]:
        """Have another number of instances of each target, and leave alone those that stay.

        Args:
            number: how many; None: ``by`` more (or fewer) than there are.

        Raises:
            RequestError: one of the targets cannot have so many; nothing was changed about any.
        """
        self.refuse_while_stopping()
        numbers = [self._number_for(target, number, by) for target in targets]
        errors: dict[str, AsyncsupError] = {}

        async def one(target: Target, wanted: int) -> None:
            try:
                await self._scale(target, wanted, asked_by=asked_by, wait=wait)
            except AsyncsupError as error:
                errors[target.name] = error

        await together(partial(one, *pair) for pair in zip(targets, numbers, strict=True))
        return [Scaled(target=t.name, instances=len(t.instances), error=errors.get(t.name)) for t in targets]

    def _number_for(self, target: Target, number: int | None, by: int) -> int:
        """How many instances are wanted.

        Raises:
            RequestError: it cannot have so many.
        """
        wanted = len(target.instances) + by if number is None else number
        if not 0 <= wanted <= MOST_INSTANCES:
            raise RequestError(f"instances: must be from 0 to {MOST_INSTANCES}, would be {wanted}")
        for path in (target.config.log.stdout, target.config.log.stderr):
            if wanted > 1 and isinstance(path, Path) and is_one_file(path):
                raise RequestError(
                    f"{target.name} writes to {path}, which {wanted} instances would share; "
                    f"put {INSTANCE} into its name"
                )
        return wanted

    async def _scale(self, target: Target, wanted: int, *, asked_by: str, wait: bool) -> None:
        remember = partial(
            self.store.set_scaled, target.name, configured=target.config.instances, instances=wanted
        )
        await target.scale(wanted, asked_by=asked_by, wait=wait, remember=remember)
        self.events.emit("target.scaled", target=target.name, instances=wanted)

    def _remember_wanted(self, name: str, wanted: bool, stopped_alone: Set[int]) -> None:
        """For whoever comes after a crash, and where that is configured for every later `serve`.

        Raises:
            StateError: for the latter there is no room. Then a start has left no trace; of a stop, the former
                knows.
        """
        known = self.store.wanted(name), self.store.stopped_alone(name)
        is_new = self.config.targets[name].remembers_wishes and known != (wanted, stopped_alone)
        if is_new and wanted:
            self.store.set_wanted(name, wanted, stopped_alone)
        self.journal.put(f"target {name}", {"wanted": wanted, "stopped_alone": sorted(stopped_alone)})
        if is_new and not wanted:
            self.store.set_wanted(name, wanted, stopped_alone)

    def end_if_essential_is_down(self, target: Target) -> None:
        """A patch has let go of a target: what its transaction had to see to is ours again."""
        for instance in target.instances:
            if target.config.essential and instance.state in {State.EXITED, State.FAILED}:
                self._essential_ended(instance)

    def _essential_ended(self, instance: Instance) -> None:
        """An `essential` target has ended: the supervisor ends with its exit status."""
        if self.targets[instance.config.name].busy in {"patch", "rollback", "recovery"}:
            return  # the transaction sees it, and brings it up again on the old files
        status = instance.last_exit.exit_status if instance.last_exit is not None else 1
        self._exit_status = status
        self.shutdown(f"essential {instance.name} has ended")

    # --- another configuration --------------------------------------------------------------------------

    def add_targets(self, names: Iterable[str]) -> list[Target]:
        """Targets that the configuration has and we have not yet; not started.

        Raises:
            ShuttingDownError: they would not be among those that are stopped.
        """
        self.refuse_while_stopping()
        added = [self._make_target(name) for name in names]
        for target in added:
            target.held_down = self._stays_down(target)
            self._tasks.start_soon(target.run, name=f"target {target.name}")
        return added

    async def remove_targets(
        self,
        names: Iterable[str],
        *,
        asked_by: str,
        attempt: Callable[[str, Callable[[], Awaitable[None]]], Awaitable[None]],
    ) -> None:
        """Stop targets that are configured no more, dependents first, and forget them; their files stay, and
        so does what operators have said of them, should they be configured again."""
        going = [self.targets[name] for name in names]
        order = StopOrder(going)

        async def remove(target: Target) -> None:
            with order.accounting_for(target):
                await order.turn_of(target)
                await target.stop(target.instances, asked_by=asked_by, remember=False)
                target.retire()
                del self.targets[target.name]

        await together(partial(attempt, target.name, partial(remove, target)) for target in going)

    def connect_targets(self) -> None:
        """Let every target know whom it depends on, and who on it."""
        for target in self.targets.values():
            target.dependencies = [
                Dependency(target=self.targets[name], condition=condition)
                for name, condition in self.config.targets[target.name].depends_on.items()
                if name in self.targets  # else it was removed, and whoever depends on it could not be stopped
            ]
            target.dependents = [
                self.targets[name]
                for name, config in self.config.targets.items()
                if target.name in config.depends_on
            ]

    def take_up_settings(self) -> None:
        """What is asked for when it is needed is in force already; this is the rest."""
        logging.getLogger().setLevel(self.config.supervisor.log_level.upper())
        self._schedules_changed.set()

    async def _keep_schedules(self) -> None:
        while True:
            schedules = {t.name: t.config.schedule for t in self.targets.values() if t.config.schedule}
            self._schedules_changed.clear()
            async with anyio.create_task_group() as tasks:
                if schedules:
                    tasks.start_soon(keep, schedules, self._due)
                await self._schedules_changed.wait()
                tasks.cancel_scope.cancel()

    # --- facts ----------------------------------------------------------------------------------------------

    def root_facts(self, name: str) -> RootFacts:
        config = self.config.targets[name]
        if config.root is None:
            return RootFacts(build=config.build, generation=None, patch=None, current=None)
        state = self.store.state(name)
        return RootFacts(
            build=state.build,
            generation=state.generation,
            patch=state.patch,
            current=self.store.current_link(name),
        )

    def _on_notify(self, sender: Sender, said: Notification, descriptors: list[int]) -> Refusal | None:
        """Have an instance hear what a process of its has said; or what of it does not count."""
        instance = self._runtime.groups.get(sender.group)
        if instance is None:
            return Refusal("stranger", "its sender belongs to no instance")
        if not instance.may_speak(sender.pid, sender.uid):
            return Refusal("user", f"its sender runs as a user that may not speak for {instance.name}")
        return instance.said_notify(said, descriptors)

    def info(self) -> dict[str, Any]:
        settings = self.config.supervisor
        counters = self.counters + self.channel.counters + self.notify.counters
        return {
            "version": asyncsup.__version__,
            "protocol": PROTOCOL_VERSION,
            "pid": os.getpid(),
            "keeper": self.keeper.pid,
            "adopted": self._inheritance.adopted,
            "region": settings.region,
            "config": str(self.config.path),
            "state_dir": str(settings.state_dir),
            "runtime_dir": str(settings.runtime_dir),
            "started": self.started_at,
            "uptime": time.monotonic() - self._started,
            "seq": self.events.seq,
            "trust": self.config.patch.trust,
            "inbox": str(self.config.patch.inbox),
            "sockets": self.sockets.describe(),
            "targets": len(self.targets),
            "groups": {name: sorted(members) for name, members in self.config.groups.items()},
            "stopping": self._stopping.is_set(),
            "tasks": len(asyncio.all_tasks()),
            "isolation": self.cgroups.to_json(),
            "counters": dict(sorted(counters.items())),
        }

    def describe(self, target: Target, *, usage: bool = False) -> dict[str, Any]:
        """Args: usage: say as well what the processes of each instance take, where that is known."""
        facts = self.root_facts(target.name)
        return {
            "name": target.name,
            "state": target.state,
            "ready": target.ready,
            "build": facts.build,
            "region": target.config.region,
            "generation": facts.generation,
            "patch": facts.patch,
            "wanted": "up" if target.wanted else "down",
            "busy": target.busy,
            "current": target.current,
            "waiting": target.waiting,
            "instances": [_describe(instance, usage=usage) for instance in target.instances],
            "others": [_describe(instance, usage=usage) for instance in target.others],
        }

    def select(self, names: Sequence[str], *, default_all: bool = False) -> list[Selection]:
        """Find what names of targets and groups, shell globs and instance names (``web:0``) mean, in the
        configuration's order.

        Raises:
            TargetNotFoundError: a name (or glob) matches nothing.
        """
        if (not names and default_all) or "all" in names:
            return [Selection(target=t, instances=t.instances) for t in self.targets.values()]
        chosen: dict[str, set[int]] = {}
        groups = self.config.groups
        for pattern in names:
            name, colon, index = pattern.partition(":")
            members = {member for group in fnmatch.filter(groups, name) for member in groups[group]}
            matches = [
                t for t in self.targets.values() if t.name in members or fnmatch.fnmatchcase(t.name, name)
            ]
            found = False
            for target in matches:
                wanted = {i.index for i in target.instances if index in {"", "*", str(i.index)}}
                if wanted or (not colon and not target.instances):
                    chosen.setdefault(target.name, set()).update(wanted)
                    found = True
            if not found:
                raise TargetNotFoundError(self._no_such(pattern), name=pattern)
        return [
            Selection(target=t, instances=[i for i in t.instances if i.index in chosen[t.name]])
            for t in self.targets.values()
            if t.name in chosen
        ]

    def _no_such(self, pattern: str) -> str:
        import difflib  # noqa: PLC0415 - only on the way to an error

        names = [*self.targets, *self.config.groups]
        near = difflib.get_close_matches(pattern.partition(":")[0], names, n=1)
        known = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names) or 'none'}"
        return f"no target or instance {pattern!r}; {known}"

    # --- operations -----------------------------------------------------------------------------------------

    async def start(self, selection: Selection, *, asked_by: str, wait: bool) -> None:
        """Start a target, and first the targets it depends on: what of them is down, or was given up.

        Raises:
            StartFailedError: with ``wait``, one ended or gave up before it was ready, or what it depends on
                has been given up.
        """
        self.refuse_while_stopping()
        target = selection.target
        self.refuse_unisolated(target)
        first = [
            partial(other.start, other.startable or other.instances, asked_by=asked_by, wait=False)
            for other, satisfied in _closure(target)
            if not satisfied
            and (
                not other.wanted
                or any(i.state in {State.STOPPED, State.FAILED} for i in other.startable or other.instances)
            )
        ]
        # That one has failed means something only when it has been tried again.
        wait_now = wait and not first
        await together([partial(target.start, selection.instances, asked_by=asked_by, wait=wait_now), *first])
        if wait and first:
            await target.wait_settled(target.in_slots_of(selection.instances))

    async def wait_for(self, selections: Sequence[Selection], what: str, timeout: float | None) -> None:
        """Wait until every instance is ``ready``, ``running`` (has a process) or ``stopped`` (has none).

        Raises:
            TimeoutExpiredError: names the instances that are not there yet.
        """
        reached: Callable[[Instance], bool] = {
            "ready": lambda i: i.ready,
            "running": lambda i: i.pid is not None,
            "stopped": lambda i: i.state in {State.STOPPED, State.EXITED, State.FAILED},
        }[what]
        chosen = [(selection.target, i.index) for selection in selections for i in selection.instances]

        async def wait(target: Target, index: int) -> None:
            """Whoever has the slot: another one may come to have it meanwhile."""
            while index < len(target.instances) and not reached(target.instances[index]):
                await target.instances[index].wait_until(lambda i: reached(i) or i.role != "current")

        with anyio.move_on_after(timeout) as scope:
            for target, index in chosen:
                await wait(target, index)
        if scope.cancelled_caught:
            present = [target.instances[index] for target, index in chosen if index < len(target.instances)]
            missing = [f"{i.name} is {i.situation}" for i in present if not reached(i)]
            raise TimeoutExpiredError(f"not {what} after {timeout:g} s: {', '.join(missing)}")

    def stream(self, instance: Instance, name: str) -> OutputStream:
        streams = instance.streams
        return streams.get(name) or streams["stdout"]

    def instance(self, name: str) -> Instance:
        """Raises TargetNotFoundError."""
        for target in self.targets.values():
            for instance in target.instances:
                if instance.name == name:
                    return instance
        raise TargetNotFoundError(self._no_such(name), name=name)

    def refuse_unisolated(self, target: Target) -> None:
        """Raises CgroupUnavailableError: it asks for limits or a control group, and the host has none."""
        self.cgroups.require(target.config.cgroup, target.config.cgroup_limits)

    def refuse_while_stopping(self) -> None:
        if self._stopping.is_set():
            raise ShuttingDownError("the supervisor is stopping and takes no new work")


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _describe(instance: Instance, *, usage: bool) -> dict[str, Any]:
    described = instance.describe()
    if usage:
        taken = instance.usage()
        described["usage"] = None if taken is None else taken.to_json()
    return described


def _closure(target: Target) -> list[tuple[Target, bool]]:
    """What a target depends on, directly or not, nearest last; and whether all is well with it."""
    found: dict[str, tuple[Target, bool]] = {}

    def visit(each: Target) -> None:
        for dependency in each.dependencies:
            other = dependency.target
            if other.name not in found:
                visit(other)
                found[other.name] = other, dependency.satisfied

    visit(target)
    return list(found.values())


def _guarded(config: Config) -> Guarded:
    """What says who may patch what, and is read by nobody but us.

    Not the files named in ``env_files``: they say as much about a program as its own files do.
    """
    settings, patch = config.supervisor, config.patch
    places = {settings.state_dir: "the state directory", settings.runtime_dir: "the runtime directory"}
    places |= {patch.inbox: "the inbox"} | dict.fromkeys(config.files, "the configuration")
    if patch.allowed_signers is not None:
        places[patch.allowed_signers] = "the list of who may sign patches"
    return Guarded(places=places, patterns=config.include)
