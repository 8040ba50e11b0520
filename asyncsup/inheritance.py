"""What an earlier supervisor has left behind, and how this one goes on with it.

The journal says what there was; `adoption` finds what is left of it. Whatever is found runs on as if nothing
had happened: with its pid, its output, its restart counter and back-off, and with an operator's wish that it
be up or down. Whatever ended meanwhile is treated as an exit at this moment.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import signal
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import anyio.abc

from asyncsup import adoption
from asyncsup.adoption import AdoptedChild
from asyncsup.cgroups import Cgroup
from asyncsup.errors import AsyncsupError
from asyncsup.instance import Instance
from asyncsup.lifecycle import READY, State
from asyncsup.record import InstanceRecord, PatchRecord, ProcessRecord
from asyncsup.restart import Exit
from asyncsup.runtime import Runtime
from asyncsup.target import Target

log = logging.getLogger("asyncsup")

HANDED_OVER: Final = "handed over"
"""The fact that a supervisor has ended because another one is to go on in its place."""
LEFTOVER_GRACE_SECONDS: Final = 10.0
"""How long an instance that is configured no more may take to end."""


class Inheritance:
    """Built from the facts of a journal; empty if the supervisor before has ended in good order.

    Args:
        orphans: ``kill`` for instances that are to be stopped, and started anew where they are wanted. Those
            that were handed over on purpose are kept all the same.

    Attributes:
        adopted: how many processes were taken back.
    """

    def __init__(
        self,
        facts: Mapping[str, Any],
        targets: Mapping[str, Target],
        runtime: Runtime,
        *,
        orphans: Literal["adopt", "kill"],
    ) -> None:
        self.adopted = 0
        self._replace_all = orphans == "kill" and not facts.get(HANDED_OVER)
        self._targets = targets
        self._runtime = runtime
        runtime.journal.drop(HANDED_OVER)
        self._wanted = {
            name: bool(value["wanted"])
            for name in targets
            if isinstance(value := facts.get(f"target {name}"), Mapping) and "wanted" in value
        }
        self._stopped_alone = {
            name: frozenset(map(int, value["stopped_alone"]))
            for name in self._wanted
            if isinstance((value := facts[f"target {name}"]).get("stopped_alone"), list)
        }
        self.patches: dict[int, PatchRecord] = {}
        """What was written down of patches under way, by transaction."""
        self._slots = {slot.name: (target, slot) for target in targets.values() for slot in target.instances}
        self._records: dict[Instance, InstanceRecord] = {}
        self._leftovers: dict[str, ProcessRecord] = {}
        self._ending: dict[str, asyncio.Future[None]] = {}
        """Of the leftovers, those that are being ended; each until its process is gone."""
        for key, value in facts.items():
            kind, _, name = key.partition(" ")
            try:
                if kind == "transaction":
                    self.patches[int(name)] = PatchRecord.from_json(value)
                if kind != "instance":
                    continue
                record, name = InstanceRecord.from_json(value), name.partition("~")[0]
            except (ValueError, TypeError, KeyError) as error:
                log.error("the journal's record of %s cannot be read (%s)", key, error)  # noqa: TRY400
                continue
            if (instance := self._seat(name, record)) is not None:
                self._records[instance] = record
            elif record.process is not None:
                self._leftovers[key.removeprefix("instance ")] = record.process
            else:
                runtime.journal.drop(key)

    def _seat(self, name: str, record: InstanceRecord) -> Instance | None:
        """Where a process of this record belongs; None when there is no such slot any more."""
        if name not in self._slots:
            return None
        target, slot = self._slots[name]
        if record.role == "current":
            slot.seat = record.seat
            return slot
        return target.seat_beside(slot, seat=record.seat) if record.process is not None else None

    @property
    def names(self) -> list[str]:
        """The instances there are or were, as far as anybody knows."""
        instances = [i.seat_name for target in self._targets.values() for i in target.everybody]
        return [*instances, *self._leftovers]

    def knows(self, target: Target) -> bool:
        """Whether the earlier supervisor had this target: then it is not started because it is new."""
        return target.name in self._wanted

    def on_probation(self) -> list[int]:
        """The transactions whose patch everybody has taken up who was to, and still stands by it."""
        return [txn for txn, patch in self.patches.items() if self._stands(patch)]

    def _stands(self, patch: PatchRecord) -> bool:
        if patch.standing is None or any(part.target not in self._targets for part in patch.parts):
            return False
        records = {i.name: record for i, record in self._records.items() if record.role == "current"}
        return all(name in records and self._is_up(records[name], name, pid) for name, pid in patch.standing)

    def _is_up(self, record: InstanceRecord, name: str, pid: int) -> bool:
        process = record.process
        if record.state not in READY or record.failure is not None:
            return False
        if process is None or process.pid != pid or process.ended is not None:
            return False
        finding = adoption.find(process, self._runtime.fifos / f"{name}.stdout")
        if finding.pidfd < 0:
            return False
        poll = select.poll()
        poll.register(finding.pidfd, select.POLLIN)
        running = not poll.poll(0)
        os.close(finding.pidfd)
        return running and finding.verdict is adoption.Verdict.OURS

    def find(self) -> None:
        """Look for every process. Nothing is started, ended or sent."""
        began = time.monotonic()
        for target in self._targets.values():
            if target.name in self._wanted:
                target.wanted = self._wanted[target.name]
                target.held_down = not target.wanted
            if target.name in self._stopped_alone:
                target.stopped_alone = self._stopped_alone[target.name]
        for instance, record in self._records.items():
            instance.restore(record)
            self.adopted += instance.pid is not None
        if self._records:
            took = (time.monotonic() - began) * 1000
            log.info("%d of %d instances taken back in %.0f ms", self.adopted, len(self._records), took)

    def carry_on(self, tasks: anyio.abc.TaskGroup, *, undecided: Collection[str]) -> None:
        """Go on with everything.

        Args:
            undecided: targets with a patch that is still to be decided about, and with it who is to go.
        """
        for instance in self._records:
            instance.carry_on()
        for target in self._targets.values():
            target.start_waiting()
            if self.knows(target):
                tasks.start_soon(self._complete, target)
        for instance in self._records:
            if instance.role != "current" and not (
                instance.role == "standby" and instance.config.name in undecided
            ):
                self._targets[instance.config.name].let_go(
                    instance, "the supervisor before has replaced it, or given it up"
                )
        for name, record in self._leftovers.items():
            self._end_leftover(name, record)

    async def _complete(self, target: Target) -> None:
        """What an operator had asked for, and had come only half the way."""
        instances = target.instances
        running = [instance for instance in instances if instance.pid is not None]
        try:
            if self._replace_all and running:
                await target.replace(running, asked_by='orphans = "kill"')
            if target.wanted:
                alone = [i for i in instances if i.index in target.stopped_alone and i.wanted]
                if alone:
                    await target.stop(alone, asked_by="the supervisor before")
                missing = [instance for instance in target.startable if instance not in self._records]
                missing += await self._stopped_for_a_while(instances)
                if missing:
                    await target.start(missing, asked_by="the supervisor before", wait=False)
            elif any(instance.wanted for instance in instances):
                await target.stop(instances, asked_by="the supervisor before")
        except AsyncsupError as error:
            log.warning("%s", error.message)

    async def _stopped_for_a_while(self, instances: Sequence[Instance]) -> list[Instance]:
        """Those that a patch or a restart was stopping in order to start them again, once they are down."""
        records = self._records
        stopping = [i for i in instances if i in records and records[i].state is State.STOPPING]
        for instance in stopping:
            await instance.wait_until(lambda i: i.state is not State.STOPPING)
        return [i for i in stopping if i.wanted and i.state is State.STOPPED]

    async def leftovers_gone(self) -> None:
        """Wait until nothing is left of what is configured no more, unless it survives SIGKILL."""
        if self._ending:
            await asyncio.wait(list(self._ending.values()), timeout=2 * LEFTOVER_GRACE_SECONDS)

    def _end_leftover(self, name: str, record: ProcessRecord) -> None:
        """An instance that is not configured any more."""
        fifo = self._runtime.fifos / f"{name.partition('~')[0]}.stdout"
        finding = adoption.find(record, fifo)
        if finding.verdict is not adoption.Verdict.OURS:
            if finding.pidfd >= 0:
                os.close(finding.pidfd)
            log.warning("%s is not configured any more, and not ended: %s", name, finding.why)
            self._runtime.journal.drop(f"instance {name}")
            return
        child = AdoptedChild(finding.record, finding.pidfd, self._runtime.keeper)
        child.groups = adoption.groups_of(finding.record, fifo)
        log.warning("%s (pid %d) is not configured any more: ending it", name, child.pid)

        group = None if record.cgroup is None else Cgroup(Path(record.cgroup))

        def ended(how: Exit) -> None:
            child.signal_group(signal.SIGKILL)
            timer.cancel()
            log.info("%s (pid %d): %s", name, child.pid, how)
            self._runtime.journal.drop(f"instance {name}")
            gone.set_result(None)
            if group is not None:
                group.kill()
                group.when_empty(lambda: None if group.remove() else log.warning("%s stays", group.path))

        loop = asyncio.get_running_loop()
        gone = self._ending[name] = loop.create_future()
        timer = loop.call_later(LEFTOVER_GRACE_SECONDS, child.signal_group, signal.SIGKILL)
        child.on_exit(ended)
        child.signal_group(signal.SIGTERM)
