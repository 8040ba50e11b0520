"""What waits in the queue of a target, and what waits in the queues of several to begin there together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import anyio
import msgspec

if TYPE_CHECKING:
    from asyncsup.target import Target


class Operation(msgspec.Struct, eq=False):
    """Something that somebody wants to have done to a target.

    Attributes:
        since: when it was asked for, and from its beginning on when that was (monotonic).
    """

    name: str
    asked_by: str
    work: Callable[[], Awaitable[Any]]
    future: asyncio.Future[Any]
    party: Party
    scope: anyio.CancelScope = msgspec.field(default_factory=anyio.CancelScope)
    cancelled_because: str = "its client gave up"
    since: float = msgspec.field(default_factory=time.monotonic)

    def __str__(self) -> str:
        return f"{self.name} for {self.asked_by}, since {time.monotonic() - self.since:.1f} s"

    def cancel(self, because: str) -> None:
        self.cancelled_because = because
        self.scope.cancel()

    def describe(self) -> dict[str, Any]:
        """What, for whom, since when (seconds)."""
        return {
            "operation": self.name, "asked_by": self.asked_by, "since": time.monotonic() - self.since,
        }  # fmt: skip


class Party(msgspec.Struct, eq=False):
    """Operations, each in the queue of another target, that begin together."""

    operations: dict[Target, Operation] = msgspec.field(default_factory=dict)
    begun: bool = False

    def begin(self) -> bool:
        """Begin if every target is free; whether it has begun. From then on no target has anything else."""
        if not self.begun and all(
            target.is_free_for(operation) for target, operation in self.operations.items()
        ):
            self.begun = True
            self.wake()
        return self.begun

    def wake(self) -> None:
        for target in self.operations:
            target.look_again()
