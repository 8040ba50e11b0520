"""One patch, or one rollback, carried out on one or several targets: all of them, or none.

The straight line is `Transaction.run`. Each step registers its undo before it begins, because a step that is
cancelled or fails halfway needs undoing too; so every undo is harmless when its step never ran. The files of
all targets change in one rename (`Store.switch`), so there is no moment at which one target is patched and
another is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final, Literal

import anyio
import anyio.to_thread
import msgspec
from msgspec.structs import asdict

from asyncsup.channel import PeerError, PeerGoneError
from asyncsup.errors import (
    AsyncsupError,
    CancelledByRequestError,
    PatchError,
    PatchRolledBackError,
    PatchTargetRefusedError,
    PatchUndecidedError,
    RollbackFailedError,
    StartFailedError,
    StopFailedError,
)
from asyncsup.events import EventStream, timestamp
from asyncsup.failpoints import step_failpoint
from asyncsup.instance import Instance
from asyncsup.lifecycle import ALIVE, State
from asyncsup.patch.manifest import Kind
from asyncsup.patch.store import Store
from asyncsup.rollout import Rollout
from asyncsup.target import SETTLED, Target
from asyncsup.together import each, together
from target_sdk.protocol import Prepare, ProtocolError, Verdict

log = logging.getLogger("asyncsup.patch")

DEFAULT_RETRY_SECONDS: Final = 1.0
"""When a target says `wait` without saying how long."""

Progress = Callable[[int], None]
Standing = Sequence[tuple[Instance, int | None]]
"""Instances that have taken a change up, and with which process."""


class InstanceRecord(msgspec.Struct, kw_only=True):
    """What happened to one instance; durations in seconds."""

    name: str
    told_by: str
    pid_before: int | None
    pid_after: int | None = None
    prepare: str | None = None
    prepare_took: float | None = None
    reload: str | None = None
    reload_took: float | None = None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Participant(msgspec.Struct, kw_only=True):
    """One target's part in a transaction.

    Attributes:
        stage: builds the next generation; runs in a worker thread.
        changed: paths relative to the target's root, as told to the instances.
    """

    target: Target
    build_before: int
    build_after: int
    changed: Sequence[str]
    stage: Callable[[int, Progress], object]
    instances: list[Instance] = msgspec.field(default_factory=list)
    """Those that have, or are to have, a process: a target that is stopped gets the files only."""
    records: dict[str, InstanceRecord] = msgspec.field(default_factory=dict)

    @property
    def present(self) -> list[Instance]:
        """Whoever counts by now in the slots of those instances."""
        return self.target.in_slots_of(self.instances)

    def enlist(self) -> None:
        """Take down who is concerned, as things stand when the transaction has the target to itself."""
        up = {State.STARTING, State.RUNNING, State.RELOADING}
        if self.target.wanted:
            up |= {State.BACKOFF, State.WAITING, State.FAILED}
        self.instances = [instance for instance in self.target.instances if instance.state in up]
        self.records = {
            i.name: InstanceRecord(name=i.name, told_by=i.told_by, pid_before=i.pid)
            for i in self.target.instances
        }


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be done.

    Attributes:
        probation: in seconds.
        manual_commit: it then waits for an operator.
        manual_rollback: a failure after the switch undoes nothing.
        confirm: asked in a worker thread, when everybody has agreed and before anything is changed, whether
            what allowed it still does; raises an `AsyncsupError` if not.
    """

    action: Literal["apply", "rollback"]
    kind: Kind
    patch: str
    probation: float
    manual_commit: bool
    manual_rollback: bool
    total_bytes: int
    participants: Sequence[Participant]
    confirm: Callable[[], object] = lambda: None


