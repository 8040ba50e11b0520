"""Who is stopped before whom: of the targets that one request stops, those that depend on others come first.

What lies between two of them, and is not to be stopped itself, hands the order on: if `web` depends on
`cache` and `cache` on `db`, then `web` is stopped before `db`. Targets that have nothing to do with each
other are stopped side by side.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from asyncsup.operation import Party

if TYPE_CHECKING:
    from asyncsup.target import Target


class StopOrder:
    """The order of one stop or restart of several targets.

    Whoever has a turn says when it has passed, whatever has become of it (`accounting_for`): what one target
    refuses keeps none of the others from being stopped.
    """

    def __init__(self, targets: Iterable[Target]) -> None:
        self._passed = {target: asyncio.Event() for target in targets}
        self._dependents = self._nearest(lambda target: target.dependents)
        self._dependencies = self._nearest(lambda target: [each.target for each in target.dependencies])
        self._parties: dict[Target, Party] = {}

    async def turn_of(self, target: Target) -> None:
        """Wait for those that depend on a target."""
        for other in self._dependents[target]:
            await self._passed[other].wait()

    def passed(self, target: Target) -> None:
        """It has been stopped, or will not be."""
        self._passed[target].set()

    @contextmanager
    def accounting_for(self, target: Target) -> Iterator[None]:
        """However the block ends, the turn of a target has passed by then; unless it is cancelled: then the
        whole request was given up, and nobody is to find that it is his turn.
        """
        try:
            yield
        except Exception:
            self.passed(target)
            raise
        self.passed(target)

    async def dependencies_passed(self, target: Target) -> None:
        """Wait for those that a target depends on: before, it would be started on what is about to go."""
        for other in self._dependencies[target]:
            await self._passed[other].wait()

    def party(self, target: Target) -> Party:
        """What begins together: whatever has to do with each other. Otherwise one would be down for as long
        as something else is going on in another.
        """
        if target not in self._parties:
            party = Party()
            ahead = [target]
            while ahead:
                each = ahead.pop()
                if each not in self._parties:
                    self._parties[each] = party
                    ahead += [*self._dependents[each], *self._dependencies[each]]
        return self._parties[target]

    def _nearest(self, step: Callable[[Target], Iterable[Target]]) -> Mapping[Target, list[Target]]:
        """For each target the first ones of the others that are found step by step."""
        nearest: dict[Target, list[Target]] = {}
        for target in self._passed:
            found, seen, ahead = [], {target}, list(step(target))
            while ahead:
                other = ahead.pop()
                if other in seen:
                    continue
                seen.add(other)
                if other in self._passed:
                    found.append(other)
                else:
                    ahead += step(other)
            nearest[target] = found
        return nearest
