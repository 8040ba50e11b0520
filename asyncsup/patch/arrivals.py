"""What is done with the packages of the inbox: listed, applied as they come, and moved away afterwards."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import anyio
import msgspec
from msgspec.structs import replace

from asyncsup.actor import Actor
from asyncsup.errors import (
    AllowedSignersError,
    AsyncsupError,
    CancelledByRequestError,
    PatchNotFoundError,
    PatchRolledBackError,
    PatchUndecidedError,
    TargetBusyError,
    TrustUnavailableError,
)
from asyncsup.patch.checksum import has_checksum
from asyncsup.patch.inbox import Inbox
from asyncsup.patch.intake import Intake, Source, identity_of
from asyncsup.patch.jobs import Job, Jobs, Outcome
from asyncsup.patch.patchable import Patchable
from asyncsup.patch.report import summary
from asyncsup.patch.wish import Wish

log = logging.getLogger("asyncsup.patch")


class _Arriving(msgspec.Struct, eq=False, kw_only=True):
    """A package of the inbox that is being applied, or waits for others that share targets with it.

    Attributes:
        file: what lay there when it was begun with.
        changed: something else does by now, and wants to be looked at.
        done: applied or refused, or waiting for its commit.
    """

    targets: frozenset[str]
    file: tuple[Any, ...]
    changed: bool = False
    done: asyncio.Event = msgspec.field(default_factory=asyncio.Event)


class Arrivals:
    """The packages that lie in one inbox.

    Args:
        jobs: what is under way, whoever asked for it.
        apply: applies a package, as `PatchOverseer.apply`.
    """

    def __init__(
        self,
        inbox: Inbox,
        intake: Intake,
        patchable: Patchable,
        jobs: Jobs,
        apply: Callable[[Source, Wish], Awaitable[object]],
    ) -> None:
        self._inbox = inbox
        self._intake = intake
        self._patchable = patchable
        self._jobs = jobs
        self._apply = apply
        self._passed_over: set[str] = set()

    async def listing(self) -> dict[str, Any]:
        """What lies in the inbox, and what can be read of it.

        Raises:
            PatchNotFoundError: the inbox itself cannot be read.
        """
        found = []
        for arrival in self._inbox.arrivals():
            entry: dict[str, Any] = {
                "file": arrival.path.name,
                "size": arrival.size,
                "checksum": has_checksum(arrival.path),
                "state": "incomplete",
            }
            if arrival.complete:
                try:
                    with await self._intake.open(Source(path=arrival.path, in_inbox=True)) as package:
                        entry |= {"state": "complete", **summary(package)}
                except AsyncsupError as error:
                    entry |= {"state": "malformed", "detail": error.message, "code": error.error_code}
                except Exception as error:
                    # Whatever it was, it says nothing about the others.
                    log.exception("%s cannot be looked at", arrival.path)
                    entry |= {"state": "malformed", "detail": type(error).__name__, "code": "internal"}
            found.append(entry)
        return {"inbox": found, "folder": str(self._inbox.folder), "trust": self._intake.trust}

    async def apply_all(self) -> None:
        """Apply what comes into the inbox until cancelled (``[patch] auto``): in order of build what shares
        targets, and side by side what does not.
        """
        under_way: dict[str, _Arriving] = {}
        async with anyio.create_task_group() as tasks:
            while True:
                await self._inbox.changed()
                try:
                    listing = await self.listing()
                except (PatchNotFoundError, OSError) as error:
                    log.warning("what lies in the inbox cannot be applied: %s", error)
                    continue
                ready = [entry for entry in listing["inbox"] if entry["state"] == "complete"]
                for entry in sorted(ready, key=lambda entry: int(entry["build"])):
                    name = entry["file"]
                    file = (identity_of(self._inbox.folder / name), entry["checksum"])
                    if name in under_way:
                        under_way[name].changed |= under_way[name].file != file
                        continue
                    if self._jobs.has_package(name):
                        # It waits for its commit, or somebody else applies it: a second job would queue
                        # behind the first, and apply what is about to be aborted.
                        self._passed_over.add(name)
                        continue
                    targets = frozenset(entry["targets"] or [target.name for target in self._patchable.all()])
                    before = [other.done for other in under_way.values() if other.targets & targets]
                    under_way[name] = _Arriving(targets=targets, file=file)
                    tasks.start_soon(self._apply_in_turn, name, before, under_way)

    async def _apply_in_turn(
        self, name: str, before: Sequence[asyncio.Event], under_way: dict[str, _Arriving]
    ) -> None:
        try:
            for other in before:
                await other.wait()
            await self._apply_one(name)
        except (AsyncsupError, OSError) as error:
            log.warning("%s: %s", name, error)
        except Exception:
            log.exception("%s was not applied", name)
        finally:
            mine = under_way.pop(name)
            mine.done.set()
            if mine.changed:
                self._inbox.look_again()

    async def _apply_one(self, name: str) -> None:
        source = self._intake.find(path=None, upload=None, name=name, sha256=None, crc32=None)
        if self._intake.trust == "digest" and source.sha256 is None:
            log.warning("%s waits in the inbox for %s.sha256", name, name)
            return
        await self._apply(source, Wish(actor=Actor.of_file(source.path)))

    def settle(self, job: Job, source: Source, outcome: Outcome) -> None:
        """Move a zip out of the inbox, with its report, once it has been dealt with."""
        if source.path.name in self._passed_over:
            # What lies there once the job has ended, if anything does, may be another package.
            self._passed_over.discard(source.path.name)
            self._inbox.look_again()
        if not source.in_inbox or identity_of(source.path) != source.identity:
            return  # it has gone, or is another one by now that came under the same name
        if not isinstance(outcome, AsyncsupError):
            self._inbox.settle(source.path, outcome, outcome="applied")
        elif isinstance(outcome, PatchUndecidedError):
            self._inbox.settle(source.path, outcome.details["report"], outcome="applied")
        elif not _was_not_tried(source, outcome) and not (job.outlasted and _was_cancelled(outcome)):
            # (Of one that the end of the supervisor has cut short, the next supervisor makes a new start.)
            self._inbox.settle(source.path, outcome.details["report"], outcome="rejected")

    async def settle_by_name(self, job: Job, outcome: Outcome) -> None:
        """As `settle`, for a package of which only is known what the supervisor before has written down."""
        name = job.inbox_name
        if name is None:
            return
        try:
            source = self._intake.find(path=None, upload=None, name=name, sha256=None, crc32=None)
            if job.inbox_file is not None:
                source = replace(source, identity=job.inbox_file)
            self.settle(job, source, outcome)
        except (AsyncsupError, OSError) as error:
            log.warning("%s stays where it is: %s", name, error)


def _was_cancelled(error: AsyncsupError) -> bool:
    """Whether somebody ended a patch, which has left nothing behind."""
    cause = error.details.get("cause") if isinstance(error, PatchRolledBackError) else error.error_code
    return cause == CancelledByRequestError.code


def _was_not_tried(source: Source, error: AsyncsupError) -> bool:
    """Whether nothing is known to be wrong with a package, so that it may be tried again as it lies: a target
    was busy, its signatures could not be judged, or the checksum is missing, or was mistyped. (One beside the
    package that disagrees is another matter.)"""
    if error.exit_status == TargetBusyError.exit_status or error.error_code == "trust.digest_missing":
        return True
    if isinstance(error, AllowedSignersError | TrustUnavailableError):
        return True
    opened = error.details["report"]["patch"] is not None
    mistyped = {"digest.crc32"} if source.sidecar else {"digest.crc32", "digest.sha256"}
    return not opened and error.error_code in mistyped