class Undo:
    """The way back, step by step, last first."""

    def __init__(self) -> None:
        self._steps: list[tuple[str, Callable[[], Awaitable[None]]]] = []
        self.touched = False
        """Whether a process or a file that a target sees has been changed."""

    def push(self, name: str, step: Callable[[], Awaitable[None]]) -> None:
        self._steps.append((name, step))

    async def unwind(self) -> list[str]:
        """Take every step, whatever becomes of the others; returns what failed. Each step has deadlines of
        its own, so no clock may cut the way back short."""
        failures = []
        while self._steps:
            name, step = self._steps.pop()
            try:
                await step_failpoint(f"undo.{name}")
                await step()
            except (AsyncsupError, OSError) as error:
                foreseen = io_failed(error) if isinstance(error, OSError) else error
                log.error("undo of %s failed: %s", name, foreseen.message)  # noqa: TRY400 - foreseen
                failures.append(f"{name}: {foreseen.message}")
            except Exception as error:
                log.exception("undo of %s failed", name)
                failures.append(f"{name}: {error}")
        return failures


class Transaction:
    """Carries out a `Change` on targets the caller holds.

    Args:
        txn: the transaction's number in the store, begun there already.
        asked_by: for whoever follows the events.
    """

    def __init__(self, txn: int, change: Change, store: Store, events: EventStream, *, asked_by: str) -> None:
        self.txn = txn
        self.change = change
        self.steps: list[dict[str, Any]] = []
        self.cancel_reason = "cancelled"
        self.commit_requested = asyncio.Event()
        self.waits_for_commit = False
        self.on_uncommitted: Callable[[], None] = lambda: None
        self.before_undo: Callable[[AsyncsupError], None] = lambda _: None
        """Told in a worker thread, before what was changed is undone, why."""
        self.on_standing: Callable[[Standing | None], None] = lambda _: None
        """Told who must not fall from now on; None right before the switch, and when everything is undone."""
        self.rest = anyio.CancelScope(shield=True)
        """What is done for a change that is kept already: to cancel this gives up that, and nothing else."""
        self._store = store
        self._events = events
        self._asked_by = asked_by
        self._began = time.monotonic()
        self._staged_bytes = 0
        self._prepared: list[Instance] = []
        self._asking: set[str] = set()
        """Those of them that owe an answer."""
        self._told: set[str] = set()
        self._standing: list[tuple[Instance, int | None]] = []
        """Who took the change up, and with which process: they must stay until the commit."""
        self._up: dict[Instance, tuple[State, int]] = {}
        """Who was up at the switch of a warm patch: starting or ready, and after how many restarts."""
        self._undone_because: str | None = None
        """For whoever finds it undone and not reported, should there be no time for that."""
        self._rollouts = {
            p.target.name: Rollout(p.target, f"patch {change.patch[:12]}") for p in change.participants
        }
        self._taken_back: dict[str, int] = {}
        """The generation of each target whose instances replaced others, and were to go again."""
        self._switched = False
        self._in_force = False
        """It has switched, and no `Undo` has been taken."""

    async def run(self) -> None:
        """Carry the change out, or leave everything as it was, processes included.

        Raises:
            PatchRefusedError, PatchMalformedError, PatchTargetRefusedError: nothing was changed.
            PatchRolledBackError: it was applied and undone; ``__cause__`` says why.
            PatchUndecidedError: it failed after the switch, and nothing was undone.
            RollbackFailedError: undoing failed as well; the message says where.
        """
        async with self._rollback_on_error() as undo:
            undo.push("staging", self._discard)
            await self._stage()
            await self._run_hooks("pre_patch", "patch.hook_refused")
            undo.push("preparing", self._abort_prepared)
            await self._prepare()
            await anyio.to_thread.run_sync(self.change.confirm)
            if self.change.kind is Kind.COLD:
                undo.push("stopping", self._start_again)
                undo.touched = any(p.instances for p in self._stopped_first)
                await self._stop()
            if self.change.kind is Kind.WARM:
                undo.push("reloading", self._reload_back)
            undo.push("switching", self._switch_back)
            undo.touched = True
            await self._switch()
            self._in_force = True
            if self.change.kind is Kind.COLD:
                undo.push("starting", self._stop_new)
                await self._start()
            else:
                await self._reload()
            await self._run_hooks("post_patch", "patch.hook_failed")
            await self._prove_itself()
        # Leaving the block without an error is the commit.
        self._finish()

    async def keep(self) -> None:
        """Somebody has decided that an undecided change stays. It is too late to cancel anything."""
        try:
            with anyio.CancelScope(shield=True):
                await self._commit()
        except OSError as error:
            raise io_failed(error) from error
        if self.change.kind is Kind.COLD:
            # What failed may have kept others from their turn. Whoever cannot be replaced runs on as it is.
            with self.rest:
                jobs = [partial(self._replace_the_rest, p) for p in self.change.participants]
                self.note_failures("start", await each(jobs))
            if self.rest.cancelled_caught:
                self._note("start", None, None, f"given up: {self.cancel_reason}")
        self._finish()

    async def _replace_the_rest(self, participant: Participant) -> None:
        """Replace the processes of a target that have not taken the change up."""
        target = participant.target
        generation = self._store.state(target.name).generation
        stale = [i for i in target.instances if i.pid is not None and i.generation not in {None, generation}]
        # Whoever has fallen is tried again: as others may not be spared without it.
        fallen = [i for i in target.instances if i.wanted and i.state in {State.FAILED, State.BACKOFF}]
        try:
            await self._rollouts[target.name].run([*fallen, *stale])
        except BaseException:
            await target.up_again([*fallen, *stale], f"patch {self.change.patch[:12]}")
            raise

    async def take_back(self, reason: str) -> None:
        """Somebody has decided that an undecided change is taken back: in the order in which `run` would.

        Raises:
            RollbackFailedError: the message says where.
        """
        self._switched = True
        undo = Undo()
        undo.push("staging", self._discard)
        if self.change.kind is Kind.COLD:
            undo.push("stopping", self._start_again)
        else:
            undo.push("reloading", self._reload_back)
        undo.push("switching", self._switch_back)
        if self.change.kind is Kind.COLD:
            undo.push("starting", self._stop_new)
        with anyio.CancelScope(shield=True):
            self._note("undo", None, None, reason)
            failures = await undo.unwind()
        self._take_down_pids()
        if failures:
            raise RollbackFailedError(f"going back failed: {'; '.join(failures)}")

    async def go_on(self, standing: Standing) -> None:
        """Go on with a change that an earlier supervisor had brought as far as its probation.

        Args:
            standing: who has taken it up, and with which process.
        Raises:
            PatchRolledBackError, RollbackFailedError: as `run` does.
        """
        self._standing, self._switched, self._in_force = list(standing), True, True
        if self.change.kind is Kind.WARM:
            self._up = {i: (i.state, i.restarts) for i in self._concerned if i.state in ALIVE}
        async with self._rollback_on_error() as undo:
            undo.push("staging", self._discard)
            cold = self.change.kind is Kind.COLD
            undo.push("stopping" if cold else "reloading", self._start_again if cold else self._reload_back)
            undo.push("switching", self._switch_back)
            undo.touched = True
            if cold:
                undo.push("starting", self._stop_new)
            await self._prove_itself()
        self._finish()

    async def _prove_itself(self) -> None:
        self.on_standing(self._standing)
        await self._probation()
        if self.change.manual_commit:
            await self._await_commit()
        await self._commit()

    # --- the way there --------------------------------------------------------------------------------------

    async def _stage(self) -> None:
        loop = asyncio.get_running_loop()

        told = 0

        def progress(size: int) -> None:
            nonlocal told
            self._staged_bytes += size
            done = self._staged_bytes
            # A hundred events of a patch are enough, however many files it has.
            if done - told >= self.change.total_bytes / 100 or done == self.change.total_bytes:
                told = done
                loop.call_soon_threadsafe(self._publish_progress, done)

        for participant in self.change.participants:
            async with self._step("stage", participant.target.name) as step:
                await anyio.to_thread.run_sync(participant.stage, self.txn, progress)
                step["detail"] = f"{files_said(participant.changed)} for build {participant.build_after}"

    async def _run_hooks(self, name: Literal["pre_patch", "post_patch"], code: str) -> None:
        async def run(participant: Participant) -> None:
            target = participant.target
            command: tuple[str, ...] | None = getattr(target.config.hooks, name)
            if command is None:
                return
            environment = {
                "ASYNCSUP_PATCH": self.change.patch,
                "ASYNCSUP_PATCH_ACTION": self.change.action,
                "ASYNCSUP_PATCH_KIND": self.change.kind.value,
                "ASYNCSUP_BUILD_BEFORE": str(participant.build_before),
                "ASYNCSUP_BUILD_AFTER": str(participant.build_after),
            }
            async with self._step(name, target.name):
                failure = await target.run_hook(name, command, environment)
                if failure is None:
                    return
                refused = PatchTargetRefusedError if name == "pre_patch" else PatchError
                raise refused(f"the {name} hook of {target.name} failed: {failure}", code=code)

        await together(partial(run, participant) for participant in self.change.participants)

    async def _prepare(self) -> None:
        """Ask every instance that can answer; all at once."""
        await together(
            partial(self._ask, participant, instance)
            for participant in self.change.participants
            for instance in participant.instances
            if instance.told_by == "sdk"
        )

    async def _ask(self, participant: Participant, instance: Instance) -> None:
        config = participant.target.config
        record = participant.records[instance.name]
        began = time.monotonic()
        if instance.state is State.STARTING:
            # It has not finished starting on what is to be replaced; its answer would mean nothing.
            with anyio.move_on_after(config.patch.ack_timeout):
                await instance.wait_until(lambda i: i.state is not State.STARTING)
        if not instance.ready:
            record.prepare = f"not asked, {instance.state.value}"
            return
        request = Prepare(
            patch=self.change.patch,
            kind=self.change.kind.value,
            build=participant.build_after,
            region=config.region,
            changed=participant.changed,
            deadline=config.patch.ack_timeout,
        )
        async with self._step("prepare", config.name, instance.name) as step:
            self._prepared.append(instance)
            while True:
                self._asking.add(instance.name)
                try:
                    answer = await instance.prepare(request)
                except TimeoutError:
                    raise PatchTargetRefusedError(
                        f"{instance.name} did not answer `prepare` within {request.deadline:g} s",
                        code="patch.no_answer",
                        instance=instance.name,
                    ) from None
                except PeerGoneError as error:
                    raise PatchTargetRefusedError(
                        f"{error}", code="patch.target_died", instance=instance.name
                    ) from None
                except (PeerError, ProtocolError) as error:
                    raise PatchTargetRefusedError(
                        f"{instance.name} answered `prepare` with an error: {error}",
                        code="patch.bad_answer",
                        instance=instance.name,
                    ) from None
                self._asking.discard(instance.name)
                record.prepare, record.reason = answer.verdict.value, answer.reason
                record.prepare_took = time.monotonic() - began
                because = f": {answer.reason}" if answer.reason else ""
                if answer.verdict is Verdict.GO_AHEAD:
                    step["detail"] = "go ahead"
                    return
                if answer.verdict is Verdict.NOT_ALLOWED:
                    raise PatchTargetRefusedError(
                        f"{instance.name} does not allow the patch{because}",
                        code="patch.not_allowed",
                        instance=instance.name,
                    )
                pause = DEFAULT_RETRY_SECONDS if answer.retry_after is None else max(answer.retry_after, 0.01)
                if record.prepare_took + pause > config.patch.wait_max:
                    raise PatchTargetRefusedError(
                        f"{instance.name} still asks to wait after {record.prepare_took:.1f} s "
                        f"(wait_max is {config.patch.wait_max:g} s){because}",
                        code="patch.still_waiting",
                        instance=instance.name,
                    )
                self._note("wait", config.name, instance.name, f"asks to wait {pause:g} s{because}")
                await anyio.sleep(pause)

    async def _stop(self) -> None:
        async def stop(participant: Participant) -> None:
            async with self._step("stop", participant.target.name):
                await participant.target.stop_instances(
                    participant.instances, f"patch {self.change.patch[:12]}"
                )
            carried = await anyio.to_thread.run_sync(self._store.carry, self.txn, participant.target.name)
            if carried:
                self._note("carry", participant.target.name, None, f"{files_said(carried)} the program wrote")

        await together(partial(stop, participant) for participant in self._stopped_first)

    async def _switch(self) -> None:
        async with self._step("switch") as step:
            self._switched = True
            if self.change.kind is Kind.WARM:
                self._up = {i: (i.state, i.restarts) for i in self._concerned if i.state in ALIVE}
            self.on_standing(None)
            await anyio.to_thread.run_sync(self._store.switch, self.txn)
            names = ", ".join(participant.target.name for participant in self.change.participants)
            step["detail"] = f"one rename for {names}"

    async def _reload(self) -> None:
        await together(partial(self._tell, participant) for participant in self.change.participants)

    async def _tell(self, participant: Participant) -> None:
        target = participant.target
        await step_failpoint("transaction.reload")
        for instance in participant.instances:
            await self._arrive(instance)
        chosen = [instance for instance in participant.instances if instance.ready]
        self._told.update(instance.name for instance in chosen)
        self._standing += [(instance, instance.pid) for instance in chosen]
        outcomes = await target.reload_instances(
            chosen, patch=self.change.patch, build=participant.build_after, changed=participant.changed,
            rollback=self.change.action == "rollback",
        )  # fmt: skip
        failure: PatchError | None = None
        for name, outcome in outcomes:
            record = participant.records[name]
            record.told_by, record.reload_took = outcome.told_by, outcome.took
            record.reload = "ok" if outcome.ok else "failed"
            if outcome.told_by == "nobody":
                record.reload = None
            if not outcome.ok:
                record.reason = outcome.reason
                failure = failure or PatchError(
                    f"{name} failed to take up build {participant.build_after}: {outcome.reason}",
                    code="patch.reload_failed",
                    instance=name,
                )
            detail = {"nobody": "not told: it has no way to be"}.get(outcome.told_by, f"by {outcome.told_by}")
            self._note("reload", target.name, name, outcome.reason or detail, took=outcome.took)
        if failure is not None:
            raise failure

    async def _arrive(self, instance: Instance) -> None:
        """Wait until an instance can be told of a warm patch, or starts by itself some other time.

        Raises:
            PatchError: it was up at the switch, and cannot work with the new files.
        """
        # It cannot be told before it has finished starting, and ends by itself if it never does.
        await instance.wait_until(lambda i: i.state is not State.STARTING)
        if instance not in self._up or _is_done(instance):
            return
        state, before = self._up[instance]
        if state is State.STARTING:
            # It may have read the old files, or some of both; its next start reads the new ones only.
            await instance.wait_until(
                lambda i: i.state in SETTLED and (i.state is not State.BACKOFF or i.restarts > before)
            )
        elif instance.restarts > before:
            raise _fallen(instance)
        if not instance.ready:
            raise _fallen(instance)

    async def _start(self) -> None:
        async def start(participant: Participant) -> None:
            began = time.monotonic()
            async with self._step("start", participant.target.name):
                if participant.target.config.rolls:
                    standing = await self._roll_out(participant)
                else:
                    standing = await self._bring_up(participant)
                # Whoever came up first may have ended while others were still starting.
                for instance, pid in standing:
                    self._check_standing(instance, pid)
            for instance in participant.present:
                record = participant.records[instance.name]
                record.told_by, record.reload, record.pid_after = "restart", "ok", instance.pid
                record.reload_took = time.monotonic() - began
            self._standing += standing

        await together(partial(start, participant) for participant in self.change.participants)

    async def _roll_out(self, participant: Participant) -> list[tuple[Instance, int | None]]:
        """Replace running instances; the first ones may have to stand the test before the others follow."""
        target, rollout = participant.target, self._rollouts[participant.target.name]
        left, canary = rollout.in_order(participant.instances), target.config.patch.canary
        try:
            if 0 < canary < len(left):
                await rollout.run(left[:canary])
                async with self._step("canary", target.name) as step:
                    first = list(rollout.came_up)
                    step["detail"] = f"{', '.join(i.name for i, _ in first)} for {self.change.probation:g} s"
                    with anyio.move_on_after(self.change.probation):
                        await together(partial(self._fall, instance, pid) for instance, pid in first)
                left = left[canary:]
            await rollout.run(left)
        except StartFailedError as error:
            raise PatchError(error.message, code="patch.start_failed", **error.details) from None
        return rollout.came_up

    async def _probation(self) -> None:
        """Nobody may end, stop being ready or say that it has failed, for a while after the change."""
        async with self._step("probation") as step:
            step["detail"] = f"{self.change.probation:g} s"
            with anyio.move_on_after(self.change.probation):
                await together(partial(self._fall, instance, pid) for instance, pid in self._standing)
            for instance, pid in self._standing:
                self._check_standing(instance, pid)

    async def _await_commit(self) -> None:
        """Stay on probation until an operator says that it is good."""
        async with self._step("await commit"):
            self.waits_for_commit = True
            self.on_uncommitted()
            try:
                with anyio.CancelScope() as waiting:

                    async def committed() -> None:
                        await self.commit_requested.wait()
                        waiting.cancel()

                    await together([committed, *(partial(self._fall, i, pid) for i, pid in self._standing)])
            finally:
                self.waits_for_commit = False

    async def _fall(self, instance: Instance, pid: int | None) -> None:
        await instance.wait_until(lambda i: not i.ready or i.pid != pid or i.failure is not None)
        self._check_standing(instance, pid)

    def _check_standing(self, instance: Instance, pid: int | None) -> None:
        if not instance.ready or instance.pid != pid:
            raise _fallen(instance)
        if instance.failure is not None:
            raise PatchError(
                f"{instance.name} said within probation that it has failed: {instance.failure}",
                code="patch.probation_failed",
                instance=instance.name,
            )

    async def _commit(self) -> None:
        async with self._step("commit"):
            await anyio.to_thread.run_sync(self._store.commit, self.txn)

    # --- the way back ---------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _rollback_on_error(self) -> AsyncIterator[Undo]:
        undo = Undo()
        try:
            yield undo
        except BaseException as error:
            cause = self._cause(error)
            if self._switched:
                self.on_standing(None)
            cancelled = isinstance(error, asyncio.CancelledError)
            if self._in_force and self.change.manual_rollback and not cancelled:
                self._note("undecided", None, None, cause.message)
                raise PatchUndecidedError(
                    f"{cause.message}; nothing was undone: `asyncsup patch abort {self.txn}` takes it back, "
                    f"`asyncsup patch commit {self.txn}` keeps it",
                    cause=cause.error_code,
                ) from cause
            with anyio.CancelScope(shield=True):
                self._note("undo", None, None, cause.message)
                self._undone_because = cause.message
                if undo.touched:
                    await anyio.to_thread.run_sync(self.before_undo, cause)
                failures = await undo.unwind()
            if failures:
                raise RollbackFailedError(
                    f"{cause.message}; and going back failed: {'; '.join(failures)}", cause=cause.error_code
                ) from cause
            if undo.touched:
                raise PatchRolledBackError(
                    f"everything is as before, because: {cause.message}", cause=cause.error_code
                ) from cause
            raise cause from None
        finally:
            self._take_down_pids()

    def _take_down_pids(self) -> None:
        for participant in self.change.participants:
            for instance in participant.target.instances:
                participant.records[instance.name].pid_after = instance.pid

    def _cause(self, error: BaseException) -> AsyncsupError:
        if isinstance(error, AsyncsupError):
            return error
        if isinstance(error, asyncio.CancelledError):
            return CancelledByRequestError(f"the patch was cancelled: {self.cancel_reason}")
        if isinstance(error, OSError):
            return io_failed(error)
        log.error("patch step failed unexpectedly", exc_info=error)
        return PatchError(f"{type(error).__name__}: {error}", code="internal")

    async def _discard(self) -> None:
        await anyio.to_thread.run_sync(self._store.abort, self.txn, self._undone_because)

    async def _abort_prepared(self) -> None:
        limit = max((p.target.config.patch.ack_timeout for p in self.change.participants), default=0.0)
        concerned = [i for i in self._prepared if i.ready and i.name not in self._told]
        for instance in concerned:
            if instance.name in self._asking:
                # It is still thinking about `prepare`, and listens to nothing before it has answered that.
                instance.abort_later(self.change.patch, deadline=limit)
        await _all(
            partial(instance.abort, self.change.patch, deadline=limit)
            for instance in concerned
            if instance.name not in self._asking
        )

    async def _start_again(self) -> None:
        async def start(participant: Participant) -> None:
            target = participant.target
            left = await target.still_there(participant.present)
            # Those that run on the new files, because nobody stands by in their slots who does not.
            stale = self._taken_back.get(target.name, -1)
            running = [i for i in participant.present if i.pid is not None and i not in left]
            on_new_files = [i for i in running if i.generation == stale] if target.config.rolls else []
            try:
                if on_new_files:
                    # Who is down first: before others are stopped, so many have to be ready as may be.
                    down = [i for i in participant.present if i not in left and i not in running]
                    await target.spawn_instances(down, "going back", whatever_it_depends_on=True)
                    await target.settle(down)
                    await Rollout(target, "going back", at_any_price=True).complete(on_new_files)
            finally:
                # One that does not come up on the old files either is no reason to leave others down.
                left += await target.still_there([i for i in participant.present if i not in left])
                await self._bring_up(participant, without=left)
            if left:
                names = [instance.name for instance in left]
                raise StopFailedError(
                    f"{', '.join(names)}: a process is still there, so it is not started again; when it has "
                    f"gone, `asyncsup start {' '.join(names)}` does"
                )

        await _all(partial(start, participant) for participant in self.change.participants)

    async def _switch_back(self) -> None:
        await anyio.to_thread.run_sync(self._store.switch_back, self.txn)

    async def _reload_back(self) -> None:
        """Tell all of them: those that were told of the change, and those that crashed after the switch and
        were started again on the new files. Whoever is to be tried again starts on the old ones by itself;
        whoever was given up on the new ones is started.
        """
        if not self._switched:
            return

        async def tell(participant: Participant) -> None:
            for instance in participant.instances:
                await instance.wait_until(lambda i: i.state is not State.STARTING)
            given_up = [i for i in participant.instances if i in self._up and _is_down(i)]
            await participant.target.spawn_instances(given_up, "going back", whatever_it_depends_on=True)
            chosen = [instance for instance in participant.instances if instance.ready]
            outcomes = await participant.target.reload_instances(
                chosen, patch=self.change.patch, build=participant.build_before, changed=participant.changed,
                rollback=True,
            )  # fmt: skip
            failed = []
            for instance, (name, outcome) in zip(chosen, outcomes, strict=True):
                self._note(
                    "reload back", participant.target.name, name, outcome.reason or "ok", took=outcome.took
                )
                if not outcome.ok and instance.ready:
                    failed.append(
                        f"{name} has the old files again but did not take them up ({outcome.reason}); "
                        f"`asyncsup restart {name}` would"
                    )
            if failed:
                raise PatchError("; ".join(failed))

        await _all(partial(tell, participant) for participant in self.change.participants)

    async def _stop_new(self) -> None:
        async def stop(participant: Participant) -> None:
            if not participant.target.config.rolls:
                await participant.target.stop_instances(participant.present, "going back")
                return
            # Who was replaced without a gap goes back without one, too. Whoever else runs on the new files is
            # replaced once more, when the old ones are back.
            self._taken_back[participant.target.name] = self._store.state(participant.target.name).generation
            rollout = self._rollouts[participant.target.name]
            back = rollout.back()
            fallen = [i for i in participant.present if not i.ready and i not in back]
            await participant.target.stop_instances(fallen, "going back")

        await _all(partial(stop, participant) for participant in self.change.participants)

    def _finish(self) -> None:
        """The change is here to stay: those that were replaced may go."""
        for rollout in self._rollouts.values():
            rollout.finish()

    # --- helpers --------------------------------------------------------------------------------------------

    @property
    def _stopped_first(self) -> list[Participant]:
        """Those of a cold patch whose instances are all stopped before the switch, and started after it."""
        return [p for p in self.change.participants if not p.target.config.rolls]

    @property
    def _concerned(self) -> list[Instance]:
        return [instance for p in self.change.participants for instance in p.instances]

    async def _bring_up(
        self, participant: Participant, *, without: Sequence[Instance] = ()
    ) -> list[tuple[Instance, int | None]]:
        """Start instances, and wait until each is ready; returns them with the processes that were. One of a
        oneshot may have ended with success instead.
        """
        present = [instance for instance in participant.present if instance not in without]
        await participant.target.spawn_instances(
            present, f"patch {self.change.patch[:12]}", whatever_it_depends_on=True
        )
        standing: list[tuple[Instance, int | None]] = []

        async def come_up(instance: Instance) -> None:
            await participant.target.wait_settled([instance])
            if instance.ready:
                standing.append((instance, instance.pid))
            elif not _is_done(instance):
                raise StartFailedError(
                    f"{instance.name} ended before it was ready: {instance.detail}", instance=instance.name
                )

        try:
            await together(partial(come_up, instance) for instance in present)
        except StartFailedError as error:
            raise PatchError(error.message, code="patch.start_failed", **error.details) from None
        return standing

    @contextlib.asynccontextmanager
    async def _step(
        self, name: str, target: str | None = None, instance: str | None = None
    ) -> AsyncIterator[dict[str, str]]:
        """Time a step and note it when it has ended, well or not; yields a dict for its detail."""
        began = time.monotonic()
        record = {"detail": ""}
        await step_failpoint(f"transaction.{name.replace(' ', '_')}")
        try:
            yield record
        except AsyncsupError as error:
            self._note(name, target, instance, error.message, took=time.monotonic() - began)
            raise
        self._note(name, target, instance, record["detail"], took=time.monotonic() - began)

    def _note(
        self, step: str, target: str | None, instance: str | None, detail: str, *, took: float | None = None
    ) -> None:
        at = timestamp()
        record = {
            "seq": len(self.steps) + 1, "at": at, "step": step, "target": target, "instance": instance,
            "detail": detail, "took": took,
        }  # fmt: skip
        self.steps.append(record)
        self._store.record(self.txn, step, target=target, instance=instance, detail=detail, took=took, at=at)
        self.publish("patch.step", **{k: v for k, v in record.items() if k not in {"seq", "at"}})

    def note_failures(self, step: str, failures: Iterable[Exception]) -> None:
        """What went wrong in a step that changes nothing about the outcome."""
        for failure in failures:
            self._note(step, None, None, f"failed: {failure}")

    def _publish_progress(self, done: int) -> None:
        self.publish("patch.progress", done=done, total=self.change.total_bytes)

    def publish(self, kind: str, **fields: Any) -> None:
        """An event of this transaction, as all of them begin."""
        self._events.emit(
            kind, txn=self.txn, patch=self.change.patch or None, asked_by=self._asked_by, **fields
        )


