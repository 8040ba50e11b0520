"""Run several things at once: until the first fails, or all of them to their end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

import anyio


async def together(jobs: Iterable[Callable[[], Awaitable[object]]]) -> None:
    """Await all jobs concurrently.

    Raises:
        Exception: the first that a job raised, bare instead of in an exception group, because there is one
            thing to tell the operator; the other jobs are cancelled before.
    """
    failures: list[Exception] = []

    async with anyio.create_task_group() as tasks:

        async def guarded(job: Callable[[], Awaitable[object]]) -> None:
            try:
                await job()
            except Exception as error:
                failures.append(error)
                tasks.cancel_scope.cancel()

        for job in jobs:
            tasks.start_soon(guarded, job)
    if failures:
        raise failures[0]


async def each(jobs: Iterable[Callable[[], Awaitable[object]]]) -> list[Exception]:
    """Await all jobs concurrently, each to its end, whatever becomes of others; returns what they raised."""
    failures: list[Exception] = []

    async def guarded(job: Callable[[], Awaitable[object]]) -> None:
        try:
            await job()
        except Exception as error:
            failures.append(error)

    async with anyio.create_task_group() as tasks:
        for job in jobs:
            tasks.start_soon(guarded, job)
    return failures
