"""Replacing the instances of a target, some at a time, and without a gap where the target allows it.

With `overlap` a successor is started beside the instance it replaces, on the same sockets, and takes that
place when it is ready. The old one goes on serving until everything is decided (`finish` or `back`), then
finishes what it has begun (`Target.let_go`), and ends. So a successor that does not come up, or falls later,
has never taken anybody's service away.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from asyncsup.errors import NoCapacityError, StartFailedError
from asyncsup.instance import Instance
from asyncsup.together import together

if TYPE_CHECKING:
    from asyncsup.target import Target


class Rollout:
    """One replacement of instances of a target. What an earlier one has left standing by is part of it.

    Args:
        reason: for whoever looks at the instances.
        beside: whether a successor may be started beside the one it replaces; as configured by default.
        at_any_price: go on one at a time where `min_available` leaves no room; on the way back from what has
            failed, where to stop half-way would be worse.
    """

    def __init__(
        self, target: Target, reason: str, *, beside: bool | None = None, at_any_price: bool = False
    ) -> None:
        self._target = target
        self._reason = reason
        self._beside = target.config.overlaps if beside is None else beside
        self._at_any_price = at_any_price
        self._standing_by: list[Instance] = [i for i in target.others if i.role == "standby"]
        self.came_up: list[tuple[Instance, int | None]] = []
        """New ones, each with the process that has become ready."""

    async def run(self, chosen: Sequence[Instance]) -> None:
        """Replace instances. After a failure those of earlier batches are new ones, and all others the old.

        Raises:
            StartFailedError: a new one did not become ready.
            StopFailedError: an old one cannot be stopped.
            NoCapacityError: as many are ready as have to be; none may be stopped.
        """
        left = list(chosen)
        while left:
            left = self.in_order(left)
            size = self._batch_size(left)
            batch, left = left[:size], left[size:]
            await self._replace(batch)

    def in_order(self, chosen: Sequence[Instance]) -> list[Instance]:
        """Those whose turn comes first before the others: where so many have to be ready, it is those that
        are not."""
        return sorted(chosen, key=lambda i: i.ready) if self._floor else list(chosen)

    async def complete(self, chosen: Sequence[Instance]) -> None:
        """`run`, and whatever has been replaced by its end stays so (`finish`)."""
        try:
            await self.run(chosen)
        finally:
            self.finish()

    @property
    def _floor(self) -> int:
        """How many have to be ready at any time; of all of them one can be spared. Nobody is missing who is
        replaced without a gap."""
        most = max(len(self._target.instances) - 1, 0)
        return 0 if self._beside else min(self._target.config.patch.min_available, most)

    def _batch_size(self, left: Sequence[Instance]) -> int:
        most = self._target.config.patch.max_parallel or len(left)
        down = sum(not instance.ready for instance in left)
        if not self._floor:
            return most
        if down:
            return min(most, down)
        spare = sum(instance.ready for instance in self._target.instances) - self._floor
        if spare < 1 and not self._at_any_price:
            raise NoCapacityError(
                f"{left[0].name} cannot be stopped: of {len(self._target.instances)} instances of "
                f"{self._target.name} {self._floor + spare} are ready, and {self._floor} have to be "
                "(patch.min_available)",
                target=self._target.name,
            )
        return min(most, max(1, spare))

    async def _replace(self, batch: Sequence[Instance]) -> None:
        target = self._target
        beside = [i for i in batch if self._beside and i.ready]
        others = [i for i in batch if i not in beside]
        successors = [target.seat_beside(instance) for instance in beside]
        try:
            await together(
                [
                    partial(self._start_beside, successors),
                    partial(self._start_again, others),
                ]
            )
            # Whoever came up first may have ended while others were still starting.
            await target.wait_settled(successors)
        except BaseException:
            for successor in successors:
                target.let_go(successor, f"{self._reason}: given up")
            raise
        self._standing_by += [target.take_over(successor, "standby") for successor in successors]

    async def _start_beside(self, successors: Sequence[Instance]) -> None:
        await self._target.spawn_instances(successors, self._reason, whatever_it_depends_on=True)
        await together(partial(self._come_up, successor) for successor in successors)

    async def _start_again(self, others: Sequence[Instance]) -> None:
        if not others:
            return
        await self._target.stop_instances(others, self._reason)
        for instance in others:
            instance.configure(self._target.config)  # it may be for other settings that they are replaced
        await self._target.spawn_instances(others, self._reason, whatever_it_depends_on=True)
        await together(partial(self._come_up, instance) for instance in others)

    async def _come_up(self, instance: Instance) -> None:
        await self._target.wait_settled([instance])
        if instance.ready:
            self.came_up.append((instance, instance.pid))
        elif not instance.config.oneshot:
            raise StartFailedError(
                f"{instance.name} ended before it was ready: {instance.detail}", instance=instance.name
            )

    def back(self) -> list[Instance]:
        """Let the old ones that stand by count again, and the new ones go. Returns the old ones: some may
        have ended.
        """
        returned = self._still_standing_by()
        for old in returned:
            self._target.let_go(self._target.take_over(old, "retiring"), f"{self._reason}: going back")
        return returned

    def finish(self) -> None:
        """The new ones stay: let the old ones go, each as soon as it has finished what it has begun."""
        for old in self._still_standing_by():
            self._target.let_go(old, self._reason)

    def _still_standing_by(self) -> list[Instance]:
        """Those that nobody else has decided about meanwhile. They are ours no more."""
        left, self._standing_by = self._standing_by, []
        return [old for old in left if old in self._target.others and old.role == "standby"]
