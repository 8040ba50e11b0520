"""Where the handlers of an asyncio program run: in one task of its event loop, one at a time.

A module of its own because a threaded program must not pay for importing asyncio.
"""

from __future__ import annotations

import asyncio
import inspect
import time

from target_sdk.dispatch import HANDLER_GRACE, Finish, failed
from target_sdk.patching import Call, Outcome, StoppingError


class LoopDispatcher:
    """Handlers run on the loop that is running where this is made."""

    def __init__(self, finish: Finish) -> None:
        self._finish = finish
        self._loop = asyncio.get_running_loop()
        self._calls: asyncio.Queue[Call] = asyncio.Queue()
        self._task = self._loop.create_task(self._serve(), name="target-sdk-handlers")

    def submit(self, call: Call) -> None:
        """Queue a call. Called on the I/O thread."""
        try:
            self._loop.call_soon_threadsafe(self._calls.put_nowait, call)
        except RuntimeError:  # the loop is closed: the program ended without leaving the target
            self._finish(call, Outcome(error=StoppingError()))

    async def close(self) -> None:
        """Cancel the handler that is running and answer whoever still waits."""
        self._task.cancel()
        try:
            await asyncio.wait({self._task}, timeout=HANDLER_GRACE)
        finally:
            while not self._calls.empty():
                self._finish(self._calls.get_nowait(), Outcome(error=StoppingError()))

    async def _serve(self) -> None:
        while True:
            call = await self._calls.get()
            await self._run(call)

    async def _run(self, call: Call) -> None:
        assert call.handler is not None
        started = time.monotonic()
        try:
            value = call.handler(call.argument)
            if inspect.isawaitable(value):
                value = await value
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            leaving = task is not None and task.cancelling() > 0
            self._finish(call, failed(call, StoppingError() if leaving else error, started))
            if leaving:
                raise
            # Otherwise the handler awaited something that was cancelled: its failure, not our end.
        except BaseException as error:
            self._finish(call, failed(call, error, started))
            if not isinstance(error, Exception):
                raise
        else:
            self._finish(call, Outcome(value=value, took=time.monotonic() - started))
