"""`config plan` and `config apply`: from the configuration in force to the one in the file, and nothing else.

Everything is read and checked before anything is touched. Then, in this order: targets that are gone are
stopped, those that changed are restarted or told nothing, new ones are started. A target in which nothing
changed is not looked at.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
from msgspec.structs import replace

from asyncsup.config import Config, load_config
from asyncsup.config.changes import Changes, TargetChange, compare
from asyncsup.config.settings import options
from asyncsup.errors import AsyncsupError, TargetBusyError
from asyncsup.together import together

if TYPE_CHECKING:
    from asyncsup.instance import Instance
    from asyncsup.supervisor import Supervisor
    from asyncsup.target import Target

log = logging.getLogger("asyncsup")


class Reconfigurer:
    """Changes the configuration of one supervisor, one change at a time."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._asked_by: str | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._shield = anyio.CancelScope()

    async def idle(self) -> None:
        """Return when nobody is at it. Whoever begins in the same turn of the event loop finds it so."""
        while not self._idle.is_set():
            await self._idle.wait()

    def let_go(self) -> None:
        """The tasks of the supervisor end, and with them whoever would bring a change to its end."""
        self._shield.shield = False

    async def plan(self) -> dict[str, Any]:
        """What `apply` would do.

        Raises:
            ConfigError: the file is not right.
        """
        after = await self._read()
        changes = compare(self._supervisor.config, after, lost=self._supervisor.sockets.lost())
        return {**_described(changes), "warnings": list(after.warnings)}

    async def apply(self, *, asked_by: str, wait: bool) -> dict[str, Any]:
        """Do it. What one target refuses keeps none of the others from being changed.

        Args:
            wait: for new and restarted targets to be ready.

        Raises:
            ConfigError, StateError: the file is not right, or does not fit what patches have made of a root;
                nothing was touched.
            ShuttingDownError: the supervisor is stopping. Targets that are gone from the file may have been
                stopped for it before; nothing else was touched.
            TargetBusyError: somebody else is at it.
        """
        if self._asked_by is not None:
            raise TargetBusyError(f"the configuration is being changed for {self._asked_by}")
        self._asked_by = asked_by
        self._idle.clear()
        try:
            # A client that gives up ends it no more: the configuration would say what no target has, and who
            # was being restarted would stay down.
            with anyio.CancelScope(shield=True) as self._shield:
                result, begun = await self._apply(asked_by)
        finally:
            self._asked_by = None
            self._idle.set()
        if wait:
            # What it waits for may never come: that must not keep others from another change.
            await self._settled(begun, result["failed"])
        return result

    async def _read(self) -> Config:
        return await anyio.to_thread.run_sync(load_config, self._supervisor.config.path)

    async def _settled(self, begun: Mapping[str, Sequence[Instance]], failed: dict[str, Any]) -> None:
        """Wait until those that were started are ready; adds to `failed` who does not become so."""

        async def settled(name: str, instances: Sequence[Instance]) -> None:
            target = self._supervisor.targets.get(name)
            if target is None or not target.wanted:
                return
            try:
                await target.wait_settled(instances)
            except AsyncsupError as error:
                log.warning("%s: %s", name, error.message)
                failed[name] = _told(error)

        await together(partial(settled, name, instances) for name, instances in begun.items())

    async def _apply(self, asked_by: str) -> tuple[dict[str, Any], Mapping[str, Sequence[Instance]]]:
        """Returns also the instances that were started, by target."""
        supervisor = self._supervisor
        supervisor.refuse_while_stopping()
        before, read = supervisor.config, await self._read()
        lost = supervisor.sockets.lost()
        changes = compare(before, read, lost=lost)
        after = replace(
            read,
            supervisor=_without_postponed(before.supervisor, read.supervisor),
            patch=_without_postponed(before.patch, read.patch),
        )
        await anyio.to_thread.run_sync(supervisor.register_roots, after)
        failures: dict[str, AsyncsupError] = {}
        begun: dict[str, Sequence[Instance]] = {}

        async def attempt(name: str, work: Any) -> None:
            try:
                await work()
            except AsyncsupError as error:
                log.warning("%s: %s", name, error.message)
                failures[name] = error

        await supervisor.remove_targets(changes.removed, asked_by=asked_by, attempt=attempt)
        supervisor.refuse_while_stopping()
        # A target that could not be stopped stays, with what it was configured as.
        kept = {name: before.targets[name] for name in changes.removed if name in supervisor.targets}
        supervisor.config = replace(after, targets={**after.targets, **kept})
        supervisor.guard_no_more_than(supervisor.config)
        for name, error in supervisor.sockets.configure(after.sockets, lost=lost).items():
            failures[f"socket.{name}"] = error
        supervisor.config = replace(supervisor.config, sockets=supervisor.sockets.configs)
        added = supervisor.add_targets(changes.added)
        supervisor.connect_targets()

        async def change_target(name: str, change: TargetChange) -> None:
            begun[name] = await supervisor.targets[name].reconfigure(
                after.targets[name],
                restart=bool(change.at_start),
                resize="instances" in change.keys,
                asked_by=asked_by,
            )

        async def start_target(target: Target) -> None:
            await target.start(target.startable, asked_by=asked_by, wait=False)
            begun[target.name] = target.instances

        await together(
            partial(attempt, name, partial(change_target, name, change))
            for name, change in changes.changed.items()
        )
        if self._keep_settings_of_failed(before, failures):
            # Patches have to go where its programs are.
            register = partial(supervisor.register_roots, supervisor.config)
            await attempt("roots", partial(anyio.to_thread.run_sync, register))
        await together(
            partial(attempt, target.name, partial(start_target, target))
            for target in added
            if target.config.autostart is True and not target.held_down
        )
        for target in supervisor.targets.values():
            target.await_demand()  # a socket that could not be bound before may be by now
        supervisor.take_up_settings()
        supervisor.events.emit("config.applied", asked_by=asked_by, failed=sorted(failures))
        log.info("configuration taken up for %s", asked_by)
        result = {
            **_described(changes),
            "warnings": list(read.warnings),
            "failed": {name: _told(error) for name, error in failures.items()},
        }
        return result, begun

    def _keep_settings_of_failed(self, before: Config, failed: Iterable[str]) -> bool:
        """Those that have refused the new settings have the old ones: `plan` shows the difference again.

        Returns whether there are any.
        """
        supervisor = self._supervisor
        kept = {
            name: target.config
            for name in failed
            if (target := supervisor.targets.get(name)) is not None
            and target.config != supervisor.config.targets[name]
        }
        supervisor.config = replace(supervisor.config, targets={**supervisor.config.targets, **kept})
        return bool(kept)


def _told(error: AsyncsupError) -> dict[str, str]:
    return {"code": error.error_code, "message": error.message}


def _without_postponed(before: Any, after: Any) -> Any:
    """The settings as they are in force: what only another process takes up stays as it is."""
    settings: type = type(after)
    postponed = {name: getattr(before, name) for name, option in options(settings).items() if option.at_start}
    return replace(after, **postponed)


def _described(changes: Changes) -> dict[str, Any]:
    def split(restarted: bool) -> Mapping[str, list[str]]:
        return {
            name: list(change.at_start or change.keys)
            for name, change in changes.changed.items()
            if bool(change.at_start) == restarted
        }

    return {
        "added": list(changes.added),
        "removed": list(changes.removed),
        "restarted": split(True),
        "in_place": split(False),
        "immediate": list(changes.immediate),
        "postponed": list(changes.postponed),
    }
