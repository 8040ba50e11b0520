"""Run several things at once; the first failure ends the others."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

import anyio

from asyncsup.errors import AsyncsupError


async def together(jobs: Iterable[Callable[[], Awaitable[object]]]) -> None:
    """Await all jobs concurrently.

    Raises:
        AsyncsupError: the first that a job raised, bare instead of in an exception group, because there is
            one thing to tell the operator; the other jobs are cancelled before.
    """
    failures: list[AsyncsupError] = []

    async with anyio.create_task_group() as tasks:

        async def guarded(job: Callable[[], Awaitable[object]]) -> None:
            try:
                await job()
            except AsyncsupError as error:
                failures.append(error)
                tasks.cancel_scope.cancel()

        for job in jobs:
            tasks.start_soon(guarded, job)
    if failures:
        raise failures[0]