def _is_done(instance: Instance) -> bool:
    """Whether it has ended as a oneshot is to end."""
    return instance.config.oneshot and instance.state is State.EXITED


def _is_down(instance: Instance) -> bool:
    """Whether it has ended, and nobody will start it again."""
    return instance.state in {State.FAILED, State.EXITED} and not _is_done(instance)


def _fallen(instance: Instance) -> PatchError:
    why = instance.last_exit.reason if instance.last_exit is not None else instance.detail
    return PatchError(
        f"{instance.name} did not survive probation: {why}",
        code="patch.probation_failed",
        instance=instance.name,
    )


def io_failed(error: OSError) -> PatchError:
    """What the system says, as an error with a code."""
    where = f" ({error.filename})" if error.filename else ""
    return PatchError(f"{error.strerror or error}{where}", code="patch.io_failed")


async def _all(jobs: Iterable[Callable[[], Awaitable[object]]]) -> None:
    """For the way back: every job to its end; one that cannot be helped is no reason to let others down.

    Raises:
        PatchError: with what all of those that failed say.
    """
    failures = await each(jobs)
    for failure in failures:
        if not isinstance(failure, AsyncsupError | OSError):
            log.error("a way back failed unexpectedly", exc_info=failure)
    if failures:
        raise PatchError("; ".join(getattr(failure, "message", None) or str(failure) for failure in failures))


def files_said(paths: Sequence[str]) -> str:
    """How many there are, in words."""
    return f"{len(paths)} file{'' if len(paths) == 1 else 's'}"
