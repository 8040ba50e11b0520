"""After a crash in the middle of a patch: recovery has taken the files back, and now the processes.

A process of an earlier supervisor has run on meanwhile. It may have been told of a patch that is no more, or
may have been started on its files.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from asyncsup.errors import AsyncsupError, CancelledByRequestError, ShuttingDownError
from asyncsup.instance import Instance
from asyncsup.lifecycle import State
from asyncsup.rollout import Rollout
from asyncsup.target import Target, hold_all

if TYPE_CHECKING:
    from asyncsup.patch.store import Store

log = logging.getLogger("asyncsup.patch")

ASKED_BY = "recovery"

Changed = Mapping[str, Sequence[str]]


async def bring_back(
    target: Target,
    *,
    store: Store,
    txn: int | None,
    patch: str | None,
    cold: bool,
    changed: Sequence[str],
) -> None:
    """Have a target's processes take up the files that are there again, before anything else is done to it.

    Args:
        cold: they were started on the files that were taken back, so they are started anew; otherwise they
            are told.
    """
    told: set[Instance] = set()
    while True:
        with anyio.CancelScope() as scope:
            try:
                async with hold_all([target], "recovery", ASKED_BY, on_preempt=lambda _: scope.cancel()):
                    if cold:
                        failure = await _start_anew(target, store)
                    else:
                        failure = await _tell(target, store, patch, changed, told)
            except ShuttingDownError:
                return  # it is stopped with all others, and started on these files
            except CancelledByRequestError:  # while it was queued
                if target.is_to_be_up:
                    continue
                return
            except AsyncsupError as error:
                failure = error.message
            if failure is not None:
                log.error(
                    "%s has the files from before the patch again, but not everybody has taken them up (%s); "
                    "`asyncsup restart %s` would",
                    target.name,
                    failure,
                    target.name,
                )
            if txn is not None:
                detail = failure or ("started anew" if cold else "told")
                record = partial(store.record, txn, "bring back", target=target.name, detail=detail)
                await anyio.to_thread.run_sync(record)
        # One of its instances was to be stopped: it is done with those that run on.
        if not (scope.cancelled_caught and target.is_to_be_up):
            return


async def bring_all_back(
    targets: Iterable[Target], *, store: Store, txn: int, patch: str | None, cold: bool, changed: Changed
) -> None:
    """Have all targets of a patch that was taken back do so, each by itself.

    Args:
        changed: the paths that it had changed, by target.
    """
    async with anyio.create_task_group() as tasks:
        for target in targets:
            work = partial(
                bring_back,
                target,
                store=store,
                txn=txn,
                patch=patch,
                cold=cold,
                changed=changed[target.name],
            )
            tasks.start_soon(work)


async def _start_anew(target: Target, store: Store) -> str | None:
    reason = "its files were taken back"
    # Those that were replaced without a gap are still there, on the old files; and so are those whose turn
    # had not come yet.
    rollout = Rollout(target, reason, at_any_price=True)
    back = rollout.back()
    generation = store.state(target.name).generation
    stale = [i for i in target.instances if i.pid is not None and i.generation != generation]
    one_by_one = [i for i in stale if i.wanted] if target.config.rolls else []
    at_once = [i for i in stale if i not in one_by_one]
    try:
        await target.stop_instances(at_once, reason)
        wanted = [i for i in (*at_once, *back) if i.wanted]
        await target.spawn_instances(wanted, reason, whatever_it_depends_on=True)
        if one_by_one:
            # Who is down first, as in a transaction that goes back.
            absent = {State.WAITING, State.LOST, State.EXITED}
            others = [i for i in target.instances if i.wanted and i not in stale and i.state not in absent]
            left = await target.still_there(others)
            others = [i for i in others if i not in left]
            await target.spawn_instances(others, reason, whatever_it_depends_on=True)
            await target.settle(others)
            await rollout.complete(one_by_one)
    except asyncio.CancelledError:
        await target.up_again([*stale, *back], reason)
        raise
    return None


async def _tell(
    target: Target, store: Store, patch: str | None, changed: Sequence[str], told: set[Instance]
) -> str | None:
    """Args: told: those that have taken the old files up; added to."""

    async def tell() -> str | None:
        outcomes = await target.reload_instances(
            chosen := [instance for instance in target.instances if instance.ready and instance not in told],
            patch=patch,
            build=store.state(target.name).build,
            changed=changed,
            rollback=True,
        )
        told.update(i for i, (_, outcome) in zip(chosen, outcomes, strict=True) if outcome.ok)
        failed = [f"{name}: {outcome.reason}" for name, outcome in outcomes if not outcome.ok]
        return "; ".join(failed) or None

    try:
        for instance in target.instances:
            # It may have read the files that were there before the recovery; it is told when it can listen.
            await instance.wait_until(lambda i: i.state is not State.STARTING)
        return await tell()
    except asyncio.CancelledError:
        if target.is_to_be_up:
            # One of them is stopped: the others run on, and not with what was taken back.
            with anyio.CancelScope(shield=True):
                failure = await tell()
            if failure is not None:
                log.error("%s: not everybody has the old files: %s", target.name, failure)  # noqa: TRY400 - foreseen
        raise
